"""The actions of one original group: reading its specs or stored data, and converting to the dense group and back.

This is the only module of the environments that knows the forms in which an environment takes actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.data import Categorical, OneHot, TensorSpec

from matwm_rl.action_space import ActionSpace, DiscreteActions
from matwm_rl.envs.entries import action_mask_key


@dataclass(frozen=True)
class GroupActions:
    """Discrete actions of the n agents of one group, as indices or as one-hot vectors.

    Args:
        counts: number of actions of each of the n agents.
        is_one_hot: whether the environment takes one-hot vectors.

    Examples:
        >>> import torch
        >>> actions = GroupActions([3, 3], is_one_hot=True)
        >>> actions.from_dense(torch.tensor([2, 0])).tolist()
        [[0, 0, 1], [1, 0, 0]]
        >>> actions.to_dense(torch.tensor([[0, 0, 1], [1, 0, 0]])).tolist()
        [2, 0]
    """

    counts: list[int]
    is_one_hot: bool

    @property
    def num_actions(self) -> int:
        """Size of the group's own action mask: the most actions of any of its agents."""
        return max(self.counts)

    def from_dense(self, action: Tensor) -> Tensor:
        """Convert the dense group's actions ``[*batch, n]`` of these agents to the form that the environment takes."""
        return one_hot(action, self.num_actions) if self.is_one_hot else action

    def to_dense(self, action: Tensor) -> Tensor:
        """Convert actions in the environment's form to the dense group's ``[*batch, n]``."""
        return action.long().argmax(-1) if self.is_one_hot else action.long()


def read_action_specs(specs: Sequence[TensorSpec], group: str) -> GroupActions:
    """Read the actions of a group from the action specs of its agents.

    Args:
        specs: one for each agent, without batch dimensions.
        group: name of the group, for errors.

    Raises:
        ValueError: if actions are not discrete, or one-hot and of unequal sizes.
    """
    counts = [_action_count(spec, group) for spec in specs]
    is_one_hot = isinstance(specs[0], OneHot)
    if is_one_hot and len(set(counts)) > 1:
        raise ValueError(f"group {group!r} has one-hot actions of unequal sizes; make it with categorical actions.")
    return GroupActions(counts, is_one_hot)


def _action_count(spec: TensorSpec, group: str) -> int:
    is_index = isinstance(spec, Categorical) and spec.ndim == 0
    if is_index or (isinstance(spec, OneHot) and spec.ndim == 1):
        return int(spec.space.n)
    raise ValueError(
        f"group {group!r} has the action spec {spec}; expected one discrete action per agent. Build the environment "
        "with discrete actions (VMAS: continuous_actions=False; PettingZoo: continuous=False or "
        "continuous_actions=False)."
    )


def read_stored_actions(rollout: TensorDictBase, group: str, num_actions: Mapping[str, int]) -> GroupActions:
    """Read the actions of a group from stored data.

    Args:
        rollout: with ``(group, "action")`` and optionally ``(group, "action_mask")``.
        group: name of the group.
        num_actions: for each group the number of an agent's actions, where the data does not tell.

    Raises:
        ValueError: if neither the data nor ``num_actions`` tells how many actions there are.
    """
    action = rollout.get((group, "action"))
    mask_key = action_mask_key(set(rollout.keys(True, True)), group)
    mask = None if mask_key is None else rollout.get(mask_key)
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
    return GroupActions([count] * action.shape[rollout.ndim], is_one_hot)


def stored_group_actions(rollout: TensorDictBase, group: str, actions: ActionSpace, rows: slice) -> GroupActions:
    """Describe a group's stored actions by what the dense group's ``actions`` say of its agents ``rows``."""
    counts: list[int] = actions.legal()[rows].sum(-1).tolist()
    return GroupActions(counts, _stored_one_hot(rollout.get((group, "action")), rollout))


def _stored_one_hot(action: Tensor, rollout: TensorDictBase) -> bool:
    return action.ndim > rollout.ndim + 1


def join_actions(groups: Iterable[GroupActions]) -> ActionSpace:
    """Build the action space of the dense group from the actions of its groups, in agent order.

    Examples:
        >>> join_actions([GroupActions([4, 4], False), GroupActions([3], False)])
        DiscreteActions(counts=[4, 4, 3])
    """
    return DiscreteActions([count for group in groups for count in group.counts])
