"""Layers with several stacked copies of their weights: one per agent, or one per group of like agents.

Everything here is agent-major: ``[N, *batch, F]``, so that N networks are one batched matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """Linear layer with a stack of weights, ``[N, *batch, in] -> [N, *batch, out]``.

    TorchRL's ``MultiAgentMLP(share_params=False)`` does the same through ``vmap``, at 1.3 times the cost on CPU and
    without weights that several agents share.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        stack_index: for each of the N agents, which weights of the stack it uses. ``range(N)`` gives every agent
            its own; group indices give every group its own; all zeros one shared layer.
        zero_init: start at zero (output layers of two-hot heads: they then begin by predicting zero).

    Examples:
        >>> layer = StackedLinear(3, 5, stack_index=[0, 0, 1])
        >>> layer.weight.shape, layer(torch.zeros(3, 7, 3)).shape
        (torch.Size([2, 3, 5]), torch.Size([3, 7, 5]))
    """

    stack_index: Tensor

    def __init__(
        self, in_features: int, out_features: int, stack_index: Sequence[int], *, zero_init: bool = False
    ) -> None:
        super().__init__()
        stack = max(stack_index) + 1
        self.num_agents = len(stack_index)
        self.per_agent = list(stack_index) == list(range(stack)) and stack > 1
        # Neighbours that share weights are one product: agents of one group stand together.
        self.runs = [(index, len(list(run))) for index, run in groupby(stack_index)]
        # One shared layer does not ask how many agents there are.
        self.register_buffer("stack_index", torch.tensor(list(stack_index) if stack > 1 else [0]), persistent=False)
        bound = 0.0 if zero_init else 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(stack, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(stack, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Apply agent n's weights to ``x[n]``."""
        return self._product(x, self.weight)

    def from_ones(self, ones: Tensor, behind: Tensor | None = None) -> Tensor:
        """Apply the layer to a multi-hot input by adding up rows of weights: a hundredth of the arithmetic.

        Args:
            ones: int64 ``[N, *batch, K]``, positions of the ones in the input's first part.
            behind: ``[N, *batch, R]``, the input's last R features, if it has any besides.
        """
        first_row = (self.stack_index * self.weight.shape[1]).view(-1, *[1] * (ones.ndim - 1))
        rows = (ones + first_row).flatten(0, -2)
        out = nn.functional.embedding_bag(rows, self.weight.flatten(0, 1), mode="sum").view(*ones.shape[:-1], -1)
        if behind is None:
            return out + self.bias[self.stack_index].view(-1, *[1] * (ones.ndim - 2), out.shape[-1])
        return out + self._product(behind, self.weight[:, -behind.shape[-1] :])

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if len(self.runs) == 1:
            return nn.functional.linear(x, weight[0].T, self.bias[0])
        if x.shape[0] != self.num_agents:
            raise ValueError(
                f"expected {self.num_agents} agents in dimension 0, got a tensor of shape {tuple(x.shape)}"
            )
        if self.per_agent:
            out = torch.baddbmm(self.bias.unsqueeze(1), x.reshape(self.num_agents, -1, x.shape[-1]), weight)
            return out.view(*x.shape[:-1], -1)
        parts = x.split([length for _, length in self.runs])
        return torch.cat(
            [
                nn.functional.linear(part, weight[index].T, self.bias[index])
                for part, (index, _) in zip(parts, self.runs, strict=True)
            ]
        )


class StackedLayerNorm(nn.Module):
    """Layer normalisation with one gain and offset per agent, ``[N, *batch, F]``.

    Examples:
        >>> StackedLayerNorm(4, num_agents=2)(torch.randn(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, features: int, num_agents: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_agents, features))
        self.bias = nn.Parameter(torch.zeros(num_agents, features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, then apply agent n's gain and offset."""
        shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        x = nn.functional.layer_norm(x, x.shape[-1:])
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))


class StackedMLP(nn.Sequential):
    """One MLP per agent, ``[N, *batch, in] -> [N, *batch, out]``: linear, layer norm, SiLU, ..., linear.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        num_agents: N.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.

    Examples:
        >>> StackedMLP(3, 2, num_agents=4, num_cells=8)(torch.zeros(4, 5, 3)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_agents: int, num_cells: int = 512, depth: int = 2
    ) -> None:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                StackedLinear(in_features, num_cells, range(num_agents)),
                StackedLayerNorm(num_cells, num_agents),
                nn.SiLU(),
            ]
            in_features = num_cells
        # Zero: the policy starts uniform and the value at 0, whatever the seed.
        layers.append(StackedLinear(in_features, out_features, range(num_agents), zero_init=True))
        super().__init__(*layers)

    def forward(self, x: Tensor, ones: Tensor | None = None) -> Tensor:
        """Apply agent n's MLP to ``x[n]``; with ``ones``, to a multi-hot part and ``x[n]`` behind it."""
        first, *rest = self.children()
        x = first(x) if ones is None else cast(StackedLinear, first).from_ones(ones, x)
        for layer in rest:
            x = layer(x)
        return x


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
