from __future__ import annotations

import pytest
import torch

from matwm_rl import keys
from matwm_rl.data import add_agent_entries
from matwm_rl.modules import (
    HISTORY_KEYS,
    STATE_KEYS,
    ActorCriticConfig,
    PolicyConfig,
    StateEstimator,
    WorldModel,
    WorldModelPolicy,
    make_actor,
)
from tests.helpers import COUNTS, LATENTS, make_model, mock_env, randomize

N = len(COUNTS)


def make_exact() -> WorldModel:
    """A model that encodes without chance, so that two passes over the same data agree."""
    return make_model(latent="gaussian").eval()


@torch.no_grad()
def test_states_are_those_of_the_sequence_pass() -> None:
    """Whoever acts: here random agents."""
    estimator = StateEstimator(make_exact(), history_length=8)
    env = mock_env(episode_length=6).append_transform(estimator.make_tensordict_primer())
    states = []

    def act(td: torch.Tensor) -> torch.Tensor:
        states.append(estimator(td).select(*STATE_KEYS).clone())
        return estimator.remember(env.rand_action(td))

    rollout = env.rollout(15, act, break_when_any_done=False)
    assert rollout["next", "done"].sum() == 2
    expected = estimator.world_model(add_agent_entries(rollout.exclude(*STATE_KEYS)))
    for key in STATE_KEYS:
        alive = rollout[keys.ALIVE]
        torch.testing.assert_close(torch.stack(states)[key][alive], expected[key][alive], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_a_policy_is_the_estimator_and_then_actors(latent: str, batch: tuple[int, ...]) -> None:
    model = make_model(latent=latent)
    estimator = StateEstimator(model, history_length=4)
    actor = randomize(make_actor(model, ActorCriticConfig(num_cells=8)))
    policy = WorldModelPolicy(model, actor, history_length=4)
    td = estimator.make_tensordict_primer().primers.zero().expand(*batch).clone()
    for _ in range(6):
        td[keys.OBSERVATION] = torch.randn(*batch, N, 5)
        td[keys.ACTION_MASK] = model.legal.expand(*batch, -1, -1)
        torch.manual_seed(3)
        acted = policy(td.clone())
        torch.manual_seed(3)
        stepwise = estimator(td.clone())
        assert set(estimator.out_keys) <= set(stepwise.keys(True, True))
        stepwise = estimator.remember(actor(stepwise))
        for key in (keys.ACTION, keys.LOGITS, *(("next", *key) for key in HISTORY_KEYS)):
            assert torch.equal(acted[key], stepwise[key]), key
        for key in HISTORY_KEYS:
            td[key] = acted["next", *key]
    assert (td["history", "length"] == 4).all()


def test_states_carry_no_gradient() -> None:
    estimator = StateEstimator(make_exact())
    td = estimator(estimator.make_tensordict_primer().primers.zero().set(keys.OBSERVATION, torch.randn(N, 5)))
    assert not any(td[key].requires_grad for key in estimator.out_keys)


def test_wrong_entries_are_named() -> None:
    estimator = StateEstimator(make_model())
    assert estimator.history_length == PolicyConfig.history_length == 64
    start = estimator.make_tensordict_primer().primers.zero()
    with pytest.raises(KeyError, match=r"StateEstimator reads \('agents', 'observation'\), which is missing"):
        estimator(start.clone())
    with pytest.raises(ValueError, match=r"'observation'\) of shape \[3, 5\], found \[3, 6\]"):
        estimator(start.clone().set(keys.OBSERVATION, torch.randn(N, 6)))
    seen = start.set(keys.OBSERVATION, torch.randn(N, 5))
    with pytest.raises(KeyError, match=r"'history', 'length'\).*make_tensordict_primer"):
        estimator(seen.exclude(("history", "length")))
    with pytest.raises(ValueError, match=r"'code'\) of shape \[3, 64, 4\], found \[3, 2, 4\]"):
        estimator(seen.clone().set(("history", "code"), torch.zeros(3, 2, 4, dtype=torch.int16)))
    with pytest.raises(KeyError, match=r"reads \('agents', 'action'\), which is missing"):
        estimator.remember(estimator(seen.clone()))
    with pytest.raises(ValueError, match="history_length must be a positive integer, got 0"):
        StateEstimator(make_model(), history_length=0)
