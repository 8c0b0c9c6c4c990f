from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv, check_env_specs

from matwm_rl import keys
from matwm_rl.data import to_focal
from matwm_rl.envs import MockEnv, MultiAgentEnv, SerialMultiAgentEnv, make_env
from matwm_rl.modules import WorldModel, WorldModelFeatures
from tests.helpers import EXACT, LATENTS, STATE_KEYS, make_model, mock_env


def make_exact(latent: str = "fsq") -> WorldModel:
    return make_model(latent=latent, num_classes=32).eval()


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
@pytest.mark.parametrize("outside", [True, False])
def test_features_are_the_states_of_the_sequence_pass(latent: str, outside: bool) -> None:
    model = make_exact(latent)
    features = WorldModelFeatures(model, context_length=8)
    env = mock_env(episode_length=6)
    env = TransformedEnv(env, features) if outside else env.append_transform(features)
    rollout = env.rollout(15, break_when_any_done=False)
    done = rollout["next", "done"].squeeze(-1)
    assert done.sum() == 2
    expected = model(to_focal(rollout.exclude(*STATE_KEYS)))
    for key in STATE_KEYS:
        torch.testing.assert_close(rollout[key], expected[key], rtol=1e-4, atol=1e-5)
        # What a step reaches is what the next one starts from, but at an episode's end.
        reached = rollout["next", *key]
        assert torch.equal(reached[:-1][~done[:-1]], rollout[key][1:][~done[:-1]]), key
    # At an episode's end the features are those of its own last observation, not of the next episode's first.
    ended = done.nonzero().squeeze(-1)
    assert rollout["next", *keys.HIDDEN][ended].any(-1).all() and not rollout[keys.HIDDEN][ended[:1] + 1].any()
    assert rollout["context", "length"][:, 0].tolist() == [*range(6), *range(6), 0, 1, 2]


@torch.no_grad()
def test_environments_of_a_batch_reset_on_their_own() -> None:
    model, lengths = make_exact(), (3, 5)
    makers = [lambda n=n: MultiAgentEnv(MockEnv(episode_length=n, ending="truncate")) for n in lengths]
    batched = TransformedEnv(SerialMultiAgentEnv(2, makers), WorldModelFeatures(model, context_length=4))
    torch.manual_seed(0)
    rollout = batched.rollout(9, break_when_any_done=False)
    for row, length in enumerate(lengths):
        assert rollout[row]["context", "length"][:, 0].tolist() == [min(t % length, 4) for t in range(9)]
        states = model(to_focal(rollout[row].exclude(*STATE_KEYS))[:length])
        for key in STATE_KEYS:
            torch.testing.assert_close(rollout[row][key][:length], states[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_specs(latent: str, num_envs: int) -> None:
    env = mock_env(num_envs=num_envs)
    check_env_specs(TransformedEnv(env, WorldModelFeatures(make_model(latent=latent).eval(), context_length=3)))


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
    sizes = {"hidden_size": 16, "num_heads": 2, "num_dims": 4, "num_classes": 4}
    model = WorldModel.from_env(env, **sizes, **options).eval()
    env = env.append_transform(WorldModelFeatures(model, context_length=4))
    check_env_specs(env)
    rollout = env.rollout(6)
    assert torch.equal(rollout["context", "action"][:, -1, :, -4:], rollout[keys.ACTION][:, -5:-1].movedim(1, -1))


def test_random_frames_of_a_collector_have_features_too() -> None:
    env = TransformedEnv(mock_env(episode_length=5), WorldModelFeatures(make_exact(), context_length=4))
    collector = Collector(env, env.rand_action, frames_per_batch=12, total_frames=24)
    lengths = [length for batch in collector for length in batch["context", "length"][:, 0].tolist()]
    collector.shutdown()
    assert lengths == [min(t % 5, 4) for t in range(24)]


def test_bad_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="context_length must be at least 1, got 0"):
        WorldModelFeatures(make_model(), context_length=0)
