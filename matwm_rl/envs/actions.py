"""The actions of one original group: reading its specs or stored data, and converting to the dense group and back.

This is the only module of the environments that knows the forms in which an environment takes actions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.data import Bounded, Categorical, OneHot, TensorSpec

from matwm_rl.action_space import ActionSpace, DiscreteActions
from matwm_rl.box_actions import TOLERANCE, BoxActions
from matwm_rl.checks import read_entry
from matwm_rl.envs.entries import action_mask_key

Bound = float | Sequence[float]
"""One bound for all numbers of an action, or one for each number."""


def to_simulator(action: Any) -> Any:
    """Return one agent's action as simulators take it: an index as a Python integer, a vector as it is.

    Examples:
        >>> import numpy as np
        >>> to_simulator(np.int64(3)), to_simulator(np.zeros(2))
        (3, array([0., 0.]))
    """
    return action if np.ndim(action) else int(action)


class GroupActions(ABC):
    """The actions of the n agents of one group, as the environment takes them."""

    sizes: list[int]
    """For each agent how many entries of an action mask are its own: its actions, or the numbers of its action."""

    @property
    def num_actions(self) -> int:
        """Size of the group's own action mask."""
        return max(self.sizes)

    @abstractmethod
    def from_dense(self, action: Tensor) -> Tensor:
        """Convert the dense group's actions of these agents to the form that the environment takes."""

    @abstractmethod
    def to_dense(self, action: Tensor) -> Tensor:
        """Convert actions in the environment's form to the form of the dense group."""


@dataclass(frozen=True)
class DiscreteGroupActions(GroupActions):
    """Discrete actions, as indices or as one-hot vectors; in the dense group they are indices ``[*batch, n]``.

    Args:
        sizes: number of actions of each of the n agents.
        is_one_hot: whether the environment takes one-hot vectors.

    Examples:
        >>> actions = DiscreteGroupActions([3, 3], is_one_hot=True)
        >>> actions.from_dense(torch.tensor([2, 0])).tolist()
        [[0, 0, 1], [1, 0, 0]]
        >>> actions.to_dense(torch.tensor([[0, 0, 1], [1, 0, 0]])).tolist()
        [2, 0]
    """

    sizes: list[int]
    is_one_hot: bool

    def from_dense(self, action: Tensor) -> Tensor:
        """See the base class."""
        return one_hot(action, self.num_actions) if self.is_one_hot else action

    def to_dense(self, action: Tensor) -> Tensor:
        """See the base class."""
        return action.long().argmax(-1) if self.is_one_hot else action.long()


@dataclass(frozen=True)
class BoxGroupActions(GroupActions):
    """Continuous actions ``[*batch, n, d]``; in the dense group ``[*batch, n, A]``, from -1 to 1 and padded with zeros.

    Args:
        low: lowest values of the d numbers of each of the n agents, in the environment's units.
        high: their highest values.
        dtype: of the environment's actions.

    Examples:
        >>> actions = BoxGroupActions([[0.0, -2.0]], [[1.0, 2.0]])
        >>> actions.from_dense(torch.tensor([[-1.0, 0.5, 0.0]])).tolist()
        [[0.0, 1.0]]
        >>> actions.to_dense(torch.tensor([[0.0, 1.0]])).tolist()
        [[-1.0, 0.5]]
    """

    low: list[list[float]]
    high: list[list[float]]
    dtype: torch.dtype = torch.float32

    @property
    def sizes(self) -> list[int]:  # type: ignore[override]
        """For each agent d."""
        return [len(low) for low in self.low]

    def from_dense(self, action: Tensor) -> Tensor:
        """See the base class."""
        low, high = self._bounds(action.device)
        share = 0.5 * (action[..., : self.num_actions].to(low) + 1)
        return torch.minimum(torch.maximum(low + share * (high - low), low), high).to(self.dtype)

    def to_dense(self, action: Tensor) -> Tensor:
        """See the base class; what lies outside by rounding alone is brought to the bound."""
        low, high = self._bounds(action.device)
        dense = 2 * (action.to(low) - low) / (high - low) - 1
        inside = dense.clamp(-1, 1)
        return torch.where((dense - inside).abs() <= TOLERANCE, inside, dense).float()

    def _bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        low, high = (_on_device(tuple(map(tuple, bound)), device) for bound in (self.low, self.high))
        return low, high


@lru_cache(maxsize=128)
def _on_device(bound: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """Return bounds as a tensor. It is shared, as a GPU would wait for a copy at every step: do not write to it."""
    return torch.tensor(bound, dtype=torch.float64, device=device)


def read_action_specs(specs: Sequence[TensorSpec], group: str) -> GroupActions:
    """Read the actions of a group from the action specs of its agents.

    Args:
        specs: one for each agent, without batch dimensions.
        group: name of the group, for errors.

    Raises:
        ValueError: if actions are neither discrete nor vectors between bounds, or one-hot or vectors of unequal sizes.
    """
    if all(_is_box(spec) for spec in specs):
        return _read_boxes(specs, group)
    counts = [_action_count(spec, group) for spec in specs]
    is_one_hot = isinstance(specs[0], OneHot)
    if is_one_hot and len(set(counts)) > 1:
        raise ValueError(f"group {group!r} has one-hot actions of unequal sizes; make it with categorical actions.")
    return DiscreteGroupActions(counts, is_one_hot)


def _is_box(spec: TensorSpec) -> bool:
    return isinstance(spec, Bounded) and spec.ndim == 1 and spec.dtype.is_floating_point and spec.shape[0] > 0


def _read_boxes(specs: Sequence[TensorSpec], group: str) -> BoxGroupActions:
    if len({spec.shape for spec in specs}) > 1:
        raise ValueError(f"group {group!r} has continuous actions of unequal sizes; put such agents into groups apart.")
    low, high = ([getattr(spec.space, name).tolist() for spec in specs] for name in ("low", "high"))
    return BoxGroupActions(low, high, specs[0].dtype)


def _action_count(spec: TensorSpec, group: str) -> int:
    is_index = isinstance(spec, Categorical) and spec.ndim == 0
    if is_index or (isinstance(spec, OneHot) and spec.ndim == 1):
        return int(spec.space.n)
    raise ValueError(
        f"group {group!r} has the action spec {spec}; expected of each agent one discrete action, or one vector of "
        "numbers between bounds, and of all agents the same kind."
    )


def read_stored_actions(
    rollout: TensorDictBase,
    group: str,
    num_actions: Mapping[str, int],
    action_bounds: Mapping[str, tuple[Bound, Bound]],
) -> GroupActions:
    """Read the actions of a group from stored data.

    Args:
        rollout: with ``(group, "action")`` and optionally ``(group, "action_mask")``.
        group: name of the group.
        num_actions: for each group the number of an agent's discrete actions, where the data does not tell.
        action_bounds: for each group the lowest and the highest values of continuous actions.

    Raises:
        ValueError: if neither the data nor ``num_actions`` tells how many actions there are, or continuous actions
            have no ``action_bounds``.
    """
    action = rollout.get((group, "action"))
    mask_key = action_mask_key(set(rollout.keys(True, True)), group)
    mask = None if mask_key is None else rollout.get(mask_key)
    # Only discrete actions have masks: those may be one-hot vectors that are stored as floats.
    if action.is_floating_point() and (mask is None or group in action_bounds):
        return _stored_boxes(action, rollout, group, action_bounds)
    is_one_hot = _stored_one_hot(action, rollout)
    if is_one_hot:
        count = action.shape[-1]
    elif mask is not None:
        count = mask.shape[-1]
    elif group in num_actions:
        count = num_actions[group]
    else:
        raise ValueError(
            f"the data does not tell how many actions agents of group {group!r} have (the largest stored is "
            f"{int(action.max())}); give num_actions={{{group!r}: ...}}."
        )
    return DiscreteGroupActions([count] * action.shape[rollout.ndim], is_one_hot)


def _stored_boxes(
    action: Tensor, rollout: TensorDictBase, group: str, action_bounds: Mapping[str, tuple[Bound, Bound]]
) -> BoxGroupActions:
    if action.ndim != rollout.ndim + 2:
        raise ValueError(
            f"group {group!r} has stored continuous actions of shape {list(action.shape)}; expected "
            f"{[*rollout.shape, 'agents', 'numbers']}."
        )
    if group not in action_bounds:
        raise ValueError(
            f"the data does not tell the bounds of group {group!r}'s continuous actions (stored are "
            f"{float(action.min()):.3g} to {float(action.max()):.3g}); give action_bounds={{{group!r}: (low, high)}}."
        )
    agents, size = action.shape[-2:]
    low, high = (
        [float(bound)] * size if isinstance(bound, (int, float)) else [float(number) for number in bound]
        for bound in action_bounds[group]
    )
    if not len(low) == len(high) == size:
        raise ValueError(f"action_bounds of group {group!r} are {low} and {high}; its actions have {size} numbers.")
    return BoxGroupActions([low] * agents, [high] * agents, action.dtype)


def stored_group_actions(rollout: TensorDictBase, group: str, actions: ActionSpace, rows: slice) -> GroupActions:
    """Describe a group's stored actions by what the dense group's ``actions`` say of its agents ``rows``.

    Raises:
        ValueError: if actions of this kind are not stored in this form.
    """
    action = rollout.get((group, "action"))
    if isinstance(actions, BoxActions):
        if action.is_floating_point():
            boxes = BoxGroupActions(actions.low[rows], actions.high[rows], action.dtype)
            shape = (*action.shape[: rollout.ndim + 1], boxes.num_actions)
            read_entry(rollout, (group, "action"), "merge_rollout", shape)
            return boxes
    else:
        discrete = DiscreteGroupActions(actions.legal()[rows].sum(-1).tolist(), _stored_one_hot(action, rollout))
        # Floating-point numbers must be one-hot vectors.
        if not (action.is_floating_point() and discrete.is_one_hot) or action.shape[-1] == discrete.num_actions:
            return discrete
    raise ValueError(f"stored actions of group {group!r} are {action.dtype}; the layout has {actions}.")


def _stored_one_hot(action: Tensor, rollout: TensorDictBase) -> bool:
    return action.ndim > rollout.ndim + 1


def join_actions(groups: Mapping[str, GroupActions]) -> ActionSpace:
    """Build the action space of the dense group from the actions of its groups, in agent order.

    Raises:
        ValueError: if some are discrete and others are continuous.

    Examples:
        >>> join_actions({"a": DiscreteGroupActions([4, 4], False), "b": DiscreteGroupActions([3], False)})
        DiscreteActions(counts=[4, 4, 3])
    """
    box = {name: actions for name, actions in groups.items() if isinstance(actions, BoxGroupActions)}
    if box and len(box) < len(groups):
        discrete = [name for name in groups if name not in box]
        raise ValueError(
            f"the actions of the groups {list(box)} are continuous, those of {discrete} are discrete; expected one "
            "kind for all agents. Make the environment with one kind, or offer a choice of continuous actions by index."
        )
    if box:
        return BoxActions(*([row for own in box.values() for row in getattr(own, name)] for name in ("low", "high")))
    return DiscreteActions([size for actions in groups.values() for size in actions.sizes])
