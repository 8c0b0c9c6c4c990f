"""What holds for every latent space."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matwm_rl.modules import (
    CategoricalLatent,
    CategoricalLatentConfig,
    GaussianLatent,
    GaussianLatentConfig,
    LatentConfig,
    LatentSpace,
)
from tests.helpers import random_latent

SPACES = [CategoricalLatent(3, 4), GaussianLatent(3), GaussianLatent(3).eval()]


def mode(space: LatentSpace) -> str:
    return f"{type(space).__name__}{'' if space.training else ' eval'}"


every_space = pytest.mark.parametrize("space", SPACES, ids=mode)


@every_space
def test_a_stored_latent_is_the_same(space: LatentSpace) -> None:
    drawn = space.sample_prior(torch.randn(50, space.dynamics_size), random_latent(space, 50))
    for z in (random_latent(space, 50), drawn, space.sample_posterior(torch.randn(50, space.encoder_size))):
        assert z.shape == (50, space.latent_size)
        stored = space.to_code(z).to(space.code_dtype)
        assert stored.shape == (50, space.num_dims)
        assert torch.equal(space.from_code(stored), z)


@every_space
def test_latents_are_one_hot_vectors_where_the_space_says_so(space: LatentSpace) -> None:
    classes = space.num_classes
    for z in (
        random_latent(space, 50),
        space.sample_posterior(torch.randn(50, space.encoder_size)),
        space.sample_prior(torch.randn(50, space.dynamics_size), random_latent(space, 50)),
    ):
        if classes is None:
            assert (z != z.round()).all()
        else:
            blocks = z.unflatten(-1, (space.num_dims, classes))
            assert ((blocks == 0) | (blocks == 1)).all() and (blocks.sum(-1) == 1).all()


@every_space
def test_prior_samples_carry_no_gradient(space: LatentSpace) -> None:
    output = torch.randn(4, space.dynamics_size, requires_grad=True)
    latent = space.sample_posterior(torch.randn(4, space.encoder_size, requires_grad=True))
    before = output.detach().clone(), latent.detach().clone()
    assert not space.sample_prior(output, latent).requires_grad
    assert not space.draw(space.prior(output, latent)).requires_grad
    assert torch.equal(output.detach(), before[0]) and torch.equal(latent.detach(), before[1])


def test_configs_build_their_spaces() -> None:
    categorical, gaussian = CategoricalLatentConfig(num_dims=2, num_classes=3).build(), GaussianLatentConfig().build()
    assert isinstance(categorical, CategoricalLatent) and isinstance(gaussian, GaussianLatent)
    assert (categorical.num_dims, categorical.num_classes) == (2, 3)
    assert gaussian.num_dims == GaussianLatentConfig.num_dims
    with pytest.raises(NotImplementedError):
        LatentConfig().build()


def test_bad_sizes_are_named() -> None:
    for build in (lambda: GaussianLatent(0), lambda: CategoricalLatent(0, 4)):
        with pytest.raises(ValueError, match="num_dims must be a positive integer, got 0"):
            build()
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 2, got 1"):
        CategoricalLatent(2, 1)
    for name in ("width", "step_scale", "spread_scale"):
        with pytest.raises(ValueError, match=rf"{name} must be a positive number, got -0\.5"):
            GaussianLatent(2, **{name: -0.5})


def test_a_space_of_a_user_chooses_how_latents_are_stored() -> None:
    class Halved(GaussianLatent):
        code_dtype = torch.float16

        def from_code(self, code: Tensor) -> Tensor:
            return code.float()

    space = Halved(3)
    z = random_latent(space, 50)
    stored = space.to_code(z).to(space.code_dtype)
    torch.testing.assert_close(space.from_code(stored), z, rtol=1e-3, atol=1e-3)
