from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv, check_env_specs

from matwm_rl import keys
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import MockEnv, MultiAgentEnv, SerialMultiAgentEnv, make_env
from matwm_rl.modules import STATE_KEYS, WorldModel, WorldModelConfig, WorldModelFeatures
from tests.helpers import LATENTS, SMALL, make_model, mock_env


def make_exact() -> WorldModel:
    """A model that encodes without chance, so that two passes over the same data agree."""
    return make_model(latent="gaussian").eval()


@torch.no_grad()
@pytest.mark.parametrize("outside", [True, False])
def test_features_are_the_states_of_the_sequence_pass(outside: bool) -> None:
    model = make_exact()
    features = WorldModelFeatures(model, history_length=8)
    env = mock_env(episode_length=6)
    env = TransformedEnv(env, features) if outside else env.append_transform(features)
    rollout = env.rollout(15, break_when_any_done=False)
    done = rollout["next", "done"].squeeze(-1)
    assert done.sum() == 2
    expected = model(add_agent_entries(rollout.exclude(*STATE_KEYS)))
    for key in STATE_KEYS:
        alive = rollout[keys.ALIVE]
        torch.testing.assert_close(rollout[key][alive], expected[key][alive], rtol=1e-4, atol=1e-5)
        # What a step reaches is what the next one starts from, but at an episode's end.
        reached = rollout["next", *key]
        assert torch.equal(reached[:-1][~done[:-1]], rollout[key][1:][~done[:-1]]), key
    # At an episode's end the features are those of its own last observation, not of the next episode's first.
    ended = done.nonzero().squeeze(-1)
    last = rollout["next", *keys.HIDDEN][ended].any(-1)
    assert torch.equal(last, rollout[keys.NEXT_ALIVE][ended]) and not rollout[keys.HIDDEN][ended[:1] + 1].any()
    assert rollout["history", "length"][:, 0].tolist() == [*range(6), *range(6), 0, 1, 2]


@torch.no_grad()
def test_environments_of_a_batch_reset_on_their_own() -> None:
    model, lengths = make_exact(), (3, 5)
    makers = [lambda n=n: MultiAgentEnv(MockEnv(episode_length=n, ending="truncate")) for n in lengths]
    batched = TransformedEnv(SerialMultiAgentEnv(2, makers), WorldModelFeatures(model, history_length=4))
    torch.manual_seed(0)
    rollout = batched.rollout(9, break_when_any_done=False)
    for row, length in enumerate(lengths):
        assert rollout[row]["history", "length"][:, 0].tolist() == [min(t % length, 4) for t in range(9)]
        states = model(add_agent_entries(rollout[row].exclude(*STATE_KEYS))[:length])
        for key in STATE_KEYS:
            alive = rollout[row][keys.ALIVE][:length]
            seen = rollout[row][key][:length]
            torch.testing.assert_close(seen[alive], states[key][alive], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_specs(latent: str, num_envs: int) -> None:
    env = mock_env(num_envs=num_envs)
    check_env_specs(TransformedEnv(env, WorldModelFeatures(make_model(latent=latent).eval(), history_length=3)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vmas/simple_spread", {}),  # its one group is itself called "agents"
        ("vmas/simple_spread", {"teammate_predictor": False}),
        ("mpe2/simple_tag_v3", {}),
    ],
)
def test_other_environments(name: str, options: dict[str, Any]) -> None:
    env = make_env(name, seed=0, num_envs=2)
    model = WorldModel.from_env(env, WorldModelConfig(**SMALL, **options)).eval()
    env = env.append_transform(WorldModelFeatures(model, history_length=4))
    check_env_specs(env)
    rollout = env.rollout(6)
    assert torch.equal(rollout["history", "action"][:, -1, :, -4:], rollout[keys.ACTION][:, -5:-1].movedim(1, -1))


def test_random_frames_of_a_collector_have_features_too() -> None:
    env = TransformedEnv(mock_env(episode_length=5), WorldModelFeatures(make_exact(), history_length=4))
    collector = Collector(env, env.rand_action, frames_per_batch=12, total_frames=24)
    lengths = [length for batch in collector for length in batch["history", "length"][:, 0].tolist()]
    collector.shutdown()
    assert lengths == [min(t % 5, 4) for t in range(24)]


def test_bad_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="history_length must be a positive integer, got 0"):
        WorldModelFeatures(make_model(), history_length=0)
