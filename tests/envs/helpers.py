"""Environments, policies and dreams of small models, for the tests of environments."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from matwm_rl import keys
from matwm_rl.envs import ImaginationEnv
from matwm_rl.keys import ACTION, ACTION_MASK
from matwm_rl.modules import WorldModel
from tests.helpers import COUNTS, make_model, random_batch

N, S, C, H = len(COUNTS), 6, 3, 4
KAZ = "butterfly/knights_archers_zombies_v11"
DEADLY = {"spawn_delay": 2, "max_zombies": 60}
"""So many zombies that knights and archers soon die."""


def first_legal_policy() -> TensorDictModule:
    """Takes the first legal action: deterministic, and legal if the mask is."""
    return TensorDictModule(lambda mask: mask.int().argmax(-1), in_keys=[ACTION_MASK], out_keys=[ACTION])


def assert_legal(data: TensorDictBase) -> None:
    if data[ACTION].is_floating_point():
        assert (data[ACTION].abs() <= data[ACTION_MASK]).all()
    else:
        assert data[ACTION_MASK].gather(-1, data[ACTION].unsqueeze(-1)).all()


def starts(size: int = S, context: int = C, **kwargs: Any) -> TensorDict:
    """Focal starts, some of whose episodes end within the context; somebody lives in every row."""
    td = random_batch(size, context + 1, **kwargs)
    td[keys.ALIVE][..., 0] = True
    return td


def make_dreams(model: WorldModel | None = None, td: TensorDict | None = None, **kwargs: Any) -> ImaginationEnv:
    """An environment whose dreams always begin at the same starts, and end by the time limit alone."""
    td = starts() if td is None else td
    options = {"max_steps": H, "end_threshold": 0.0} | kwargs
    return ImaginationEnv(make_model() if model is None else model, lambda: td, **options)


def random_rollout(env: ImaginationEnv, steps: int, seed: int = 0) -> TensorDictBase:
    torch.manual_seed(seed)
    return env.rollout(steps, break_when_any_done=False)


def differing(one: TensorDictBase, other: TensorDictBase, rows: Tensor) -> list[object]:
    """Keys of entries that are not exactly the same in these rows."""
    return [key for key in one.keys(True, True) if not torch.equal(one[key][rows], other[key][rows])]
