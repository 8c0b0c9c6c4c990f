from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import one_hot

from matwm_rl.modules import ActionMixer, CategoricalLatent, Head, Latent, TeammatePredictor
from matwm_rl.modules.heads import ILLEGAL_LOGIT
from tests.helpers import grads, others, random_latent, randomize

COUNTS = [4, 2, 3]


@pytest.mark.parametrize("scaled", [True, False])
def test_mixer_is_one_linear_map_of_latent_and_one_hot_action(float64: None, scaled: bool) -> None:
    mixer = ActionMixer(5, 8, action_counts=COUNTS, scaled=scaled)
    ids = sum(COUNTS) if scaled else max(COUNTS)
    assert mixer.action_rows.weight.shape == (ids, 8)
    linear = torch.cat([mixer.latent.weight[0].T, mixer.action_rows.weight.T], 1)
    action = torch.stack([torch.randint(n, (6,)) for n in COUNTS])
    # Numbers, and a code of one five-way one-hot that may be looked up.
    for latent in (Latent(torch.randn(3, 6, 5)), random_latent(CategoricalLatent(1, 5), 3, 6)):
        out = mixer(latent, action)
        for i, b in itertools.product(range(3), range(6)):
            offset = sum(COUNTS[:i]) if scaled else 0
            x = torch.cat([latent.value[i, b], one_hot(action[i, b] + offset, ids).double()])
            torch.testing.assert_close(out[i, b], linear @ x + mixer.latent.bias[0])


def test_scaled_actions_of_different_agents_share_no_row() -> None:
    mixer = ActionMixer(5, 8, action_counts=COUNTS)
    touched = torch.zeros(sum(COUNTS))
    for agent, count in enumerate(COUNTS):
        action = torch.zeros(3, count, dtype=torch.long)
        action[agent] = torch.arange(count)
        out = mixer(Latent(torch.zeros(3, count, 5)), action)[agent]
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
    logits = predictor()(Latent(torch.randn(3, 2, 6, 4)), torch.ones(6, 6, dtype=torch.bool).tril())
    assert logits.shape == (3, 2, 6, 2, 4)
    for i in range(3):
        for place, j in enumerate(others(i, 3)):
            assert (logits[i, :, :, place, COUNTS[j] :] == ILLEGAL_LOGIT).all()
            assert (logits[i, :, :, place, : COUNTS[j]].abs() < 100).all()
    assert (logits.softmax(-1)[logits == ILLEGAL_LOGIT] == 0).all()


def test_teammate_predictor_stops_the_gradient_to_its_latents() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    model, code = predictor(), CategoricalLatent(2, 2)
    value = torch.randn(3, 2, 6, 4, requires_grad=True)
    looked_up = Latent(random_latent(code, 3, 2, 6).value.requires_grad_())
    looked_up.ones = code.from_code(code.to_code(looked_up)).ones
    for latent in (Latent(value), looked_up):
        outputs = [model(latent, causal), model.prefill(latent, causal, room=0)[0]]
        cache = model.prefill(latent[:, :, :5], causal[:5, :5], room=1)[1]
        with torch.no_grad():
            outputs.append(model.step(latent[:, :, 5], cache))
        for out in outputs[:2]:
            assert grads(out.softmax(-1).square().sum(), [model.input.weight])[0].any()
            assert not grads(out.softmax(-1).square().sum(), [latent.value])[0].any()
        torch.testing.assert_close(outputs[2], outputs[1])


def test_the_input_layer_learns_the_same_from_look_ups_and_from_products(float64: None) -> None:
    model, latent = predictor(), random_latent(CategoricalLatent(2, 2), 3, 2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    dense, looked_up = model(Latent(latent.value), causal), model(latent, causal)
    torch.testing.assert_close(looked_up, dense)
    losses = [out.softmax(-1).square().sum() for out in (dense, looked_up)]
    for expected, grad in zip(*(grads(loss, model.parameters()) for loss in losses), strict=True):
        torch.testing.assert_close(grad, expected)


@torch.no_grad()
@pytest.mark.parametrize("prefilled", [1, 3, 6])
@pytest.mark.parametrize("multi_hot", [True, False])
def test_cached_teammate_logits_equal_those_of_the_sequence(float64: None, prefilled: int, multi_hot: bool) -> None:
    model = predictor()
    latent = random_latent(CategoricalLatent(2, 2), 3, 2, 7) if multi_hot else Latent(torch.randn(3, 2, 7, 4))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    whole = model(Latent(latent.value), causal)
    out, cache = model.prefill(latent[:, :, :prefilled], causal[:prefilled, :prefilled], room=7 - prefilled)
    torch.testing.assert_close(out, whole[:, :, prefilled - 1], rtol=1e-10, atol=1e-12)
    for t in range(prefilled, 7):
        out = model.step(latent[:, :, t], cache)
        torch.testing.assert_close(out, whole[:, :, t], rtol=1e-10, atol=1e-12)
