"""The original groups of an environment, and reading them as one dense group.

Legend: E batch size, N agents, A the most actions of any agent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import pad
from torchrl.envs import EnvBase

from matwm_rl.envs.actions import GroupActions, read_action_specs, stored_group_actions
from matwm_rl.envs.entries import Key, ObservationEntries, action_mask_key, agent_specs
from matwm_rl.envs.episode_ends import read_agents, read_masks
from matwm_rl.envs.images import Images
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.keys import ACTION_MASK, ALIVE, OBSERVATION


@dataclass(frozen=True, kw_only=True)
class Group:
    """Where one original group lies among the agents and what the base environment gives for it."""

    name: str
    rows: slice
    actions: GroupActions
    observation: ObservationEntries
    action_mask: Key | None
    """Where its action mask is; None if it has none."""
    reward: Key
    """Where its rewards are, in the group or at the root."""
    shares_reward: bool
    """Whether there is one reward for all of its agents."""
    has_mask: bool
    has_ends: bool
    """Whether it has a ``"terminated"`` and a ``"truncated"`` of its own."""


def _rows(layout: AgentLayout) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, agents in layout.group_map.items():
        yield name, slice(start, start + len(agents))
        start += len(agents)


def groups_of_env(env: EnvBase, layout: AgentLayout, images: Images) -> list[Group]:
    """Read the groups off the specs of an environment."""
    observation_keys = set(env.full_observation_spec.keys(True))
    rewards = {_tuple(key): spec.shape[env.batch_dims :] for key, spec in env.full_reward_spec.items(True, True)}
    done_keys = set(env.full_done_spec.keys(True))
    groups = []
    for name, rows in _rows(layout):
        agents = layout.group_map[name]
        reward, shares_reward = _find_reward(rewards, name, len(agents))
        groups.append(
            Group(
                name=name,
                rows=rows,
                actions=read_action_specs(agent_specs(env, env.full_action_spec, (name, "action"), agents), name),
                observation=ObservationEntries.of_env(env, name, agents, images),
                action_mask=action_mask_key(observation_keys, name),
                reward=reward,
                shares_reward=shares_reward,
                has_mask=(name, "mask") in observation_keys,
                has_ends={(name, "terminated"), (name, "truncated")} <= done_keys,
            )
        )
    return groups


def groups_of_rollout(rollout: TensorDictBase, layout: AgentLayout) -> list[Group]:
    """Read the groups off stored data; an entry counts only if it is there before and after each step."""
    following = rollout.get("next")
    both = set(rollout.keys(True, True)) & set(following.keys(True, True))
    rewards = {_tuple(key): value.shape[rollout.ndim :] for key, value in following.items(True, True)}

    def is_stored(name: str, *entries: str) -> bool:
        keys = [(name, entry) for entry in entries]
        return all(data.get(key, None) is not None for key in keys for data in (rollout, following))

    groups = []
    for name, rows in _rows(layout):
        agents = layout.group_map[name]
        reward, shares_reward = _find_reward(rewards, name, len(agents))
        groups.append(
            Group(
                name=name,
                rows=rows,
                actions=stored_group_actions(rollout, name, layout.actions, rows),
                observation=ObservationEntries.of_rollout(
                    rollout, name, agents, layout.observation_shape[0] if layout.is_image else "none"
                ),
                action_mask=action_mask_key(both, name),
                reward=reward,
                shares_reward=shares_reward,
                has_mask=is_stored(name, "mask"),
                has_ends=is_stored(name, "terminated", "truncated"),
            )
        )
    return groups


def _tuple(key: NestedKey) -> Key:
    return (key,) if isinstance(key, str) else key


def _find_reward(shapes: dict[Key, torch.Size], group: str, num_agents: int) -> tuple[Key, bool]:
    """Find the rewards of a group among entries of these shapes, and whether there is one for all of its agents."""
    own: Key = (group, "reward")
    root: Key = ("reward",)
    each: list[tuple[int, ...]] = []
    common: list[tuple[int, ...]] = [(1,)]
    if own in shapes:
        key, each = own, [(num_agents, 1), (num_agents,)]
    elif root in shapes:
        key, common = root, [(1,), ()]
    else:
        raise ValueError(
            f"group {group!r} has no rewards: expected {own}, or 'reward' at the root for all agents, found "
            f"{sorted(map(str, shapes))}."
        )
    if (shape := tuple(shapes[key])) not in (*each, *common):
        raise ValueError(
            f"expected rewards under {key} of one of the shapes {[*each, *common]} behind the batch dimensions, of "
            f"{num_agents} agents, found {shape}."
        )
    return key, shape not in each


class DenseReader:
    """Reads the entries of all groups as those of one dense group.

    Args:
        layout: who the agents are.
        groups: where the original groups lie, and what there is of them.
        agents_die: whether agents can die before their episode ends.
    """

    def __init__(self, layout: AgentLayout, groups: list[Group], *, agents_die: bool) -> None:
        self.layout = layout
        self.groups = groups
        self._agents_die = agents_die
        self._masks_change = agents_die or any(group.action_mask for group in groups)
        self._own_actions: dict[torch.device, Tensor] = {}

    def own_actions(self, device: torch.device) -> Tensor:
        """Return which actions each agent has at all, bool ``[N, A]``, as a tensor that nobody may write into."""
        if device not in self._own_actions:
            self._own_actions[device] = self.layout.actions.legal().to(device)
        return self._own_actions[device]

    def agents(
        self, tensordict: TensorDictBase, alive: Tensor, legal: Tensor, seen: Tensor | None = None
    ) -> TensorDict:
        """Build the dense group: what the agents observe, which of them live, and what they may do.

        Observations are real of the agents in ``seen``, by default those that live.
        """
        observation = self._observation(tensordict)
        if self._agents_die:
            dead = ~(alive if seen is None else seen)
            observation = observation.masked_fill(dead.view(*dead.shape, *(1,) * len(self.layout.observation_shape)), 0)
        return TensorDict(
            {OBSERVATION[1]: observation, ALIVE[1]: alive.clone(), ACTION_MASK[1]: legal.clone()},
            batch_size=alive.shape,
            device=tensordict.device,
        )

    def reward(self, tensordict: TensorDictBase) -> Tensor:
        """Read the rewards ``[*E, N, 1]`` float32; one that a group or all agents have in common is each agent's."""
        batch = tensordict.batch_size
        parts = []
        for group in self.groups:
            count = group.rows.stop - group.rows.start
            reward = tensordict.get(group.reward)
            reward = reward.reshape(*batch, 1 if group.shares_reward else count, 1)
            parts.append(reward.expand(*batch, count, 1))
        return torch.cat(parts, dim=len(batch)).to(torch.float32)

    def flag(self, tensordict: TensorDictBase, name: str) -> Tensor:
        """Read an entry ``[*E, n, 1]`` of each group as ``[*E, N]``."""
        return read_agents(tensordict, self.layout.group_map, name).squeeze(-1)

    def mask(self, tensordict: TensorDictBase, device: torch.device) -> Tensor:
        """Read the environment's own mask of acting agents, ``[*E, N]``; True where it has none."""
        return read_masks(tensordict, self.layout.group_map, device)

    def legal_actions(self, tensordict: TensorDictBase, alive: Tensor) -> Tensor:
        """Read the legal actions ``[*E, N, A]``; agents that cannot act keep one."""
        legal = self.own_actions(alive.device).expand(*alive.shape, -1)
        if not self._masks_change:
            return legal
        legal = legal & alive.unsqueeze(-1)
        for group in self.groups:
            if group.action_mask is not None:
                mask = tensordict.get(group.action_mask).to(torch.bool)
                legal[..., group.rows, : group.actions.num_actions] &= mask
        return self.layout.actions.allow_one_(legal)

    def _observation(self, tensordict: TensorDictBase) -> Tensor:
        parts = [
            part
            for group in self.groups
            for part in group.observation.read(tensordict, self.layout.observation_shape[-1])
        ]
        if not self.layout.is_image:
            width = self.layout.observation_shape[0]
            parts = [pad(part, (0, width - part.shape[-1])) for part in parts]
        return torch.cat(parts, dim=tensordict.ndim).to(torch.uint8 if self.layout.is_image else torch.float32)
