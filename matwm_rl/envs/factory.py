"""Environments by name."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import torch
from torchrl.envs import EnvBase

from matwm_rl.arguments import check_ints, check_switches, read_device, read_text
from matwm_rl.envs.families import wrap_pettingzoo
from matwm_rl.envs.images import Images
from matwm_rl.envs.multi_agent_env import MultiAgentEnv, ParallelMultiAgentEnv, SerialMultiAgentEnv
from matwm_rl.envs.registry import ClassRegistry, Family, MakeFamily, RegisteredEndRule, end_rules, families


def make_env(
    name: str,
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

    ==================================  ==========================================  ======================
    name                                environments                                extra
    ==================================  ==========================================  ======================
    ``"mpe2/simple_tag_v3"``            every module of ``mpe2``; 25 steps unless   ``matwm_rl[mpe]``
                                        ``max_cycles`` is given
    ``"butterfly/pistonball_v6"``       every module of ``pettingzoo.butterfly``    ``matwm_rl[butterfly]``
    ``"vmas/simple_tag"``               every scenario of VMAS; 100 steps unless    ``matwm_rl[vmas]``
                                        ``max_steps`` is given
    ``"mock"``                          :class:`~matwm_rl.envs.MockEnv`             none
    ``"package.module:factory"``        what this function returns                  none
    ==================================  ==========================================  ======================

    Other families are added with :func:`~matwm_rl.envs.register_family`. A factory ``"package.module:factory"`` is
    imported and called with ``kwargs``. It returns a grouped TorchRL environment without a batch dimension, a
    :class:`~matwm_rl.envs.MultiAgentEnv`, which is used as it is, or a PettingZoo parallel environment, which is
    wrapped as those of ``mpe2`` are.

    Args:
        name: family and environment, or module and factory.
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
            ``render_mode="rgb_array"``; of ``mpe2`` and ``butterfly`` ``group_map`` goes to TorchRL's wrapper.

    Raises:
        ValueError: if the name is unknown, ``num_envs`` is below 1, or an environment of a family that is not
            vectorized has a batch dimension.
        TypeError: if a family or factory returns something else than an environment.
        ImportError: if the package of the family, or the module of the factory, cannot be imported.

    Examples:
        >>> env = make_env("mock", seed=0)
        >>> env.rollout(4)["next", "agents", "reward"].shape
        torch.Size([4, 3, 1])
        >>> make_env("matwm_rl.envs:MockEnv", episode_length=2).rollout(4).shape
        torch.Size([2])
    """
    read_text("name", name)
    check_ints(1, num_envs=num_envs, image_size=image_size)
    check_switches(parallel=parallel)
    if seed is not None:
        check_ints(0, seed=seed)
    if device is not None:
        read_device("device", device)
    family, task = _look_up(name)
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
        return Family(_call_factory, vectorized=False), name
    raise ValueError(
        f"unknown environment {name!r}; registered families: {', '.join(sorted(families))}. Register another with "
        "matwm_rl.envs.register_family, or name a function that can be imported: 'package.module:factory'."
    )


def _call_factory(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> Any:
    """Import and call the factory ``"package.module:factory"``."""
    module_name, _, factory_name = task.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"the environment {task!r} needs the module {module_name!r}: {error}") from error
    if not callable(factory := getattr(module, factory_name, None)):
        raise ValueError(f"unknown environment {task!r}: {module_name!r} has no function {factory_name!r}.")
    env = factory(**kwargs)
    return env.to(device) if device is not None and isinstance(env, EnvBase) else env


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
    env = make(task, num_envs=num_envs, device=device, **kwargs)
    pettingzoo = sys.modules.get("pettingzoo")
    if pettingzoo is not None and isinstance(env, pettingzoo.ParallelEnv):
        env = wrap_pettingzoo(env, device=device)
    if not isinstance(env, EnvBase):
        raise TypeError(
            f"{name!r} made a {type(env).__name__}; expected a grouped TorchRL environment, a MultiAgentEnv or a "
            "PettingZoo parallel environment."
        )
    return env if isinstance(env, MultiAgentEnv) else MultiAgentEnv(env, image_size=image_size, images=images)


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
