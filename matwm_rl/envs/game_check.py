"""The check of what a PettingZoo environment returns, since TorchRL's wrapper fails without naming the agent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np


class GameWrapper:
    """Base class of wrappers of a parallel environment. Other attributes are read from the environment.

    Args:
        game: the parallel environment.
    """

    def __init__(self, game: Any) -> None:
        self.game = game

    def __getattr__(self, name: str) -> Any:
        # While this is being copied, the game is not there yet.
        if name == "game" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.game, name)


class CheckedGame(GameWrapper):
    """A PettingZoo parallel environment whose rewards, observations and masks are looked at before they are used.

    It also lets actions begin at ``Discrete(n, start)``'s start, which TorchRL leaves out. Everything else is the
    environment's own.

    Args:
        game: the parallel environment.
    """

    def __init__(self, game: Any) -> None:
        super().__init__(game)
        self._step = 0
        self._shapes = {agent: dict(_boxes(game.observation_space(agent))) for agent in game.possible_agents}
        spaces = {agent: game.action_space(agent) for agent in game.possible_agents}
        discrete = {agent: space for agent, space in spaces.items() if type(space).__name__ == "Discrete"}
        self._starts = {agent: int(space.start) for agent, space in discrete.items() if space.start}
        self._counts = {agent: int(space.n) for agent, space in discrete.items()}

    def reset(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reset the environment.

        Raises:
            ValueError: if observations or masks are not as the spaces say.
        """
        self._step = 0
        observations, infos = self._unpack(self.game.reset(*args, **kwargs), 2)
        self._check_observations(observations, infos, ended=())
        return observations, infos

    def step(self, actions: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """Step the environment.

        Raises:
            ValueError: if rewards are missing or no numbers, or observations or masks are not as the spaces say.
        """
        self._step += 1
        acting = list(self.game.agents)
        if self._starts:
            actions = {agent: action + self._starts.get(agent, 0) for agent, action in actions.items()}
        observations, rewards, terminations, truncations, infos = self._unpack(self.game.step(actions), 5)
        told = {"rewards": rewards, "terminations": terminations, "truncations": truncations}
        for agent in acting:
            if agent not in self.game.agents and not any(agent in given for given in (observations, *told.values())):
                continue  # it died, and the environment returned nothing for it
            for what, given in told.items():
                if agent not in given:
                    self._refuse(f"{what} without {agent!r}, which acted", "one for every agent that acted")
            if not _is_number(rewards[agent]):
                self._refuse(f"the reward {rewards[agent]!r} of {agent!r}", "one number")
        ended = [agent for agent in terminations if terminations[agent] or truncations.get(agent)]
        self._check_observations(observations, infos, ended)
        return observations, rewards, terminations, truncations, infos

    def _unpack(self, given: Any, number: int) -> tuple[dict[str, Any], ...]:
        parts = given if isinstance(given, tuple | list) else [given]
        if len(parts) != number or not all(isinstance(part, Mapping) for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts)
            self._refuse(f"({kinds})", f"a tuple of {number} dicts by agent, as PettingZoo's parallel API has it")
        return tuple(parts)

    def _check_observations(self, observations: Mapping[str, Any], infos: Mapping[str, Any], ended: Any) -> None:
        for agent, observation in observations.items():
            if agent not in self._shapes:
                self._refuse(f"an observation of {agent!r}", f"agents of its possible_agents, {list(self._shapes)}")
            for path, shape in self._shapes[agent].items():
                value = observation
                for name in path:
                    value = value.get(name) if isinstance(value, Mapping) else None
                where = ".".join(("observation", *path))
                if not isinstance(value, np.ndarray):
                    value = np.asarray(value)
                if value.dtype.kind not in "biuf" or value.size != math.prod(shape):
                    found = (
                        f"{value.dtype} {list(value.shape)}" if value.dtype.kind in "biuf" else repr(observation)[:80]
                    )
                    self._refuse(
                        f"the {where} of {agent!r} as {found}", f"numbers of shape {list(shape)}, as its space"
                    )
            mask = observation.get("action_mask") if isinstance(observation, Mapping) else None
            info = infos.get(agent)
            mask = info.get("action_mask") if mask is None and isinstance(info, Mapping) else mask
            if mask is not None and agent in self.game.agents and agent not in ended:
                self._check_mask(agent, np.asarray(mask))

    def _check_mask(self, agent: str, mask: Any) -> None:
        count = self._counts.get(agent)
        if mask.shape != (count,) or not ((mask == 0) | (mask == 1)).all():
            self._refuse(f"the action mask {mask.tolist()} of {agent!r}", f"{count} entries of 0 or 1")
        if not mask.any():
            self._refuse(f"no legal action of {agent!r}, which has not ended", "at least one")

    def _refuse(self, given: str, expected: str) -> None:
        name = type(getattr(self.game, "unwrapped", self.game)).__name__
        raise ValueError(
            f"the environment {name} gave {given}, in step {self._step} of its episode; expected {expected}"
        )


def _boxes(space: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Yield place and shape of all boxes in a space."""
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        for name, part in parts.items():
            yield from _boxes(part, (*path, name))
    elif type(space).__name__ == "Box":
        yield path, tuple(space.shape)


def _is_number(value: Any) -> bool:
    if isinstance(value, Real):
        return True
    value = np.asarray(value)
    return value.size == 1 and value.dtype.kind in "biuf"
