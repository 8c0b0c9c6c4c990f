"""Who the agents of an environment are: names, original groups, actions and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from matwm_rl.action_space import ActionSpace
from matwm_rl.envs.actions import Bound, GroupActions, join_actions, read_action_specs, read_stored_actions
from matwm_rl.envs.entries import ObservationEntries, action_mask_key, agent_specs
from matwm_rl.envs.images import ImageFormat, Images


@dataclass(frozen=True, kw_only=True)
class AgentLayout:
    """What the dense ``"agents"`` group of a :class:`~matwm_rl.envs.MultiAgentEnv` was made from.

    Agents stand in the order of their original groups, so that the agents of one group are neighbours.

    Attributes:
        agent_names: names in agent order, length N.
        group_map: the original groups, ``{group: [agent names]}``.
        group_index: for each agent the index of its original group.
        actions: what the agents can do; see :class:`~matwm_rl.action_space.ActionSpace`.
        observation_shape: one agent's padded observation, ``(D,)`` or, for images, ``(C, S, S)``.
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
        """For each agent the number of its actions or, if they are continuous, the length of its action."""
        counts: list[int] = self.actions.legal().sum(-1).tolist()
        return counts

    @property
    def num_actions(self) -> int:
        """A: the largest number of actions of an agent or, if they are continuous, the length of the longest."""
        return self.actions.num_actions

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
    def from_env(cls, env: EnvBase, *, image_size: int = 64, images: Images = "auto") -> AgentLayout:
        """Read the layout from the specs of a grouped environment.

        Args:
            env: environment with a ``group_map`` and the keys ``(group, "observation")`` and ``(group, "action")``.
            image_size: side S of the square to which images are resized.
            images: which observations are images; see :class:`~matwm_rl.envs.MultiAgentEnv`.

        Raises:
            ValueError: if ``env`` has no ``group_map``, lacks one of these keys, has actions that are neither discrete
                nor vectors between bounds, or has both image and vector observations, or both kinds of actions.
        """
        group_map = getattr(env, "group_map", None)
        if not isinstance(group_map, dict) or not group_map:
            raise ValueError(
                f"expected an environment with a `group_map` (such as PettingZooWrapper or VmasEnv), got {env}."
            )
        observations: list[tuple[int, ImageFormat | None]] = []
        actions: dict[str, GroupActions] = {}
        for group, names in group_map.items():
            entries = ObservationEntries.of_env(env, group, names, images)
            observations += zip(entries.sizes, entries.formats, strict=True)
            specs = agent_specs(env, env.full_action_spec, (group, "action"), names)
            actions[group] = read_action_specs(specs, group)
        observation_keys = set(env.full_observation_spec.keys(True, True))
        return cls._of(
            {group: list(names) for group, names in group_map.items()},
            observations=observations,
            actions=join_actions(actions),
            masked=[group for group in group_map if action_mask_key(observation_keys, group) is not None],
            image_size=image_size,
        )

    @classmethod
    def from_rollout(
        cls,
        rollout: TensorDictBase,
        *,
        num_actions: Mapping[str, int] | None = None,
        action_bounds: Mapping[str, tuple[Bound, Bound]] | None = None,
        image_size: int = 64,
        images: Images = "auto",
    ) -> AgentLayout:
        """Read the layout from stored data of a grouped environment, without the environment.

        Groups are the entries that hold an ``"observation"`` and an ``"action"``, in alphabetical order. Agents are
        named after their group, ``hunter_0``.

        Args:
            rollout: ``[T]`` or ``[E, T]``, see :func:`~matwm_rl.envs.merge_rollout`.
            num_actions: for each group the number of an agent's actions. Only needed of groups whose actions are
                categorical and have no ``"action_mask"``, which would tell.
            action_bounds: for each group the lowest and the highest values of continuous actions, each a number or one
                for every number of an action.
            image_size: side S of the square to which uint8 images are resized.
            images: which observations are images; see :class:`~matwm_rl.envs.MultiAgentEnv`.

        Raises:
            ValueError: if there are no groups, both image and vector observations, or the number of actions or their
                bounds are unknown.

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
        observations: list[tuple[int, ImageFormat | None]] = []
        actions: dict[str, GroupActions] = {}
        for group in groups:
            actions[group] = read_stored_actions(rollout, group, num_actions or {}, action_bounds or {})
            group_map[group] = [f"{group}_{agent}" for agent in range(len(actions[group].sizes))]
            entries = ObservationEntries.of_rollout(rollout, group, group_map[group], images)
            observations += zip(entries.sizes, entries.formats, strict=True)
        return cls._of(
            group_map,
            observations=observations,
            actions=join_actions(actions),
            masked=[group for group in groups if action_mask_key(present, group) is not None],
            image_size=image_size,
        )

    @classmethod
    def _of(
        cls,
        group_map: dict[str, list[str]],
        *,
        observations: list[tuple[int, ImageFormat | None]],
        actions: ActionSpace,
        masked: list[str],
        image_size: int,
    ) -> AgentLayout:
        """Build a layout from the size of each agent's observation, the format of its images, and groups with masks."""
        if masked and not actions.has_probs:
            raise ValueError(
                f"the groups {masked} have action masks, which are for discrete actions; theirs are continuous. Leave "
                "the masks out."
            )
        names = [name for agents in group_map.values() for name in agents]
        channels = {
            name: None if image is None else image.channels
            for name, (_, image) in zip(names, observations, strict=True)
        }
        if len(set(channels.values())) > 1:
            raise ValueError(
                "all agents must observe vectors, or images of equally many channels; found the channels (None: a "
                f"vector) {channels}. Say images='none' to read all observations as vectors."
            )
        (num_channels,) = set(channels.values())
        if num_channels is None:
            sizes = [size for size, _ in observations]
            shape: tuple[int, ...] = (max(sizes),)
            if not max(sizes):
                raise ValueError(f"no agent observes anything: the observations of {names} have no entry")
        else:
            shape = (num_channels, image_size, image_size)
            sizes = [math.prod(shape)] * len(observations)
        return cls(
            agent_names=names,
            group_map=group_map,
            group_index=[index for index, agents in enumerate(group_map.values()) for _ in agents],
            actions=actions,
            observation_shape=shape,
            observation_sizes=sizes,
            is_image=num_channels is not None,
            has_action_mask=bool(masked),
        )
