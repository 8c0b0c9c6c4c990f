"""Layers with several stacked copies of their weights: one per agent, or one per group of like agents.

Everything here is agent-major: ``[N, *batch, F]``, so that N networks are one batched matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_ints, check_switches, read_index
from matwm_rl.functional import may_need_gradient, one_hot_classes

Runs = list[tuple[int, int]]
"""Neighbouring agents that share weights: which weights of the stack, and how many agents."""


def runs_of(stack_index: Sequence[int]) -> Runs:
    """Return the runs of agents that share weights. Agents of a group are neighbours, so a group is one run."""
    return [(index, len(list(run))) for index, run in groupby(stack_index)]


def split_runs(x: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    """Split ``[N, ...]`` into its runs, without a copy."""
    return x.split([length for _, length in runs])


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

    Raises:
        ValueError: if a size is not positive, or an input is not of N agents.

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
        check_ints(1, in_features=in_features, out_features=out_features)
        stack_index = read_index("stack_index", stack_index)
        check_switches(zero_init=zero_init)
        stack = max(stack_index) + 1
        self.num_agents = len(stack_index)
        self.per_agent = list(stack_index) == list(range(stack)) and stack > 1
        self.runs = runs_of(stack_index)
        # One shared layer does not ask how many agents there are.
        self.register_buffer("stack_index", torch.tensor(list(stack_index) if stack > 1 else [0]), persistent=False)
        self.bound = 0.0 if zero_init else 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(stack, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(stack, out_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and offsets anew."""
        for parameter in (self.weight, self.bias):
            parameter.uniform_(-self.bound, self.bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply agent n's weights to ``x[n]``."""
        if len(self.runs) == 1:
            index = self.runs[0][0]
            return nn.functional.linear(x, self.weight[index].T, self.bias[index])
        if x.shape[0] != self.num_agents:
            raise ValueError(
                f"expected {self.num_agents} agents in dimension 0, got a tensor of shape {tuple(x.shape)}"
            )
        if self.per_agent:
            out = torch.baddbmm(self.bias.unsqueeze(1), x.reshape(self.num_agents, -1, x.shape[-1]), self.weight)
            return out.view(*x.shape[:-1], -1)
        return torch.cat(self.forward_runs(split_runs(x, self.runs)))

    def forward_runs(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Apply the layer to runs of agents that share weights, see :class:`StackedSequential`."""
        # Unbound once: the gradients of single indices would each be a whole stack of zeros.
        weights, biases = self.weight.unbind(), self.bias.unbind()
        return [
            nn.functional.linear(part, weights[index].T, biases[index])
            for part, (index, _) in zip(parts, self.runs, strict=True)
        ]

    def forward_multi_hot(self, index: Tensor, extra: Tensor | None = None) -> Tensor:
        """Apply the layer to a multi-hot input by adding up rows of weights: a hundredth of the arithmetic.

        Args:
            index: int64 ``[N, *batch, K]``, positions of the ones in the input's first part.
            extra: ``[N, *batch, R]``, the input's last R features, if it has any besides.
        """
        stack, (_, in_features, out_features) = self.stack_index, self.weight.shape
        rows = index.reshape(len(stack), -1, index.shape[-1]) + (stack * in_features).view(-1, 1, 1)
        out = nn.functional.embedding_bag(rows.flatten(0, 1), self.weight.flatten(0, 1), mode="sum")
        # Added in place, here and by baddbmm: to allocate a new tensor takes as long as the arithmetic.
        out = out.view(len(stack), -1, out_features).add_(self.bias[stack].unsqueeze(1))
        if extra is not None:
            size = extra.shape[-1]
            weight = self.weight if self.per_agent else self.weight[stack]
            out = torch.baddbmm(out, extra.reshape(len(stack), -1, size), weight[:, in_features - size :])
        return out.view(*index.shape[:-1], out_features)


class LatentLinear(StackedLinear):
    """First layer of a network that reads latents; it looks rows up where z is made of one-hot vectors.

    It multiplies where a gradient may be wanted through z.

    Args:
        latent_size: Z.
        out_features: size of the output.
        stack_index: see :class:`StackedLinear`.
        num_classes: C, where z is ``Z // C`` one-hot vectors; ``None`` for any other z.
        extra_features: R, size of what is read beside z.
        zero_init: see :class:`StackedLinear`.

    Raises:
        ValueError: if a size is not positive, or z is not made of whole one-hot vectors.

    Examples:
        >>> layer = LatentLinear(8, 3, [0], num_classes=4)
        >>> z = torch.zeros(1, 5, 8).index_fill(-1, torch.tensor([1, 7]), 1.0)
        >>> torch.allclose(layer(z), StackedLinear.forward(layer, z), atol=1e-6)
        True
    """

    def __init__(
        self,
        latent_size: int,
        out_features: int,
        stack_index: Sequence[int],
        *,
        num_classes: int | None,
        extra_features: int = 0,
        zero_init: bool = False,
    ) -> None:
        check_ints(1, latent_size=latent_size)
        check_ints(0, extra_features=extra_features)
        if num_classes is not None:
            check_ints(1, num_classes=num_classes)
            if latent_size % num_classes:
                raise ValueError(f"latent_size must be a multiple of num_classes, {num_classes}, got {latent_size}")
        super().__init__(latent_size + extra_features, out_features, stack_index, zero_init=zero_init)
        self.latent_size, self.num_classes = latent_size, num_classes

    def forward(self, latent: Tensor, extra: Tensor | None = None) -> Tensor:
        """Map z ``[N, *batch, Z]`` and what is read beside it ``[N, *batch, R]`` to ``[N, *batch, out]``."""
        # An exported program multiplies too: in ONNX a sum of rows is a loop over them.
        if self.num_classes is None or may_need_gradient(latent) or torch.compiler.is_exporting():
            return super().forward(latent if extra is None else torch.cat([latent, extra], -1))
        first = torch.arange(0, self.latent_size, self.num_classes, device=latent.device)
        return self.forward_multi_hot(one_hot_classes(latent, self.num_classes) + first, extra)
