"""What is said about a world model, against slow versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import world_model_quality as quality
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import TransformedEnv
from world_model_quality import average_precision, contact_precision, play

from matwm_rl import keys
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import make_env
from matwm_rl.evaluation import RandomActions, episode_windows, open_loop_errors
from matwm_rl.modules import (
    ActorCriticConfig,
    GaussianLatentConfig,
    HiddenRewardConfig,
    ObservationRewardConfig,
    RewardHead,
    Transition,
    WorldModel,
    WorldModelConfig,
    WorldModelPolicy,
    make_actor,
)
from matwm_rl.training import save_policy
from tests.helpers import SMALL, randomize

TAG = "mpe2/simple_tag_v3"
PURSUERS = 3


def slow_average_precision(scores: list[float], labels: list[bool]) -> float:
    """For every true label: the share of true ones among all that score as high or higher; the mean of these."""
    shares = []
    for score, label in zip(scores, labels, strict=True):
        if label:
            above = [other for value, other in zip(scores, labels, strict=True) if value >= score]
            shares.append(sum(above) / len(above))
    return sum(shares) / len(shares)


class LatentReward(RewardHead):
    """Reads the next latent, and the hidden state before it."""

    reads_successor = True

    def __init__(self, latent_size: int, hidden_size: int, num_bins: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(latent_size + hidden_size, num_bins)

    def forward(self, transition: Transition) -> Tensor:
        return self.linear(torch.cat([transition.next_latent, transition.hidden], -1))


def make_policy(env_name: str = TAG, parts: dict[str, Any] | None = None, **overrides: Any) -> WorldModelPolicy:
    config = WorldModelConfig(**(SMALL | overrides))
    world_model = randomize(WorldModel.from_env(make_env(env_name), config, **(parts or {})))
    return WorldModelPolicy(world_model, randomize(make_actor(world_model, ActorCriticConfig(num_cells=8))))


@pytest.fixture(scope="module")
def contacts() -> TensorDictBase:
    """Random episodes of simple_tag ``[2, 50]`` with made-up contacts, which would be rare."""
    torch.manual_seed(0)
    rollout = play(make_env(TAG, num_envs=2, seed=0), RandomActions(), episodes=4)
    reward = rollout["next", "agents", "reward"]
    reward[:] = torch.where(torch.rand_like(reward) < 0.3, 10.0, 0.0)
    return rollout


def test_average_precision_is_that_of_a_loop() -> None:
    for _ in range(20):
        # Rounded, so that some are equal.
        scores, labels = torch.randn(30).round(decimals=1), torch.rand(30) < 0.3
        labels[0] = True
        slow = slow_average_precision(scores.tolist(), labels.tolist())
        assert average_precision(scores, labels) == pytest.approx(slow, rel=1e-5)
    labels = torch.arange(10) > 6
    assert average_precision(labels.float() + torch.rand(10) / 2, labels) == 1.0
    assert average_precision(torch.ones(10), labels) == pytest.approx(0.3)
    assert average_precision(torch.randn(5), torch.zeros(5, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("reads", ["next_observation", "next_latent"])
def test_contact_precision_is_that_of_a_loop(
    reads: str, contacts: TensorDictBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"reward": LatentReward(16, 16, 255)} if reads == "next_latent" else {}
    model = make_policy(
        parts=parts, reward=ObservationRewardConfig(), latent=GaussianLatentConfig(num_dims=16)
    ).world_model.eval()
    drawn: list[tuple[Tensor, Tensor]] = []

    def sample(hidden: Tensor, latent: Tensor) -> Tensor:
        drawn.append((hidden, type(model.dynamics).sample(model.dynamics, hidden, latent)))
        return drawn[-1][1]

    monkeypatch.setattr(model.dynamics, "sample", sample)
    torch.manual_seed(1)
    precision = contact_precision(model, contacts, PURSUERS)
    logits = model(add_agent_entries(contacts.copy()))["next", "agents", "reward_logits"]
    ((hidden, latent),) = drawn
    observation, action = (contacts[key].movedim(2, 0) for key in (keys.OBSERVATION, keys.ACTION))
    scores: dict[str, list[float]] = {"true": [], "sampled": []}
    labels = []
    with torch.no_grad():
        for e in range(contacts.shape[0]):
            for t in range(contacts.shape[1]):
                z, h, a = (value[:, e : e + 1, t] for value in (latent, hidden, action))
                before = model.decode(model.encode(observation[:, e : e + 1, t]))
                following = (lambda z=z: z), (lambda before=before: before), (lambda z=z: model.decode(z))
                step = Transition(z, a, h, *following)
                imagined = model.two_hot.decode(model.reward(step)).squeeze(-1)
                for pursuer in range(PURSUERS):
                    labels.append(bool(contacts["next", "agents", "reward"][e, t, pursuer, 0] > 0))
                    scores["true"].append(float(model.two_hot.decode(logits[e, t, pursuer])))
                    scores["sampled"].append(float(imagined[pursuer]))
    assert precision == {
        "base_rate": pytest.approx(sum(labels) / len(labels)),
        **{name: pytest.approx(slow_average_precision(values, labels), rel=1e-4) for name, values in scores.items()},
    }
    assert precision["true"] != pytest.approx(precision["sampled"], rel=1e-2)


def test_a_reward_head_that_reads_history_is_asked_about_what_followed_alone(contacts: TensorDictBase) -> None:
    model = make_policy(reward=HiddenRewardConfig()).world_model
    assert set(contact_precision(model, contacts, PURSUERS)) == {"true", "base_rate"}


def test_play_gives_whole_episodes() -> None:
    env = make_env("mock", num_envs=2, seed=0)
    rollout = play(env, RandomActions(), episodes=5)
    # Three of six steps each in both environments.
    assert rollout.shape == (2, 18)
    assert rollout["next", "done"].squeeze(-1).nonzero()[:, 1].tolist() == [5, 11, 17] * 2
    # The mock environment's agents observe the step of the episode.
    assert rollout["agents", "observation"][0, :, 0, 0].tolist() == [*range(6)] * 3


def test_episodes_of_unequal_lengths_are_played_until_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "ROLLOUT", 60)
    torch.manual_seed(0)
    env = make_env("vmas/balance", num_envs=4, seed=0)
    rollout = play(env, RandomActions(), episodes=8)
    done, terminated = rollout["next", "done"], rollout["next", "terminated"]
    parts = rollout.shape[1] // 60
    assert rollout.shape == (4, 60 * parts)
    assert done[:, 59::60].all()
    # The package falls at other times in every environment.
    assert len({tuple(row.squeeze(-1).nonzero().squeeze(-1).tolist()) for row in terminated}) > 1
    assert terminated.sum() >= 8 > terminated[:, : 60 * (parts - 1)].sum()
    # Nothing is cut apart from the ends of the parts.
    assert done.sum() - terminated.sum() <= 4 * parts


def test_without_long_episodes_there_are_no_open_loop_errors(contacts: TensorDictBase) -> None:
    policy = make_policy()
    assert quality.open_loop_table(policy.world_model, contacts[:, :17]) == {}


def test_there_is_contact_in_tag_alone() -> None:
    name = "mpe2/simple_push_v3"  # whose groups have the names of those of tag
    found = quality.world_model_quality(make_policy(name), name, episodes=10, seed=7)
    assert len(found) == 18
    assert all(key.startswith("open_loop/") for key in found)


def test_play_samples_actions_as_in_training() -> None:
    policy = make_policy()

    def actions(seed: int) -> Tensor:
        env = TransformedEnv(make_env(TAG, num_envs=2, seed=0), policy.make_tensordict_primer())
        torch.manual_seed(seed)
        return play(env, policy, episodes=4)["agents", "action"]

    assert torch.equal(actions(1), actions(1))
    assert actions(1).shape == (2, 50, 4)
    assert not torch.equal(actions(1), actions(2))


def test_open_loop_errors_are_means_over_agents() -> None:
    policy = make_policy()
    env = TransformedEnv(make_env(TAG, num_envs=2, seed=0), policy.make_tensordict_primer())
    rollout = play(env, policy, episodes=4)
    torch.manual_seed(3)
    table = quality.open_loop_table(policy.world_model, rollout)
    torch.manual_seed(3)
    errors = open_loop_errors(policy.world_model, episode_windows(rollout, 18), context_length=8, horizon=10)
    assert len(table) == 3 * 3 * 2
    for step in (1, 5, 10):
        by_agent = errors["model", "reward"][step - 1].tolist()
        assert table[f"open_loop/reward/{step}"] == pytest.approx(sum(by_agent) / 4)
        still = errors["trivial", "observation"][step - 1].tolist()
        assert table[f"open_loop/observation/{step}/trivial"] == pytest.approx(sum(still) / 4)


def test_quality_of_tag_repeats_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "PAIRINGS", (["adversary"],))
    policy = make_policy(reward=ObservationRewardConfig(), latent=GaussianLatentConfig(num_dims=8))
    before = torch.get_rng_state()
    first = quality.world_model_quality(policy, TAG, episodes=10, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    contact = {f"contact_precision/{d}/{k}" for d in ("own", "scripted") for k in ("true", "sampled", "base_rate")}
    assert contact == {name for name in first if not name.startswith("open_loop")}
    # Chasing pursuers.
    assert first["contact_precision/scripted/base_rate"] > 0.1
    torch.manual_seed(5)
    assert quality.world_model_quality(policy, TAG, episodes=10, seed=7) == first


def test_the_command_measures_a_stored_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = "mpe2/simple_spread_v3"
    save_policy(tmp_path / "policy.pt", make_policy(spread))
    output = tmp_path / "new" / "figures.json"
    command = [str(tmp_path / "policy.pt"), "--env", spread, "--episodes", "10", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["world_model_quality.py", *command])
    quality.main()
    figures = json.loads(output.read_text())
    # There is no contact to foresee.
    assert all(name.startswith("open_loop/") for name in figures)
    assert len(figures) == 18
    assert f"{figures['open_loop/reward/5']:8.3f}" in capsys.readouterr().out
