from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.action_space import ILLEGAL_LOGIT, ActionSpace, DiscreteActions
from matwm_rl.modules import (
    CategoricalLatent,
    Imagination,
    TeammatePredictor,
    TeammatePredictorBase,
    make_actor,
)
from tests.helpers import grads, make_model, others, random_batch, random_latent, randomize

COUNTS = [4, 2, 3]
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()


def predictor(num_classes: int | None = None) -> TeammatePredictor:
    sizes = {"group_index": [0, 1, 2], "features": 16, "num_heads": 2, "num_layers": 2, "dropout": 0.0}
    return randomize(TeammatePredictor(4, actions=DiscreteActions(COUNTS), num_classes=num_classes, **sizes))


def latents(num_classes: int | None) -> Tensor:
    return torch.randn(3, 2, 7, 4) if num_classes is None else random_latent(CategoricalLatent(2, 2), 3, 2, 7)


def test_logits_stand_in_agent_order_and_forbid_what_a_teammate_has_not() -> None:
    logits = predictor()(latents(None), CAUSAL)
    assert logits.shape == (3, 2, 7, 2, 4)
    for i in range(3):
        for place, j in enumerate(others(i, 3)):
            assert (logits[i, :, :, place, COUNTS[j] :] == ILLEGAL_LOGIT).all()
            assert (logits[i, :, :, place, : COUNTS[j]].abs() < 100).all()
    assert (logits.softmax(-1)[logits == ILLEGAL_LOGIT] == 0).all()


@pytest.mark.parametrize("num_classes", [2, None])
def test_the_gradient_to_the_latents_is_stopped(num_classes: int | None) -> None:
    model, latent = predictor(num_classes), latents(num_classes).requires_grad_()
    outputs = [model(latent, CAUSAL), model.prefill(latent, CAUSAL, room=0)[0]]
    cache = model.prefill(latent[:, :, :6], CAUSAL[:6, :6], room=1)[1]
    with torch.no_grad():
        last = model.step(latent[:, :, 6], cache)
    for out in outputs:
        assert grads(out.softmax(-1).square().sum(), [model.input.weight])[0].any()
        assert not grads(out.softmax(-1).square().sum(), [latent])[0].any()
    torch.testing.assert_close(last, outputs[1])


@torch.no_grad()
@pytest.mark.parametrize("prefilled", [1, 3, 6])
@pytest.mark.parametrize("num_classes", [2, None])
def test_cached_logits_equal_those_of_the_sequence(float64: None, prefilled: int, num_classes: int | None) -> None:
    model, latent = predictor(num_classes), latents(num_classes)
    whole = model(latent, CAUSAL)
    out, cache = model.prefill(latent[:, :, :prefilled], CAUSAL[:prefilled, :prefilled], room=7 - prefilled)
    torch.testing.assert_close(out, whole[:, :, prefilled - 1], rtol=1e-10, atol=1e-12)
    for t in range(prefilled, 7):
        out = model.step(latent[:, :, t], cache)
        torch.testing.assert_close(out, whole[:, :, t], rtol=1e-10, atol=1e-12)


# -- predictors of a user --------------------------------------------------------------------------------------------


class Present(TeammatePredictorBase):
    """Reads the present latent alone."""

    def __init__(self, latent_size: int, actions: ActionSpace) -> None:
        super().__init__(actions)
        self.linear = nn.Linear(latent_size, self.num_outputs)

    def logits(self, latent: Tensor) -> Tensor:
        return self.linear(latent)


def test_one_method_makes_a_predictor(float64: None) -> None:
    """It is used in the parallel pass and in imagination, and learns there nothing about latents."""
    actions = DiscreteActions([4, 4, 3])
    model = make_model(parts={"teammates": Present(20, actions)})
    out = model(random_batch())
    latent = out[keys.LATENT]
    for i in range(3):
        said = model.teammates.linear(latent[:, :, i]).unflatten(-1, (2, 4))
        for place, j in enumerate(others(i, 3)):
            legal = actions.counts[j]
            torch.testing.assert_close(out[keys.TEAMMATE_LOGITS][:, :, i, place, :legal], said[..., place, :legal])
            assert (out[keys.TEAMMATE_LOGITS][:, :, i, place, legal:] == ILLEGAL_LOGIT).all()
    loss = out[keys.TEAMMATE_LOGITS].softmax(-1).square().sum()
    assert grads(loss, [model.teammates.linear.weight])[0].any()
    assert not any(grad.any() for grad in grads(loss, model.encoder.parameters()))
    imagined = Imagination(model, make_actor(model), horizon=3)(random_batch(2, 4))
    said = model.teammates.linear(imagined["next", *keys.LATENT][:, :, 0]).unflatten(-1, (2, 4))
    torch.testing.assert_close(imagined["next", *keys.TEAMMATE_LOGITS][:, :, 0, 0], said[..., 0, :])


def test_predictors_that_lack_a_method_or_give_another_shape_are_named() -> None:
    actions = DiscreteActions([4, 4, 3])

    class Silent(TeammatePredictorBase):
        pass

    class Short(TeammatePredictorBase):
        def logits(self, latent: Tensor) -> Tensor:
            return latent[..., :3]

    with pytest.raises(NotImplementedError, match="Silent must override `logits`, or `forward`, `prefill` and `step`"):
        make_model(parts={"teammates": Silent(actions)})(random_batch())
    with pytest.raises(ValueError, match=r"Short must give logits .*\(N-1\) \* P = 2 \* 4.* found \[3, 3, 7, 3\]"):
        make_model(parts={"teammates": Short(actions)})(random_batch())
