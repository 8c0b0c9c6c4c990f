"""SMACv2 and MeltingPot without StarCraft and without Lab2D: simulators with their interfaces, sizes and conventions.

TorchRL's own wrappers are around them, so that all specs and keys are those that the real ones have.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

# ---------------------------------------------------------------------- SMACv2


class StarCraft:
    """Three marines, who may wait (1), move (2 to 5) and attack (6 to 8); a dead one may do nothing but 0.

    The second dies in step 2, all at the end of an episode that is lost. An episode ends after six steps.
    """

    n_agents, n_enemies, n_actions = 3, 3, 9

    def __init__(self, *, continuing_episode: bool = False, wins: bool = True) -> None:
        self.continuing_episode, self.wins, self.time = continuing_episode, wins, 0

    def get_obs_size(self) -> int:
        return 10

    def get_state_size(self) -> int:
        return 20

    def reset(self) -> Any:
        self.time = 0
        return self.get_obs(), self.get_state()

    def _alive(self, agent: int) -> bool:
        return (agent != 1 or self.time < 2) and (self.wins or self.time < 6)

    def get_obs(self) -> np.ndarray:
        return np.stack([np.full(10, 0.1 * (self.time + 1) * self._alive(agent), np.float32) for agent in range(3)])

    def get_state(self) -> np.ndarray:
        return np.full(20, 0.5, np.float32)

    def get_avail_actions(self) -> list[list[int]]:
        living = [0, 1, 1, 1, 1, 0, 1, 1, 1]
        return [living if self._alive(agent) else [1] + [0] * 8 for agent in range(3)]

    def step(self, actions: Any) -> Any:
        for agent, action in enumerate(actions):
            assert self.get_avail_actions()[agent][action], f"Agent {agent} cannot perform action {action}"
        self.time += 1
        done = self.time == 6
        info: dict[str, Any] = {"battle_won": done and self.wins, "dead_allies": 1, "dead_enemies": 0}
        if done and self.continuing_episode:
            info["episode_limit"] = True
        return 0.5 * self.time, done, info

    def close(self) -> None:
        pass


def smac(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Any:
    """Return TorchRL's SMACv2Wrapper around the stand-in."""
    from torchrl.envs.libs.smacv2 import SMACv2Wrapper

    module = ModuleType("smacv2")
    module.env = SimpleNamespace(StarCraft2Env=StarCraft)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smacv2", module)
    return SMACv2Wrapper(env=StarCraft(**kwargs))


# ---------------------------------------------------------------------- MeltingPot


class Array:
    """As ``dm_env.specs.Array``."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)


class BoundedArray(Array):
    """As ``dm_env.specs.BoundedArray``, which the stand-in has none of."""


class DiscreteArray(BoundedArray):
    """As ``dm_env.specs.DiscreteArray``."""

    def __init__(self, num_values: int) -> None:
        super().__init__((), np.int64)
        self.num_values = num_values


class Substrate:
    """Two players as in commons_harvest__open; the episode is over after six steps."""

    def __init__(self) -> None:
        self.time = 0

    def observation_spec(self) -> list[dict[str, Array]]:
        number, picture = Array((), np.float64), Array((88, 88, 3), np.uint8)
        player = {"COLLECTIVE_REWARD": number, "READY_TO_SHOOT": number, "RGB": picture}
        return [player | {"WORLD.RGB": Array((144, 192, 3), np.uint8)}] * 2

    def action_spec(self) -> list[Array]:
        return [DiscreteArray(8)] * 2

    def reward_spec(self) -> list[Array]:
        return [Array((), np.float64)] * 2

    def observation(self) -> list[dict[str, np.ndarray]]:
        return [
            {
                "COLLECTIVE_REWARD": np.float64(3),
                "READY_TO_SHOOT": np.float64(1),
                "RGB": np.full((88, 88, 3), 10 * self.time + player, np.uint8),
                "WORLD.RGB": np.zeros((144, 192, 3), np.uint8),
            }
            for player in range(2)
        ]

    def _step(self) -> Any:
        rewards, last = [np.float64(self.time), np.float64(-self.time)], self.time == 6
        return SimpleNamespace(observation=self.observation(), reward=rewards, last=lambda: last)

    def reset(self) -> Any:
        self.time = 0
        return self._step()

    def step(self, actions: list[Any]) -> Any:
        self.time += 1
        return self._step()

    def close(self) -> None:
        pass


def meltingpot(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Any:
    """Return TorchRL's MeltingpotWrapper around the stand-in."""
    from torchrl.envs.libs.meltingpot import MeltingpotWrapper

    module, dm_env = ModuleType("meltingpot"), ModuleType("dm_env")
    substrate = SimpleNamespace(Substrate=Substrate)
    module.utils = SimpleNamespace(substrates=SimpleNamespace(substrate=substrate))  # type: ignore[attr-defined]
    specs = SimpleNamespace(Array=Array, BoundedArray=BoundedArray, DiscreteArray=DiscreteArray)
    dm_env.specs = specs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "meltingpot", module)
    monkeypatch.setitem(sys.modules, "dm_env", dm_env)
    return MeltingpotWrapper(env=Substrate(), **kwargs)
