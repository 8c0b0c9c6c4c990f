"""Environments by name; their packages are imported only when asked for."""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, MarlGroupMapType
from torchrl.envs.libs.pettingzoo import PettingZooWrapper
from torchrl.envs.libs.vmas import VmasEnv

from matwm_rl.envs.mock import MockEnv
from matwm_rl.envs.multi_agent_env import MultiAgentEnv, ParallelMultiAgentEnv, SerialMultiAgentEnv

MPE_MAX_CYCLES = 25
VMAS_MAX_STEPS = 100


def make_env(
    name: str,
    *,
    seed: int | None = None,
    num_envs: int = 1,
    device: torch.device | str | None = None,
    parallel: bool = False,
    image_size: int = 64,
    **kwargs: Any,
) -> MultiAgentEnv | SerialMultiAgentEnv | ParallelMultiAgentEnv:
    """Makes an environment with one dense ``"agents"`` group; see :class:`~matwm_rl.envs.MultiAgentEnv`.

    ==================================  ==========================================  ======================
    name                                environments                                extra
    ==================================  ==========================================  ======================
    ``"mpe2/simple_tag_v3"``            every module of ``mpe2``; 25 steps unless   ``matwm_rl[mpe]``
                                        ``max_cycles`` is given
    ``"butterfly/pistonball_v6"``       every module of ``pettingzoo.butterfly``    ``matwm_rl[butterfly]``
    ``"vmas/simple_tag"``               every scenario of VMAS; 100 steps unless    ``matwm_rl[vmas]``
                                        ``max_steps`` is given
    ``"mock"``                          :class:`~matwm_rl.envs.MockEnv`             none
    ==================================  ==========================================  ======================

    Args:
        name: family and environment.
        seed: passed to ``env.set_seed``; the same seed gives the same episodes. VMAS has one random state for all its
            environments in a process, so there they repeat only if all are stepped in the same order.
        num_envs: with 1 the environment has no batch dimension, except VMAS, which simulates a batch at once and
            always has batch size ``[num_envs]``; with more the batch size is ``[num_envs]``.
        device: device of the tensors given and received.
        parallel: whether ``num_envs`` > 1 PettingZoo environments run each in a process of its own. Then call this
            function below ``if __name__ == "__main__":``. VMAS and the mock environment are vectorized and ignore it.
        image_size: side of the square to which uint8 images are resized.
        kwargs: passed to the environment's own constructor, for example ``max_cycles`` or
            ``render_mode="rgb_array"``; ``group_map`` goes to TorchRL's wrapper.

    Raises:
        ValueError: if the name is unknown or ``num_envs`` is below 1.
        ImportError: if the package of the family is not installed.

    Examples:
        >>> env = make_env("mock", seed=0)
        >>> env.rollout(4)["next", "agents", "reward"].shape
        torch.Size([4, 3, 1])
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
    family, _, task = name.partition("/")
    if family not in _FAMILIES or bool(task) == (family == "mock"):
        known = ", ".join(repr(known if known == "mock" else f"{known}/...") for known in _FAMILIES)
        raise ValueError(f"unknown environment {name!r}; expected one of {known}.")
    make = partial(_FAMILIES[family], task, device=device, **kwargs)
    env: MultiAgentEnv | SerialMultiAgentEnv | ParallelMultiAgentEnv
    if family in _VECTORIZED:
        env = MultiAgentEnv(make(num_envs=num_envs), image_size=image_size)
    elif num_envs == 1:
        env = MultiAgentEnv(make(), image_size=image_size)
    else:
        batched = ParallelMultiAgentEnv if parallel else SerialMultiAgentEnv
        env = batched(num_envs, partial(_merged, make, image_size))
    if seed is not None:
        env.set_seed(seed)
    return env


def _merged(make: Callable[[], EnvBase], image_size: int) -> MultiAgentEnv:
    return MultiAgentEnv(make(), image_size=image_size)


def _make_mpe(task: str, *, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    package = _import("mpe2", extra="mpe")
    kwargs.setdefault("max_cycles", MPE_MAX_CYCLES)
    return _wrap_pettingzoo(_module(package, task, "mpe2"), device=device, **kwargs)


def _make_butterfly(task: str, *, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    # pygame opens a window at import otherwise, which fails on a machine without a screen.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    package = _import("pettingzoo.butterfly", extra="butterfly")
    # Without a render mode some of them never draw what their agents observe.
    kwargs.setdefault("render_mode", "rgb_array")
    if task.startswith("pistonball"):
        kwargs.setdefault("continuous", False)
    return _wrap_pettingzoo(_module(package, task, "butterfly"), device=device, **kwargs)


def _wrap_pettingzoo(
    module: ModuleType,
    *,
    device: torch.device | str | None,
    group_map: Any = None,
    **kwargs: Any,
) -> EnvBase:
    env = module.parallel_env(**kwargs)
    if group_map is not None:
        _check_groups(env, group_map)
    with warnings.catch_warnings():
        # TorchRL's wrapper names the one version of PettingZoo that it is tested with.
        warnings.filterwarnings("ignore", message="PettingZoo in TorchRL is tested")
        return _PettingZoo(env, group_map=group_map, use_mask=True, done_on_any=False, device=device)


class _PettingZoo(PettingZooWrapper):
    """TorchRL's wrapper looks for ``agents`` among all attributes of all modules, at every step: 15% of its time."""

    @property
    def agents(self) -> list[str]:
        """Who is alive."""
        return self._env.agents  # type: ignore[no-any-return]


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


def _make_vmas(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    vmas = _import("vmas", extra="vmas")
    scenarios = sorted([*vmas.scenarios, *vmas.mpe_scenarios, *vmas.debug_scenarios])
    if task not in scenarios:
        raise ValueError(f"unknown environment 'vmas/{task}'; scenarios: {', '.join(scenarios)}.")
    kwargs.setdefault("max_steps", VMAS_MAX_STEPS)
    kwargs.setdefault("continuous_actions", False)
    return _Vmas(task, num_envs=num_envs, device=device, **kwargs)


class _Vmas(VmasEnv):
    """VMAS has one random state for all environments of a process: to seed or play one changes what the others do.

    Here an environment that was seeded keeps a state of its own.
    """

    _random_state: list[Any] | None = None

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        if self._random_state is None:
            yield
            return
        shared = self._env.vmas_random_state  # an attribute of the class
        others = list(shared)
        shared[:] = self._random_state
        try:
            yield
        finally:
            self._random_state = list(shared)
            shared[:] = others

    def _set_seed(self, seed: int | None) -> None:
        self._random_state = [*self._env.vmas_random_state]
        with self._own_randomness():
            super()._set_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        with self._own_randomness():
            return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        with self._own_randomness():
            return super()._step(tensordict)


def _make_mock(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    return MockEnv(batch_size=[num_envs] if num_envs > 1 else [], device=device, **kwargs)


def _import(package: str, *, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this environment needs the package {package.partition('.')[0]!r}: "
            f'pip install "matwm_rl[{extra}]" ({error})'
        ) from error


def _module(package: ModuleType, task: str, family: str) -> ModuleType:
    tasks = sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if module.name.rpartition("_v")[2].isdigit()
    )
    if task not in tasks:
        raise ValueError(f"unknown environment '{family}/{task}'; environments: {', '.join(tasks)}.")
    return importlib.import_module(f"{package.__name__}.{task}")


_FAMILIES: dict[str, Callable[..., EnvBase]] = {
    "mpe2": _make_mpe,
    "butterfly": _make_butterfly,
    "vmas": _make_vmas,
    "mock": _make_mock,
}
_VECTORIZED = ("vmas", "mock")
