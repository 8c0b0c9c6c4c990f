from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import one_hot

from matwm_rl.modules import ActionMixer, Head, TeammatePredictor
from matwm_rl.modules.heads import ILLEGAL_LOGIT
from tests.helpers import grads, others, randomize

COUNTS = [4, 2, 3]


@pytest.mark.parametrize("scaled", [True, False])
def test_mixer_is_one_linear_map_of_latent_and_one_hot_action(float64: None, scaled: bool) -> None:
    mixer = ActionMixer(5, 8, action_counts=COUNTS, scaled=scaled)
    ids = sum(COUNTS) if scaled else max(COUNTS)
    assert mixer.action_rows.weight.shape == (ids, 8)
    linear = torch.cat([mixer.latent.weight, mixer.action_rows.weight.T], 1)
    latent, action = torch.randn(3, 6, 5), torch.stack([torch.randint(n, (6,)) for n in COUNTS])
    out = mixer(latent, action)
    for i, b in itertools.product(range(3), range(6)):
        offset = sum(COUNTS[:i]) if scaled else 0
        x = torch.cat([latent[i, b], one_hot(action[i, b] + offset, ids).double()])
        torch.testing.assert_close(out[i, b], linear @ x + mixer.latent.bias)


def test_scaled_actions_of_different_agents_share_no_row() -> None:
    mixer = ActionMixer(5, 8, action_counts=COUNTS)
    touched = torch.zeros(sum(COUNTS))
    for agent, count in enumerate(COUNTS):
        action = torch.zeros(3, count, dtype=torch.long)
        action[agent] = torch.arange(count)
        out = mixer(torch.zeros(3, count, 5), action)[agent]
        (grad,) = grads(out.sum(), [mixer.action_rows.weight])
        touched += (grad != 0).any(1)
    assert touched.tolist() == [1.0] * sum(COUNTS)


def test_head_has_its_last_layer_per_group_and_may_start_at_zero() -> None:
    head = Head(4, 6, group_index=[0, 0, 1], num_cells=8, depth=2, zero_init=True)
    assert not head(torch.randn(3, 5, 4)).any()
    assert head.output.weight.shape == (2, 8, 6)
    assert Head(4, 6, group_index=[0, 1], depth=0)(torch.randn(2, 4)).shape == (2, 6)


def predictor() -> TeammatePredictor:
    return randomize(
        TeammatePredictor(
            4, action_counts=COUNTS, group_index=[0, 1, 2], features=16, num_heads=2, num_layers=2, dropout=0.0
        )
    )


def test_teammate_logits_stand_in_agent_order_and_forbid_what_a_teammate_has_not() -> None:
    logits = predictor()(torch.randn(3, 2, 6, 4), torch.ones(6, 6, dtype=torch.bool).tril())
    assert logits.shape == (3, 2, 6, 2, 4)
    for i in range(3):
        for place, j in enumerate(others(i, 3)):
            assert (logits[i, :, :, place, COUNTS[j] :] == ILLEGAL_LOGIT).all()
            assert (logits[i, :, :, place, : COUNTS[j]].abs() < 100).all()
    assert (logits.softmax(-1)[logits == ILLEGAL_LOGIT] == 0).all()


def test_teammate_predictor_stops_the_gradient_to_its_latents() -> None:
    model, latent = predictor(), torch.randn(3, 2, 6, 4, requires_grad=True)
    out = model(latent, torch.ones(6, 6, dtype=torch.bool).tril())
    assert not grads(out.softmax(-1).square().sum(), [latent])[0].any()


@torch.no_grad()
def test_cached_teammate_logits_equal_those_of_the_sequence(float64: None) -> None:
    model, latent = predictor(), torch.randn(3, 2, 6, 4)
    whole = model(latent, torch.ones(6, 6, dtype=torch.bool).tril())
    cache = model.transformer.make_cache(6, 6)
    torch.testing.assert_close(model.cached(latent[:, :, :3], cache), whole[:, :, 2], rtol=1e-10, atol=1e-12)
    for t in range(3, 6):
        out = model.cached(latent[:, :, t : t + 1], cache)
        torch.testing.assert_close(out, whole[:, :, t], rtol=1e-10, atol=1e-12)
