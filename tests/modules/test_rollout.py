from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from matwm_rl import keys
from matwm_rl.modules import STATE_KEYS, HiddenRewardConfig, ObservationRewardConfig, RewardConfig, Rollout, State
from tests.helpers import COUNTS, LATENTS, make_model, random_batch

N, S, C, H = len(COUNTS), 4, 3, 5


def first_legal(state: State, mask: Tensor) -> Tensor:
    """Depends on state and mask, without chance."""
    preference = state.hidden[..., : mask.shape[-1]].masked_fill(~mask, -torch.inf)
    return preference.argmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("reward", [HiddenRewardConfig(), ObservationRewardConfig()], ids=["hidden", "observation"])
def test_what_is_packed_is_what_a_loop_over_steps_gives(float64: None, latent: str, reward: RewardConfig) -> None:
    """One step of one start of one agent at a time."""
    model, starts = make_model(latent=latent, reward=reward), random_batch(S, C + 1)
    torch.manual_seed(1)
    packed = model.imagine(*model.start_from(starts, H), first_legal, H).pack()
    assert packed.batch_size == (S, H)
    torch.manual_seed(1)
    state, caches = model.start_from(starts, H)
    found = {key: packed[key] for key in packed.keys(True, True)}
    expected = {key: torch.zeros_like(value) for key, value in found.items()}
    for t in range(H):
        mask = model.legal_actions(state.latent)
        action = first_legal(state, mask)
        following = model.step(state, action, caches)
        outcome = model.predict_outcome(state, action, following)
        for s, n in itertools.product(range(S), range(N)):
            for prefix, now in (((), state), (("next",), following)):
                values = (now.latent, now.hidden, now.teammate_logits)
                for key, value in zip(STATE_KEYS, values, strict=True):
                    expected[(*prefix, *key)][s, t, n] = value[n, s]
            expected[keys.ACTION][s, t, n] = action[n, s]
            expected[keys.ACTION_MASK][s, t, n] = mask[n, s]
            for key, value in zip((keys.REWARD, keys.CONTINUATION), outcome, strict=True):
                expected[key][s, t, n, 0] = value[n, s]
        state = following
    assert len(expected) == 2 * len(STATE_KEYS) + 4
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


@torch.no_grad()
def test_a_rollout_holds_its_steps() -> None:
    model = make_model()
    state, caches = model.start_from(random_batch(S, C + 1), H)
    seen: list[tuple[State, Tensor]] = []

    def act(state: State, mask: Tensor) -> Tensor:
        seen.append((state, mask))
        return first_legal(state, mask)

    rollout = model.imagine(state, caches, act, H)
    assert isinstance(rollout, Rollout) and rollout.world_model is model
    assert [len(part) for part in (rollout.states, rollout.actions, rollout.masks)] == [H + 1, H, H]
    assert rollout.states[0] is state
    for t, (state, mask) in enumerate(seen):
        assert state is rollout.states[t] and mask is rollout.masks[t]
    # No more room than was asked for.
    with pytest.raises(ValueError, match="full"):
        model.step(rollout.states[-1], rollout.actions[-1], caches)
