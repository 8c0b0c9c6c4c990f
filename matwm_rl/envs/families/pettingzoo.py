"""The families of PettingZoo's packages, and its parallel environments in general."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, MarlGroupMapType
from torchrl.envs.libs.pettingzoo import PettingZooWrapper

from matwm_rl.arguments import check_ints
from matwm_rl.envs.families.game_batch import GameBatch
from matwm_rl.envs.families.named import construct, unknown_environment
from matwm_rl.envs.families.packages import import_package
from matwm_rl.envs.game_check import CheckedGame, GameWrapper
from matwm_rl.envs.registry import register_family
from matwm_rl.torchrl_internals import simulator

MPE_MAX_CYCLES = 25
"""Length of an episode of mpe2 unless ``max_cycles`` is given."""
MULTIWALKER_MAX_CYCLES = 500
"""Length of an episode of multiwalker unless ``max_cycles`` is given: the environment's own default."""


def make_mpe(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make an environment of a module of ``mpe2``; see :func:`wrap_pettingzoo` for ``group_map``.

    Raises:
        ValueError: if there is no such module.
    """
    return _make("mpe2", "mpe2", task, extra="mpe", device=device, **({"max_cycles": MPE_MAX_CYCLES} | kwargs))


def make_mpe_batch(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make ``num_envs`` environments of a module of ``mpe2`` that step as one batch; see :func:`make_mpe`."""
    return GameBatch(partial(make_mpe, task, num_envs=1, device=device, **kwargs), num_envs)


def make_butterfly(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make an environment of a module of ``pettingzoo.butterfly``; see :func:`wrap_pettingzoo` for ``group_map``.

    Raises:
        ValueError: if there is no such module.
    """
    if task.startswith("pistonball"):
        kwargs.setdefault("continuous", False)
    return _make("butterfly", "pettingzoo.butterfly", task, extra="butterfly", device=device, **kwargs)


def make_sisl(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make an environment of a module of ``pettingzoo.sisl``; see :func:`wrap_pettingzoo` for ``group_map``.

    Multiwalker reports its time limit as a termination, from which values do not bootstrap. It is replaced by a limit
    that truncates.

    Raises:
        ValueError: if there is no such module.
    """
    limit = None
    if task.startswith("multiwalker"):
        limit = kwargs.pop("max_cycles", MULTIWALKER_MAX_CYCLES)
        kwargs["max_cycles"] = sys.maxsize
    return _make("sisl", "pettingzoo.sisl", task, extra="sisl", device=device, limit=limit, **kwargs)


def make_magent2(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make an environment of a module of ``magent2.environments``; see :func:`wrap_pettingzoo` for ``group_map``.

    Raises:
        ValueError: if there is no such module.
    """
    return _make("magent2", "magent2.environments", task, extra="magent2", device=device, **kwargs)


def _make(
    family: str,
    package: str,
    task: str,
    *,
    extra: str,
    device: torch.device | str | None,
    group_map: dict[str, list[str]] | MarlGroupMapType | None = None,
    limit: int | None = None,
    **kwargs: Any,
) -> EnvBase:
    # pygame opens a window at import otherwise, which fails on a machine without a screen.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    module = _module(import_package(package, extra=extra), task, family)
    # Allow rendering. Some butterfly games also need it to produce observations.
    kwargs.setdefault("render_mode", "rgb_array")
    game = construct(f"{family}/{task}", module.parallel_env, kwargs)
    game = game if limit is None else _TimeLimit(game, limit)
    return wrap_pettingzoo(game, group_map=group_map, device=device)


def _module(package: ModuleType, task: str, family: str) -> ModuleType:
    tasks = sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if module.name.rpartition("_v")[2].isdigit()
    )
    if task not in tasks:
        raise unknown_environment(f"{family}/{task}", task, tasks)
    with warnings.catch_warnings():
        # PettingZoo warns that a registry will replace this import, but no release has one yet.
        warnings.filterwarnings("ignore", message="The old environment creation API")
        return importlib.import_module(f"{package.__name__}.{task}")


class _TimeLimit(GameWrapper):
    """Truncates episodes after ``max_cycles`` steps.

    Args:
        game: the parallel environment.
        max_cycles: length of an episode.
    """

    def __init__(self, game: Any, max_cycles: int) -> None:
        super().__init__(game)
        check_ints(1, max_cycles=max_cycles)
        self._max_cycles = max_cycles
        self._steps = 0

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        """Begin an episode."""
        self._steps = 0
        return self.game.reset(*args, **kwargs)

    def step(self, actions: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """Take a step; after the last of an episode no agent is left."""
        observations, rewards, terminated, truncated, infos = self.game.step(actions)
        self._steps += 1
        if self._steps >= self._max_cycles:
            truncated = dict.fromkeys(truncated, True)
            self.game.agents = []
        return observations, rewards, terminated, truncated, infos


def wrap_pettingzoo(
    env: Any,
    *,
    group_map: dict[str, list[str]] | MarlGroupMapType | None = None,
    device: torch.device | str | None = None,
) -> EnvBase:
    """Wrap a PettingZoo parallel environment with the settings that :class:`~matwm_rl.envs.MultiAgentEnv` needs.

    Args:
        env: the parallel environment, or any object with its methods.
        group_map: the groups, ``{group: [agent names]}``; by default TorchRL's, which go by the agents' names, where
            agents of unequal observations or actions get groups of their own.
        device: device of the tensors given and received.

    Raises:
        ValueError: if a given group holds agents of unequal observations or actions, or agents or spaces are missing.

    Examples:
        >>> from mpe2 import simple_tag_v3
        >>> wrap_pettingzoo(simple_tag_v3.parallel_env()).group_map["agent"]
        ['agent_0']
    """
    if hasattr(env, "agent_iter"):
        raise ValueError("agents of an AEC environment act in turns; wrap its parallel_env(...), not its env(...).")
    if not getattr(env, "possible_agents", None):
        raise ValueError(
            f"{env} has no possible_agents: a PettingZoo environment must list all agents that can ever take part, "
            "before its first reset."
        )
    if group_map is not None:
        _check_groups(env, group_map)
    return _PettingZoo(env, group_map=group_map, use_mask=True, done_on_any=False, device=device)


class _PettingZoo(PettingZooWrapper):
    """Lets agents join after the reset, and looks at what the environment returns before TorchRL's wrapper reads it.

    TorchRL's wrapper also looks for ``agents`` among all attributes of all modules, at every step: 15% of its time.
    """

    def _check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Accept any object with the right methods; TorchRL asks for PettingZoo's own class."""

    def _build_env(self, env: Any) -> CheckedGame:
        # TorchRL's wrapper also warns about every release of PettingZoo except the one that it is tested with.
        self.parallel = True
        return CheckedGame(env)

    def _get_default_group_map(self, agent_names: list[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for group, names in super()._get_default_group_map(agent_names).items():
            alike: dict[Any, list[str]] = {}
            for name in names:
                alike.setdefault(_kind_of(self, name), []).append(name)
            groups |= {group: names} if len(alike) == 1 else {same[0]: same for same in alike.values()}
        return groups

    @property
    def agents(self) -> list[str]:
        """Which agents are alive."""
        agents: list[str] = simulator(self).agents
        return agents

    def _reset_parallel(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        observations, infos = super()._reset_parallel(**kwargs)
        # TorchRL's wrapper expects all possible agents at a reset. Those that join later are masked until they do.
        late = [agent for agent in self.possible_agents if agent not in observations]
        observations = {**observations, **{agent: _zeros(self.observation_space(agent)) for agent in late}}
        kept = _only_masks(observations, infos)
        if any(kept.values()):
            # It reads from the first infos whether there are masks, and believes it of a group if all its agents have.
            for agent in (agent for agent, info in kept.items() if not info):
                count = getattr(self.action_space(agent), "n", None)
                kept[agent] = {} if count is None else {"action_mask": np.ones(count, dtype=np.int8)}
        return observations, kept

    def _step_parallel(self, tensordict: TensorDictBase) -> tuple[Any, ...]:
        observations, *ends, infos = super()._step_parallel(tensordict)
        kept = _only_masks(observations, infos)
        for agent in (agent for agent, info in kept.items() if info):
            group = next(group for group, agents in self.group_map.items() if agent in agents)
            if not self.has_action_mask[group]:
                raise ValueError(
                    f"the infos of {agent!r} have an action mask after a step, but none after the reset; expected one "
                    "in the infos of every reset too."
                )
        return (observations, *ends, kept)


def _only_masks(observations: Mapping[str, Any], infos: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keep of the infos the action masks: nobody here reads others, which may come and go, and be texts."""
    found = {agent: infos.get(agent) or {} for agent in observations}
    return {agent: {name: info[name] for name in ("action_mask",) if name in info} for agent, info in found.items()}


def _zeros(space: Any) -> Any:
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        return {name: _zeros(part) for name, part in parts.items()}
    if parts is not None:
        return tuple(map(_zeros, parts))
    return np.zeros(space.shape, dtype=space.dtype)


def _kind_of(env: Any, agent: str) -> tuple[Any, Any]:
    """Return what must be equal of the agents of a group."""
    return _kind(env.observation_space(agent)), _kind(env.action_space(agent))


def _kind(space: Any) -> Any:
    parts = getattr(space, "spaces", None)
    if parts is not None:
        named = parts.items() if isinstance(parts, Mapping) else enumerate(parts)
        return tuple((name, _kind(part)) for name, part in named)
    counts = (str(getattr(space, name, None)) for name in ("n", "start", "nvec"))
    return type(space).__name__, space.shape, str(space.dtype), *counts


def _check_groups(env: Any, group_map: dict[str, list[str]] | MarlGroupMapType) -> None:
    if isinstance(group_map, MarlGroupMapType):
        group_map = group_map.get_group_map(env.possible_agents)
    for group, agents in group_map.items():
        if unknown := [agent for agent in agents if agent not in env.possible_agents]:
            raise ValueError(
                f"group {group!r} holds the unknown agents {unknown}; the environment has {list(env.possible_agents)}."
            )
        kinds = {_kind_of(env, agent): (env.observation_space(agent), env.action_space(agent)) for agent in agents}
        if len(kinds) > 1:
            raise ValueError(
                f"group {group!r} holds agents of unequal observations or actions ({list(kinds.values())}), which "
                "TorchRL's PettingZooWrapper cannot stack. Put them into groups of their own; MultiAgentEnv merges all "
                "groups."
            )


register_family("mpe2", make_mpe, make_batch=make_mpe_batch)
register_family("butterfly", make_butterfly)
register_family("sisl", make_sisl)
register_family("magent2", make_magent2)
