"""The family ``"mock"``."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.envs import EnvBase

from matwm_rl.envs.families.named import construct
from matwm_rl.envs.mock import MockEnv
from matwm_rl.envs.registry import register_family


def make_mock(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make a :class:`~matwm_rl.envs.MockEnv`, which has no tasks; one environment has no batch dimension.

    Raises:
        ValueError: if a task is named.
    """
    if task:
        raise ValueError(f"unknown environment 'mock/{task}'; the only one is 'mock'.")
    batch_size = [num_envs] if num_envs > 1 else []
    made: EnvBase = construct("mock", MockEnv, {"batch_size": batch_size, "device": device} | kwargs)
    return made


register_family("mock", make_mock, vectorized=True)
