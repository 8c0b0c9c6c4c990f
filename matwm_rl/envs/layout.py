"""Who the agents of an environment are: names, original groups, actions and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite, TensorSpec
from torchrl.envs import EnvBase

from matwm_rl.action_space import ActionSpace
from matwm_rl.envs.actions import GroupActions, join_actions, read_action_specs, read_stored_actions
from matwm_rl.envs.images import is_image, is_image_spec


@dataclass(frozen=True, kw_only=True)
class AgentLayout:
    """What the dense ``"agents"`` group of a :class:`~matwm_rl.envs.MultiAgentEnv` was made from.

    Agents stand in the order of their original groups, so that the agents of one group are neighbours.

    Attributes:
        agent_names: names in agent order, length N.
        group_map: the original groups, ``{group: [agent names]}``.
        group_index: for each agent the index of its original group.
        actions: what the agents can do; see :class:`~matwm_rl.action_space.ActionSpace`.
        observation_shape: one agent's padded observation, ``(D,)`` or, for images, ``(3, S, S)``.
        observation_sizes: for each agent the number of entries of ``observation_shape`` that it really uses.
        is_image: whether observations are uint8 images.
        has_action_mask: whether the environment says at each step which actions are legal.

    Raises:
        ValueError: by :meth:`from_env` and :meth:`from_rollout`, if the groups cannot be read.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> layout = make_env("mock").layout
        >>> layout.agent_names, layout.group_index
        (['hunter_0', 'hunter_1', 'prey_0'], [0, 0, 1])
        >>> layout.action_counts, layout.num_actions
        ([4, 4, 3], 4)
    """

    agent_names: list[str]
    group_map: dict[str, list[str]]
    group_index: list[int]
    actions: ActionSpace
    observation_shape: tuple[int, ...]
    observation_sizes: list[int]
    is_image: bool
    has_action_mask: bool = False

    @property
    def num_agents(self) -> int:
        """The number of agents N."""
        return len(self.agent_names)

    @property
    def action_counts(self) -> list[int]:
        """For each agent the number of its actions: how many of the A entries it has."""
        counts: list[int] = self.actions.legal().sum(-1).tolist()
        return counts

    @property
    def num_actions(self) -> int:
        """The number A of actions of the agent that has most."""
        return self.actions.num_parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain Python values, to be stored.

        Examples:
            >>> from matwm_rl.envs import make_env
            >>> make_env("mock").layout.to_dict()["actions"]
            {'kind': 'discrete', 'counts': [4, 4, 3]}
        """
        return {
            "agent_names": list(self.agent_names),
            "group_map": {group: list(names) for group, names in self.group_map.items()},
            "group_index": list(self.group_index),
            "actions": self.actions.to_dict(),
            "observation_shape": list(self.observation_shape),
            "observation_sizes": list(self.observation_sizes),
            "is_image": self.is_image,
            "has_action_mask": self.has_action_mask,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> AgentLayout:
        """Rebuild a layout from what :meth:`to_dict` or :func:`dataclasses.asdict` returned.

        Raises:
            ValueError: if entries are missing or unknown, or the kind of action space is.

        Examples:
            >>> from matwm_rl.envs import make_env
            >>> layout = make_env("mock").layout
            >>> AgentLayout.from_dict(layout.to_dict()) == layout
            True
        """
        expected = {field.name for field in fields(cls)}
        if stored.keys() != expected:
            raise ValueError(
                f"the stored layout lacks {sorted(expected - stored.keys())} and has the unknown entries "
                f"{sorted(stored.keys() - expected)}."
            )
        actions = ActionSpace.from_dict(stored["actions"])
        return cls(**{**stored, "actions": actions, "observation_shape": tuple(stored["observation_shape"])})

    @classmethod
    def from_env(cls, env: EnvBase, *, image_size: int = 64) -> AgentLayout:
        """Read the layout from the specs of a grouped environment.

        Args:
            env: environment with a ``group_map`` and the keys ``(group, "observation")`` and ``(group, "action")``.
            image_size: side S of the square to which uint8 images are resized.

        Raises:
            ValueError: if ``env`` has no ``group_map``, lacks one of these keys, has actions that are not discrete, or
                has both image and vector observations.
        """
        group_map = getattr(env, "group_map", None)
        if not isinstance(group_map, dict) or not group_map:
            raise ValueError(
                f"expected an environment with a `group_map` (such as PettingZooWrapper or VmasEnv), got {env}."
            )
        observation_specs: list[TensorSpec] = []
        actions: list[GroupActions] = []
        for group in group_map:
            observation_specs += per_agent_specs(env, env.full_observation_spec, (group, "observation"))
            actions.append(read_action_specs(per_agent_specs(env, env.full_action_spec, (group, "action")), group))
        return cls._of(
            {group: list(names) for group, names in group_map.items()},
            observations=[(spec.shape, is_image_spec(spec)) for spec in observation_specs],
            actions=join_actions(actions),
            has_action_mask=any((group, "action_mask") in env.full_observation_spec.keys(True) for group in group_map),
            image_size=image_size,
        )

    @classmethod
    def from_rollout(
        cls, rollout: TensorDictBase, *, num_actions: Mapping[str, int] | None = None, image_size: int = 64
    ) -> AgentLayout:
        """Read the layout from stored data of a grouped environment, without the environment.

        Groups are the entries that hold an ``"observation"`` and an ``"action"``, in alphabetical order. Agents are
        named after their group, ``hunter_0``.

        Args:
            rollout: ``[T]`` or ``[E, T]``, see :func:`~matwm_rl.envs.merge_rollout`.
            num_actions: for each group the number of an agent's actions. Only needed of groups whose actions are
                categorical and have no ``"action_mask"``, which would tell.
            image_size: side S of the square to which uint8 images are resized.

        Raises:
            ValueError: if there are no groups, both image and vector observations, or the number of actions is unknown.

        Examples:
            >>> from matwm_rl.envs import MockEnv
            >>> AgentLayout.from_rollout(MockEnv().rollout(3)).action_counts
            [4, 4, 3]
        """
        present = set(rollout.keys(include_nested=True))
        groups = sorted({key[0] for key in present if isinstance(key, tuple) and key[1:] == ("observation",)})
        groups = [group for group in groups if (group, "action") in present]
        if not groups:
            raise ValueError(f"no entry holds an observation and an action; there are {sorted(map(str, present))}.")
        group_map: dict[str, list[str]] = {}
        observations: list[tuple[torch.Size, bool]] = []
        actions: list[GroupActions] = []
        for group in groups:
            observation = rollout.get((group, "observation"))
            count, shape = observation.shape[rollout.ndim], observation.shape[rollout.ndim + 1 :]
            group_map[group] = [f"{group}_{agent}" for agent in range(count)]
            observations += [(shape, is_image(shape, observation.dtype))] * count
            actions.append(read_stored_actions(rollout, group, num_actions or {}))
        return cls._of(
            group_map,
            observations=observations,
            actions=join_actions(actions),
            has_action_mask=any((group, "action_mask") in present for group in groups),
            image_size=image_size,
        )

    @classmethod
    def _of(
        cls,
        group_map: dict[str, list[str]],
        *,
        observations: list[tuple[torch.Size, bool]],
        actions: ActionSpace,
        has_action_mask: bool,
        image_size: int,
    ) -> AgentLayout:
        """Build a layout from the shape of each agent's observation, and whether it is an image."""
        are_images = {image for _, image in observations}
        if len(are_images) > 1:
            raise ValueError("some agents observe images and others vectors; give all agents the same kind.")
        (all_images,) = are_images
        if all_images:
            shape: tuple[int, ...] = (3, image_size, image_size)
            sizes = [math.prod(shape)] * len(observations)
        else:
            sizes = [math.prod(observed) for observed, _ in observations]
            shape = (max(sizes),)
        return cls(
            agent_names=[name for names in group_map.values() for name in names],
            group_map=group_map,
            group_index=[index for index, names in enumerate(group_map.values()) for _ in names],
            actions=actions,
            observation_shape=shape,
            observation_sizes=sizes,
            is_image=all_images,
            has_action_mask=has_action_mask,
        )


def per_agent_specs(env: EnvBase, spec: Composite, key: tuple[str, str]) -> list[TensorSpec]:
    """Return the spec of ``key`` for each agent of the group, without batch dimensions."""
    if key not in spec.keys(True, True):
        found = sorted(str(found) for found in spec.keys(True, True))
        raise ValueError(
            f"expected one tensor under {key}, found {found}. Observations and actions made of several tensors (Dict "
            "or Tuple spaces) must be flattened by the environment first."
        )
    # Unbind the agents first: a spec of unlike agents is stacked along their dimension and cannot be indexed by others.
    first_env = (0,) * len(env.batch_size)
    return [agent_spec[key[1]][first_env] for agent_spec in spec[key[0]].unbind(len(env.batch_size))]
