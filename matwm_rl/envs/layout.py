"""Who the agents of an environment are: names, original groups, sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchrl.data import Categorical, Composite, OneHot, TensorSpec
from torchrl.envs import EnvBase

from matwm_rl.envs.images import is_image_spec


@dataclass(frozen=True, kw_only=True)
class AgentLayout:
    """What the dense ``"agents"`` group of a :class:`~matwm_rl.envs.MultiAgentEnv` was made from.

    Agents stand in the order of their original groups, so that the agents of one group are neighbours.

    Attributes:
        agent_names: names in agent order, length N.
        group_map: the original groups, ``{group: [agent names]}``.
        group_index: for each agent the index of its original group.
        action_counts: for each agent the number of its actions; the largest is A.
        observation_shape: one agent's padded observation, ``(D,)`` or, for images, ``(3, S, S)``.
        observation_sizes: for each agent the number of entries of ``observation_shape`` that it really uses.
        is_image: whether observations are uint8 images.
        has_action_mask: whether the environment says at each step which actions are legal.

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
    action_counts: list[int]
    observation_shape: tuple[int, ...]
    observation_sizes: list[int]
    is_image: bool
    has_action_mask: bool = False

    @property
    def num_agents(self) -> int:
        """The number of agents N."""
        return len(self.agent_names)

    @property
    def num_actions(self) -> int:
        """The number A of actions of the agent that has most."""
        return max(self.action_counts)

    @classmethod
    def from_env(cls, env: EnvBase, *, image_size: int = 64) -> AgentLayout:
        """Reads the layout from the specs of a grouped environment.

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
        action_counts: list[int] = []
        for group in group_map:
            observation_specs += per_agent_specs(env, env.full_observation_spec, (group, "observation"))
            action_counts += [
                _action_count(spec, group) for spec in per_agent_specs(env, env.full_action_spec, (group, "action"))
            ]
        are_images = [is_image_spec(spec) for spec in observation_specs]
        if any(are_images) and not all(are_images):
            raise ValueError("some agents observe images and others vectors; give all agents the same kind.")
        if are_images[0]:
            shape: tuple[int, ...] = (3, image_size, image_size)
            sizes = [math.prod(shape)] * len(observation_specs)
        else:
            sizes = [spec.shape.numel() for spec in observation_specs]
            shape = (max(sizes),)
        return cls(
            agent_names=[name for names in group_map.values() for name in names],
            group_map={group: list(names) for group, names in group_map.items()},
            group_index=[index for index, names in enumerate(group_map.values()) for _ in names],
            action_counts=action_counts,
            observation_shape=shape,
            observation_sizes=sizes,
            is_image=are_images[0],
            has_action_mask=any((group, "action_mask") in env.full_observation_spec.keys(True) for group in group_map),
        )


def per_agent_specs(env: EnvBase, spec: Composite, key: tuple[str, str]) -> list[TensorSpec]:
    """The spec of ``key`` for each agent of the group, without batch dimensions."""
    if key not in spec.keys(True, True):
        found = sorted(str(found) for found in spec.keys(True, True))
        raise ValueError(
            f"expected one tensor under {key}, found {found}. Observations and actions made of several tensors (Dict "
            "or Tuple spaces) must be flattened by the environment first."
        )
    # Agents are told apart first: a spec of unequal agents is stacked along their dimension and indexes no other.
    first_env = (0,) * len(env.batch_size)
    return [agent_spec[key[1]][first_env] for agent_spec in spec[key[0]].unbind(len(env.batch_size))]


def _action_count(spec: TensorSpec, group: str) -> int:
    if isinstance(spec, Categorical) and spec.ndim == 0:
        return int(spec.space.n)
    if isinstance(spec, OneHot) and spec.ndim == 1:
        return int(spec.space.n)
    raise ValueError(
        f"group {group!r} has the action spec {spec}; expected one discrete action per agent. Build the environment "
        "with discrete actions (VMAS: continuous_actions=False; PettingZoo: continuous=False or "
        "continuous_actions=False)."
    )
