"""Latent codes: what lies between the encoder and everything else. Exchangeable, with one interface.

A code turns the encoder's features into a distribution over K code dimensions of C classes each, draws z_t from it, and
turns class indices drawn from the dynamics predictor into the same feature vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from matwm_rl.functional import sample_index
from matwm_rl.modules.stacked import StackedLinear

MIN_LOG_PROB = -30.0
"""Smaller probabilities mean nothing, and soon are denormal numbers, on which CPUs are twenty times slower."""


@dataclass
class Latent:
    """Latents z.

    Attributes:
        value: the features, ``[..., Z]``.
        ones: where z is multi-hot, the positions of its ones, int64 ``[..., K]``: layers that need no gradient through
            z look rows of their weights up in place of a product. ``None`` for codes of numbers.
    """

    value: Tensor
    ones: Tensor | None = None

    def __getitem__(self, index: Any) -> Latent:
        """Index the batch dimensions."""
        return Latent(self.value[index], None if self.ones is None else self.ones[index])

    def detach(self) -> Latent:
        """The same latents, without gradient."""
        return Latent(self.value.detach(), self.ones)

    @staticmethod
    def stack(latents: list[Latent], dim: int) -> Latent:
        """Stack along a new batch dimension."""
        ones = [latent.ones for latent in latents if latent.ones is not None]
        return Latent(torch.stack([latent.value for latent in latents], dim), torch.stack(ones, dim) if ones else None)


def read_latent(layer: StackedLinear, latent: Latent) -> Tensor:
    """Apply a first layer to latents, by look-up where z is multi-hot and no gradient is wanted through it.

    Examples:
        >>> layer, code = StackedLinear(8, 3, [0]), CategoricalLatent(2, 4)
        >>> latent = code.from_index(torch.tensor([[[1, 3]]]))
        >>> torch.allclose(read_latent(layer, latent), layer(latent.value), atol=1e-6)
        True
    """
    if latent.ones is None or latent.value.requires_grad:
        return layer(latent.value)
    return layer.from_ones(latent.ones)


class LatentCode(nn.Module):
    """Interface of a latent code with ``num_dims`` (K) dimensions of ``num_classes`` (C) classes.

    Attributes:
        encoder_size: number of features the encoder must deliver.
        latent_size: size Z of the feature vector z.
        dynamics_size: number of outputs the dynamics predictor must deliver.
        multi_hot: whether latents have ``ones``.
    """

    multi_hot = False
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

    def sample_posterior(self, features: Tensor) -> Latent:
        """Encoder features ``[..., encoder_size]`` to z ``[..., Z]``, with straight-through gradients."""
        raise NotImplementedError

    def from_index(self, index: Tensor) -> Latent:
        """Class indices ``[..., K]`` to z ``[..., Z]``."""
        raise NotImplementedError

    def to_index(self, latent: Latent) -> Tensor:
        """Invert :meth:`from_index`: z ``[..., Z]`` to class indices ``[..., K]``."""
        raise NotImplementedError

    def prior(self, output: Tensor, latent: Latent) -> Tensor:
        """Log-probabilities of z_{t+1} ``[..., K, C]``, given the dynamics predictor's output and z_t.

        Args:
            output: ``[..., dynamics_size]``.
            latent: z_t.
        """
        raise NotImplementedError

    def sample_prior(self, output: Tensor, latent: Latent) -> Latent:
        """Draw z_{t+1} ``[..., Z]`` from what :meth:`prior` describes."""
        raise NotImplementedError

    def draw(self, log_probs: Tensor) -> Latent:
        """Draw z ``[..., Z]`` from log-probabilities ``[..., K, C]``, as the world model's forward pass writes them."""
        return self.from_index(sample_index(log_probs.exp()))


class CategoricalLatent(LatentCode):
    """The paper's code: K categoricals of C classes, one-hot, straight-through, with unimix (section 2).

    Args:
        num_dims: K.
        num_classes: C.
        unimix: share of the uniform distribution mixed into all probabilities.

    Examples:
        >>> code = CategoricalLatent(4, 8)
        >>> z = code.sample_posterior(torch.randn(2, code.encoder_size))
        >>> z.value.shape, z.value.sum(-1).tolist(), z.ones.shape
        (torch.Size([2, 32]), [4.0, 4.0], torch.Size([2, 4]))
    """

    multi_hot = True
    first: Tensor

    def __init__(self, num_dims: int = 32, num_classes: int = 32, *, unimix: float = 0.01) -> None:
        super().__init__(num_dims, num_classes)
        self.unimix = unimix
        self.encoder_size = self.latent_size = self.dynamics_size = num_dims * num_classes
        # Position of every dimension's first class.
        self.register_buffer("first", torch.arange(0, self.latent_size, num_classes), persistent=False)

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

    def prior(self, output: Tensor, latent: Latent) -> Tensor:
        """Logits to log-probabilities ``[..., K, C]`` with unimix; z_t plays no part."""
        return self.posterior(output)

    def sample_prior(self, output: Tensor, latent: Latent) -> Latent:
        """Sample one-hots ``[..., Z]``."""
        return self.from_index(sample_index(self._probs(output)))

    def sample_posterior(self, features: Tensor) -> Latent:
        """Sample one-hots; gradients pass to the probabilities (straight-through)."""
        probs = self._probs(features)
        sample = self.from_index(sample_index(probs.detach()))
        if not probs.requires_grad:
            return sample
        probs = probs.flatten(-2)
        return Latent(sample.value + (probs - probs.detach()), sample.ones)

    def from_index(self, index: Tensor) -> Latent:
        """One-hots, flattened."""
        ones = index + self.first
        value = torch.zeros(*index.shape[:-1], self.latent_size, device=index.device)
        return Latent(value.scatter_(-1, ones, 1.0), ones)

    def to_index(self, latent: Latent) -> Tensor:
        """Class of the one in every one-hot."""
        if latent.ones is None:
            return latent.value.unflatten(-1, (self.num_dims, self.num_classes)).argmax(-1)
        return latent.ones - self.first


class _LogBell(torch.autograd.Function):
    """Log-probabilities of bells over the levels 0 .. C-1: ``log_softmax(-((level - centre) * scale)^2)``.

    By hand, because autograd walks over ``[..., K, C]`` a dozen times: the gradient needs two sums over the levels.
    """

    @staticmethod
    def forward(ctx: Any, centre: Tensor, scale: Tensor, levels: Tensor, limit: float) -> Tensor:
        bell = (levels - centre.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).square_().neg_()
        log_probs = bell.clamp_(min=limit).log_softmax(-1)
        ctx.save_for_backward(centre, scale, levels, log_probs)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        centre, scale, levels, log_probs = ctx.saved_tensors
        # Through the softmax; the result sums to zero over the levels, and what was clamped has no weight.
        grad = grad - log_probs.exp().mul_(grad.sum(-1, keepdim=True))
        first, second = (grad @ torch.stack([levels, levels.square()], -1)).unbind(-1)
        squared = second - 2 * centre * first
        return 2 * scale.square() * first, -2 * scale * squared, None, None


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
        >>> z.value.tolist(), code.to_index(z).tolist()
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

    def _log_bell(self, centre: Tensor, width: Tensor, limit: float = -math.inf) -> Tensor:
        """Log-probabilities ``[..., K, C]`` of bells around ``centre [..., K]``, of ``width`` levels."""
        return _LogBell.apply(centre, math.sqrt(0.5) / width, self.levels, limit)

    def posterior(self, features: Tensor) -> Tensor:
        """Log-probabilities ``[..., K, C]`` of a bell of ``width`` levels around the value before rounding."""
        return self._log_bell(self._scale(features), torch.full_like(features, self.width), MIN_LOG_PROB)

    def prior(self, output: Tensor, latent: Latent) -> Tensor:
        """Movements and widths ``[..., 2 K]`` from z_t to log-probabilities ``[..., K, C]``."""
        centre, width = self._moved(output, latent)
        # Not clamped: a prior that was sure and wrong must feel how far off it was.
        return self._log_bell(centre, width)

    def _moved(self, output: Tensor, latent: Latent) -> tuple[Tensor, Tensor]:
        """Centre and width of the prior's bell, in levels, ``[..., K]`` each."""
        movement, width = output.chunk(2, -1)
        width = nn.functional.softplus(width) + 0.5 * self.width
        return (latent.value + movement + 1) * (0.5 * (self.num_classes - 1)), width

    def sample_prior(self, output: Tensor, latent: Latent) -> Latent:
        """Draw levels, ``[..., Z]``."""
        centre, width = self._moved(output.detach(), latent.detach())
        scale = math.sqrt(0.5) / width
        # Against the likeliest level, and not normalised: the draw divides by the sum.
        likeliest = ((centre.clamp(0, self.num_classes - 1).round() - centre) * scale).square()
        distance = (
            (self.levels - centre.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).square_().sub_(likeliest.unsqueeze(-1))
        )
        return self.from_index(sample_index(distance.clamp_(max=-MIN_LOG_PROB).neg_().exp_()))

    def sample_posterior(self, features: Tensor) -> Latent:
        """Nearest level; gradients pass as if there were no rounding (straight-through)."""
        value = self._scale(features)
        value = value + (value.round() - value).detach() if value.requires_grad else value.round()
        return Latent(value * (2 / (self.num_classes - 1)) - 1)

    def from_index(self, index: Tensor) -> Latent:
        """Level index to its value in [-1, 1]."""
        return Latent(index.to(self.levels.dtype) * (2 / (self.num_classes - 1)) - 1)

    def to_index(self, latent: Latent) -> Tensor:
        """Value in [-1, 1] to the nearest level's index."""
        return ((latent.value + 1) * (0.5 * (self.num_classes - 1))).round().long()


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
