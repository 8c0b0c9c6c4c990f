"""Simple opponents to measure trained agents against: random ones for any environment, scripted ones for simple_tag."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from matwm_rl import keys
from matwm_rl.checks import read_entry
from matwm_rl.envs import AgentLayout

ARENA = 0.9
"""Half width of simple_tag's arena."""


class RandomActions(TensorDictModuleBase):
    """All agents act uniformly at random among their legal actions.

    Keys read: ``("agents", "action_mask")``; written: ``("agents", "action")``.

    Raises:
        KeyError: if there is no action mask.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> make_env("mock", seed=0).rollout(3, RandomActions())["agents", "action"].shape
        torch.Size([3, 3])
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_keys: list[NestedKey] = [keys.ACTION_MASK]
        self.out_keys: list[NestedKey] = [keys.ACTION]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write random legal actions."""
        mask = read_entry(tensordict, keys.ACTION_MASK, self)
        action = torch.multinomial(mask.flatten(0, -2).float(), 1).view(mask.shape[:-1])
        return tensordict.set(keys.ACTION, action)


class TagScript(TensorDictModuleBase):
    """Scripted agents of simple_tag (mpe2 and VMAS): pursuers chase, the evader flees.

    A pursuer steps along the larger axis towards the evader. The evader steps along the larger axis away from the
    nearest pursuer, and back towards the centre when it has left the arena (a coordinate beyond 0.9, where mpe2's
    penalty begins). Observations of both are ``[velocity 2, position 2, landmarks 2 each, other agents 2 each, ...]``,
    all relative but the first two. Actions of mpe2 are 0 stay, 1 left, 2 right, 3 down, 4 up; VMAS has nine,
    ``3 x + y`` with x and y each 0 stay, 1 down, 2 up.

    Args:
        layout: of a simple_tag environment with one evader.

    Keys read: ``("agents", "observation")``; written: ``("agents", "action")``.

    Raises:
        ValueError: if the layout is not that of simple_tag with one evader.
        KeyError: if there is no observation.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> env.rollout(3, TagScript(env.layout))["agents", "action"].shape
        torch.Size([3, 4])
    """

    steps: Tensor

    def __init__(self, layout: AgentLayout) -> None:
        super().__init__()
        groups = {name: len(agents) for name, agents in layout.group_map.items()}
        if list(groups) != ["adversary", "agent"] or groups["agent"] != 1:
            raise ValueError(f"TagScript plays simple_tag with one evader, got the groups {groups}")
        self.num_pursuers = groups["adversary"]
        # The evader's observation ends with the pursuers' positions: what stands before is the same for all agents.
        # Index: axis (0 = x, 1 = y), then direction (0 = negative, 1 = positive).
        steps = {5: [[1, 2], [3, 4]], 9: [[3, 6], [1, 2]]}.get(layout.num_actions)
        if steps is None:
            raise ValueError(f"TagScript knows 5 (mpe2) or 9 (VMAS) actions, got {layout.num_actions}")
        self.register_buffer("steps", torch.tensor(steps), persistent=False)
        self.others_start = layout.observation_sizes[-1] - 2 * self.num_pursuers
        self.in_keys: list[NestedKey] = [keys.OBSERVATION]
        self.out_keys: list[NestedKey] = [keys.ACTION]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actions of chasing pursuers and a fleeing evader."""
        observation = read_entry(tensordict, keys.OBSERVATION, self)
        end = self.others_start + 2 * self.num_pursuers
        others = observation[..., self.others_start : end].unflatten(-1, (self.num_pursuers, 2))
        # Pursuers see the evader last; the evader sees pursuers alone.
        chase = self._step_along(others[..., :-1, -1, :])
        from_evader = others[..., -1, :, :]
        nearest = from_evader.norm(dim=-1).argmin(-1, keepdim=True).unsqueeze(-1)
        away = -from_evader.gather(-2, nearest.expand(*nearest.shape[:-1], 2)).squeeze(-2)
        position = observation[..., -1, 2:4]
        outside = position.abs().amax(-1, keepdim=True) > ARENA
        flee = self._step_along(torch.where(outside, -position, away))
        return tensordict.set(keys.ACTION, torch.cat([chase, flee.unsqueeze(-1)], -1))

    def _step_along(self, direction: Tensor) -> Tensor:
        """The action that steps along the larger axis of ``direction [..., 2]``."""
        axis = direction.abs().argmax(-1, keepdim=True)
        positive = direction.gather(-1, axis) > 0
        return self.steps[axis, positive.long()].squeeze(-1)


class CrossPlay(TensorDictModuleBase):
    """Some agents act by one policy, the others by another.

    Args:
        policy: acts for the agents of ``groups``.
        opponents: acts for all others.
        layout: of the environment.
        groups: names of original groups.

    Keys read: those of both; the opponents see what they read alone. Keys written: ``("agents", "action")``, and what
    ``policy`` carries on.

    Raises:
        ValueError: if a group does not exist.
        KeyError: if an entry that is read is missing.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> chasers = CrossPlay(TagScript(env.layout), RandomActions(), env.layout, ["adversary"])
        >>> env.rollout(3, chasers)["agents", "action"].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        opponents: TensorDictModuleBase,
        layout: AgentLayout,
        groups: Sequence[str],
    ) -> None:
        super().__init__()
        names = list(layout.group_map)
        if unknown := [group for group in groups if group not in names]:
            raise ValueError(f"unknown groups {unknown}; the environment has {names}")
        self.policy, self.opponents = policy, opponents
        acts = torch.tensor([names[index] in groups for index in layout.group_index])
        self.register_buffer("acts", acts, persistent=False)
        self.in_keys = list(dict.fromkeys([*policy.in_keys, *opponents.in_keys]))
        self.out_keys = list(policy.out_keys)

    acts: Tensor

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actions of both sides."""
        theirs = self.opponents(tensordict.select(*self.opponents.in_keys)).get(keys.ACTION)
        ours = self.policy(tensordict).get(keys.ACTION)
        return tensordict.set(keys.ACTION, torch.where(self.acts, ours, theirs))
