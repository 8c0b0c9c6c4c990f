"""Environments with continuous actions, and what their tests do with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium.spaces as sp
import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from matwm_rl.envs import MultiAgentEnv, make_env, merge_rollout
from matwm_rl.keys import ACTION, DONE
from tests.envs.population import Population

CONTINUOUS = {"continuous_actions": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An environment whose episodes are of seven steps, and the bounds of its actions."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    package: str
    sizes: list[int]
    low_of_all: float = -1

    def make(self, **kwargs: Any) -> Any:
        pytest.importorskip(self.package, reason=f"{self.package} is not installed")
        return make_env(self.name, **self.kwargs, **kwargs)

    @property
    def low(self) -> list[list[float]]:
        return [[self.low_of_all] * size for size in self.sizes]

    @property
    def high(self) -> list[list[float]]:
        return [[1] * size for size in self.sizes]

    @property
    def is_vmas(self) -> bool:
        return self.name.startswith("vmas/")

    def raw(self) -> Any:
        """The environment itself, without anything of this library or of TorchRL around it."""
        import importlib

        family, task = self.name.split("/")
        if family == "vmas":
            return importlib.import_module("vmas").make_env(task, num_envs=1, seed=None, **self.kwargs)
        if family == "mamujoco":
            from gymnasium_robotics import mamujoco_v1

            return mamujoco_v1.parallel_env(*task.split("-"), **self.kwargs)
        package = {"mpe2": "mpe2", "sisl": "pettingzoo.sisl"}[family]
        return importlib.import_module(f"{package}.{task}").parallel_env(**self.kwargs)


CASES = {
    "mpe2 tag": Case(
        name="mpe2/simple_tag_v3",
        kwargs={"max_cycles": 7} | CONTINUOUS,
        package="mpe2",
        sizes=[5] * 4,
        low_of_all=0,
    ),
    "mpe2 speaker": Case(
        name="mpe2/simple_speaker_listener_v4",
        kwargs={"max_cycles": 7} | CONTINUOUS,
        package="mpe2",
        sizes=[3, 5],
        low_of_all=0,
    ),
    "vmas tag": Case(
        name="vmas/simple_tag",
        kwargs={"max_steps": 7} | CONTINUOUS,
        package="vmas",
        sizes=[2] * 4,
    ),
    "vmas balance": Case(
        name="vmas/balance",
        kwargs={"max_steps": 7} | CONTINUOUS,
        package="vmas",
        sizes=[2] * 3,
    ),
    "multiwalker": Case(
        name="sisl/multiwalker_v9",
        kwargs={"max_cycles": 7},
        package="Box2D",
        sizes=[4] * 3,
    ),
    "half cheetah": Case(
        name="mamujoco/HalfCheetah-2x3",
        kwargs={"max_episode_steps": 7},
        package="gymnasium_robotics",
        sizes=[3] * 2,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Arms(Population):
    """The population, whose agents take the vectors of their action spaces."""

    def __init__(self, spaces: dict[str, sp.Space[Any]], **kwargs: Any) -> None:
        super().__init__(tuple(spaces), **kwargs)
        self.spaces = spaces

    def action_space(self, agent: str) -> Any:
        return self.spaces[agent]

    def step(self, actions: dict[str, Any]) -> Any:
        returned = super().step(dict.fromkeys(actions, 0))
        self.given[-1] = {agent: np.array(action) for agent, action in actions.items()}
        return returned


UNLIKE: dict[str, sp.Space[Any]] = {
    "a_0": sp.Box(np.float32([0, -2]), np.float32([1, 6])),
    "a_1": sp.Box(np.float32([-1, 1]), np.float32([0, 3])),
    "b_0": sp.Box(10, 20, (1,), np.float64),
}
"""Two agents of one group whose bounds differ, and one with fewer numbers."""


def play(env: EnvBase, actions: Tensor) -> TensorDictBase:
    """Play actions ``[*E, T, N, A]`` from a reset on, over the ends of episodes."""
    data, steps = env.reset(), []
    for action in actions.unbind(-3):
        step, data = env.step_and_maybe_reset(data.set(ACTION, action))
        steps.append(step)
    return torch.stack(steps, env.batch_dims)


def assert_equal(one: TensorDictBase, other: TensorDictBase) -> None:
    keys = {str(key): key for key in one.keys(True, True)}
    assert keys.keys() == {str(key) for key in other.keys(True, True)}
    for key in keys.values():
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6, msg=lambda found, key=key: f"{key} {found}")


def assert_merged(env: MultiAgentEnv, base: EnvBase, steps: int = 16, **kwargs: Any) -> None:
    """Play an environment and, with the same actions, the base environment; merge what this gives."""
    live = env.rollout(steps, break_when_any_done=False)
    assert live[DONE].any()
    data, stored, space = base.reset(), [], env.layout.actions
    for action in live[ACTION].unbind(-3):
        start = 0
        for group, names in env.group_map.items():
            rows = slice(start, start := start + len(names))
            low, high = torch.tensor(space.low[rows]), torch.tensor(space.high[rows])
            own = low + (action[..., rows, : low.shape[-1]] + 1) / 2 * (high - low)
            data[group, "action"] = own.to(base.full_action_spec[group, "action"].dtype)
        step, data = base.step_and_maybe_reset(data)
        stored.append(step)
    rollout = torch.stack(stored, base.batch_dims)
    merged = merge_rollout(rollout, env.layout, **kwargs)
    # By keys, as the root of live data has the number of the episode too.
    assert_equal(merged, live.select(*merged.keys(True, True)))
