"""A NaN or an infinity stops where it enters, and the error names entry, agent, environment and step."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDictBase

from matwm_rl.envs import MockEnv, MultiAgentEnv, SerialMultiAgentEnv, make_env
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.step_check import StepCheck
from tests.helpers import make_layout, random_batch

NAN, INF = math.nan, math.inf


class Spoilt(MockEnv):
    """Gives a number as an entry of the prey or the second hunter at one step of the first episode."""

    def __init__(self, entry: str, number: float, step: int, group: str = "prey", agent: int = 0) -> None:
        super().__init__()
        self.spoilt, self.calls = (entry, number, step, group, agent), 0

    def _spoil(self, td: TensorDictBase) -> TensorDictBase:
        entry, number, step, group, agent = self.spoilt
        if self.calls == step:
            td[group, entry][agent] = number
        return td

    def _reset(self, *args: object, **kwargs: object) -> TensorDictBase:
        return self._spoil(super()._reset(*args, **kwargs))

    def _step(self, td: TensorDictBase) -> TensorDictBase:
        self.calls += 1
        return self._spoil(super()._step(td))


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("entry", ["reward", "observation"])
def test_one_such_number_of_one_agent_at_one_step_is_named(entry: str, number: float) -> None:
    env = MultiAgentEnv(Spoilt(entry, number, 2))
    with pytest.raises(
        ValueError, match=f"gave {number} as {entry} of agent 'prey_0' at step 2 of the episode"
    ) as error:
        env.rollout(10)
    assert "correct the environment" in str(error.value)


def test_a_first_observation_counts_and_another_agent_is_told_apart() -> None:
    env = MultiAgentEnv(Spoilt("observation", NAN, 0, "hunter", 1))
    with pytest.raises(ValueError, match="as observation of agent 'hunter_1' at step 0"):
        env.reset()


def test_what_is_too_large_for_float32_is_an_infinity() -> None:
    """Rewards are read as float32, in which 1e300 is infinite."""
    check, layout = StepCheck(make_layout()), make_layout()
    td = random_batch(1, 1, deaths=False)[0, 0].get("next")
    td["agents", "reward"] = torch.tensor([1.0, 1e300, 1.0], dtype=torch.float64).unsqueeze(-1).float()
    with pytest.raises(ValueError, match=f"gave inf as reward of agent '{layout.agent_names[1]}' .*float32"):
        check.after_step(td)


def test_the_environment_of_a_batch_and_the_step_of_its_own_episode() -> None:
    env = make_env("vmas/simple_tag", num_envs=3, max_steps=100, seed=0)
    td = env.reset()
    for _ in range(3):
        td = env.rand_step(td)["next"]
    reset = torch.tensor([[False], [True], [False]])
    td = env.reset(td.select("agents", "done").set("_reset", reset))
    td = env.rand_step(td)["next"]
    agents = env.layout.agent_names
    for index, step in ((1, 1), (2, 4)):
        spoilt = td.clone()
        spoilt["agents", "reward"][index, 3] = NAN
        env.transform._step_check._steps -= 1
        with pytest.raises(ValueError, match=f"'{agents[3]}' at step {step} of the episode of environment {index} "):
            env.transform._step_check.after_step(spoilt)


def test_environments_in_a_batch_of_their_own_are_checked_too() -> None:
    makers = [lambda: MultiAgentEnv(MockEnv()), lambda: MultiAgentEnv(Spoilt("reward", NAN, 2))]
    with pytest.raises(ValueError, match="as reward of agent 'prey_0' at step 2"):
        SerialMultiAgentEnv(2, makers).rollout(5)


def test_huge_finite_numbers_and_images_pass() -> None:
    assert MultiAgentEnv(Spoilt("reward", 3e37, 1)).rollout(3)["next", "agents", "reward"].max() == 3e37
    layout: AgentLayout = make_layout(observation_shape=(3, 4, 4))
    images = random_batch(1, 1, observation_shape=(3, 4, 4))[0, 0]
    assert StepCheck(layout).after_reset(images, None) is images


def test_a_dead_agents_observation_does_not_count() -> None:
    """It is read as zeros, whatever the environment gives."""
    env = MultiAgentEnv(Spoilt("observation", NAN, 4, "hunter", 1))
    td = env.rollout(5)
    assert not td["next", "agents", "alive"][3, 1] and not td["next", "agents", "observation"][3, 1].any()
