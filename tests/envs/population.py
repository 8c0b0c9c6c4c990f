"""A PettingZoo environment whose agents come and go by a timetable."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces
import numpy as np
from pettingzoo import ParallelEnv

from matwm_rl.envs import MultiAgentEnv
from matwm_rl.envs.families import wrap_pettingzoo


class Population(ParallelEnv):
    """Agent i observes ``[step, i, 1]`` and is rewarded ``i + 1`` a step.

    Args:
        names: of the agents that there can be.
        timetable: ``{agent: {step: event}}`` with the events ``"die"``, ``"cut"`` (truncated alone) and ``"join"``.
        late: who is not there at the reset.
        length: of an episode.
        end: of it: ``"terminate"``, ``"truncate"`` or ``"both"``.
    """

    metadata = {"name": "population"}
    render_mode = None

    def __init__(
        self,
        names: tuple[str, ...] = ("a_0", "a_1"),
        *,
        timetable: dict[str, dict[int, str]] | None = None,
        late: tuple[str, ...] = (),
        length: int = 8,
        end: str = "truncate",
    ) -> None:
        self.possible_agents = list(names)
        self.timetable, self.late, self.length, self.end = timetable or {}, late, length, end
        self.given: list[dict[str, int]] = []

    def observation_space(self, agent: str) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def action_space(self, agent: str) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(3)

    def _observe(self, agent: str) -> np.ndarray:
        return np.array([self.time, self.possible_agents.index(agent), 1], dtype=np.float32)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.time = 0
        self.agents = [agent for agent in self.possible_agents if agent not in self.late]
        return {agent: self._observe(agent) for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> Any:
        self.given.append({agent: int(action) for agent, action in actions.items()})
        self.time += 1
        now = {agent: events.get(self.time) for agent, events in self.timetable.items()}
        over = self.time >= self.length
        acted, joined = list(self.agents), [agent for agent, event in now.items() if event == "join"]
        terminated = {a: now.get(a) == "die" or (over and self.end in ("terminate", "both")) for a in acted}
        truncated = {a: now.get(a) == "cut" or (over and self.end in ("truncate", "both")) for a in acted}
        self.agents = [] if over else [*(a for a in acted if not (terminated[a] or truncated[a])), *joined]
        seen = [*acted, *joined]
        none = dict.fromkeys(joined, False)
        return (
            {a: self._observe(a) for a in seen},
            {a: float(self.possible_agents.index(a) + 1) * (a in acted) for a in seen},
            {**terminated, **none},
            {**truncated, **none},
            {a: {} for a in seen},
        )

    def render(self) -> None:
        return None

    def close(self) -> None:
        pass


def population(**kwargs: Any) -> MultiAgentEnv:
    return MultiAgentEnv(wrap_pettingzoo(Population(**kwargs)))
