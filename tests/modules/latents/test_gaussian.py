from __future__ import annotations

import itertools
import math

import pytest
import torch

from matwm_rl.modules import GaussianLatent
from tests.helpers import grads, random_latent


def test_posterior_is_equally_wide_around_every_value(float64: None) -> None:
    space = GaussianLatent(3, width=0.1)
    features = 10 * torch.randn(7, 3)
    mean, log_deviation = space.posterior(features).unbind(-1)
    assert torch.equal(mean, features)
    assert log_deviation.exp().flatten().tolist() == pytest.approx([0.1] * 21, rel=1e-12)


def test_z_is_drawn_while_training_and_the_mean_otherwise() -> None:
    space = GaussianLatent(2, width=0.1)
    features = torch.tensor([3.0, -50.0], requires_grad=True)
    z = space.sample_posterior(features.expand(20_000, -1))
    noise = (z - features).detach() / 0.1
    assert noise.mean(0).abs().max() < 5 / math.sqrt(20_000)
    assert noise.std(0).tolist() == pytest.approx([1.0, 1.0], abs=5 / math.sqrt(2 * 20_000))
    # Reparameterised: the features move what is drawn.
    (grad,) = grads(z.sum(), [features])
    assert grad.tolist() == [20_000.0] * 2
    space.eval()
    assert torch.equal(space.sample_posterior(features), features)


def test_prior_moves_on_from_the_present_latent(float64: None) -> None:
    space = GaussianLatent(2, width=0.1, step_scale=0.3, spread_scale=0.7)
    output, latent = torch.randn(10, space.dynamics_size), random_latent(space, 10)
    prior = space.prior(output, latent)
    assert prior.shape == (10, 2, 2)
    for b, k in itertools.product(range(10), range(2)):
        mean, log_deviation = prior[b, k].tolist()
        assert mean == pytest.approx(float(latent[b, k]) + 0.3 * float(output[b, k]))
        spread = math.log1p(math.exp(float(output[b, 2 + k])))
        assert math.exp(log_deviation) == pytest.approx(0.7 * spread + 0.05)


def test_prior_is_sampled_from_what_the_loss_sees() -> None:
    space = GaussianLatent(3)
    output, latent = torch.randn(space.dynamics_size), random_latent(space)
    prior = space.prior(output, latent)
    mean, deviation = prior[:, 0], prior[:, 1].exp()
    many = latent.expand(20_000, -1)
    for drawn in (space.sample_prior(output.expand(20_000, -1), many), space.draw(prior.expand(20_000, -1, -1))):
        noise = (drawn - mean) / deviation
        assert noise.mean(0).abs().max() < 5 / math.sqrt(20_000)
        assert (noise.std(0) - 1).abs().max() < 5 / math.sqrt(2 * 20_000)
        # Independent of each other.
        assert (noise.T.corrcoef() - torch.eye(3)).abs().max() < 5 / math.sqrt(20_000)


def test_prior_has_a_smallest_width_and_stays_finite_far_out() -> None:
    space = GaussianLatent(2)
    features = torch.tensor([-1e3, 1e3], requires_grad=True)
    for raw, deviation in ((-1e4, 0.01), (1e4, 2e3)):
        output = torch.tensor([1e3, -1e3, raw, raw], requires_grad=True)
        prior = space.prior(output, random_latent(space))
        assert prior[:, 1].exp().tolist() == pytest.approx([deviation] * 2, rel=1e-3)
        assert space.draw(prior).isfinite().all()
        for kl in space.balanced_kl(space.posterior(features), prior):
            assert kl.isfinite() and all(grad.isfinite().all() for grad in grads(kl, [output, features]))


@pytest.mark.parametrize("distance", [0.1, 1.0, 1e3])
def test_prior_is_drawn_to_a_posterior_at_any_distance(distance: float) -> None:
    """A confident and wrong prior must be moved, and widened until it is right."""
    space = GaussianLatent(1)
    output = torch.tensor([[0.0, -4.0]], requires_grad=True)
    prior = space.prior(output, torch.zeros(1, 1))
    space.balanced_kl(space.posterior(torch.full((1, 1), distance)), prior)[0].sum().backward()
    movement, width = output.grad[0].tolist()
    assert movement < -1e-2 and width < -1e-2


def test_everything_is_computed_in_float32_whatever_precision_the_inputs_have() -> None:
    space = GaussianLatent(3)
    features, output = torch.randn(5, 3).bfloat16(), torch.randn(5, 6).bfloat16()
    z = space.sample_posterior(features)
    prior = space.prior(output, z)
    values = [z, prior, space.posterior(features), space.sample_prior(output, z)]
    values += [space.draw(prior.bfloat16()), *space.balanced_kl(space.posterior(features).bfloat16(), prior)]
    assert {value.dtype for value in values} == {torch.float32}
    # Noise far below bfloat16's spacing at these values.
    assert (z != z.bfloat16()).any()
