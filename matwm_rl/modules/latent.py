"""Latent codes: what lies between the encoder and everything else. Exchangeable, with one interface.

A code turns the encoder's features into a distribution over K code dimensions of C classes each, draws z_t from it, and
turns class indices drawn from the dynamics predictor into the same feature vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from matwm_rl.functional import sample_index

MIN_LOG_PROB = -30.0
"""Smaller probabilities mean nothing, and soon are denormal numbers, on which CPUs are twenty times slower."""


class LatentCode(nn.Module):
    """Interface of a latent code with ``num_dims`` (K) dimensions of ``num_classes`` (C) classes.

    Attributes:
        encoder_size: number of features the encoder must deliver.
        latent_size: size Z of the feature vector z.
        dynamics_size: number of outputs the dynamics predictor must deliver.
    """

    encoder_size: int
    latent_size: int
    dynamics_size: int

    def __init__(self, num_dims: int, num_classes: int) -> None:
        super().__init__()
        if num_dims < 1 or num_classes < 2:
            raise ValueError(f"a code needs >= 1 dimension and >= 2 classes, got {num_dims} x {num_classes}")
        self.num_dims = num_dims
        self.num_classes = num_classes

    def posterior(self, features: Tensor) -> Tensor:
        """Encoder features ``[..., encoder_size]`` to posterior log-probabilities ``[..., K, C]``."""
        raise NotImplementedError

    def sample_posterior(self, features: Tensor) -> Tensor:
        """Encoder features ``[..., encoder_size]`` to z ``[..., Z]``, with straight-through gradients."""
        raise NotImplementedError

    def from_index(self, index: Tensor) -> Tensor:
        """Class indices ``[..., K]`` to z ``[..., Z]``."""
        raise NotImplementedError

    def to_index(self, latent: Tensor) -> Tensor:
        """Invert :meth:`from_index`: z ``[..., Z]`` to class indices ``[..., K]``."""
        raise NotImplementedError

    def prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Log-probabilities of z_{t+1} ``[..., K, C]``, given the dynamics predictor's output and z_t.

        Args:
            output: ``[..., dynamics_size]``.
            latent: z_t, ``[..., Z]``.
        """
        raise NotImplementedError

    def sample_prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Draw z_{t+1} ``[..., Z]`` from what :meth:`prior` describes."""
        return self.from_index(sample_index(self.prior(output, latent).exp()))


class CategoricalLatent(LatentCode):
    """The paper's code: K categoricals of C classes, one-hot, straight-through, with unimix (section 2).

    Args:
        num_dims: K.
        num_classes: C.
        unimix: share of the uniform distribution mixed into all probabilities.

    Examples:
        >>> code = CategoricalLatent(4, 8)
        >>> z = code.sample_posterior(torch.randn(2, code.encoder_size))
        >>> z.shape, z.sum(-1).tolist()
        (torch.Size([2, 32]), [4.0, 4.0])
    """

    def __init__(self, num_dims: int = 32, num_classes: int = 32, *, unimix: float = 0.01) -> None:
        super().__init__(num_dims, num_classes)
        self.unimix = unimix
        self.encoder_size = self.latent_size = self.dynamics_size = num_dims * num_classes

    def _probs(self, logits: Tensor) -> Tensor:
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
        """Logits to log-probabilities ``[..., K, C]`` with unimix; z_t plays no part."""
        return self.posterior(output)

    def sample_prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Sample one-hots ``[..., Z]``."""
        return self.from_index(sample_index(self._probs(output)))

    def sample_posterior(self, features: Tensor) -> Tensor:
        """Sample one-hots; gradients pass to the probabilities (straight-through)."""
        probs = self._probs(features)
        sample = self.from_index(sample_index(probs.detach()))
        probs = probs.flatten(-2)
        return sample + probs - probs.detach()

    def from_index(self, index: Tensor) -> Tensor:
        """One-hots, flattened."""
        one_hot = torch.zeros(*index.shape, self.num_classes, device=index.device)
        return one_hot.scatter_(-1, index.long().unsqueeze(-1), 1.0).flatten(-2)

    def to_index(self, latent: Tensor) -> Tensor:
        """Position of the one in every one-hot."""
        return latent.unflatten(-1, (self.num_dims, self.num_classes)).argmax(-1)


class FSQLatent(LatentCode):
    """Finite scalar quantisation (arXiv:2309.15505): K numbers, each rounded to one of C levels in [-1, 1].

    Keeps the fine geometry of low-dimensional observations that one-hot categoricals lose. z is the nearest level,
    straight-through. The posterior is a narrow bell over the levels around the encoder's value, so that the KL terms of
    the paper are well-defined and differentiable. The prior is a bell too: for every dimension the dynamics predictor
    gives by how much it moves on from z_t, and a width. So neighbouring levels are alike, an untrained model predicts
    that nothing moves, and the model stays discrete.

    Args:
        num_dims: K.
        num_classes: C, levels per dimension.
        width: standard deviation of the posterior, in levels.

    Examples:
        >>> code = FSQLatent(3, num_classes=5)
        >>> z = code.sample_posterior(torch.tensor([[0.0, 10.0, -10.0]]))
        >>> z.tolist(), code.to_index(z).tolist()
        ([[0.0, 1.0, -1.0]], [[2, 4, 0]])
    """

    levels: Tensor

    def __init__(self, num_dims: int = 64, num_classes: int = 16, *, width: float = 0.25) -> None:
        super().__init__(num_dims, num_classes)
        self.width = width
        self.encoder_size = self.latent_size = num_dims
        self.dynamics_size = 2 * num_dims
        self.register_buffer("levels", torch.arange(num_classes, dtype=torch.get_default_dtype()), persistent=False)

    def _scale(self, features: Tensor) -> Tensor:
        return (features.tanh() + 1) * (0.5 * (self.num_classes - 1))

    def _bell(self, centre: Tensor, width: Tensor | float) -> Tensor:
        return -0.5 * ((centre.unsqueeze(-1) - self.levels) / width).square()

    def posterior(self, features: Tensor) -> Tensor:
        """Log-probabilities ``[..., K, C]`` of a bell of ``width`` levels around the value before rounding."""
        bell = self._bell(self._scale(features), self.width)
        return bell.clamp(min=MIN_LOG_PROB).log_softmax(-1)

    def prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Movements and widths ``[..., 2 K]`` from z_t to log-probabilities ``[..., K, C]``."""
        movement, width = output.chunk(2, -1)
        width = nn.functional.softplus(width) + 0.5 * self.width
        centre = (latent + movement + 1) * (0.5 * (self.num_classes - 1))
        # Not clamped: a prior that was sure and wrong must feel how far off it was.
        return self._bell(centre, width.unsqueeze(-1)).log_softmax(-1)

    def sample_prior(self, output: Tensor, latent: Tensor) -> Tensor:
        """Draw levels, ``[..., Z]``."""
        return self.from_index(sample_index(self.prior(output, latent).clamp(min=MIN_LOG_PROB).exp()))

    def sample_posterior(self, features: Tensor) -> Tensor:
        """Nearest level; gradients pass as if there were no rounding (straight-through)."""
        value = self._scale(features)
        value = value + (value.round() - value).detach()
        return value * (2 / (self.num_classes - 1)) - 1

    def from_index(self, index: Tensor) -> Tensor:
        """Level index to its value in [-1, 1]."""
        return index.to(self.levels.dtype) * (2 / (self.num_classes - 1)) - 1

    def to_index(self, latent: Tensor) -> Tensor:
        """Value in [-1, 1] to the nearest level's index."""
        return ((latent + 1) * (0.5 * (self.num_classes - 1))).round().long()


def make_latent(kind: str, num_dims: int, num_classes: int) -> LatentCode:
    """Build a code by name: ``"categorical"`` (the paper's) or ``"fsq"``.

    Examples:
        >>> make_latent("fsq", 8, 4).latent_size
        8
    """
    codes: dict[str, Callable[[int, int], LatentCode]] = {"categorical": CategoricalLatent, "fsq": FSQLatent}
    if kind not in codes:
        raise ValueError(f"unknown latent code {kind!r}; choose one of {sorted(codes)}")
    return codes[kind](num_dims, num_classes)
