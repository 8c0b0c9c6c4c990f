from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from matwm_rl.modules import CategoricalLatent
from tests.helpers import random_latent


def slow_unimix(logits: list[float], share: float) -> list[float]:
    exponentials = [math.exp(x) for x in logits]
    return [(1 - share) * x / sum(exponentials) + share / len(logits) for x in exponentials]


def sides(space: CategoricalLatent, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of features and prior of the dynamics predictor's output: categoricals treat both alike."""
    return space.posterior(logits), space.prior(logits, random_latent(space, *logits.shape[:-1]))


@pytest.mark.parametrize("side", [0, 1], ids=["posterior", "prior"])
@pytest.mark.parametrize("unimix", [0.01, 0.0])
def test_uniform_probability_is_mixed_into_both_sides(float64: None, side: int, unimix: float) -> None:
    space = CategoricalLatent(3, 4, unimix=unimix)
    features = 5 * torch.randn(6, 12)
    log_probs = sides(space, features)[side]
    assert log_probs.shape == (6, 3, 4)
    for b, k in itertools.product(range(6), range(3)):
        expected = slow_unimix(features[b, 4 * k : 4 * k + 4].tolist(), unimix)
        assert log_probs[b, k].exp().tolist() == pytest.approx(expected, rel=1e-9)
    extreme = sides(space, torch.tensor([1e4, 0.0, 0.0, 0.0] * 3))[side]
    assert extreme.isfinite().all() and extreme.exp().min() == pytest.approx(unimix / 4)


def test_the_paper_mixes_one_percent() -> None:
    assert CategoricalLatent(3, 4).unimix == 0.01


def test_distributions_of_large_logits_are_normalised_and_finite() -> None:
    space = CategoricalLatent(3, 4)
    for log_probs in sides(space, 100 * torch.randn(20, 12)):
        assert log_probs.isfinite().all()
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(20, 3))


def test_samples_are_one_hot_and_straight_through(float64: None) -> None:
    space = CategoricalLatent(3, 4)
    features = torch.randn(6, 12, requires_grad=True)
    z = space.sample_posterior(features)
    blocks = z.detach().unflatten(-1, (3, 4))
    torch.testing.assert_close(blocks.sum(-1), torch.ones(6, 3))
    torch.testing.assert_close(blocks.amax(-1), torch.ones(6, 3))
    # The rounding errors of straight-through samples do not reach their codes.
    assert torch.equal(space.to_code(z), blocks.argmax(-1))
    weight = torch.randn_like(z)
    (grad,) = torch.autograd.grad((weight * z).sum(), features)
    (expected,) = torch.autograd.grad((weight * space.posterior(features).exp().flatten(-2)).sum(), features)
    torch.testing.assert_close(grad, expected)
    assert grad.any()


def test_samples_follow_the_posterior_and_the_prior() -> None:
    space = CategoricalLatent(2, 3)
    features = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 0.0])
    many, latent = features.expand(20_000, -1), random_latent(space, 20_000)
    parameters = space.posterior(features)
    for drawn in (
        space.sample_posterior(many),
        space.sample_prior(many, latent),
        space.draw(parameters.expand(20_000, -1, -1)),
    ):
        deviation = (drawn.mean(0).unflatten(0, (2, 3)) - parameters.exp()).abs().max()
        assert deviation < 5 * 0.5 / math.sqrt(20_000)


def test_codes_are_classes() -> None:
    space = CategoricalLatent(3, 4)
    code = torch.randint(4, (50, 3))
    z = space.from_code(code)
    for b, k, c in itertools.product(range(50), range(3), range(4)):
        assert z[b, 4 * k + c] == float(code[b, k] == c)
    assert torch.equal(space.to_code(z), code)
