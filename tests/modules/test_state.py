from __future__ import annotations

import pytest
import torch

from matwm_rl import keys
from matwm_rl.modules import STATE_KEYS, Caches, State
from tests.helpers import COUNTS, LATENTS, make_model, random_batch, random_latent

N = len(COUNTS)


@pytest.mark.parametrize("latent", LATENTS)
def test_states_are_stacked_indexed_and_named_as_one(latent: str) -> None:
    space = LATENTS[latent].build()
    states = [State(random_latent(space, N, 5), torch.randn(N, 5, 16), torch.randn(N, 5, N - 1, 4)) for _ in range(3)]
    whole = State.stack(states, 2)
    entries = whole.entries()
    assert list(entries) == STATE_KEYS
    for t, state in enumerate(states):
        for key, value in state.entries().items():
            # TorchRL's layout: agents behind the batch.
            assert value.shape[:2] == (5, N)
            assert torch.equal(entries[key][:, t], value)
            assert torch.equal(whole[:, :, t].entries()[key], value)
            assert torch.equal(whole[:, :, t:].entries()[key][:, 0], value)
    n, s = 1, 3
    assert torch.equal(entries[keys.LATENT][s, 0, n], states[0].latent[n, s])
    assert torch.equal(entries[keys.HIDDEN][s, 0, n], states[0].hidden[n, s])
    assert torch.equal(entries[keys.TEAMMATE_LOGITS][s, 0, n], states[0].teammate_logits[n, s])


def test_replaced_rows_are_the_new_ones_in_a_copy() -> None:
    first, second = (State(torch.randn(N, 5, 6), torch.randn(N, 5, 16), torch.randn(N, 5, N - 1, 4)) for _ in range(2))
    rows, new = torch.tensor([True, False, False, True, False]), second[:, [2, 4]]
    before = {key: value.clone() for key, value in first.entries().items()}
    for key, value in first.replace_rows(rows, new).entries().items():
        assert torch.equal(value[rows], new.entries()[key])
        assert torch.equal(value[~rows], before[key][~rows])
        # A copy: what was given out before stays what it was.
        assert torch.equal(first.entries()[key], before[key]) and not torch.equal(value, before[key])


@torch.no_grad()
def test_rows_of_caches_go_on_from_another_past(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every agent's: rows are starts, of which the caches hold N."""
    model = make_model(latent="gaussian").eval()
    monkeypatch.setattr(model.dynamics, "sample", lambda hidden, latent: latent + 1)
    first, second = (random_batch(4, 4, done=torch.zeros(4, 4, N, dtype=torch.bool)) for _ in range(2))
    rows, action = torch.tensor([True, False, False, True]), torch.randint(3, (N, 4))
    state, caches = model.start_from(first, horizon=1)
    new_state, new_caches = model.start_from(second[rows], horizon=1)
    caches.replace_rows(rows, new_caches)
    mixed = model.step(state.replace_rows(rows, new_state), action, caches).entries()
    alone = []
    for batch in (first, second):
        state, caches = model.start_from(batch, horizon=1)
        alone.append(model.step(state, action, caches).entries())
    for key in STATE_KEYS:
        torch.testing.assert_close(mixed[key][~rows], alone[0][key][~rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixed[key][rows], alone[1][key][rows], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(alone[0][key][rows], alone[1][key][rows])


@torch.no_grad()
@pytest.mark.parametrize("predicts", [True, False])
def test_full_caches_make_room(predicts: bool) -> None:
    model = make_model(teammate_predictor=predicts)
    state, caches = model.start_from(random_batch(2, 4), horizon=1)
    assert (caches.teammates is None) is not predicts
    action = torch.zeros(N, 2, dtype=torch.long)
    caches.make_room(keep=2)
    # A place was left: nothing is forgotten.
    assert caches.sequence.length == 3
    state = model.step(state, action, caches)
    with pytest.raises(ValueError, match="full"):
        model.step(state, action, caches)
    caches.make_room(keep=2)
    assert caches.sequence.length == 2 and (not predicts or caches.teammates.length == 2)
    model.step(state, action, caches)


def test_a_teammate_predictors_cache_that_lacks_methods_is_named() -> None:
    model = make_model()
    _, caches = model.start_from(random_batch(2, 4), horizon=1)
    foreign = Caches(caches.sequence, {"of": "its own kind"})
    for call in (lambda: foreign.make_room(1), lambda: foreign.replace_rows(torch.tensor([True, False]), foreign)):
        with pytest.raises(TypeError, match=r"cache, a dict, has no \['replace_rows', 'make_room'\].*ImaginationEnv"):
            call()
