"""The families ``"mpe2"`` and ``"butterfly"``, and PettingZoo's parallel environments in general."""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torchrl.envs import EnvBase, MarlGroupMapType
from torchrl.envs.libs.pettingzoo import PettingZooWrapper

from matwm_rl.envs.families.packages import import_package
from matwm_rl.envs.registry import register_family
from matwm_rl.torchrl_internals import simulator

MPE_MAX_CYCLES = 25
"""Length of an episode of mpe2 unless ``max_cycles`` is given."""


def make_mpe(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make an environment of a module of ``mpe2``; see :func:`wrap_pettingzoo` for ``group_map``.

    Raises:
        ValueError: if there is no such module.
    """
    package = import_package("mpe2", extra="mpe")
    kwargs.setdefault("max_cycles", MPE_MAX_CYCLES)
    kwargs.setdefault("render_mode", "rgb_array")  # so that it can be drawn; nothing is, unless asked
    return _make(_module(package, task, "mpe2"), device=device, **kwargs)


def make_butterfly(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make an environment of a module of ``pettingzoo.butterfly``; see :func:`wrap_pettingzoo` for ``group_map``.

    Raises:
        ValueError: if there is no such module.
    """
    # pygame opens a window at import otherwise, which fails on a machine without a screen.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    package = import_package("pettingzoo.butterfly", extra="butterfly")
    # Without a render mode some of them never draw what their agents observe.
    kwargs.setdefault("render_mode", "rgb_array")
    if task.startswith("pistonball"):
        kwargs.setdefault("continuous", False)
    return _make(_module(package, task, "butterfly"), device=device, **kwargs)


def _make(
    module: ModuleType,
    *,
    device: torch.device | str | None,
    group_map: dict[str, list[str]] | MarlGroupMapType | None = None,
    **kwargs: Any,
) -> EnvBase:
    return wrap_pettingzoo(module.parallel_env(**kwargs), group_map=group_map, device=device)


def _module(package: ModuleType, task: str, family: str) -> ModuleType:
    tasks = sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if module.name.rpartition("_v")[2].isdigit()
    )
    if task not in tasks:
        raise ValueError(f"unknown environment '{family}/{task}'; environments: {', '.join(tasks)}.")
    return importlib.import_module(f"{package.__name__}.{task}")


def wrap_pettingzoo(
    env: Any,
    *,
    group_map: dict[str, list[str]] | MarlGroupMapType | None = None,
    device: torch.device | str | None = None,
) -> EnvBase:
    """Wrap a PettingZoo parallel environment with the settings that :class:`~matwm_rl.envs.MultiAgentEnv` needs.

    Args:
        env: the parallel environment.
        group_map: the groups, ``{group: [agent names]}``; by default TorchRL's, which go by the agents' names.
        device: device of the tensors given and received.

    Raises:
        ValueError: if a given group holds agents of unequal observations or actions.

    Examples:
        >>> from mpe2 import simple_tag_v3
        >>> wrap_pettingzoo(simple_tag_v3.parallel_env()).group_map["agent"]
        ['agent_0']
    """
    if group_map is not None:
        _check_groups(env, group_map)
    with warnings.catch_warnings():
        # TorchRL's wrapper names the one version of PettingZoo that it is tested with.
        warnings.filterwarnings("ignore", message="PettingZoo in TorchRL is tested")
        return _PettingZoo(env, group_map=group_map, use_mask=True, done_on_any=False, device=device)


class _PettingZoo(PettingZooWrapper):
    """Lets agents join after the reset.

    TorchRL's wrapper also looks for ``agents`` among all attributes of all modules, at every step: 15% of its time.
    """

    @property
    def agents(self) -> list[str]:
        """Which agents are alive."""
        agents: list[str] = simulator(self).agents
        return agents

    def _reset_parallel(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # TorchRL's wrapper expects all possible agents at a reset. Those that join later are masked until they do.
        observations, infos = super()._reset_parallel(**kwargs)
        late = [agent for agent in self.possible_agents if agent not in observations]
        return (
            {**observations, **{agent: _zeros(self.observation_space(agent)) for agent in late}},
            {**infos, **{agent: {} for agent in self.possible_agents if agent not in infos}},
        )


def _zeros(space: Any) -> Any:
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        return {name: _zeros(part) for name, part in parts.items()}
    if parts is not None:
        return tuple(map(_zeros, parts))
    return np.zeros(space.shape, dtype=space.dtype)


def _check_groups(env: Any, group_map: dict[str, list[str]] | MarlGroupMapType) -> None:
    if isinstance(group_map, MarlGroupMapType):
        group_map = group_map.get_group_map(env.possible_agents)
    for group, agents in group_map.items():
        spaces = {agent: (env.observation_space(agent), env.action_space(agent)) for agent in agents}
        sizes = {(observation.shape, str(action)) for observation, action in spaces.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"group {group!r} holds agents of unequal observations or actions ({sizes}), which TorchRL's "
                "PettingZooWrapper cannot stack. Put them into groups of their own; MultiAgentEnv merges all groups."
            )


register_family("mpe2", make_mpe)
register_family("butterfly", make_butterfly)
