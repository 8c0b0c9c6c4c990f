"""A latent space of numbers with normal distributions (ours), for vector observations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_numbers
from matwm_rl.functional import at_least_float32
from matwm_rl.loss_functions import balanced_gaussian_kl
from matwm_rl.modules.latents.base import LatentConfig, LatentSpace
from matwm_rl.settings import setting


class GaussianLatent(LatentSpace):
    """K numbers, each with a normal distribution (ours). It keeps the geometry of short vectors without rounding.

    The posterior has the same width everywhere, and the KL terms measure distances in units of this width. z is drawn
    from the posterior while training and is its mean otherwise. For every dimension the dynamics predictor gives how
    far it moves from z_t, and a standard deviation.

    Args:
        num_dims: K.
        width: standard deviation of the posterior. Without this noise the encoder would escape the KL terms by
            shrinking the scale of z.
        step_scale: the movement that an output of 1 of the dynamics predictor stands for. Movements per step are small,
            and outputs of order 1 are what Adam learns well.
        spread_scale: the same for the standard deviation of the prior, which is never below half of ``width``.

    Raises:
        ValueError: if there is no dimension, or a width or scale is not positive.

    Examples:
        >>> space = GaussianLatent(3).eval()
        >>> z = space.sample_posterior(torch.tensor([[0.0, 10.0, -10.0]]))
        >>> z.tolist(), space.posterior(z)[..., 1].exp()
        ([[0.0, 10.0, -10.0]], tensor([[0.0200, 0.0200, 0.0200]]))
    """

    code_dtype = torch.float32
    coordinate_scale = 1.0

    def __init__(
        self, num_dims: int, *, width: float = 0.02, step_scale: float = 0.4, spread_scale: float = 0.2
    ) -> None:
        super().__init__(num_dims)
        check_numbers(above=0, width=width, step_scale=step_scale, spread_scale=spread_scale)
        self.width, self.step_scale, self.spread_scale = width, step_scale, spread_scale
        self.encoder_size = self.latent_size = num_dims
        self.dynamics_size = 2 * num_dims

    def posterior(self, features: Tensor) -> Tensor:
        """Means and log standard deviations ``[..., K, 2]``."""
        mean = at_least_float32(features)
        return torch.stack([mean, torch.full_like(mean, math.log(self.width))], -1)

    def sample_posterior(self, features: Tensor) -> Tensor:
        """Draw z while training, with gradients through it; give the mean otherwise."""
        mean = at_least_float32(features)
        return torch.add(mean, torch.randn_like(mean), alpha=self.width) if self.training else mean

    def prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Turn movements and widths ``[..., 2 K]`` into means and log standard deviations ``[..., K, 2]``."""
        movement, spread = at_least_float32(output).chunk(2, -1)
        deviation = self.spread_scale * nn.functional.softplus(spread) + 0.5 * self.width
        return torch.stack([latent + self.step_scale * movement, deviation.log()], -1)

    def draw(self, parameters: Tensor) -> Tensor:
        """Draw z ``[..., Z]`` from means and log standard deviations ``[..., K, 2]``."""
        mean, log_deviation = at_least_float32(parameters.detach()).unbind(-1)
        return torch.addcmul(mean, log_deviation.exp(), torch.randn_like(mean))

    def balanced_kl(self, posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`~matwm_rl.loss_functions.balanced_gaussian_kl`."""
        return balanced_gaussian_kl(posterior, prior)

    def to_code(self, latent: Tensor) -> Tensor:
        """Return z as it is."""
        return latent

    def from_code(self, code: Tensor) -> Tensor:
        """Return the code as it is."""
        return code


@dataclass(kw_only=True)
class GaussianLatentConfig(LatentConfig):
    """Settings of :class:`GaussianLatent`.

    Attributes:
        num_dims: K.

    Examples:
        >>> GaussianLatentConfig(num_dims=8).build()
        GaussianLatent()
    """

    num_dims: int = setting(64, minimum=1)

    def build(self) -> GaussianLatent:
        """Build the latent space."""
        return GaussianLatent(self.num_dims)
