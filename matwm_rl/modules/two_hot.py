"""Scalars as distributions over bins: rewards and values (docs/algorithm.md, World model)."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor
from torchrl.modules import SymExpTwoHot
from torchrl.modules.functional import symexp, symlog

from matwm_rl.arguments import check_ints, check_numbers, read_choice
from matwm_rl.functional import agents_first
from matwm_rl.modules.running_norm import RunningNorm


class Interpolation(StrEnum):
    """In which space a target is split between its two bins, and bins are averaged."""

    raw = "raw"
    """TorchRL's and DreamerV3's. The average is unbiased: a reward of 10 with probability 0.1 decodes to 1."""
    symlog = "symlog"
    """STORM's, hence the paper's. The same reward decodes to 0.27."""


class TwoHot(SymExpTwoHot):
    """Two-hot distributions over 255 bins that are evenly spaced in symlog space.

    Args:
        num_bins: number of bins.
        limit: the bins span ``symexp(-limit)`` to ``symexp(limit)``; targets beyond saturate.
        interpolation: ``"raw"`` or ``"symlog"``; see :class:`Interpolation`.
        norm: of one number for each agent. The bins then are those of normalised numbers, and the last dimension of
            targets is the agents'. :meth:`update` takes in what is seen.

    Raises:
        ValueError: if an argument is not among these; by :meth:`loss`, if targets do not fit the logits.

    Examples:
        >>> two_hot = TwoHot(255)
        >>> target = torch.tensor([0.0, 10.0])
        >>> probs = two_hot.encode(target).mean(0)
        >>> two_hot.decode(probs.log())
        tensor(5.0000)
        >>> symlog = TwoHot(255, interpolation="symlog")
        >>> symlog.decode(symlog.encode(target).mean(0).log())
        tensor(2.3166)
    """

    def __init__(
        self,
        num_bins: int = 255,
        *,
        limit: float = 20.0,
        interpolation: str = Interpolation.raw,
        norm: RunningNorm | None = None,
    ) -> None:
        check_ints(2, num_bins=num_bins)
        check_numbers(above=0, maximum=80, limit=limit)  # beyond, symexp is infinite in float32
        super().__init__(num_bins)
        self.interpolation = read_choice("interpolation", interpolation, Interpolation)
        grid = torch.linspace(-limit, limit, num_bins, dtype=torch.float64)
        bins = symexp(grid) if interpolation == Interpolation.raw else grid
        self.norm = norm
        # Constants, rebuilt by the constructor: kept out of checkpoints, where every head would store them again.
        self.register_buffer("bins", bins.to(torch.get_default_dtype()), persistent=False)

    def update(self, target: Tensor, valid: Tensor) -> None:
        """Let ``norm``, if there is one, take in targets ``[*batch, N]`` where ``valid [*batch, N]`` is true."""
        if self.norm is not None:
            self.norm.update(agents_first(target.unsqueeze(-1)), agents_first(valid, 0))

    def encode(self, target: Tensor) -> Tensor:
        """Return two-hot probabilities ``[..., num_bins]`` of raw targets ``[...]``.

        The same as TorchRL's, which takes twice as long and fails under ``torch.vmap``.
        """
        upper, weight = self._place(self._normalized(target), target.dtype)
        # Zeros of the weights' own kind, which under vmap are an ensemble's.
        probs = weight.new_zeros(*target.shape, self.num_bins)
        return probs.scatter_(-1, torch.stack([upper - 1, upper], -1), torch.stack([1 - weight, weight], -1))

    def decode(self, logits: Tensor) -> Tensor:
        """Return raw scalars ``[...]`` of logits ``[..., num_bins]``."""
        value = super().decode(logits)
        value = value if self.interpolation == Interpolation.raw else symexp(value)
        if self.norm is None:
            return value
        return torch.addcmul(self.norm.agent_mean.squeeze(-1), value, self.norm.agent_scale.squeeze(-1))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy ``[...]`` of logits ``[..., num_bins]`` and raw targets, ``[...]`` or ``[..., 1]``.

        The same as TorchRL's over the two bins alone: the other bins' targets are zeros, and this takes half the time.
        """
        return self.joint_loss(logits, target)

    def joint_loss(self, logits: Tensor, *targets: Tensor) -> Tensor:
        """Return the sum of cross-entropies with several targets, see :meth:`loss`, in one pass over the logits."""
        targets = tuple(target.squeeze(-1) if target.ndim == logits.ndim else target for target in targets)
        for shape in (tuple(target.shape) for target in targets if target.shape != logits.shape[:-1]):
            raise ValueError(f"targets of shape {shape} do not fit logits of shape {tuple(logits.shape)}")
        upper, weight = self._place(torch.stack([self._normalized(target) for target in targets], -1), logits.dtype)
        low, high = logits.log_softmax(-1).gather(-1, torch.cat([upper - 1, upper], -1)).chunk(2, -1)
        return -torch.lerp(low, high, weight).sum(-1)

    def _normalized(self, target: Tensor) -> Tensor:
        if self.norm is None:
            return target
        return (target - self.norm.agent_mean.squeeze(-1)) / self.norm.agent_scale.squeeze(-1)

    def _place(self, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the upper one of the two bins of raw targets ``[...]``, and its weight."""
        bins = self.bins.to(dtype)
        target = target if self.interpolation == Interpolation.raw else symlog(target)
        target = target.to(dtype).clamp(bins[0], bins[-1]).contiguous()
        upper = torch.bucketize(target, bins).clamp(1, self.num_bins - 1)
        low, high = bins[upper - 1], bins[upper]
        return upper, (target - low) / (high - low)
