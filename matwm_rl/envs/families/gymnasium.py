"""The families ``"rware"`` and ``"lbforaging"``, whose environments are Gymnasium's, with Tuple spaces."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchrl.envs import EnvBase

from matwm_rl.envs.families.game_batch import GameBatch
from matwm_rl.envs.families.named import construct, unknown_environment
from matwm_rl.envs.families.packages import import_package
from matwm_rl.envs.families.pettingzoo import wrap_pettingzoo
from matwm_rl.envs.families.tuple_game import TupleGame
from matwm_rl.envs.registry import register_family

Colour = tuple[int, int, int]
GREY, BLUE, BLACK, RED, ORANGE = (190, 190, 190), (70, 130, 220), (40, 40, 40), (200, 40, 40), (240, 150, 30)
CELL = 24
"""Pixels of the side of a cell in pictures."""


class Foraging(TupleGame):
    """Level-based foraging, whose episodes repeat from a seed, and which is drawn without a screen.

    It places its players where none stands, and where none stood at the end of the episode before: without this, what
    a seed gives would depend on what was played before. Players are red, food is green, the darker the higher its
    level.
    """

    render_mode = "rgb_array"
    """It has no other."""

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode; with a seed as if none had been before."""
        for player in self.unwrapped.players if seed is not None else ():
            player.position = None
        return super().reset(seed, options)

    def render(self) -> NDArray[np.uint8]:
        """Draw the field."""
        field, players = self.unwrapped.field, self.unwrapped.players
        food = [(row, column, (0, max(80, 230 - 30 * field[row, column]), 0)) for row, column in np.argwhere(field)]
        return _draw(field.shape, [*food, *((*player.position, RED) for player in players)])


class Warehouse(TupleGame):
    """The robotic warehouse, which is drawn without a screen.

    Shelves are grey, those that are asked for blue, goals black, agents orange, and red if they carry a shelf.
    """

    render_mode = "rgb_array"
    """It has no other."""

    def render(self) -> NDArray[np.uint8]:
        """Draw the warehouse."""
        game = self.unwrapped
        goals = [(y, x, BLACK) for x, y in game.goals]
        shelves = [(shelf.y, shelf.x, BLUE if shelf in game.request_queue else GREY) for shelf in game.shelfs]
        agents = [(agent.y, agent.x, RED if agent.carrying_shelf else ORANGE) for agent in game.agents]
        return _draw(game.grid_size, [*goals, *shelves, *agents])


def _draw(shape: tuple[int, ...], things: Iterable[tuple[int, int, Colour]]) -> NDArray[np.uint8]:
    """Draw cells with what is in them, row, column and colour; the last thing is on top."""
    cells = np.full((*shape, 3), 255, dtype=np.uint8)
    for row, column, colour in things:
        cells[row, column] = colour
    picture = cells.repeat(CELL, 0).repeat(CELL, 1)
    picture[::CELL], picture[:, ::CELL] = 220, 220
    return picture


def _make(
    package: str,
    limit: str,
    game: type[TupleGame],
    task: str,
    *,
    num_envs: int,
    device: torch.device | str | None,
    **kwargs: Any,
) -> TupleGame:
    """Make an environment that a package registers with Gymnasium.

    They report their time limit as a termination, from which values do not bootstrap. Gymnasium's own ``TimeLimit``
    takes its place.

    Args:
        package: which registers its environments when it is imported.
        limit: the argument that is the length of an episode.
        game: what is around the environment.
        task: an environment's id.
        num_envs: always 1.
        device: of the tensors, which the wrapper around it makes.
        kwargs: passed to the environment.

    Raises:
        ValueError: if the package has no such environment.
    """
    import_package(package, extra=package)
    gymnasium = import_package("gymnasium", extra=package)
    known = [name for name, spec in gymnasium.registry.items() if str(spec.entry_point).startswith(f"{package}.")]
    if task not in known:
        raise unknown_environment(f"{package}/{task}", task, known)
    spec = copy.deepcopy(gymnasium.spec(task))
    steps = kwargs.pop(limit, spec.kwargs[limit])
    spec.kwargs[limit] = sys.maxsize
    made = {"max_episode_steps": steps, "disable_env_checker": True}
    return game(construct(f"{package}/{task}", partial(gymnasium.make, spec, **made), kwargs))


make_rware = partial(_make, "rware", "max_steps", Warehouse)
make_lbforaging = partial(_make, "lbforaging", "max_episode_steps", Foraging)


def make_lbforaging_batch(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make ``num_envs`` environments of level-based foraging that step as one batch."""
    return GameBatch(lambda: wrap_pettingzoo(make_lbforaging(task, num_envs=1, device=device, **kwargs)), num_envs)


register_family("rware", make_rware)
register_family("lbforaging", make_lbforaging, make_batch=make_lbforaging_batch)
