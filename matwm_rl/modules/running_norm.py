"""Running mean and spread of what an environment gives, so that networks see every unit alike (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_ints, check_numbers, read_index
from matwm_rl.checks import check_shape
from matwm_rl.processes import largest_of_processes, sum_over_processes

RARE = 20.0
"""A number that is nearly always the same counts as if its spread were its largest deviation over this."""
NEGLIGIBLE = 1e-4
"""A number counts as a constant if its spread is below this share of the usual spread, or of its own mean."""
LEAST = 0.5
"""A number whose spread is below this share of the usual one is magnified to this share."""


class RunningNorm(nn.Module):
    """Bring the numbers of a group of agents to mean 0 and a common spread, by what has been seen of them (ours).

    Every environment has its own units: a package moves 0.002 in a step, an agent 0.1, a reward is 10 or 0.01. One
    posterior width, one learning rate and one set of loss weights cannot suit all of them. Numbers of a similar spread
    share one unit, so that the coordinates of points keep their geometry. Numbers with less than half the usual spread
    are scaled up to half of it. Before the first :meth:`update` nothing is changed.

    TorchRL's ``VecNormV2`` is a transform of an environment: replay would hold numbers normalised with outdated
    statistics. It also does not distinguish groups or dead agents. This module is part of a model and its checkpoint.

    Args:
        size: D, how many numbers there are.
        group_index: for each of the N agents its group, which has statistics of its own.
        spread: usual standard deviation of the normalised numbers.
        min_rate: share of the newest batch in the running statistics. While there are few batches it is larger, so that
            all count alike.

    Raises:
        ValueError: if ``size`` or ``spread`` is not positive, ``min_rate`` does not lie in (0, 1], or an input has
            another shape.

    Attributes:
        mean: ``[G, D]``, of each group.
        scale: ``[G, D]``, what one unit of the normalised number stands for.
        unit: ``[G, 1]``, the scale that numbers of the usual spread have.

    Examples:
        >>> norm = RunningNorm(1, group_index=[0, 1])
        >>> seen = torch.tensor([[0.0, 0.2], [10.0, 30.0]]).unsqueeze(-1)  # two agents, two steps
        >>> norm.update(seen)
        >>> norm.normalize(seen).squeeze(-1)
        tensor([[-1.,  1.],
                [-1.,  1.]])
    """

    group: Tensor
    mean: Tensor
    variance: Tensor
    reach: Tensor
    scale: Tensor
    unit: Tensor
    batches: Tensor

    def __init__(
        self,
        size: int,
        *,
        group_index: Sequence[int],
        spread: float = 1.0,
        min_rate: float = 0.005,
    ) -> None:
        super().__init__()
        check_ints(1, size=size)
        check_numbers(above=0, spread=spread)
        check_numbers(above=0, maximum=1, min_rate=min_rate)
        index = read_index("group_index", group_index)
        self.size, self.spread, self.min_rate = size, spread, min_rate
        self.num_groups = max(index) + 1
        self.register_buffer("group", torch.tensor(index), persistent=False)
        for name in ("mean", "variance", "reach"):
            self.register_buffer(name, torch.zeros(self.num_groups, size))
        self.register_buffer("scale", torch.ones(self.num_groups, size))
        self.register_buffer("unit", torch.ones(self.num_groups, 1))
        self.register_buffer("batches", torch.zeros(self.num_groups, 1))

    @torch.no_grad()
    def update(self, value: Tensor, valid: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            value: ``[N, *batch, D]``.
            valid: bool ``[N, *batch]``, which count; ``None``: all. What is not finite never counts, and a group of
                which nothing counts keeps its statistics.
        """
        check_shape(value, "RunningNorm takes in", (len(self.group), *value.shape[1:-1], self.size))
        value = value.flatten(1, -2).to(self.mean)
        finite = value.isfinite().all(-1)
        weight = (finite if valid is None else finite & valid.flatten(1)).to(value)
        value = value.masked_fill(~finite.unsqueeze(-1), 0.0)
        weight = weight.unsqueeze(-1)

        def sum_of(numbers: Tensor) -> Tensor:
            # No matrix product: it may be rounded to bfloat16, where counts above 256 are inexact.
            of_agents = (numbers * weight).sum(1)
            return torch.zeros_like(of_agents[: self.num_groups]).index_add(0, self.group, of_agents)

        count, total = sum_over_processes(sum_of(torch.ones_like(weight)), sum_of(value))
        seen, count = count > 0, count.clamp(min=1.0)
        self.batches += seen
        rate = torch.where(seen, (1 / self.batches.clamp(min=1.0)).clamp(min=self.min_rate), 0.0)
        before = self.mean.clone()
        self.mean.lerp_(total / count, rate)
        deviation = value - self.mean[self.group].unsqueeze(1)
        moved = self.variance + (self.mean - before).square()
        (squares,) = sum_over_processes(sum_of(deviation.square()))
        self.variance.copy_(torch.where(seen, moved.lerp(squares / count, rate), self.variance))
        farthest = largest_of_processes((deviation.abs() * weight).amax(1))
        self.reach.scatter_reduce_(0, self.group.unsqueeze(-1).expand_as(farthest), farthest, "amax")
        self._rescale()

    def _rescale(self) -> None:
        deviation = torch.maximum(self.variance.sqrt(), self.reach / RARE)
        deviation = torch.where(deviation > NEGLIGIBLE * self.mean.abs(), deviation, 0.0)
        varying = (deviation > 0).sum(-1, keepdim=True).clamp(min=1)
        usual = (deviation.square().sum(-1, keepdim=True) / varying).sqrt()
        is_constant = deviation <= NEGLIGIBLE * usual
        deviation = torch.where(is_constant, usual, torch.minimum(deviation / LEAST, usual))
        for scale, spread in ((self.scale, deviation), (self.unit, usual)):
            scale.copy_(torch.where(spread > 0, spread / self.spread, 1.0))

    @property
    def agent_mean(self) -> Tensor:
        """``[N, D]``, ``mean`` of every agent's group."""
        return self.mean[self.group]

    @property
    def agent_scale(self) -> Tensor:
        """``[N, D]``, ``scale`` of every agent's group."""
        return self.scale[self.group]

    def normalize(self, value: Tensor) -> Tensor:
        """Return ``[N, *batch, D]`` less their mean, over their scale."""
        return (value - _like(value, self.agent_mean)) / _like(value, self.agent_scale)

    def rescale(self, difference: Tensor) -> Tensor:
        """Return differences ``[N, *batch, D]`` of two values, over their scale."""
        return difference / _like(difference, self.agent_scale)

    def restore(self, normalized: Tensor) -> Tensor:
        """Return ``[N, *batch, D]`` in the environment's units: the inverse of :meth:`normalize`."""
        return torch.addcmul(_like(normalized, self.agent_mean), normalized, _like(normalized, self.agent_scale))

    def in_one_unit(self, value: Tensor) -> Tensor:
        """Return ``[N, *batch, D]`` over ``unit``, one scale for all D, which keeps the ratios of distances."""
        return value / _like(value, self.unit[self.group])


def _like(value: Tensor, statistic: Tensor) -> Tensor:
    """View ``[N, D]`` such that it can be taken with ``[N, *batch, D]``."""
    return statistic.view(statistic.shape[0], *[1] * (value.ndim - 2), statistic.shape[-1])
