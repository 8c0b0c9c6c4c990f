"""The transform that merges the agent groups of an environment into one dense group."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, Transform
from torchrl.envs.libs.pettingzoo import PettingZooWrapper

from matwm_rl.envs.episode_ends import end_by_agents, end_by_root
from matwm_rl.envs.game_check import CheckedGame
from matwm_rl.envs.groups import DenseReader, Group, groups_of_env
from matwm_rl.envs.images import Images
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.registry import Ends, RegisteredEndRule, end_rules, unwrap
from matwm_rl.envs.step_check import StepCheck
from matwm_rl.keys import ACTION, ACTION_MASK, AGENTS, EPISODE
from matwm_rl.torchrl_internals import replace_simulator, simulator

RESERVED = frozenset({"next", "done", "terminated", "truncated", "history", "collector", EPISODE, "_reset", "_step"})
"""Names of root entries, which no group may have."""


# TorchRL's MarlGroupMapType.ALL_IN_ONE_GROUP does not serve: agents of unequal observations cannot be stacked
# ("Failed to stack tensors", torchrl 0.14.1), masks and ends stay each backend's own, and stored data has no group_map.
class MergeGroups(Transform):
    """Merges all agent groups into the dense group ``"agents"``; see :class:`~matwm_rl.envs.MultiAgentEnv`.

    Build it with :meth:`from_env`.

    Args:
        layout: who the agents are.
        groups: where the original groups lie, and what there is of them.
        end_rule: how lives and episodes end, and whether agents can die before.
        env: the environment that the rule is called with.
    """

    def __init__(self, layout: AgentLayout, groups: list[Group], end_rule: RegisteredEndRule, env: EnvBase) -> None:
        super().__init__()
        self.layout = layout
        self._groups = groups
        self._agents_die = end_rule.agents_die
        self._reader = DenseReader(layout, groups, agents_die=end_rule.agents_die)
        # A partial, because an environment is a module and this one must not become a submodule.
        self._end_rule = partial(end_rule.rule, env)
        # Kept here because a worker of a batched environment is given the action alone, not the last observation.
        self._alive: Tensor | None = None
        self._legal: Tensor | None = None
        self._episode: Tensor | None = None
        self._step_check = StepCheck(layout)

    @classmethod
    def from_env(cls, base_env: EnvBase, *, image_size: int = 64, images: Images = "auto") -> MergeGroups:
        """Build the transform for an environment.

        Args:
            base_env: the grouped environment that the transform will be attached to.
            image_size: side of the square to which images are resized.
            images: which observations are images.

        Raises:
            ValueError: if ``base_env`` is not a grouped environment in which all agents act at once, or see
                :meth:`AgentLayout.from_env <matwm_rl.envs.AgentLayout.from_env>`.
        """
        unwrapped = unwrap(base_env)
        if isinstance(unwrapped, PettingZooWrapper) and not unwrapped.parallel:
            raise ValueError("agents of an AEC environment act in turns; wrap its parallel_env(...), not its env(...).")
        _check_names(getattr(base_env, "group_map", None))
        if "done" not in base_env.full_done_spec.keys():
            raise ValueError(
                f"expected an environment with a 'done' at the root, found {sorted(map(str, base_env.done_keys))}; "
                "episodes of groups that end apart have no dense group. Add one that says when all are over."
            )
        if isinstance(unwrapped, PettingZooWrapper) and not isinstance(simulator(unwrapped), CheckedGame):
            replace_simulator(unwrapped, CheckedGame(simulator(unwrapped)))
        layout = AgentLayout.from_env(base_env, image_size=image_size, images=images)
        groups = groups_of_env(base_env, layout, images)
        registered = end_rules.find(unwrapped)
        if registered is not None:
            return cls(layout, groups, registered, unwrapped)
        return cls(layout, groups, _conventional_rule(groups), base_env)

    def count_episodes_anew(self) -> None:
        """Give the next reset the number 0."""
        self._episode = None

    # ------------------------------------------------------------------ specs

    def transform_output_spec(self, output_spec: Composite) -> Composite:
        """Replace the groups in the observation, reward and done specs by the dense group."""
        output_spec = output_spec.clone()
        batch, device = output_spec.shape, output_spec.device
        agents_shape = torch.Size([*batch, self.layout.num_agents])
        observation_spec = output_spec["full_observation_spec"]
        for group in self._groups:
            del observation_spec[group.name]
        observation_spec[AGENTS] = self._agents_observation_spec(agents_shape, device)
        observation_spec[EPISODE] = Unbounded(shape=[*batch, 1], device=device, dtype=torch.int64)
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
        flag = partial(Categorical, 2, dtype=torch.bool, device=device)
        left = {"truncated": flag(shape=[*shape, 1])} if self._agents_die else {}
        return Composite(
            {"observation": observation, "action_mask": flag(shape=mask_shape), "alive": flag(shape=shape), **left},
            shape=shape,
        )

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Replace the groups' actions by the actions of the dense group."""
        input_spec = input_spec.clone()
        shape = torch.Size([*input_spec.shape, self.layout.num_agents])
        action = self.layout.actions.spec(input_spec.shape, input_spec.device)
        input_spec["full_action_spec"] = Composite(
            {AGENTS: Composite({"action": action}, shape=shape)}, shape=input_spec.shape
        )
        return input_spec

    # ------------------------------------------------------------------ actions

    @property
    def legal_actions(self) -> Tensor:
        """The actions that are legal now, ``[*E, N, A]`` bool; before the first reset each agent's own, ``[N, A]``."""
        return self.layout.actions.legal() if self._legal is None else self._legal

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(ACTION)
        if (problem := self.layout.actions.problem(action)) is not None:
            raise ValueError(
                f"{problem}; the agents are {self.layout.agent_names}. Sample under {ACTION_MASK}, or with "
                "env.rand_action; to batch environments use SerialMultiAgentEnv or ParallelMultiAgentEnv, since "
                "TorchRL's own lose the mask of the action spec."
            )
        # A copy, because transforms appended after this one get these inputs too and may read observations and actions.
        inputs = tensordict.copy()
        agents = action.ndim - len(self.layout.actions.action_shape)
        for group in self._groups:
            rows = range(self.layout.num_agents)[group.rows]
            part = group.actions.from_dense(action.narrow(agents - 1, rows.start, len(rows)))
            if group.name == AGENTS:
                inputs.set(ACTION, part)
            else:
                inputs.set(group.name, TensorDict({"action": part}, batch_size=part.shape[:agents]))
        return inputs

    # ------------------------------------------------------------------ outputs

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        done = tensordict_reset.get("done")
        alive = self._reader.mask(tensordict_reset, done.device)
        reset = tensordict.get("_reset", None)
        if reset is not None and self._alive is not None:
            alive = torch.where(reset, alive, self._alive)
        legal = self._reader.legal_actions(tensordict_reset, alive)
        if reset is not None and self._legal is not None:
            legal = torch.where(reset.unsqueeze(-1), legal, self._legal)
        count = torch.full_like(done, -1, dtype=torch.int64) if self._episode is None else self._episode
        self._episode = count + (1 if reset is None else reset.view_as(count).long())
        terminated = tensordict_reset.get("terminated", done)
        ends = Ends(alive=alive, done=done, terminated=terminated, truncated=done & ~terminated)
        return self._step_check.after_reset(self._output(tensordict_reset, legal, ends), reset)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self._alive is None:
            raise RuntimeError("the environment was stepped before its first reset; call env.reset() first.")
        ends = self._end_rule(next_tensordict, self._alive)
        output = self._output(next_tensordict, self._reader.legal_actions(next_tensordict, ends.alive), ends)
        output.set((AGENTS, "reward"), self._reader.reward(next_tensordict))
        return self._step_check.after_step(output)

    def _output(self, tensordict: TensorDictBase, legal: Tensor, ends: Ends) -> TensorDictBase:
        """Build the merged tensordict and keep which agents live and what is legal."""
        assert self._episode is not None, "an environment is reset before its first step"
        self._alive, self._legal = ends.alive, legal
        output = tensordict.exclude(*self.layout.group_map, "reward")
        output.set(EPISODE, self._episode.clone())
        output.set("done", ends.done)
        output.set("terminated", ends.terminated)
        output.set("truncated", ends.truncated)
        if not self._agents_die:
            return output.set(AGENTS, self._reader.agents(tensordict, ends.alive, legal))
        left = torch.zeros_like(ends.alive) if ends.left is None else ends.left
        # An agent removed by a time limit keeps its last observation; its value bootstraps from it.
        agents = self._reader.agents(tensordict, ends.alive, legal, seen=ends.alive | left)
        return output.set(AGENTS, agents.set("truncated", left.unsqueeze(-1)))


def _check_names(group_map: object) -> None:
    """Check that groups and agents can be told apart and reported; that there are groups, the layout checks."""
    if not isinstance(group_map, dict):
        return
    advice = "Give the environment a group_map of other names."
    if reserved := [name for name in group_map if name in RESERVED or (name == AGENTS and len(group_map) > 1)]:
        raise ValueError(
            f"groups must not be called {reserved} (nor {AGENTS!r}, beside others): these are entries of the merged "
            f"data. {advice}"
        )
    for group, names in group_map.items():
        if not names:
            raise ValueError(f"group {group!r} has no agents; there are {group_map}. Leave it out.")
        if len(set(names)) < len(names):
            raise ValueError(f"agents of group {group!r} have the same name: {names}. {advice}")
        if wrong := [name for name in (group, *names) if name.splitlines() != [name]]:
            raise ValueError(f"groups and agents need names in one line, got {wrong}. {advice}")


def _conventional_rule(groups: list[Group]) -> RegisteredEndRule:
    """Choose the rule of an environment whose class has none registered, by what its groups hold."""
    if all(group.has_ends for group in groups):
        return RegisteredEndRule(end_by_agents, agents_die=True)
    return RegisteredEndRule(end_by_root, agents_die=any(group.has_mask for group in groups))
