"""Merging the agent groups of an environment, or of stored data, into one dense group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import one_hot, pad
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase, Transform, TransformedEnv
from torchrl.envs.libs.pettingzoo import PettingZooWrapper
from torchrl.envs.libs.vmas import VmasWrapper

from matwm_rl.checks import read_entry
from matwm_rl.envs.images import resize_images
from matwm_rl.envs.layout import AgentLayout, per_agent_specs
from matwm_rl.keys import ACTION, ACTION_MASK, AGENTS, ALIVE, OBSERVATION


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Where one original group lies among the agents and what the base environment gives for it."""

    name: str
    rows: slice
    num_actions: int
    one_hot: bool
    ragged: bool
    """Whether its observations differ in size, so that they can only be read agent by agent."""
    has_action_mask: bool
    has_mask: bool
    has_dones: bool


class MergeGroups(Transform):
    """Merges all agent groups into the dense group ``"agents"``; see :class:`~matwm_rl.envs.MultiAgentEnv`.

    Build it with :meth:`from_env`.

    Args:
        layout: who the agents are.
        groups: where the original groups lie, and what there is of them.
        vmas: the environment, if it is one of VMAS.
    """

    def __init__(self, layout: AgentLayout, groups: list[_Group], *, vmas: Any = None) -> None:
        super().__init__()
        self.layout = layout
        self._groups = groups
        self._vmas = vmas
        self._agents_end = all(group.has_dones for group in self._groups)
        self._agents_can_die = self._agents_end or any(group.has_mask for group in self._groups)
        self._masks_change = self._agents_can_die or any(group.has_action_mask for group in self._groups)
        # Kept here because a worker of a batched environment is handed the action alone, not the last observation.
        self._alive: Tensor | None = None
        self._legal: Tensor | None = None
        counts = torch.tensor(self.layout.action_counts)
        self.register_buffer("_counts", counts, persistent=False)
        self.register_buffer("_padding", torch.arange(self.layout.num_actions) < counts[:, None], persistent=False)

    _counts: Tensor
    _padding: Tensor

    @classmethod
    def from_env(cls, base_env: EnvBase, *, image_size: int = 64) -> MergeGroups:
        """The transform for an environment.

        Args:
            base_env: the grouped environment that the transform will be attached to.
            image_size: side of the square to which uint8 images are resized.

        Raises:
            ValueError: if ``base_env`` is not a grouped environment with discrete actions in which all agents act at
                once.
        """
        unwrapped = base_env
        while isinstance(unwrapped, TransformedEnv):
            unwrapped = unwrapped.base_env
        if isinstance(unwrapped, PettingZooWrapper) and not unwrapped.parallel:
            raise ValueError("agents of an AEC environment act in turns; wrap its parallel_env(...), not its env(...).")
        layout = AgentLayout.from_env(base_env, image_size=image_size)
        vmas = unwrapped._env if isinstance(unwrapped, VmasWrapper) else None
        return cls(layout, _read_groups(base_env, layout), vmas=vmas)

    # ------------------------------------------------------------------ specs

    def transform_output_spec(self, output_spec: Composite) -> Composite:
        """Replaces the groups in the observation, reward and done specs by the dense group."""
        output_spec = output_spec.clone()
        batch, device = output_spec.shape, output_spec.device
        agents_shape = torch.Size([*batch, self.layout.num_agents])
        observation_spec = output_spec["full_observation_spec"]
        for group in self._groups:
            del observation_spec[group.name]
        observation_spec[AGENTS] = self._agents_observation_spec(agents_shape, device)
        reward = Unbounded(shape=[*agents_shape, 1], device=device, dtype=torch.float32)
        output_spec["full_reward_spec"] = Composite(
            {AGENTS: Composite({"reward": reward}, shape=agents_shape)}, shape=batch
        )
        done = Categorical(2, shape=[*batch, 1], dtype=torch.bool, device=device)
        output_spec["full_done_spec"] = Composite(
            {name: done.clone() for name in ("done", "terminated", "truncated")}, shape=batch
        )
        return output_spec

    def _agents_observation_spec(self, shape: torch.Size, device: torch.device | None) -> Composite:
        observation_shape = [*shape, *self.layout.observation_shape]
        observation = (
            Bounded(0, 255, shape=observation_shape, dtype=torch.uint8, device=device)
            if self.layout.is_image
            else Unbounded(shape=observation_shape, dtype=torch.float32, device=device)
        )
        mask_shape = [*shape, self.layout.num_actions]
        return Composite(
            {
                "observation": observation,
                "action_mask": Categorical(2, shape=mask_shape, dtype=torch.bool, device=device),
                "alive": Categorical(2, shape=shape, dtype=torch.bool, device=device),
            },
            shape=shape,
        )

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Replaces the groups' actions by one categorical action per agent, masked to its own actions."""
        input_spec = input_spec.clone()
        shape = torch.Size([*input_spec.shape, self.layout.num_agents])
        action = Categorical(
            self.layout.num_actions, shape=shape, device=input_spec.device, dtype=torch.int64, mask=self._padding
        )
        input_spec["full_action_spec"] = Composite(
            {AGENTS: Composite({"action": action}, shape=shape)}, shape=input_spec.shape
        )
        return input_spec

    # ------------------------------------------------------------------ actions

    @property
    def legal_actions(self) -> Tensor:
        """The actions that are legal now, ``[*E, N, A]`` bool; before the first reset ``[N, A]``, the padding alone."""
        return self._padding if self._legal is None else self._legal

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(ACTION)
        if ((action < 0) | (action >= self._counts)).any():
            raise ValueError(
                f"got the actions {action.tolist()}; agents {self.layout.agent_names} have {self.layout.action_counts} "
                f"actions. Sample under {ACTION_MASK}, or with env.rand_action; to batch environments use "
                "SerialMultiAgentEnv or ParallelMultiAgentEnv, since TorchRL's own lose the mask of the action spec."
            )
        # Transforms appended after this one are given these inputs too, and may want what agents saw and did.
        inputs = tensordict.copy()
        for group in self._groups:
            part = action[..., group.rows]
            if group.one_hot:
                part = one_hot(part, group.num_actions)
            if group.name == AGENTS:
                inputs.set(ACTION, part)
            else:
                inputs.set(group.name, TensorDict({"action": part}, batch_size=part.shape[: action.ndim]))
        return inputs

    # ------------------------------------------------------------------ outputs

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        alive = self._mask(tensordict_reset)
        reset = tensordict.get("_reset", None)
        if reset is not None and self._alive is not None:
            alive = torch.where(reset, alive, self._alive)
        self._alive = alive
        done = tensordict_reset.get("done")
        terminated = tensordict_reset.get("terminated", done)
        legal = self._legal_actions(tensordict_reset, alive)
        if reset is not None and self._legal is not None:
            legal = torch.where(reset.unsqueeze(-1), legal, self._legal)
        return self._output(tensordict_reset, alive, legal, (done, terminated, done & ~terminated))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        alive, ends = self._ends(next_tensordict)
        self._alive = alive
        output = self._output(next_tensordict, alive, self._legal_actions(next_tensordict, alive), ends)
        output.set((AGENTS, "reward"), self._cat(next_tensordict, "reward").to(torch.float32))
        return output

    def _output(
        self,
        tensordict: TensorDictBase,
        alive: Tensor,
        legal: Tensor,
        ends: tuple[Tensor, Tensor, Tensor],
    ) -> TensorDictBase:
        """Builds the merged tensordict; ``ends`` holds the root's done, terminated and truncated."""
        output = tensordict.exclude(*(group.name for group in self._groups))
        for name, end in zip(("done", "terminated", "truncated"), ends, strict=True):
            output.set(name, end)
        self._legal = legal
        return output.set(AGENTS, self._agents(tensordict, alive, legal))

    def _agents(self, tensordict: TensorDictBase, alive: Tensor, legal: Tensor) -> TensorDict:
        """The dense group: what the agents observe, who lives, and what they may do."""
        observation = self._observation(tensordict)
        if self._agents_can_die:
            dead = ~alive
            observation = observation.masked_fill(dead.view(*dead.shape, *(1,) * len(self.layout.observation_shape)), 0)
        return TensorDict(
            {OBSERVATION[1]: observation, ALIVE[1]: alive.clone(), ACTION_MASK[1]: legal.clone()},
            batch_size=alive.shape,
            device=tensordict.device,
        )

    def _cat(self, tensordict: TensorDictBase, name: str) -> Tensor:
        """One entry of all groups, ``[*E, N, ...]``."""
        parts = [tensordict.get(group.name).get(name) for group in self._groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=tensordict.ndim)

    def _observation(self, tensordict: TensorDictBase) -> Tensor:
        parts: list[Tensor] = []
        for group in self._groups:
            data = tensordict.get(group.name)
            if group.ragged:
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

    def _mask(self, tensordict: TensorDictBase) -> Tensor:
        """The environment's own mask of acting agents, ``[*E, N]``; True where it has none."""
        shape, device = [*tensordict.batch_size, self.layout.num_agents], self._padding.device
        alive = torch.ones(shape, dtype=torch.bool, device=device)
        for group in self._groups:
            if group.has_mask:
                alive[..., group.rows] = tensordict.get(group.name).get("mask")
        return alive

    def _legal_actions(self, tensordict: TensorDictBase, alive: Tensor) -> Tensor:
        legal = self._padding.expand(*alive.shape, -1)
        if not self._masks_change:
            return legal
        legal = legal & alive.unsqueeze(-1)
        for group in self._groups:
            if group.has_action_mask:
                legal[..., group.rows, : group.num_actions] &= tensordict.get(group.name).get("action_mask")
        # A categorical distribution cannot be made of an empty row: agents that cannot act are left their first action.
        legal[..., 0] |= ~legal.any(-1)
        return legal

    # ------------------------------------------------------------------ stored data

    def merge(self, rollout: TensorDictBase, max_steps: int | None = None) -> TensorDict:
        """See :func:`merge_rollout`: what :meth:`_reset` and :meth:`_step` do, for all steps at once."""
        following = rollout.get("next")
        alive = self._mask(rollout)
        if self._agents_end:
            alive &= ~(self._agent_flag(rollout, "terminated") | self._agent_flag(rollout, "truncated"))
            survives, (done, terminated, truncated) = self._agent_ends(following, following.get("done"), alive)
        else:
            survives, (done, terminated, truncated) = self._mask(following), self._root_ends(following)
        if max_steps is not None:
            limited = terminated & (_steps_so_far(done) >= max_steps)
            terminated, truncated = terminated & ~limited, truncated | limited
        now = self._agents(rollout, alive, self._legal_actions(rollout, alive))
        after = self._agents(following, survives, self._legal_actions(following, survives))
        now.set("action", self._stored_actions(rollout))
        after.set("reward", self._cat(following, "reward").to(torch.float32))
        ends = {"done": done, "terminated": terminated, "truncated": truncated}
        return TensorDict(
            {AGENTS: now, "next": TensorDict({AGENTS: after, **ends}, rollout.shape)}, rollout.shape, rollout.device
        )

    def _stored_actions(self, rollout: TensorDictBase) -> Tensor:
        parts = []
        for group in self._groups:
            part = rollout.get((group.name, "action"))
            parts.append(part.long().argmax(-1) if group.one_hot else part.long())
        action = torch.cat(parts, -1)
        if ((action < 0) | (action >= self._counts)).any():
            found = action.flatten(0, -2).amax(0).tolist()
            raise ValueError(
                f"stored actions go up to {found}, where agents {self.layout.agent_names} have "
                f"{self.layout.action_counts} actions; correct the layout."
            )
        return action

    # ------------------------------------------------------------------ ends of lives and of episodes

    def _ends(self, tensordict: TensorDictBase) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Which agents live after the step ``[*E, N]``, and the root's done, terminated and truncated ``[*E, 1]``."""
        done = tensordict.get("done")
        alive = self._alive
        if alive is None:
            raise RuntimeError("the environment was stepped before its first reset; call env.reset() first.")
        if self._vmas is not None:
            return alive, self._vmas_ends(done)
        if self._agents_end:
            return self._agent_ends(tensordict, done, alive)
        return self._mask(tensordict), self._root_ends(tensordict)

    @staticmethod
    def _root_ends(tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        done, truncated = tensordict.get("done"), tensordict.get("truncated", None)
        truncated = torch.zeros_like(done) if truncated is None else truncated
        return done, done & ~truncated, done & truncated

    def _agent_ends(
        self, tensordict: TensorDictBase, done: Tensor, alive: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        terminated, truncated = self._agent_flag(tensordict, "terminated"), self._agent_flag(tensordict, "truncated")
        # PettingZooWrapper also reports the long dead as truncated: only who lived until now can meet a time limit.
        episode_truncated = done & (truncated & ~terminated & alive).any(-1, keepdim=True)
        died_at_the_end = terminated & episode_truncated
        left_before = terminated | truncated
        # At its end the environment drops all agents. Those who ended with the episode keep their last observation,
        # which a truncated episode bootstraps from; one who died in the very step of a time limit is dead.
        alive = alive & ~torch.where(done, died_at_the_end, left_before)
        return alive, (done, done & ~episode_truncated, episode_truncated)

    def _agent_flag(self, tensordict: TensorDictBase, name: str) -> Tensor:
        return self._cat(tensordict, name).squeeze(-1)

    def _vmas_ends(self, done: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # VmasWrapper reports the time limit as a termination, which would stop the bootstrap of values.
        env = self._vmas
        truncated = torch.zeros_like(done)
        if env.max_steps is not None and (reached := env.steps >= env.max_steps).any():
            truncated = (reached & ~env.scenario.done()).view_as(done)
        return done, done & ~truncated, truncated


def merge_rollout(rollout: TensorDictBase, layout: AgentLayout, *, max_steps: int | None = None) -> TensorDict:
    """Merge the groups of stored data, as :class:`~matwm_rl.envs.MultiAgentEnv` does those of a live environment.

    So a replay buffer that was filled from a grouped environment, such as :class:`~torchrl.envs.PettingZooWrapper` or
    :class:`~torchrl.envs.VmasEnv`, can be given to :meth:`matwm_rl.data.Replay.extend` and
    :func:`matwm_rl.training.episode_windows`. No environment is needed.

    Args:
        rollout: ``[T]`` or ``[E, T]``, steps in order of time, with the keys that collectors give: ``(group,
            "observation" | "action")``, the same observation and ``(group, "reward")`` under ``"next"``, and
            ``("next", "done")``. ``(group, "action_mask" | "mask" | "terminated" | "truncated")`` and
            ``("next", "truncated")`` are heeded where they are.
        layout: who the agents are; see :meth:`AgentLayout.from_rollout` where there is no environment.
        max_steps: a time limit that the environment reports as a termination, as VMAS does: episodes of so many steps
            count as truncated. The first stored step is taken for the first of its episode.

    Returns:
        ``[T]`` or ``[E, T]``, plain: the ``("agents", ...)`` group at the root and under ``"next"``, and
        ``("next", "done" | "terminated" | "truncated")``.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if one has another shape than the layout says.

    Examples:
        >>> from matwm_rl.envs import MockEnv
        >>> stored = MockEnv().rollout(20, break_when_any_done=False)
        >>> merged = merge_rollout(stored, AgentLayout.from_rollout(stored))
        >>> merged["agents", "observation"].shape, merged["next", "agents", "reward"].shape
        (torch.Size([20, 3, 5]), torch.Size([20, 3, 1]))
    """
    _check_rollout(rollout, layout)
    merge = MergeGroups(layout, _stored_groups(rollout, layout))
    return merge.to(rollout.get(("next", "done")).device).merge(rollout, max_steps)


def _check_rollout(rollout: TensorDictBase, layout: AgentLayout) -> None:
    if rollout.ndim not in (1, 2):
        raise ValueError(f"got data of batch {list(rollout.shape)}; expected [T] or [E, T].")
    reader = "merge_rollout"
    read_entry(rollout, ("next", "done"), reader, (*rollout.shape, 1))
    for group, names in layout.group_map.items():
        shape = (*rollout.shape, len(names))
        observation = read_entry(rollout, (group, "observation"), reader)
        read_entry(rollout, (group, "observation"), reader, (*shape, *observation.shape[len(shape) :]))
        read_entry(rollout, ("next", group, "observation"), reader, observation.shape)
        read_entry(rollout, ("next", group, "reward"), reader, (*shape, 1))
        action = read_entry(rollout, (group, "action"), reader)
        read_entry(rollout, (group, "action"), reader, (*shape, *[None] * (action.ndim > len(shape))))


def _stored_groups(rollout: TensorDictBase, layout: AgentLayout) -> list[_Group]:
    now, after = rollout, rollout.get("next")
    groups, start = [], 0
    for name, agents in layout.group_map.items():
        rows = slice(start, start + len(agents))
        start = rows.stop
        groups.append(
            _Group(
                name=name,
                rows=rows,
                num_actions=max(layout.action_counts[rows]),
                one_hot=now.get((name, "action")).ndim > rollout.ndim + 1,
                ragged=False,
                has_action_mask=_in_both(now, after, (name, "action_mask")),
                has_mask=_in_both(now, after, (name, "mask")),
                has_dones=all(_in_both(now, after, (name, end)) for end in ("terminated", "truncated")),
            )
        )
    return groups


def _steps_so_far(done: Tensor) -> Tensor:
    """Of the episode, this one included, ``[*B, T, 1]``."""
    step = torch.arange(1, done.shape[-2] + 1, device=done.device).view(-1, 1).expand(done.shape)
    before = torch.where(done, step, 0).cummax(-2).values.roll(1, -2)
    before[..., 0, :] = 0
    return step - before


def _in_both(now: TensorDictBase, after: TensorDictBase, key: tuple[str, str]) -> bool:
    return now.get(key, None) is not None and after.get(key, None) is not None


def _read_groups(env: EnvBase, layout: AgentLayout) -> list[_Group]:
    observation_keys = set(env.full_observation_spec.keys(True))
    done_keys = set(env.full_done_spec.keys(True))
    groups, start = [], 0
    for name, agents in layout.group_map.items():
        rows = slice(start, start + len(agents))
        start = rows.stop
        observations = per_agent_specs(env, env.full_observation_spec, (name, "observation"))
        is_one_hot = isinstance(per_agent_specs(env, env.full_action_spec, (name, "action"))[0], OneHot)
        if is_one_hot and len(set(layout.action_counts[rows])) > 1:
            raise ValueError(f"group {name!r} has one-hot actions of unequal sizes; make it with categorical actions.")
        groups.append(
            _Group(
                name=name,
                rows=rows,
                num_actions=max(layout.action_counts[rows]),
                one_hot=is_one_hot,
                ragged=len({spec.shape for spec in observations}) > 1,
                has_action_mask=(name, "action_mask") in observation_keys,
                has_mask=(name, "mask") in observation_keys,
                has_dones={(name, "terminated"), (name, "truncated")} <= done_keys,
            )
        )
    return groups
