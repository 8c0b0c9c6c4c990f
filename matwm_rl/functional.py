"""Pure functions on tensors: the layout of agents, precision, the episodes of a sequence, and sampling.

They use no modules and no keys. The maths of the losses is in :mod:`matwm_rl.loss_functions`. Dimension letters: N
agents, T time, F features, A actions, K latent dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from matwm_rl.torchrl_internals import is_batched


def keep_random_state(device: torch.device | None) -> AbstractContextManager[None]:
    """Restore torch's random states, of the CPU and of a device, after the block.

    Args:
        device: that draws random numbers in the block; ``None``: the CPU alone does.

    Examples:
        >>> with keep_random_state(None):
        ...     first = torch.rand(3)
        >>> torch.equal(torch.rand(3), first)
        True
    """
    return torch.random.fork_rng([device] if device is not None and device.type == "cuda" else [])


def agents_first(value: Tensor, event_dims: int = 1) -> Tensor:
    """Move the agent dimension to the front: ``[*batch, N, *event] -> [N, *batch, *event]`` (a view).

    Keys hold agents where TorchRL holds them, just before the features; modules compute agent-major, so that stacked
    per-agent weights are one batched matrix product.

    Args:
        value: the tensor.
        event_dims: number of dimensions behind the agent dimension.

    Examples:
        >>> agents_first(torch.zeros(5, 7, 3, 2)).shape
        torch.Size([3, 5, 7, 2])
    """
    return value.movedim(-1 - event_dims, 0)


def agents_last(value: Tensor, event_dims: int = 1) -> Tensor:
    """Inverse of :func:`agents_first`: ``[N, *batch, *event] -> [*batch, N, *event]`` (a view).

    Args:
        value: the tensor.
        event_dims: number of dimensions behind the agent dimension, in the result.

    Examples:
        >>> agents_last(torch.zeros(3, 5, 7, 2)).shape
        torch.Size([5, 7, 3, 2])
    """
    return value.movedim(0, value.ndim - 1 - event_dims)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Type in which matrix products of ``tensor`` are taken: autocast's where it is on, else the tensor's own.

    Args:
        tensor: a factor; its device tells which autocast applies.

    Examples:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     compute_dtype(torch.zeros(1))
        torch.bfloat16
    """
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which matrix products on ``device`` are taken in ``"float32"`` (as they come) or ``"bfloat16"``.

    Args:
        device: that of the factors.
        precision: of the products; weights and sums stay as they are.

    Raises:
        ValueError: for any other precision.

    Examples:
        >>> with autocast(torch.device("cpu"), "bfloat16"):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def at_least_float32(value: Tensor) -> Tensor:
    """At least float32: what probabilities and losses are computed in, whatever precision the products were taken in.

    Args:
        value: of any floating-point type; returned as it is where that is wide enough.

    Examples:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return value.to(torch.promote_types(value.dtype, torch.float32))


def segment_ids(done: Tensor) -> Tensor:
    """Number the episodes inside slices.

    Args:
        done: bool ``[..., T]``, true where an episode ends *after* the step.

    Returns:
        int64 ``[..., T]``: 0 for the steps of the slice's first episode, 1 for those of the next, and so on.

    Examples:
        >>> segment_ids(torch.tensor([False, True, False, False])).tolist()
        [0, 0, 1, 1]
    """
    ended = done.long().cumsum(-1)
    return torch.cat([torch.zeros_like(ended[..., :1]), ended[..., :-1]], -1)


def causal_segment_mask(segments: Tensor) -> Tensor:
    """Attention mask that is causal and confined to one episode.

    Args:
        segments: ``[..., T]`` as given by :func:`segment_ids`.

    Returns:
        bool ``[..., T, T]``, true where query (row) may attend to key (column).

    Examples:
        >>> causal_segment_mask(torch.tensor([0, 0, 1])).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    same = segments.unsqueeze(-1) == segments.unsqueeze(-2)
    return same.tril()


def shift_within_segments(value: Tensor, segments: Tensor) -> Tensor:
    """Delay a sequence by one step, with zeros at the first step of every episode.

    Args:
        value: ``[..., T, F]``.
        segments: ``[..., T]``.

    Returns:
        ``[..., T, F]``: at t the value of t-1 if both lie in the same episode, else zero.

    Examples:
        >>> shift_within_segments(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1])).squeeze(-1).tolist()
        [0.0, 1.0, 0.0]
    """
    delayed = torch.cat([torch.zeros_like(value[..., :1, :]), value[..., :-1, :]], -2)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[..., 1:] = segments[..., 1:] != segments[..., :-1]
    return delayed.masked_fill(first.unsqueeze(-1), 0.0)


def may_need_gradient(value: Tensor) -> bool:
    """Whether a gradient may be wanted of a tensor.

    Under ``torch.vmap`` tensors do not tell: it may be of all, unless gradients are off.

    Args:
        value: of any shape.

    Examples:
        >>> may_need_gradient(torch.ones(2)), may_need_gradient(torch.ones(2, requires_grad=True))
        (False, True)
    """
    return value.requires_grad or (torch.is_grad_enabled() and is_batched(value))


def softmax_over_few(logits: Tensor) -> Tensor:
    """Softmax over a last dimension of few entries, such as actions.

    The same as ``logits.softmax(-1)``, which on CPU takes 15 times as long where rows are shorter than its vectors.

    Args:
        logits: ``[..., A]``.

    Returns:
        probabilities ``[..., A]``.

    Examples:
        >>> softmax_over_few(torch.zeros(2, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


def of_teammates(entry: Tensor, dim: int = 0) -> Tensor:
    """Give each agent the entries of its teammates, in agent order.

    Args:
        entry: ``[..., N, ...]``.
        dim: the agents' dimension, counted from the front.

    Returns:
        ``[..., N, N-1, ...]``.

    Examples:
        >>> of_teammates(torch.tensor([10, 11, 12])).tolist()
        [[11, 12], [10, 12], [10, 11]]
    """
    num_agents = entry.shape[dim]
    agent = torch.arange(num_agents, device=entry.device).unsqueeze(-1)
    other = torch.arange(num_agents - 1, device=entry.device)
    return entry.movedim(dim, 0)[other + (other >= agent).long()].movedim((0, 1), (dim, dim + 1)).contiguous()


def first_entries(counts: Sequence[int]) -> Tensor:
    """Mark the first entries of every row, as many as ``counts`` say.

    Args:
        counts: of each of N rows; the largest is A.

    Returns:
        bool ``[N, A]``.

    Examples:
        >>> first_entries([2, 1]).tolist()
        [[True, True], [True, False]]
    """
    return torch.arange(max(counts)) < torch.tensor(list(counts)).unsqueeze(-1)


def random_index(mask: Tensor) -> Tensor:
    """Draw one index per row, uniformly from those that a mask allows.

    Args:
        mask: bool ``[*batch, A]``, at least one true per row.

    Returns:
        ``[*batch]``, int64.

    Examples:
        >>> random_index(torch.tensor([[False, True, False], [False, False, True]]))
        tensor([1, 2])
    """
    return torch.multinomial(mask.flatten(0, -2).float(), 1).view(mask.shape[:-1])


def sample_index(weights: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draw category indices.

    On a CPU, they are drawn by the inverse of the cumulative distribution. This needs one uniform number per draw, and
    is ten to thirty times faster than ``OneHotCategorical.sample``. On a GPU, where cumulative sums are slow, they are
    drawn by :func:`race`, as in ``torch.multinomial``.

    Args:
        weights: ``[..., C]``, probabilities up to a factor.
        uniform: the uniform numbers ``[..., 1]`` of the cumulative distribution; by default new ones.

    Returns:
        int64 ``[...]``.

    Examples:
        >>> sample_index(torch.tensor([[0.0, 1.0], [3.0, 0.0]])).tolist()
        [1, 0]
    """
    if weights.is_cuda and uniform is None:
        return race(weights.detach())
    cumulative = weights.detach().cumsum(-1)
    uniform = torch.rand_like(cumulative[..., :1]) if uniform is None else uniform
    # Scaled by the rounded total and not by 1, so that no draw lies beyond the last class.
    threshold = uniform * cumulative[..., -1:]
    # Compared in place: sums of numbers take a third of the time that sums of booleans take on CPU.
    return cumulative.le_(threshold).sum(-1).long().clamp_(max=weights.shape[-1] - 1)


def race(weights: Tensor) -> Tensor:
    """Draw category indices: every category gets an exponential random time, and the shortest time wins.

    Args:
        weights: ``[..., C]``, rates of the exponential distributions: probabilities up to a factor, not all zero.

    Returns:
        int64 ``[...]``.

    Examples:
        >>> race(torch.tensor([[0.0, 1.0], [3.0, 0.0]])).tolist()
        [1, 0]
    """
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def one_hot_classes(latent: Tensor, num_classes: int) -> Tensor:
    """Classes of flattened one-hot vectors: ``[..., K * C]`` to int64 ``[..., K]``.

    A product with 0, 1, 2, ...: three times as fast as ``argmax`` on CPU, and a tenth of what a first layer saves that
    looks its rows up.

    Args:
        latent: one-hot vectors; the rounding errors of straight-through samples do no harm.
        num_classes: C.

    Examples:
        >>> one_hot_classes(torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), 3)
        tensor([2, 0])
    """
    classes = torch.arange(num_classes, dtype=latent.dtype, device=latent.device)
    index = (latent.detach().unflatten(-1, (-1, num_classes)) @ classes).round().long()
    # A NaN becomes some integer, and rows that a layer does not have must not be looked up; the losses show the NaN.
    return index.clamp_(0, num_classes - 1)
