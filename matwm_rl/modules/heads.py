"""Parts of the world model around its transformer: action mixer and heads (docs/algorithm.md, World model).

All tensors are agent-major: ``[N, *batch, F]``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints, check_kinds, check_switches
from matwm_rl.functional import at_least_float32
from matwm_rl.modules.stacked import LatentLinear, StackedLinear
from matwm_rl.modules.stacked_mlp import mlp


class ActionMixer(nn.Module):
    """Mix latent and action into one token: ``e_t = z_t W + (a_t's embedding)``, a linear map of both.

    The embedding of discrete actions is a row of weights for each; with action scaling, each agent has its own.

    Args:
        latent_size: Z.
        features: F, size of the token.
        actions: the action space.
        num_classes: of the latent space, see :class:`~matwm_rl.modules.LatentLinear`.
        scaled: action scaling on or off.

    Examples:
        >>> import torch
        >>> from matwm_rl.action_space import DiscreteActions
        >>> mixer = ActionMixer(4, 8, actions=DiscreteActions([5, 3]), num_classes=None, scaled=True)
        >>> mixer(torch.zeros(2, 7, 4), torch.zeros(2, 7, dtype=torch.long)).shape
        torch.Size([2, 7, 8])
    """

    def __init__(
        self, latent_size: int, features: int, *, actions: ActionSpace, num_classes: int | None, scaled: bool
    ) -> None:
        super().__init__()
        check_kinds(ActionSpace, actions=actions)
        check_switches(scaled=scaled)
        self.latent = LatentLinear(latent_size, features, [0], num_classes=num_classes)
        self.action = actions.make_embedding(features, scaled=scaled)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        """Mix z ``[N, *batch, Z]`` and actions ``[N, *batch]`` into tokens ``[N, *batch, F]``."""
        tokens: Tensor = self.latent(latent) + self.action(action)
        return tokens


class Head(nn.Module):
    """MLP whose last layer is each group's own (docs/algorithm.md, World model).

    Args:
        in_features: size of the input.
        out_features: size of the output.
        group_index: group of each of the N agents.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        zero_init: start the last layer at zero.
        linear_skip: add a linear map of the input (each group's own) to the output.

    Examples:
        >>> import torch
        >>> Head(4, 6, group_index=[0, 0, 1], num_cells=8, depth=1)(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_index: Sequence[int],
        num_cells: int,
        depth: int,
        zero_init: bool = False,
        linear_skip: bool = False,
    ) -> None:
        super().__init__()
        check_ints(1, in_features=in_features, num_cells=num_cells)
        check_ints(0, depth=depth)
        check_switches(zero_init=zero_init, linear_skip=linear_skip)
        self.trunk = mlp(in_features, num_cells, depth)
        self.skip = StackedLinear(in_features, out_features, group_index) if linear_skip else None
        self.output = StackedLinear(num_cells if depth else in_features, out_features, group_index, zero_init=zero_init)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, *batch, in] -> [N, *batch, out]``."""
        out = self.output(self.trunk(x))
        return at_least_float32(out if self.skip is None else out + self.skip(x))
