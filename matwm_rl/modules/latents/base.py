"""The interface of a latent space.

A latent space turns the encoder's features into the distributions of K dimensions, and draws z_t from them. It does the
same with what the dynamics predictor says of z_{t+1}. A latent z is a tensor ``[..., Z]``. Distributions travel as one
tensor of their parameters: log-probabilities ``[..., K, C]`` of C classes, or means and log standard deviations
``[..., K, 2]`` of Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_ints
from matwm_rl.loss_functions import balanced_kl
from matwm_rl.settings import Settings


class LatentSpace(nn.Module):
    """Interface of a latent space with ``num_dims`` (K) independent dimensions (docs/algorithm.md, World model).

    Args:
        num_dims: K.

    Attributes:
        encoder_size: number of features that the encoder must deliver.
        latent_size: Z, size of a latent.
        dynamics_size: number of outputs that the dynamics predictor must deliver.
        num_classes: C, where z is K one-hot vectors of C classes; first layers then look rows of their weights up.
            ``None`` for any other z.
        coordinate_scale: scale at which a latent dimension stores a coordinate of an observation; ``None`` if
            dimensions are not real numbers.
        code_dtype: type in which z is stored (:meth:`to_code`).

    Raises:
        ValueError: if there is no dimension.

    Examples:
        >>> from matwm_rl.modules import GaussianLatent
        >>> class HalfPrecision(GaussianLatent):
        ...     code_dtype = torch.float16
        ...
        ...     def from_code(self, code: Tensor) -> Tensor:
        ...         return code.float()
        >>> space = HalfPrecision(2)
        >>> stored = space.to_code(torch.tensor([0.1, 2.0])).to(space.code_dtype)
        >>> space.from_code(stored)
        tensor([0.1000, 2.0000])
    """

    encoder_size: int
    latent_size: int
    dynamics_size: int
    num_classes: int | None = None
    coordinate_scale: float | None = None
    code_dtype: torch.dtype

    def __init__(self, num_dims: int) -> None:
        super().__init__()
        check_ints(1, num_dims=num_dims)
        self.num_dims = num_dims

    def posterior(self, features: Tensor) -> Tensor:
        """Turn encoder features ``[..., encoder_size]`` into the posterior's parameters ``[..., K, C]``."""
        raise NotImplementedError

    def sample_posterior(self, features: Tensor) -> Tensor:
        """Turn encoder features ``[..., encoder_size]`` into z ``[..., Z]``, with gradients to the features."""
        raise NotImplementedError

    def prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Turn the dynamics predictor's output into the parameters of z_{t+1}.

        Args:
            output: ``[..., dynamics_size]``.
            latent: z_t, ``[..., Z]``.

        Returns:
            ``[..., K, C]``.
        """
        raise NotImplementedError

    def sample_prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Draw z_{t+1} ``[..., Z]`` from what :meth:`prior` describes, without gradient."""
        return self.draw(self.prior(output.detach(), latent.detach()))

    def draw(self, parameters: Tensor) -> Tensor:
        """Draw z ``[..., Z]`` from parameters ``[..., K, C]``, without gradient."""
        raise NotImplementedError

    def balanced_kl(self, posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """KL divergence of the posterior from the prior, summed over K, with two gradients.

        By default that of log-probabilities of C classes; override it where the parameters are others.

        Args:
            posterior: parameters ``[..., K, C]``.
            prior: parameters ``[..., K, C]``.

        Returns:
            ``(dynamics, representation)``, each ``[...]`` in nats: the first moves the prior only, the second the
            posterior only.
        """
        return balanced_kl(posterior, prior)

    def to_code(self, latent: Tensor) -> Tensor:
        """Shorten z ``[..., Z]`` to ``[..., K]``: what is stored of it, as ``code_dtype``."""
        raise NotImplementedError

    def from_code(self, code: Tensor) -> Tensor:
        """Restore z ``[..., Z]`` from a code ``[..., K]`` of :meth:`to_code`, in any dtype that can hold it."""
        raise NotImplementedError


@dataclass(kw_only=True)
class LatentConfig(Settings):
    """Settings of a latent space. Subclass it for a latent space of your own.

    Examples:
        >>> from matwm_rl.modules import CategoricalLatentConfig
        >>> CategoricalLatentConfig(num_dims=4, num_classes=8).build().latent_size
        32
    """

    def build(self) -> LatentSpace:
        """Build the latent space."""
        raise NotImplementedError
