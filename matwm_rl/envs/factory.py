"""Environments by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from matwm_rl.arguments import check_ints, check_switches, read_device, read_text
from matwm_rl.envs.families import construct
from matwm_rl.envs.images import Images
from matwm_rl.envs.multi_agent_env import MultiAgentEnv, ParallelMultiAgentEnv, SerialMultiAgentEnv
from matwm_rl.envs.registry import ClassRegistry, Family, MakeFamily, RegisteredEndRule, end_rules, families
from matwm_rl.envs.wrap import EXPECTED, wrap_env


def make_env(
    name: str | Callable[..., Any],
    *,
    seed: int | None = None,
    num_envs: int = 1,
    device: torch.device | str | None = None,
    parallel: bool = False,
    image_size: int = 64,
    images: Images = "auto",
    **kwargs: Any,
) -> MultiAgentEnv | SerialMultiAgentEnv | ParallelMultiAgentEnv:
    """Make an environment with one dense ``"agents"`` group; see :class:`~matwm_rl.envs.MultiAgentEnv`.

    ========================================  ==========================================  ========================
    name                                      environments                                extra
    ========================================  ==========================================  ========================
    ``"mpe2/simple_tag_v3"``                  every module of ``mpe2``; 25 steps unless   ``matwm_rl[mpe]``
                                              ``max_cycles`` is given
    ``"butterfly/pistonball_v6"``             every module of ``pettingzoo.butterfly``    ``matwm_rl[butterfly]``
    ``"sisl/pursuit_v5"``                     every module of ``pettingzoo.sisl``         ``matwm_rl[sisl]``
    ``"magent2/battle_v4"``                   every module of ``magent2.environments``    ``matwm_rl[magent2]``
    ``"vmas/simple_tag"``                     every scenario of VMAS; 100 steps unless    ``matwm_rl[vmas]``
                                              ``max_steps`` is given
    ``"rware/rware-tiny-2ag-v2"``             every id that ``rware`` registers with      ``matwm_rl[rware]``
                                              Gymnasium
    ``"lbforaging/Foraging-8x8-2p-3f-v3"``    every id that ``lbforaging`` registers      ``matwm_rl[lbforaging]``
    ``"mamujoco/HalfCheetah-2x3"``            robots and partitions of MaMuJoCo           ``matwm_rl[mamujoco]``
    ``"mock"``                                :class:`~matwm_rl.envs.MockEnv`             none
    ``"package.module:function"``             what this function returns                  none
    ========================================  ==========================================  ========================

    Other families are added with :func:`~matwm_rl.envs.register_family`. A function of your own, named or given itself,
    is called with ``kwargs``. It returns what :func:`~matwm_rl.envs.wrap_env` takes: a PettingZoo parallel environment,
    a Gymnasium environment with Tuple spaces, a grouped TorchRL environment without a batch dimension, or a
    :class:`~matwm_rl.envs.MultiAgentEnv`.

    Args:
        name: family and environment, module and function, or a function.
        seed: passed to ``env.set_seed``; the same seed gives the same episodes. VMAS has one random state for all its
            environments in a process, so there they repeat only if all are stepped in the same order.
        num_envs: with 1 the environment has no batch dimension, except VMAS, which simulates a batch at once and
            always has batch size ``[num_envs]``; with more the batch size is ``[num_envs]``.
        device: device of the tensors given and received.
        parallel: whether ``num_envs`` > 1 environments run each in a process of its own. Then call this function below
            ``if __name__ == "__main__":``. VMAS and the mock environment are vectorized and ignore it.
        image_size: side of the square to which images are resized.
        images: which observations are images; see :class:`~matwm_rl.envs.MultiAgentEnv`.
        kwargs: passed to the environment's own constructor, for example ``max_cycles`` or
            ``render_mode="rgb_array"``; of PettingZoo's families ``group_map`` goes to TorchRL's wrapper.

    Raises:
        ValueError: if the name is unknown, ``num_envs`` is below 1, or an environment of a family that is not
            vectorized has a batch dimension.
        TypeError: if a family or function returns something else than an environment, or its constructor has no
            argument of a name.
        ImportError: if the package of the family, or the module of the function, cannot be imported.

    Examples:
        >>> env = make_env("mock", seed=0)
        >>> env.rollout(4)["next", "agents", "reward"].shape
        torch.Size([4, 3, 1])
        >>> make_env("matwm_rl.envs:MockEnv", episode_length=2).rollout(4).shape
        torch.Size([2])
        >>> from mpe2 import simple_tag_v3
        >>> make_env(simple_tag_v3.parallel_env, num_envs=2, max_cycles=10).rollout(30).shape
        torch.Size([2, 10])
    """
    if not callable(name):
        read_text("name", name)
    check_ints(1, num_envs=num_envs, image_size=image_size)
    check_switches(parallel=parallel)
    if seed is not None:
        check_ints(0, seed=seed)
    if device is not None:
        read_device("device", device)
    family, task = _look_up(name) if isinstance(name, str) else (Family(_Call(name), vectorized=False), "")
    name = name if isinstance(name, str) else getattr(name, "__qualname__", type(name).__name__)
    make = partial(
        _make_one, family.make, task, name=name, device=device, image_size=image_size, images=images, kwargs=kwargs
    )
    env: MultiAgentEnv | SerialMultiAgentEnv | ParallelMultiAgentEnv
    if family.vectorized:
        env = make(num_envs=num_envs)
    elif num_envs == 1:
        env = _without_batch(make, name)
    elif parallel:
        env = ParallelMultiAgentEnv(num_envs, partial(_in_worker, end_rules, make, name))
    elif family.make_batch is not None:
        env = _make_one(family.make_batch, *make.args[1:], **make.keywords, num_envs=num_envs)
    else:
        env = SerialMultiAgentEnv(num_envs, partial(_without_batch, make, name))
    if seed is not None:
        env.set_seed(seed)
    return env


def _look_up(name: str) -> tuple[Family, str]:
    prefix, _, task = name.partition("/")
    if prefix in families:
        return families[prefix], task
    if ":" in name:
        return Family(_Call(name), vectorized=False), ""
    near = difflib.get_close_matches(prefix, families, n=3)
    raise ValueError(
        f"unknown environment {name!r}"
        + (f"; near ones: {', '.join(f'{family}/{task}' if task else family for family in near)}" if near else "")
        + f"; registered families: {', '.join(sorted(families))}. A name is family and environment, as in "
        "'mpe2/simple_tag_v3'. Register another family with matwm_rl.envs.register_family, or name a function that can "
        "be imported: 'package.module:function'."
    )


class _Call:
    """The family of one function, which is given or named ``"package.module:function"``."""

    def __init__(self, function: str | Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> Any:
        if isinstance(self.function, str):
            return construct(self.function, _import_function(self.function), kwargs)
        return construct(getattr(self.function, "__qualname__", "given"), self.function, kwargs)


def _import_function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    advice = ""
    if module_name.endswith(".py"):
        advice = f" Name the module, not the file: {module_name.removesuffix('.py').replace('/', '.')}:{function_name}."
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"the environment {name!r} needs the module {module_name!r}: {error}.{advice}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [found for found, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)]
        near = difflib.get_close_matches(function_name, own, n=3)
        raise ValueError(
            f"unknown environment {name!r}: {module_name!r} has no function {function_name!r}"
            + (f"; near ones: {', '.join(near)}." if near else ".")
        )
    return function


def _make_one(
    make: MakeFamily,
    task: str,
    *,
    name: str,
    device: torch.device | str | None,
    image_size: int,
    images: Images,
    kwargs: dict[str, Any],
    num_envs: int = 1,
) -> MultiAgentEnv:
    """Make one environment and merge its groups."""
    made = make(task, num_envs=num_envs, device=device, **kwargs)
    try:
        return wrap_env(made, device=device, image_size=image_size, images=images)
    except TypeError as error:
        if str(error).endswith(f"expected {EXPECTED}."):
            raise TypeError(f"{name!r} made {str(error).removeprefix('got ')}") from error
        raise


def _without_batch(make: partial[MultiAgentEnv], name: str) -> MultiAgentEnv:
    env = make()
    if env.batch_size:
        raise ValueError(
            f"{name!r} made an environment of batch size {list(env.batch_size)}; expected none. Register environments "
            "that simulate a batch at once with matwm_rl.envs.register_family(..., vectorized=True)."
        )
    return env


def _in_worker(rules: ClassRegistry[RegisteredEndRule], make: partial[MultiAgentEnv], name: str) -> MultiAgentEnv:
    """Make an environment in a process of its own, to which the end rules are sent along.

    Classes of a script are pickled by value: the worker's copy of a class is not the one that the script registers a
    rule for, even if the worker imports the script.
    """
    end_rules.update(rules)
    return _without_batch(make, name)
