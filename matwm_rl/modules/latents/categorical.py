"""The paper's latent space: categoricals, one-hot, with straight-through gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from matwm_rl.arguments import check_ints, check_numbers
from matwm_rl.functional import may_need_gradient, one_hot_classes, sample_index
from matwm_rl.modules.latents.base import LatentConfig, LatentSpace
from matwm_rl.settings import setting


class CategoricalLatent(LatentSpace):
    """K categoricals of C classes, one-hot, straight-through, with unimix (docs/algorithm.md, World model).

    Codes are class indices.

    Args:
        num_dims: K.
        num_classes: C.
        unimix: share of the uniform distribution that is mixed into all probabilities.

    Raises:
        ValueError: if there is no dimension, there are fewer than two classes, or ``unimix`` does not lie in [0, 1).

    Examples:
        >>> space = CategoricalLatent(4, 8)
        >>> z = space.sample_posterior(torch.randn(2, space.encoder_size))
        >>> z.shape, z.sum(-1).tolist(), space.to_code(z).shape
        (torch.Size([2, 32]), [4.0, 4.0], torch.Size([2, 4]))
    """

    code_dtype = torch.int16
    num_classes: int
    one: Tensor

    def __init__(self, num_dims: int, num_classes: int, *, unimix: float = 0.01) -> None:
        super().__init__(num_dims)
        check_ints(2, num_classes=num_classes)
        check_numbers(minimum=0, below=1, unimix=unimix)
        self.num_classes = num_classes
        self.unimix = unimix
        self.encoder_size = self.latent_size = self.dynamics_size = num_dims * num_classes
        # The number 1 in the dtype that the model computes in.
        self.register_buffer("one", torch.ones(()), persistent=False)

    def probs(self, logits: Tensor) -> Tensor:
        """Turn logits ``[..., K * C]`` into probabilities ``[..., K, C]`` with unimix."""
        probs = logits.unflatten(-1, (self.num_dims, self.num_classes)).softmax(-1)
        return (1 - self.unimix) * probs + self.unimix / self.num_classes

    def posterior(self, features: Tensor) -> Tensor:
        """Log-probabilities ``[..., K, C]`` with unimix."""
        # Computed apart from the probabilities: without unimix their logarithm would underflow.
        log_probs = features.unflatten(-1, (self.num_dims, self.num_classes)).log_softmax(-1)
        if not self.unimix:
            return log_probs
        uniform = math.log(self.unimix / self.num_classes)
        return torch.logaddexp(log_probs + math.log1p(-self.unimix), torch.full_like(log_probs, uniform))

    def prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Log-probabilities ``[..., K, C]`` with unimix; z_t plays no part."""
        return self.posterior(output)

    def sample_prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Draw one-hots ``[..., Z]``."""
        return self.from_code(sample_index(self.probs(output)))

    def draw(self, parameters: Tensor) -> Tensor:
        """Draw one-hots ``[..., Z]`` from log-probabilities ``[..., K, C]``."""
        return self.from_code(sample_index(parameters.exp()))

    def sample_posterior(self, features: Tensor) -> Tensor:
        """Draw one-hots; gradients pass to the probabilities (straight-through)."""
        probs = self.probs(features)
        sample = self.from_code(sample_index(probs.detach()))
        if not may_need_gradient(probs):
            return sample
        probs = probs.flatten(-2)
        return sample + (probs - probs.detach())

    def from_code(self, code: Tensor) -> Tensor:
        """Class indices to one-hots, flattened."""
        value = code.new_zeros(*code.shape, self.num_classes, dtype=self.one.dtype)
        return value.scatter_(-1, code.long().unsqueeze(-1), 1.0).flatten(-2)

    def to_code(self, latent: Tensor) -> Tensor:
        """Class of the one in every one-hot."""
        return one_hot_classes(latent, self.num_classes)


@dataclass(kw_only=True)
class CategoricalLatentConfig(LatentConfig):
    """Settings of :class:`CategoricalLatent`; the defaults are the paper's (Table C.6).

    Attributes:
        num_dims: K.
        num_classes: C.

    Examples:
        >>> CategoricalLatentConfig().build().latent_size
        1024
    """

    num_dims: int = setting(32, minimum=1)
    num_classes: int = setting(32, minimum=2)

    def build(self) -> CategoricalLatent:
        """Build the latent space."""
        return CategoricalLatent(self.num_dims, self.num_classes)
