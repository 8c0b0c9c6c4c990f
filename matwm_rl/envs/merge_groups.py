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
from matwm_rl.envs.groups import DenseReader, Group, groups_of_env
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.registry import Ends, RegisteredEndRule, end_rules, unwrap
from matwm_rl.envs.step_check import StepCheck
from matwm_rl.keys import ACTION, ACTION_MASK, AGENTS


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
        self._reader = DenseReader(layout, groups, agents_die=end_rule.agents_die)
        # A partial, because an environment is a module and this one must not become a submodule.
        self._end_rule = partial(end_rule.rule, env)
        # Kept here because a worker of a batched environment is given the action alone, not the last observation.
        self._alive: Tensor | None = None
        self._legal: Tensor | None = None
        self._step_check = StepCheck(layout)

    @classmethod
    def from_env(cls, base_env: EnvBase, *, image_size: int = 64) -> MergeGroups:
        """Build the transform for an environment.

        Args:
            base_env: the grouped environment that the transform will be attached to.
            image_size: side of the square to which uint8 images are resized.

        Raises:
            ValueError: if ``base_env`` is not a grouped environment with discrete actions in which all agents act at
                once.
        """
        unwrapped = unwrap(base_env)
        if isinstance(unwrapped, PettingZooWrapper) and not unwrapped.parallel:
            raise ValueError("agents of an AEC environment act in turns; wrap its parallel_env(...), not its env(...).")
        layout = AgentLayout.from_env(base_env, image_size=image_size)
        groups = groups_of_env(base_env, layout)
        registered = end_rules.find(unwrapped)
        if registered is not None:
            return cls(layout, groups, registered, unwrapped)
        return cls(layout, groups, _conventional_rule(groups), base_env)

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
        for group in self._groups:
            part = group.actions.from_dense(action[..., group.rows])
            if group.name == AGENTS:
                inputs.set(ACTION, part)
            else:
                inputs.set(group.name, TensorDict({"action": part}, batch_size=part.shape[: action.ndim]))
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
        self._alive, self._legal = ends.alive, legal
        output = tensordict.exclude(*self.layout.group_map)
        output.set("done", ends.done)
        output.set("terminated", ends.terminated)
        output.set("truncated", ends.truncated)
        return output.set(AGENTS, self._reader.agents(tensordict, ends.alive, legal))


def _conventional_rule(groups: list[Group]) -> RegisteredEndRule:
    """Choose the rule of an environment whose class has none registered, by what its groups hold."""
    if all(group.has_ends for group in groups):
        return RegisteredEndRule(end_by_agents, agents_die=True)
    return RegisteredEndRule(end_by_root, agents_die=any(group.has_mask for group in groups))
