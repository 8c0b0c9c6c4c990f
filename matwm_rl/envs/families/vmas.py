"""The family ``"vmas"``: every scenario of VMAS."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.libs.vmas import VmasEnv

from matwm_rl.envs.families.named import unknown_argument, unknown_environment
from matwm_rl.envs.families.packages import import_package
from matwm_rl.envs.registry import register_family
from matwm_rl.torchrl_internals import vmas_random_state

MAX_STEPS = 100
"""Length of an episode unless ``max_steps`` is given."""


def make_vmas(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make a batch of environments of one scenario.

    Raises:
        ValueError: if there is no such scenario.
        TypeError: if the scenario has no argument of a name.
    """
    vmas = import_package("vmas", extra="vmas")
    scenarios = sorted([*vmas.scenarios, *vmas.mpe_scenarios, *vmas.debug_scenarios])
    if task not in scenarios:
        raise unknown_environment(f"vmas/{task}", task, scenarios, "scenarios")
    kwargs.setdefault("max_steps", MAX_STEPS)
    kwargs.setdefault("continuous_actions", False)
    with warnings.catch_warnings():
        # Scenarios take what they know out of the arguments, and warn of what is left.
        warnings.filterwarnings("error", message="Scenario kwargs")
        try:
            return _Vmas(task, num_envs=num_envs, device=device, **kwargs)
        except UserWarning as error:
            left = next((name for name in kwargs if repr(name) in str(error)), None)
            if left is None:
                raise
            raise unknown_argument(f"vmas/{task}", left) from error


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
        shared = vmas_random_state(self)
        others = list(shared)
        shared[:] = self._random_state
        try:
            yield
        finally:
            self._random_state = list(shared)
            shared[:] = others

    def _set_seed(self, seed: int | None) -> None:
        self._random_state = list(vmas_random_state(self))
        with self._own_randomness():
            super()._set_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        with self._own_randomness():
            return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        with self._own_randomness():
            return super()._step(tensordict)


register_family("vmas", make_vmas, vectorized=True)
