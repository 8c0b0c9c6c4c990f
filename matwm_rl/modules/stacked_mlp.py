"""MLPs with several stacked copies of their weights: normalisation, sequences of layers, and trunks that all share.

Everything here is agent-major, ``[N, *batch, F]``, as in :mod:`matwm_rl.modules.stacked`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from matwm_rl.arguments import check_ints, read_index
from matwm_rl.functional import at_least_float32
from matwm_rl.modules.stacked import Runs, StackedLinear, runs_of, split_runs

EPSILON = 1e-5
"""Epsilon of the layer norms; PyTorch's default."""


class _NormSiLU(torch.autograd.Function):
    """``silu(layer_norm(x) * weight + bias)``, which keeps the normalised x alone for its gradient.

    Autograd keeps two more tensors of the size of x and takes every step into fresh memory; at 768 starts x 12 steps of
    four agents they are 75 MB each, and clearing them costs more than computing them.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPSILON)
        return nn.functional.silu(torch.addcmul(bias, normed, weight), inplace=True), normed, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, bias = inputs
        _, normed, rstd = output
        ctx.mark_non_differentiable(normed, rstd)
        ctx.set_materialize_grads(False)  # no zeros of the size of x for outputs that have no gradient
        ctx.save_for_backward(normed, rstd, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed, rstd, weight, bias = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad.contiguous(), torch.addcmul(bias, normed, weight))
        to_bias, to_weight = grad.sum_to_size(bias.shape), (normed * grad).sum_to_size(weight.shape)
        # The gradient of a layer norm of what is normalised already (mean 0, deviation 1), over x's own deviation.
        to_x = torch.ops.aten.native_layer_norm_backward(
            grad.mul_(weight),
            normed,
            list(normed.shape[-1:]),
            torch.zeros_like(rstd),
            torch.ones_like(rstd),
            None,
            None,
            [True, False, False],
        )[0]
        return to_x.mul_(rstd), to_weight, to_bias

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
        """Apply the function to an ensemble of parameters, which adds a dimension in front of all inputs."""
        x, weight, bias = (
            value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(inputs, in_dims, strict=True)
        )
        return _NormSiLU.apply(x.expand(info.batch_size, *x.shape[1:]), weight, bias), (0, 0, 0)


class StackedNormSiLU(nn.Module):
    """Layer normalisation with a stack of gains and offsets, then SiLU; ``[N, *batch, F]``.

    Args:
        features: F.
        stack_index: for each of the N agents, which gain and offset of the stack it uses; see :class:`StackedLinear`.

    Examples:
        >>> StackedNormSiLU(4, stack_index=[0, 0])(torch.randn(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """

    stack_index: Tensor

    def __init__(self, features: int, stack_index: Sequence[int]) -> None:
        super().__init__()
        check_ints(1, features=features)
        stack_index = read_index("stack_index", stack_index)
        stack = max(stack_index) + 1
        self.per_agent = list(stack_index) == list(range(stack))
        self.runs = runs_of(stack_index)
        self.register_buffer("stack_index", torch.tensor(list(stack_index)), persistent=False)
        self.weight = nn.Parameter(torch.empty(stack, features))
        self.bias = nn.Parameter(torch.empty(stack, features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to gains of 1 and offsets of 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, apply agent n's gain and offset, then SiLU."""
        flat = at_least_float32(x).reshape(x.shape[0], -1, x.shape[-1])
        weight, bias = (p if self.per_agent else p[self.stack_index] for p in (self.weight, self.bias))
        return _NormSiLU.apply(flat, weight.unsqueeze(1), bias.unsqueeze(1))[0].view(x.shape)

    def forward_runs(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Apply the layer to runs of agents that share weights, see :class:`StackedSequential`."""
        weights, biases = self.weight.unbind(), self.bias.unbind()
        return [
            _NormSiLU.apply(at_least_float32(part), weights[index], biases[index])[0]
            for part, (index, _) in zip(parts, self.runs, strict=True)
        ]


class StackedSequential(nn.Sequential):
    """Stacked layers one after the other, ``[N, *batch, in] -> [N, *batch, out]``.

    Where groups of agents share weights, each group's states go through all layers before they are put together again:
    ``nn.Sequential`` would put them together, and take them apart, at every layer.

    Args:
        layers: stacked layers over the same agents, or sequences of such.

    Examples:
        >>> index = [0, 0, 1]
        >>> StackedSequential(StackedNormSiLU(4, index), StackedLinear(4, 2, index))(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 2])
    """

    @property
    def runs(self) -> Runs:
        """The runs of agents that share weights; none without layers."""
        return next((layer.runs for layer in self._stacked()), [])

    def _stacked(self) -> Iterator[StackedLinear | StackedNormSiLU | StackedSequential]:
        for layer in self:
            assert isinstance(layer, StackedLinear | StackedNormSiLU | StackedSequential)
            yield layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply agent n's weights to ``x[n]``."""
        runs = self.runs
        if len(runs) in (0, 1, x.shape[0]):
            out: Tensor = super().forward(x)
            return out
        return torch.cat(self.forward_runs(split_runs(x, runs)))

    def forward_runs(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Apply all layers to the runs of agents."""
        for layer in self._stacked():
            parts = layer.forward_runs(parts)
        return list(parts)


class StackedMLP(StackedSequential):
    """A stack of MLPs, ``[N, *batch, in] -> [N, *batch, out]``: linear, layer norm, SiLU, ..., linear.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        stack_index: for each of the N agents, which MLP of the stack it uses; see :class:`StackedLinear`.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.

    Examples:
        >>> StackedMLP(3, 2, stack_index=range(4), num_cells=8, depth=2)(torch.zeros(4, 5, 3)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stack_index: Sequence[int],
        num_cells: int,
        depth: int,
    ) -> None:
        check_ints(1, in_features=in_features, out_features=out_features, num_cells=num_cells)
        check_ints(0, depth=depth)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [StackedLinear(in_features, num_cells, stack_index), StackedNormSiLU(num_cells, stack_index)]
            in_features = num_cells
        # Zero: the policy starts uniform (broad, if continuous) and the value at 0, whatever the seed.
        layers.append(StackedLinear(in_features, out_features, stack_index, zero_init=True))
        super().__init__(*layers)


def mlp(in_features: int, num_cells: int, depth: int) -> nn.Sequential:
    """Shared trunk: ``depth`` times linear, layer norm, SiLU.

    Examples:
        >>> mlp(3, 8, depth=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 8])
    """
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(in_features, num_cells), nn.LayerNorm(num_cells), nn.SiLU()]
        in_features = num_cells
    return nn.Sequential(*layers)
