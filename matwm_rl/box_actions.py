"""Continuous actions: every agent takes a vector of numbers between bounds.

Legend: N agents, A the most numbers in an agent's action, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec

from matwm_rl.action_distribution import BoxDistribution, box_parameters
from matwm_rl.action_space import ILLEGAL_LOGIT, ActionSpace
from matwm_rl.arguments import check_ints, check_switches
from matwm_rl.checks import check_shape, check_type
from matwm_rl.functional import at_least_float32, first_entries

TOLERANCE = 1e-5
"""By how much rounding may move an action out of its bounds."""
GRID = 61
""":meth:`BoxActions.fit_constant` tries so many locations, and so many scales with each."""


@dataclass(frozen=True)
class BoxActions(ActionSpace, kind="box"):
    """Continuous actions: each agent takes a vector, every number of which lies from -1 to 1.

    -1 and 1 stand for the bounds of the environment's own action space. :class:`~matwm_rl.envs.MultiAgentEnv` scales
    actions between the two. Numbers that an agent does not have, as others have more, are 0. The
    action mask says which numbers an agent has; those of agents that cannot act are none.

    Agents act, and teammates are predicted, by a :class:`~matwm_rl.action_distribution.BoxDistribution`: a truncated
    normal for every number, whose 2 A parameters, locations and then scales, take the place of logits. It is bounded,
    its entropy has a closed form, and a teammate's action on a bound has a finite likelihood.

    Args:
        low: of each of the N agents, what -1 stands for in each number of its action, in the environment's units.
        high: what 1 stands for.

    Raises:
        ValueError: if there is no agent, if one's action has no number, or if bounds are not finite or not apart.

    Examples:
        >>> space = BoxActions(low=[[0.0, 0.0, 0.0], [-2.0, -2.0]], high=[[1.0, 1.0, 1.0], [2.0, 2.0]])
        >>> space.legal().tolist()
        [[True, True, True], [True, True, False]]
        >>> space.num_parameters, space.random(space.legal().expand(7, -1, -1)).shape
        (6, torch.Size([7, 2, 3]))
        >>> space.problem(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
        'got the action [0.0, 2.0, 0.0] of agent 0; expected numbers from -1 to 1'
    """

    dtype = torch.float32
    distribution_class = BoxDistribution
    has_probs = False

    low: list[list[float]]
    high: list[list[float]]
    kind: str = field(default="box", init=False, repr=False)
    """Kind of action space; stored with the bounds."""

    def __post_init__(self) -> None:
        if not self.low or [*map(len, self.low)] != [*map(len, self.high)]:
            raise ValueError(f"expected equally many lower and upper bounds of each agent, got {self.low}, {self.high}")
        for agent, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not low or not all(isfinite(a) and isfinite(b) and a < b for a, b in zip(low, high, strict=True)):
                raise ValueError(
                    f"agent {agent} has actions from {low} to {high}; expected one number or more, between finite "
                    "bounds, the lower below the upper"
                )

    @property
    def sizes(self) -> list[int]:
        """How many numbers the action of each of the N agents has."""
        return [len(low) for low in self.low]

    @property
    def num_agents(self) -> int:  # type: ignore[override]
        """The number of agents N."""
        return len(self.low)

    @property
    def num_actions(self) -> int:  # type: ignore[override]
        """A, the most numbers in any agent's action."""
        return max(self.sizes)

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        """A location and a scale for every number."""
        return 2 * self.num_actions

    @property
    def action_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """An action is a vector."""
        return (self.num_actions,)

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        bounds = {"low": self.low, "high": self.high}
        return {"kind": self.kind, **{name: [list(own) for own in bound] for name, bound in bounds.items()}}

    def legal(self) -> Tensor:
        """See the base class."""
        return first_entries(self.sizes)

    def spec(self, shape: Sequence[int], device: torch.device | str | None = None) -> TensorSpec:
        """See the base class."""
        high = self.legal().to(device, self.dtype).expand(*shape, -1, -1)
        return Bounded(-high, high, shape=high.shape, device=device, dtype=self.dtype)

    def problem(self, action: Tensor) -> str | None:
        """See the base class."""
        expected = (self.num_agents, self.num_actions)
        if action.shape[-2:] != expected or not action.is_floating_point():
            return (
                f"got actions of shape {list(action.shape)} and {action.dtype}; expected a vector of "
                f"{self.num_actions} numbers for each of {self.num_agents} agents"
            )
        limit = _limits(tuple(self.sizes), action.device)
        if not (wrong := ~(action.abs() <= limit)).any():  # of NaN this is false
            return None
        *batch, agent, place = wrong.nonzero()[0].tolist()
        found = action[(*batch, agent)].tolist()
        if place >= self.sizes[agent]:
            return f"got the action {found} of agent {agent}, which has {self.sizes[agent]} numbers; the rest must be 0"
        return f"got the action {found} of agent {agent}; expected numbers from -1 to 1"

    def random(self, mask: Tensor) -> Tensor:
        """See the base class."""
        return (2 * torch.rand(mask.shape, dtype=self.dtype, device=mask.device) - 1) * mask

    def allow_one_(self, mask: Tensor) -> Tensor:
        """See the base class: an action without numbers is an action."""
        return mask

    def make_embedding(self, features: int, *, scaled: bool) -> nn.Module:
        """See the base class and :class:`ActionVectors`."""
        return ActionVectors(self.num_agents, self.num_actions, features, scaled=scaled)

    def mask_parameters(self, parameters: Tensor, legal: Tensor, fill: float = ILLEGAL_LOGIT) -> Tensor:
        """See the base class."""
        return parameters.masked_fill(~_for_both(legal), fill)

    def are_drawable(self, parameters: Tensor, mask: Tensor) -> Tensor:
        """See the base class: both parameters of every number must be finite."""
        return (parameters.isfinite() | ~_for_both(mask)).all(-1)

    def mode(self, parameters: Tensor) -> Tensor:
        """See the base class."""
        return self._predicted(parameters).mode

    def encode(self, action: Tensor, dtype: torch.dtype) -> Tensor:
        """See the base class: as they are."""
        return action.to(dtype)

    def features(self, parameters: Tensor) -> Tensor:
        """See the base class: locations and scales, 0 for numbers that an agent does not have."""
        mask = _present(parameters)
        return torch.cat([torch.where(mask, part, 0.0) for part in box_parameters(parameters)], -1)

    def negative_log_likelihood(self, parameters: Tensor, action: Tensor) -> Tensor:
        """See the base class."""
        check_type(action, "a box agent's action is read", self.dtype)
        return -self._predicted(parameters).log_prob(action)

    def fit_constant(self, action: Tensor, mask: Tensor) -> Tensor:
        """See the base class. It takes the likeliest of a grid of locations and scales, separately for every number.

        The likelihood depends on the actions by their means and mean squares alone.
        """
        weight = mask.unsqueeze(-1).to(action)
        count = weight.sum(0).clamp(min=1)
        mean, square = ((value * weight).sum(0) / count for value in (action, action.square()))
        grid = torch.linspace(0.001, 0.999, GRID, dtype=action.dtype, device=action.device)
        raw_loc, share = (2 * grid - 1).atanh().view(-1, 1), grid.view(1, -1)
        raw = torch.stack(torch.broadcast_tensors(raw_loc, share.logit() - 2), -1).view(-1, 2)
        dist = BoxDistribution(logits=raw, mask=torch.ones_like(raw[:, :1], dtype=torch.bool))
        at_loc = dist.log_prob(dist.loc)
        distance = square.unsqueeze(-1) - 2 * mean.unsqueeze(-1) * dist.loc.mT + dist.loc.mT.square()
        best = raw[(at_loc - 0.5 * distance / dist.scale.mT.square()).argmax(-1)]
        return torch.cat([best[..., 0], best[..., 1]], -1)

    @staticmethod
    def _predicted(parameters: Tensor) -> BoxDistribution:
        return BoxDistribution(logits=parameters, mask=_present(parameters))


def _for_both(mask: Tensor) -> Tensor:
    """Repeat a mask ``[..., A]`` for locations and for scales, ``[..., 2 A]``."""
    return torch.cat([mask, mask], -1)


def _present(parameters: Tensor) -> Tensor:
    """Return which numbers :meth:`BoxActions.mask_parameters` has left, bool ``[..., A]``."""
    return ~(parameters.chunk(2, -1)[0] <= ILLEGAL_LOGIT / 2)  # NaN is no missing number


@lru_cache(maxsize=128)
def _limits(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the largest absolute value of each number of an action, ``[N, A]``. It is shared: do not write to it."""
    return (1 + TOLERANCE) * first_entries(sizes).to(device)


class ActionVectors(nn.Module):
    """A linear map of every agent's action, as continuous actions enter the action mixer.

    With action scaling every agent has a map of its own, as agents with discrete actions have rows of their own: its
    offset alone tells the shared model which agent is focal (docs/algorithm.md, World model). Without it all agents
    share one map.

    Args:
        num_agents: N.
        size: A, numbers of an action.
        features: F, size of the embedding.
        scaled: action scaling on or off.

    Examples:
        >>> vectors = ActionVectors(2, 3, 8, scaled=True)
        >>> vectors.weight.shape, vectors(torch.zeros(2, 7, 3)).shape
        (torch.Size([2, 3, 8]), torch.Size([2, 7, 8]))
    """

    def __init__(self, num_agents: int, size: int, features: int, *, scaled: bool) -> None:
        super().__init__()
        check_switches(scaled=scaled)
        check_ints(1, num_agents=num_agents, size=size, features=features)
        self.num_agents = num_agents
        maps = num_agents if scaled else 1
        # From the standard normal distribution, as nn.Embedding draws the rows of discrete actions.
        self.weight = nn.Parameter(torch.randn(maps, size, features))
        self.bias = nn.Parameter(torch.randn(maps, features))

    def forward(self, action: Tensor) -> Tensor:
        """Return the embeddings ``[N, *batch, F]`` of actions ``[N, *batch, A]``."""
        check_type(action, "a box agent's action is read", torch.float32)
        check_shape(action, "actions are read", (self.num_agents, *[None] * (action.ndim - 2), self.weight.shape[1]))
        rows = action.flatten(1, -2).to(self.weight)
        weight = self.weight.expand(self.num_agents, -1, -1)
        bias = self.bias.unsqueeze(1).expand(self.num_agents, -1, -1)
        # In float32 under autocast, as the rows of discrete actions are.
        embedded = at_least_float32(torch.baddbmm(bias, rows, weight))
        return embedded.view(*action.shape[:-1], self.weight.shape[-1])
