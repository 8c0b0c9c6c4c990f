"""The distributions of an agent's action: a choice among legal actions, or a vector of bounded numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torchrl.modules import MaskedCategorical

from matwm_rl.checks import check_shape, check_type
from matwm_rl.functional import sample_index, softmax_over_few

INVERSE_ROOT_2 = math.sqrt(0.5)
LOG_ROOT_2_PI = 0.5 * math.log(2 * math.pi)
LEAST_SCALE, LARGEST_SCALE = 0.1, 1.0
"""Bounds of the scale of :class:`BoxDistribution`: those of DreamerV3's bounded normal distribution."""


class ActionDistribution(MaskedCategorical):
    """TorchRL's ``MaskedCategorical``, drawn by :func:`~matwm_rl.functional.sample_index`.

    ``torch.multinomial`` takes four times as long, and distributions' own checks make a GPU wait at every step.

    Args:
        logits: ``[*batch, A]``.
        mask: bool ``[*batch, A]``, which actions are legal.

    Raises:
        ValueError: without a mask, or with one of another shape than the logits'.

    Examples:
        >>> mask = torch.tensor([False, True, False])
        >>> ActionDistribution(logits=torch.zeros(3), mask=mask).sample()
        tensor(1)
    """

    _validate_args = False

    def __init__(self, *, logits: Tensor, mask: Tensor) -> None:
        if mask is None:
            raise ValueError("'action_mask' is missing: it says which actions are legal")
        check_type(mask, "'action_mask' is read", torch.bool)
        super().__init__(logits=logits, mask=check_shape(mask, "'action_mask' is read", logits.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probabilities ``[*batch]`` of actions ``[*batch]``."""
        check_type(value, what := "a discrete agent's action is read", torch.int64)
        shape = (*value.shape[: value.ndim + 1 - self.logits.ndim], *self.logits.shape[:-1])
        return super().log_prob(check_shape(value, what, shape))

    def sample(self, sample_shape: torch.Size | Sequence[int] | None = None) -> Tensor:
        """Draw actions ``[*sample_shape, *batch]``."""
        probs = softmax_over_few(self.logits)
        return sample_index(probs.expand(*(sample_shape or ()), *probs.shape))

    @property
    def deterministic_sample(self) -> Tensor:
        """The likeliest actions ``[*batch]``; TorchRL asks for them under deterministic exploration."""
        return self.logits.argmax(-1)


class BoxDistribution(Distribution):
    r"""Distribution of a vector of numbers from -1 to 1, each of them drawn by a truncated normal of its own.

    .. math::
        p(a) = \frac{1}{s Z} \phi\left(\frac{a - m}{s}\right), \qquad
        Z = \Phi\left(\frac{1 - m}{s}\right) - \Phi\left(\frac{-1 - m}{s}\right)

    with the location :math:`m = \tanh(x)` and the scale :math:`s` from 0.1 to 1, a sigmoid of :math:`y + 2`. Outputs
    :math:`x = y = 0` of a network give a broad distribution around 0. As the location never leaves the bounds,
    densities, entropies and their gradients are finite everywhere, at the bounds too.

    TorchRL's ``TruncatedNormal`` looks at the values of its arguments when it is made and when it is asked for
    log-probabilities: a GPU waits each time, and CUDA graphs are impossible. It has no mask.

    Args:
        logits: ``[*batch, 2 A]``, the A numbers x and then the A numbers y.
        mask: bool ``[*batch, A]``, which numbers the agent has. The others are 0 and count as certain.

    Raises:
        ValueError: without a mask, or with one of another shape.

    Examples:
        >>> dist = BoxDistribution(logits=torch.zeros(3, 4), mask=torch.tensor([True, False]).expand(3, 2))
        >>> dist.log_prob(torch.zeros(3, 2)).shape, dist.mode.tolist()[0]
        (torch.Size([3]), [0.0, 0.0])
        >>> (dist.sample()[:, 1] == 0).all()
        tensor(True)
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    _validate_args = False

    def __init__(self, *, logits: Tensor, mask: Tensor) -> None:
        if mask is None:
            raise ValueError("'action_mask' is missing: it says which numbers of an action an agent has")
        check_type(mask, "'action_mask' is read", torch.bool)
        size = logits.shape[-1] // 2
        self.mask = check_shape(mask, "'action_mask' is read", (*logits.shape[:-1], size))
        self.logits = logits
        self.loc, self.scale = box_parameters(logits)
        # The bounds, in standard deviations from the location; one is at most 0, the other at least 0.
        self._low, self._high = (-1 - self.loc) / self.scale, (1 - self.loc) / self.scale
        self._erf_low, self._erf_high = (torch.erf(bound * INVERSE_ROOT_2) for bound in (self._low, self._high))
        self._mass = 0.5 * (self._erf_high - self._erf_low)  # Z, a sum of two positive terms
        super().__init__(logits.shape[:-1], torch.Size([size]))

    @property
    def mode(self) -> Tensor:
        """The likeliest actions ``[*batch, A]``."""
        return torch.where(self.mask, self.loc, 0.0)

    @property
    def deterministic_sample(self) -> Tensor:
        """The likeliest actions ``[*batch, A]``; TorchRL asks for them under deterministic exploration."""
        return self.mode

    @property
    def mean(self) -> Tensor:
        """Mean actions ``[*batch, A]``."""
        shift = self.scale * (_phi(self._low) - _phi(self._high)) / self._mass
        return torch.where(self.mask, self.loc + shift, 0.0)

    def sample(self, sample_shape: torch.Size | Sequence[int] | None = None) -> Tensor:
        """Draw actions ``[*sample_shape, *batch, A]``, by the inverse of the cumulative distribution."""
        with torch.no_grad():
            low, high = self._erf_low, self._erf_high
            uniform = torch.rand(*(sample_shape or ()), *low.shape, dtype=low.dtype, device=low.device)
            # erfinv is infinite at 1, which is what erf is rounded to above 4.
            limit = 1 - torch.finfo(low.dtype).eps
            standard = torch.erfinv((low + uniform * (high - low)).clamp(-limit, limit)) / INVERSE_ROOT_2
            return torch.where(self.mask, (self.loc + self.scale * standard).clamp(-1.0, 1.0), 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-densities ``[*batch]`` of actions ``[*batch, A]``, in nats; actions are taken to be in the bounds."""
        check_type(value, what := "a box agent's action is read", self.logits.dtype)
        shape = (*value.shape[: value.ndim - self.mask.ndim], *self.mask.shape)
        standard = (check_shape(value, what, shape) - self.loc) / self.scale
        density = -0.5 * standard.square() - LOG_ROOT_2_PI - (self.scale * self._mass).log()
        return torch.where(self.mask, density, 0.0).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropies ``[*batch]`` in nats; at most log 2 for every number."""
        edge = (self._low * _phi(self._low) - self._high * _phi(self._high)) / (2 * self._mass)
        return torch.where(self.mask, 0.5 + LOG_ROOT_2_PI + (self.scale * self._mass).log() + edge, 0.0).sum(-1)


def box_parameters(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the locations and the scales of a :class:`BoxDistribution`.

    Args:
        logits: ``[*batch, 2 A]``.

    Returns:
        two tensors ``[*batch, A]``.

    Examples:
        >>> [part.item() for part in box_parameters(torch.tensor([0.0, 0.0]))]
        [0.0, 0.8927...]
    """
    raw_loc, raw_scale = logits.chunk(2, -1)
    return raw_loc.tanh(), LEAST_SCALE + (LARGEST_SCALE - LEAST_SCALE) * (raw_scale + 2).sigmoid()


def _phi(x: Tensor) -> Tensor:
    """Density of the standard normal distribution."""
    return (-0.5 * x.square() - LOG_ROOT_2_PI).exp()
