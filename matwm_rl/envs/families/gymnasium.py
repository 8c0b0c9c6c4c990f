"""The families ``"rware"`` and ``"lbforaging"``, whose environments are Gymnasium's, with Tuple spaces."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import torch

from matwm_rl.envs.families.named import construct, unknown_environment
from matwm_rl.envs.families.packages import import_package
from matwm_rl.envs.families.tuple_game import TupleGame
from matwm_rl.envs.registry import register_family


class Foraging(TupleGame):
    """Level-based foraging, whose episodes repeat from a seed.

    It places its players where none stands, and where none stood at the end of the episode before: without this, what
    a seed gives would depend on what was played before.
    """

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode; with a seed as if none had been before."""
        for player in self.unwrapped.players if seed is not None else ():
            player.position = None
        return super().reset(seed, options)


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


make_rware = partial(_make, "rware", "max_steps", TupleGame)
make_lbforaging = partial(_make, "lbforaging", "max_episode_steps", Foraging)
register_family("rware", make_rware)
register_family("lbforaging", make_lbforaging)
