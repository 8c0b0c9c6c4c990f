"""Sums over the batch of all processes that learn together, where a loss or a statistic needs the whole of it.

Each process has a part of every batch. DistributedDataParallel averages their gradients, which equals the gradient of
the whole batch only if every loss is a mean over the whole batch: parts differ in their numbers of living agents.
Within :func:`learning_together` the functions below therefore count over all processes. Outside of it they change
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Not a ContextVar, whose value torch.compile cannot read.
_group: dist.ProcessGroup | None = None


@contextmanager
def learning_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let sums in this block run over all processes of a group; ``None``: over this process alone.

    All processes of the group have to compute the same things in the same order, or they wait for each other.

    Args:
        group: processes that each have a part of the batch.

    Examples:
        >>> with learning_together(None):
        ...     sum_over_processes(torch.tensor(3.0))
        (tensor(3.),)
    """
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def sum_over_processes(*values: Tensor) -> tuple[Tensor, ...]:
    """Sum tensors over all processes, for a loss that is the same number in every process.

    After DistributedDataParallel has averaged the gradients, they are those of the whole batch's loss. For this, every
    process has to compute the same number from a sum. So a sum must not enter the terms of another sum, since these
    differ between processes.

    All tensors of a call are sent together. A call takes about a millisecond on a CPU, because it waits for the slowest
    process.

    Args:
        values: floating-point numbers, of the same shapes in every process.

    Examples:
        >>> sum_over_processes(torch.tensor([1.0, 2.0]), torch.tensor(3.0))
        (tensor([1., 2.]), tensor(3.))
    """
    if _group is None:
        return values
    packed = _Sum.apply(torch.cat([value.flatten() for value in values]), _group)
    parts = packed.split([value.numel() for value in values])
    return tuple(part.view_as(value) for part, value in zip(parts, values, strict=True))


def largest_of_processes(value: Tensor) -> Tensor:
    """Elementwise maximum over all processes, without a gradient.

    Args:
        value: of the same shape in every process.

    Examples:
        >>> largest_of_processes(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return value if _group is None else gather_from_processes(value.unsqueeze(0)).amax(0)


def gather_from_processes(value: Tensor) -> Tensor:
    """Concatenation of the tensors of all processes along the first dimension, without a gradient.

    Args:
        value: of the same shape in every process.

    Examples:
        >>> gather_from_processes(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if _group is None:
        return value
    parts = [torch.empty_like(value) for _ in range(_group.size())]
    dist.all_gather(parts, value.detach().contiguous(), group=_group)
    return torch.cat(parts)


class _Sum(torch.autograd.Function):
    """An all-reduce whose gradient needs no communication.

    The all-reduce of ``torch.distributed.nn`` sums the gradients of all processes. Here they are equal, since the loss
    is the same number everywhere.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.processes = group.size()
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.processes, None
