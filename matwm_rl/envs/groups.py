"""The original groups of an environment, and reading them as one dense group.

Legend: E batch size, N agents, A the most actions of any agent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import pad
from torchrl.envs import EnvBase

from matwm_rl.envs.actions import GroupActions, read_action_specs, stored_group_actions
from matwm_rl.envs.episode_ends import read_agents, read_masks
from matwm_rl.envs.images import resize_images
from matwm_rl.envs.layout import AgentLayout, per_agent_specs
from matwm_rl.keys import ACTION_MASK, ALIVE, OBSERVATION


@dataclass(frozen=True, kw_only=True)
class Group:
    """Where one original group lies among the agents and what the base environment gives for it."""

    name: str
    rows: slice
    actions: GroupActions
    is_ragged: bool
    """Whether its observations differ in size, so that they can only be read agent by agent."""
    has_action_mask: bool
    has_mask: bool
    has_ends: bool
    """Whether it has a ``"terminated"`` and a ``"truncated"`` of its own."""


def _rows(layout: AgentLayout) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, agents in layout.group_map.items():
        yield name, slice(start, start + len(agents))
        start += len(agents)


def groups_of_env(env: EnvBase, layout: AgentLayout) -> list[Group]:
    """Read the groups off the specs of an environment."""
    observation_keys = set(env.full_observation_spec.keys(True))
    done_keys = set(env.full_done_spec.keys(True))
    groups = []
    for name, rows in _rows(layout):
        observations = per_agent_specs(env, env.full_observation_spec, (name, "observation"))
        groups.append(
            Group(
                name=name,
                rows=rows,
                actions=read_action_specs(per_agent_specs(env, env.full_action_spec, (name, "action")), name),
                is_ragged=len({spec.shape for spec in observations}) > 1,
                has_action_mask=(name, "action_mask") in observation_keys,
                has_mask=(name, "mask") in observation_keys,
                has_ends={(name, "terminated"), (name, "truncated")} <= done_keys,
            )
        )
    return groups


def groups_of_rollout(rollout: TensorDictBase, layout: AgentLayout) -> list[Group]:
    """Read the groups off stored data; an entry counts only if it is there before and after each step."""
    following = rollout.get("next")

    def is_stored(name: str, *entries: str) -> bool:
        keys = [(name, entry) for entry in entries]
        return all(data.get(key, None) is not None for key in keys for data in (rollout, following))

    return [
        Group(
            name=name,
            rows=rows,
            actions=stored_group_actions(rollout, name, layout.actions, rows),
            is_ragged=False,
            has_action_mask=is_stored(name, "action_mask"),
            has_mask=is_stored(name, "mask"),
            has_ends=is_stored(name, "terminated", "truncated"),
        )
        for name, rows in _rows(layout)
    ]


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
        self._masks_change = agents_die or any(group.has_action_mask for group in groups)
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
        """Read the rewards ``[*E, N, 1]`` float32."""
        return read_agents(tensordict, self.layout.group_map, "reward").to(torch.float32)

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
            if group.has_action_mask:
                mask = tensordict.get(group.name).get("action_mask")
                legal[..., group.rows, : group.actions.num_actions] &= mask
        return self.layout.actions.allow_one_(legal)

    def _observation(self, tensordict: TensorDictBase) -> Tensor:
        parts: list[Tensor] = []
        for group in self.groups:
            data = tensordict.get(group.name)
            if group.is_ragged:
                parts += [agent.get("observation").unsqueeze(tensordict.ndim) for agent in data.unbind(tensordict.ndim)]
            else:
                parts.append(data.get("observation"))
        if self.layout.is_image:
            parts = [resize_images(part, self.layout.observation_shape[-1]) for part in parts]
        else:
            width, agents_ndim = self.layout.observation_shape[0], tensordict.ndim + 1
            parts = [part.reshape(*part.shape[:agents_ndim], -1) for part in parts]
            parts = [pad(part, (0, width - part.shape[-1])) for part in parts]
        return torch.cat(parts, dim=tensordict.ndim).to(torch.uint8 if self.layout.is_image else torch.float32)
