"""One reward for all agents, and one end, as some wrappers have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, check_env_specs

from matwm_rl.envs import AgentLayout, MultiAgentEnv, merge_rollout
from matwm_rl.keys import ACTION_MASK, OBSERVATION, REWARD
from tests.envs.helpers import assert_legal


class Shared(EnvBase):
    """Three agents as SMACv2's: one reward and one end at the root. Others have a reward of the group.

    Args:
        reward: ``"root"``, ``"group"`` (one for all) or ``"flat"`` (one for each, without a last dimension).
        batch_size: of the environment.
        mask_in_observation: whether the observation is a Dict with an action mask.
    """

    def __init__(self, reward: str = "root", batch_size: Any = (), mask_in_observation: bool = False) -> None:
        super().__init__(batch_size=torch.Size(batch_size))
        self.reward, self.mask_in_observation = reward, mask_in_observation
        self.group_map = {"agents": ["0", "1", "2"]}
        batch = [*self.batch_size]
        agents = batch if reward == "group" else [*batch, 3]
        observation: Any = Unbounded([*batch, 3, 4])
        if mask_in_observation:
            mask = Categorical(2, shape=[*batch, 3, 2], dtype=torch.bool)
            observation = Composite({"seen": observation, "action_mask": mask}, shape=agents)
        self.observation_spec = Composite(
            {"agents": Composite({"observation": observation}, shape=agents), "state": Unbounded([*batch, 2])},
            shape=batch,
        )
        action = Categorical(2, shape=[*batch, 3])
        self.action_spec = Composite({"agents": Composite({"action": action}, shape=agents)}, shape=batch)
        shape = {"root": [*batch, 1], "group": [*batch, 1], "flat": [*batch, 3]}[reward]
        spec: Any = Unbounded(shape)
        if reward != "root":
            spec = Composite({"reward": spec}, shape=agents)
        self.reward_spec = Composite({"reward" if reward == "root" else "agents": spec}, shape=batch)
        self.steps = torch.zeros(*batch, 1)

    def _set_seed(self, seed: int | None) -> None:
        pass

    def _output(self) -> TensorDict:
        batch = self.batch_size
        agents = batch if self.reward == "group" else [*batch, 3]
        observation: Any = self.steps.unsqueeze(-1).expand(*batch, 3, 4).clone()
        if self.mask_in_observation:
            mask = torch.tensor([True, False]).expand(*batch, 3, 2).clone()
            observation = TensorDict({"seen": observation, "action_mask": mask}, agents)
        group = TensorDict({"observation": observation}, agents)
        return TensorDict({"agents": group, "state": torch.zeros(*batch, 2)}, batch)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        self.steps = torch.zeros_like(self.steps)
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return self._output().update({"done": done, "terminated": done.clone()})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.steps = self.steps + 1
        output = self._output()
        if self.reward == "root":
            output["reward"] = 10 * self.steps
        else:
            each = 10 * self.steps + torch.arange(3)
            output["agents", "reward"] = each if self.reward == "flat" else 10 * self.steps
        done = self.steps >= 4
        return output.update({"done": done, "terminated": done.clone()})


@pytest.mark.parametrize("batch_size", [[], [2]], ids=["single", "batch"])
@pytest.mark.parametrize("reward", ["root", "group", "flat"])
def test_a_reward_in_common_is_each_agents(reward: str, batch_size: list[int]) -> None:
    env = MultiAgentEnv(Shared(reward, batch_size))
    check_env_specs(env)
    data = env.rollout(3)
    extra = [0, 1, 2] if reward == "flat" else [0, 0, 0]
    expected = torch.tensor([[10.0 * step + more for more in extra] for step in (1, 2, 3)])
    assert torch.equal(data[REWARD].squeeze(-1), expected.expand(*batch_size, 3, 3))
    assert ("next", "reward") not in data.keys(True) and "state" in data.keys()
    stored = Shared(reward, batch_size).rollout(3)
    merged = merge_rollout(stored, env.layout)
    assert torch.equal(merged[REWARD], data[REWARD])


def test_rewards_of_other_shapes_are_refused() -> None:
    base = Shared("root")
    base.reward_spec = Composite({"reward": Unbounded([2])})
    with pytest.raises(ValueError, match=r"expected rewards under \('reward',\) of one of the shapes \[\(1,\), \(\)\]"):
        MultiAgentEnv(base)
    base.reward_spec = Composite({"points": Unbounded([1])})
    with pytest.raises(
        ValueError, match=r"group 'agents' has no rewards: expected \('agents', 'reward'\), or 'reward'"
    ):
        MultiAgentEnv(base)


def test_a_mask_inside_the_observation_of_another_wrapper() -> None:
    env = MultiAgentEnv(Shared(mask_in_observation=True))
    check_env_specs(env)
    data = env.rollout(3)
    assert data[OBSERVATION].shape == (3, 3, 4) and env.layout.has_action_mask
    assert not data[ACTION_MASK][..., 1].any()
    assert_legal(data)
    stored = Shared(mask_in_observation=True).rollout(3, auto_cast_to_device=False)
    layout = AgentLayout.from_rollout(stored)
    assert layout.action_counts == [2, 2, 2] and layout.observation_sizes == [4, 4, 4]
