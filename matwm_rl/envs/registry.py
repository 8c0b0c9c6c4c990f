"""What users can add to the environments: families by name, rules of episode ends and renderers by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv

from matwm_rl.arguments import check_kinds, check_switches, read_text

T = TypeVar("T")


class MakeFamily(Protocol):
    """Makes one environment of a family; see :func:`register_family`."""

    def __call__(self, task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> Any:
        """Return an environment that :func:`~matwm_rl.envs.wrap_env` takes."""


@dataclass(frozen=True)
class Family:
    """A registered family of environments."""

    make: MakeFamily
    vectorized: bool
    make_batch: MakeFamily | None = None


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Which agents live and whether the episode is over after a step; see :func:`register_end_rule`.

    Attributes:
        alive: bool ``[*E, N]``, which agents live after the step. Agents that end together with the episode stay alive
            in its last observation. An agent that was not there may be, from here on.
        done: bool ``[*E, 1]``, whether the episode is over.
        terminated: bool ``[*E, 1]``, whether it is over by a termination: values do not bootstrap.
        truncated: bool ``[*E, 1]``, whether it is over by a time limit; never both.
        left: bool ``[*E, N]``, which agents a time limit of their own took out of an episode that goes on. They are not
            alive after the step, but did not die: what the environment returned for them is their last observation.
            ``None`` where that cannot happen.

    Examples:
        >>> over = torch.tensor([True])
        >>> ends = Ends(alive=torch.tensor([True, False]), done=over, terminated=~over, truncated=over)
        >>> ends.alive.sum()
        tensor(1)
    """

    alive: Tensor
    done: Tensor
    terminated: Tensor
    truncated: Tensor
    left: Tensor | None = None


class EndRule(Protocol):
    """Reads lives and ends off an environment; see :func:`register_end_rule`."""

    def __call__(self, env: Any, tensordict: TensorDictBase, alive: Tensor) -> Ends:
        """Return the ends after the step that returned ``tensordict``; ``alive [*E, N]`` is as before the step."""


class RegisteredEndRule(NamedTuple):
    """An end rule and whether agents can die before their episode ends."""

    rule: EndRule
    agents_die: bool


Renderer = Callable[[Any, int], NDArray[np.uint8]]
"""Draws environment number ``env_index`` of a base environment: ``[H, W, 3]``."""


class ClassRegistry(Generic[T]):
    """Values by class: a class without a value of its own has that of its nearest base class.

    Examples:
        >>> registry = ClassRegistry[str]()
        >>> registry.register(int, "number")
        >>> registry.find(True), registry.find("text")
        ('number', None)
    """

    def __init__(self) -> None:
        self._values: dict[type, T] = {}

    def register(self, cls: type, value: T) -> None:
        """Give a class its value, in place of what it had."""
        self._values[cls] = value

    def update(self, other: ClassRegistry[T]) -> None:
        """Register all that another registry holds."""
        self._values.update(other._values)

    def find(self, instance: object) -> T | None:
        """Return the value of the first class in the instance's method resolution order that has one."""
        return next((self._values[cls] for cls in type(instance).__mro__ if cls in self._values), None)

    def names(self) -> list[str]:
        """Return the names of the registered classes, sorted."""
        return sorted(cls.__name__ for cls in self._values)


families: dict[str, Family] = {}
end_rules: ClassRegistry[RegisteredEndRule] = ClassRegistry()
renderers: ClassRegistry[Renderer] = ClassRegistry()


def register_family(
    name: str, make: MakeFamily, *, vectorized: bool = False, make_batch: MakeFamily | None = None
) -> None:
    """Register a family of environments: ``make_env(f"{name}/{task}")`` then calls ``make``.

    Call it where the module that defines the family is imported. A name that is registered again gets the new family.

    Args:
        name: of the family, the part before the slash. ``make_env(name)`` without a slash asks for the task ``""``.
        make: called as ``make(task, num_envs=..., device=..., **kwargs)`` with the keyword arguments of ``make_env``
            that it does not know itself. It returns an environment that :func:`~matwm_rl.envs.wrap_env` takes. An
            unknown task should be a ``ValueError``. To run in processes of their own (``parallel=True``), it must be
            picklable.
        vectorized: whether one environment simulates a batch. Then ``make`` is called once and returns an environment
            of batch size ``[num_envs]``. Else it is called for each environment, always with ``num_envs=1``, and
            returns one without a batch dimension.
        make_batch: of a family that is not vectorized, makes ``num_envs`` environments as one of that batch size, for
            one process; by default they are stepped one by one.

    Raises:
        ValueError: if the name is empty or has a slash or a colon.

    Examples:
        >>> from matwm_rl.envs import MockEnv, make_env
        >>> def make_short(task, *, num_envs, device, **kwargs):
        ...     return MockEnv(episode_length=int(task), device=device, **kwargs)
        >>> register_family("short", make_short)
        >>> make_env("short/2", num_envs=4).rollout(10).shape
        torch.Size([4, 2])
    """
    read_text("name", name)
    check_kinds(Callable, make=make)
    check_switches(vectorized=vectorized)
    if "/" in name or ":" in name:
        raise ValueError(f"the name of a family must not be empty or have a slash or a colon, got {name!r}.")
    families[name] = Family(make, vectorized, make_batch)


def register_end_rule(env_type: type[EnvBase], rule: EndRule, *, agents_die: bool = True) -> None:
    """Register how lives and episodes end in environments of a class, for :class:`~matwm_rl.envs.MultiAgentEnv`.

    Without a rule, per-agent ends are read where all groups have ``"terminated"`` and ``"truncated"`` entries, as in
    :class:`~torchrl.envs.PettingZooWrapper`; else the root's entries, and each group's ``"mask"`` where it has one.

    Args:
        env_type: class of the base environment, which no transforms are around. Its subclasses have the rule too unless
            they have their own. A class that is registered again gets the new rule.
        rule: called after each step as ``rule(env, tensordict, alive)`` with the base environment, what its step
            returned, and bool ``[*E, N]``, which agents lived before the step. It returns the
            :class:`~matwm_rl.envs.Ends` and must not write into its arguments. A limit that a transform imposes, such
            as TorchRL's ``StepCounter``, is found in the tensordict's ``"truncated"`` alone: the base environment does
            not know of it.
        agents_die: whether agents can die before their episode ends; ``False`` saves the masking of what they observe.

    Examples:
        >>> from matwm_rl.envs import Ends, MockEnv, MultiAgentEnv
        >>> class Endless(MockEnv):
        ...     pass
        >>> def never_terminated(env, tensordict, alive):
        ...     done = tensordict["done"]
        ...     return Ends(alive=alive, done=done, terminated=torch.zeros_like(done), truncated=done)
        >>> register_end_rule(Endless, never_terminated, agents_die=False)
        >>> MultiAgentEnv(Endless(ending="terminate")).rollout(9)["next", "truncated"].sum()
        tensor(1)
    """
    _check_registered(env_type, rule=rule)
    check_switches(agents_die=agents_die)
    end_rules.register(env_type, RegisteredEndRule(rule, agents_die))


def register_renderer(env_type: type[EnvBase], render: Renderer) -> None:
    """Register how to draw environments of a class, for :func:`~matwm_rl.envs.render_frame`.

    Args:
        env_type: class of the base environment, which no transforms are around. Its subclasses have the renderer too
            unless they have their own. A class that is registered again gets the new renderer.
        render: called as ``render(env, env_index)`` with the base environment and the index of the environment in its
            batch; returns an RGB image ``[H, W, 3]`` uint8.

    Examples:
        >>> from matwm_rl.envs import MockEnv, MultiAgentEnv
        >>> class Drawn(MockEnv):
        ...     pass
        >>> register_renderer(Drawn, lambda env, env_index: np.zeros((8, 8, 3), dtype=np.uint8))
        >>> MultiAgentEnv(Drawn()).render_frame().shape
        (8, 8, 3)
    """
    _check_registered(env_type, render=render)
    renderers.register(env_type, render)


def _check_registered(env_type: type, **functions: Any) -> None:
    if not (isinstance(env_type, type) and issubclass(env_type, EnvBase)):
        raise TypeError(f"env_type must be a class of TorchRL environments, got {env_type!r}")
    check_kinds(Callable, **functions)


def unwrap(env: EnvBase) -> EnvBase:
    """Return the base environment inside any number of transforms."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env
