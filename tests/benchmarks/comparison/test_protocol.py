"""All methods are evaluated alike: on the same episodes, greedy and sampled, by the agents that count."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import replace
from typing import Any

import protocol
import pytest
import torch
from protocol import ENVIRONMENTS, Environment, evaluate_policy
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import Transform, TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type

from matwm_rl.box_actions import BoxActions
from matwm_rl.envs import make_env
from matwm_rl.evaluation import Matches, RandomActions, Returns

MOCK = Environment("mock", episodes=4, num_envs=2)
SPREAD = Environment("mpe2/simple_spread_v3", episodes=2, num_envs=2)
TAG = Environment("mpe2/simple_tag_v3", episodes=2, num_envs=1)
VMAS_TAG = Environment("vmas/simple_tag", episodes=4, num_envs=2)
CROSS_PLAY = {
    "adversaries_vs_random_prey",
    "adversaries_vs_fleeing_prey",
    "prey_vs_random_adversaries",
    "prey_vs_chasing_adversaries",
}


class FirstOrLast(TensorDictModuleBase):
    """Takes the first legal action where it is to be greedy, else the last."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [("agents", "action_mask")], [("agents", "action")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        mask = tensordict["agents", "action_mask"].int()
        if exploration_type() == ExplorationType.DETERMINISTIC:
            return tensordict.set(("agents", "action"), mask.argmax(-1))
        return tensordict.set(("agents", "action"), mask.shape[-1] - 1 - mask.flip(-1).argmax(-1))


def slow_mock_return(*, greedy: bool) -> float:
    """Mean over agents: action t % n is illegal in step t, agent i gets (i + 1) * action, hunter_1 dies in step 3."""
    total = 0
    for agent, (num_actions, steps) in enumerate([(4, 6), (4, 3), (3, 6)]):
        for t in range(steps):
            legal = [action for action in range(num_actions) if action != t % num_actions]
            total += (agent + 1) * (legal[0] if greedy else legal[-1])
    return total / 3


def test_greedy_and_sampled_returns_are_those_of_the_episodes() -> None:
    assert evaluate_policy(MOCK, FirstOrLast()) == {
        "return/greedy": pytest.approx(slow_mock_return(greedy=True)),
        "return/greedy/se": 0.0,
        "return/sampled": pytest.approx(slow_mock_return(greedy=False)),
        "return/sampled/se": 0.0,
    }
    assert slow_mock_return(greedy=True) != slow_mock_return(greedy=False)


class Starts(Transform):
    """Keeps what all agents observe at the start of every episode."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self.kept.append(tensordict_reset["agents", "observation"].clone())
        return tensordict_reset


@pytest.mark.parametrize(
    ("environment", "options"), [(SPREAD, {}), (TAG, {}), (VMAS_TAG, {"max_steps": 10})], ids=["spread", "tag", "vmas"]
)
def test_every_policy_meets_the_same_episodes(
    environment: Environment, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def met(policy: TensorDictModuleBase) -> tuple[list[Tensor], dict[str, float]]:
        starts: list[Tensor] = []

        def make_noting_env(name: str, **asked: Any) -> TransformedEnv:
            return TransformedEnv(make_env(name, **asked, **options), Starts(starts))

        monkeypatch.setattr(protocol, "make_env", make_noting_env)
        returns = evaluate_policy(environment, policy)
        return starts, returns

    # One draws nothing at all, so that every draw which the environment shared with the other would differ.
    ours, our_returns = met(FirstOrLast())
    theirs, their_returns = met(RandomActions())
    assert our_returns != their_returns
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    sampled, greedy = ours[: len(ours) // 2], ours[len(ours) // 2 :]
    torch.testing.assert_close(sampled, greedy, rtol=0, atol=0)
    # And one episode is not like another.
    assert len({tuple(start.flatten().tolist()) for start in sampled}) == len(sampled) >= 2


def test_an_evaluation_leaves_no_trace() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(evaluate_policy(SPREAD, RandomActions()))
        assert torch.equal(torch.get_rng_state(), before)
    # Nor does it know what was drawn before, and random agents act alike in both ways.
    assert found[0] == found[1]
    assert found[0]["return/sampled"] == found[0]["return/greedy"]


def test_tag_is_judged_by_cross_play() -> None:
    kinds = ("sampled", "greedy")
    expected = {f"{match}/{kind}{se}" for match in CROSS_PLAY for kind in kinds for se in ("", "/se")}
    assert set(evaluate_policy(TAG, RandomActions())) == expected


def test_cross_play_is_judged_by_the_pursuers(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_env(TAG.env).layout
    values = torch.tensor([[1.0, 2, 3, 100], [4, 5, 9, 200], [0, 0, 0, 300], [2, 2, 2, 400]])
    asked: list[Any] = []

    def evaluate_matches(name: str, env: Any, policy: Any, **options: Any) -> Matches:
        asked.append((name, env.batch_size, options))
        return Matches({"match": Returns(values, layout), "self_play": Returns(values, layout)}, {"match": "adversary"})

    monkeypatch.setattr(protocol, "evaluate_matches", evaluate_matches)
    metrics = evaluate_policy(TAG, RandomActions())
    per_episode = [2.0, 6.0, 0.0, 2.0]
    spread = (sum((value - 2.5) ** 2 for value in per_episode) / 3) ** 0.5
    assert metrics["match/greedy"] == metrics["match/sampled"] == 2.5
    assert metrics["match/greedy/se"] == pytest.approx(spread / 4**0.5)
    assert metrics["return/sampled"] == pytest.approx(values.mean().item())
    kinds = [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC]
    assert asked == [(TAG.env, torch.Size([]), {"episodes": 2, "exploration": kind}) for kind in kinds]


def test_checkpoints_end_with_the_run() -> None:
    assert Environment("mock", total_steps=20, every=5).checkpoints == [5, 10, 15, 20]
    assert all(environment.checkpoints[-1] == environment.total_steps for environment in ENVIRONMENTS.values())


@pytest.mark.parametrize(
    ("name", "matches"),
    [
        ("balance", ["return"]),
        ("lbforaging", ["return"]),
        ("simple_adversary", ["adversary_vs_random", "agent_vs_random"]),
        ("simple_push", ["adversary_vs_random", "agent_vs_random"]),
    ],
)
def test_where_groups_compete_each_plays_against_random_others(name: str, matches: list[str]) -> None:
    few = replace(ENVIRONMENTS[name], episodes=2, num_envs=2)
    found = evaluate_policy(few, RandomActions())
    kinds = ("sampled", "greedy")
    assert set(found) == {f"{match}/{kind}{se}" for match in matches for kind in kinds for se in ("", "/se")}


@pytest.mark.parametrize("name", [name for name, environment in ENVIRONMENTS.items() if environment.script])
def test_every_environment_is_played_by_its_script(name: str) -> None:
    environment = ENVIRONMENTS[name]
    env = environment.make(seed=0)
    assert environment.script is not None
    action = env.rollout(2, environment.script(env.layout))["agents", "action"]
    expected = (env.num_agents, *env.layout.actions.action_shape)
    assert action.shape[-len(expected) :] == expected


def test_continuous_environments_are_others_by_their_arguments_alone() -> None:
    continuous = {name: environment for name, environment in ENVIRONMENTS.items() if environment.is_continuous}
    assert [*ENVIRONMENTS][-4:] == [*continuous]
    for name, environment in continuous.items():
        discrete = ENVIRONMENTS[name.removesuffix("_continuous")]
        assert replace(environment, env_kwargs={}) == discrete
        # Runs that are stored without arguments stay comparable.
        assert environment.protocol == discrete.protocol | {"env_kwargs": {"continuous_actions": True}}


@pytest.mark.parametrize("name", ["simple_tag_continuous", "simple_spread_continuous"])
def test_continuous_actions_are_evaluated_as_discrete_ones_are(name: str) -> None:
    few = replace(ENVIRONMENTS[name], episodes=2, num_envs=2)
    layout = few.make().layout
    assert isinstance(layout.actions, BoxActions)
    expected = CROSS_PLAY if "tag" in name else {"return"}
    kinds = ("sampled", "greedy")
    found = evaluate_policy(few, RandomActions(layout.actions))
    assert set(found) == {f"{match}/{kind}{se}" for match in expected for kind in kinds for se in ("", "/se")}


def test_arguments_of_an_environment_are_read_as_json() -> None:
    given = ["continuous_actions=true", "max_cycles=50", "render_mode=human", "text=a=b"]
    values = [("continuous_actions", True), ("max_cycles", 50), ("render_mode", "human"), ("text", "a=b")]
    assert [*map(protocol.env_argument, given)] == values
    for wrong in ("", "name", "name=", "=value"):
        with pytest.raises(ArgumentTypeError, match="expected NAME=VALUE"):
            protocol.env_argument(wrong)
