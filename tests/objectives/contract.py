"""Every loss with a batch that it reads, and comparisons of what they write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.objectives import SoftUpdate

from matwm_rl import keys
from matwm_rl.modules import make_actor, make_critic
from matwm_rl.objectives import ActorLoss, CriticLoss, Signalling, WorldModelLoss
from matwm_rl.objectives.common import KeyedLoss
from tests.helpers import COUNTS, make_model, random_batch, random_imagined, randomize
from tests.objectives.helpers import SMALL

N = len(COUNTS)
OPTIONAL = {keys.ALIVE, keys.NEXT_ALIVE, keys.TEAMMATE_ALIVE, keys.SLOW_VALUE}
NETWORKS = {"world_model": "world_model", "actor": "actor_network", "critic": "critic_network"}

every_loss = pytest.mark.parametrize("kind", ["world_model", "actor", "clipped_actor", "critic", "slow_critic"])
"""The third is PPO. The last is given what is optional: values of the EMA copy."""
each_class = pytest.mark.parametrize("kind", ["world_model", "actor", "critic"])


def make_loss(kind: str, **config: Any) -> KeyedLoss:
    """A loss without chance in it, whose EMA copy lags behind."""
    model = make_model(latent="gaussian")
    if kind == "world_model":
        return WorldModelLoss(model, **config).eval()
    if "actor" in kind:
        config = {"regularizers": [Signalling(0.5, tolerance=10.0)]} | config
        config |= {"objective": "ppo"} if kind == "clipped_actor" else {}
        return ActorLoss(randomize(make_actor(model, SMALL)), num_agents=N, **config).eval()
    loss = CriticLoss(randomize(make_critic(model, SMALL)), **config)
    SoftUpdate(loss, eps=0.98)
    randomize(loss.critic_network)
    return loss.eval()


def make_batch(kind: str, B: int = 3, T: int = 5, *, deaths: bool = True) -> TensorDict:
    if kind == "world_model":
        return random_batch(B, T, deaths=deaths)
    batch = random_imagined(B, T, model=make_model(latent="gaussian"), deaths=deaths)
    if kind == "clipped_actor":
        batch[keys.ACTION_LOG_PROB] = -2 * torch.rand(B, T, N)
    if kind == "slow_critic":
        batch[keys.SLOW_VALUE] = torch.randn(B, T, N, 1)
    return batch


def given(loss: KeyedLoss, batch: TensorDictBase) -> list[NestedKey]:
    """Which of the keys that the loss reads are there."""
    return [key for key in loss.in_keys if key in batch.keys(True)]


def by_keyword(loss: KeyedLoss, batch: TensorDictBase) -> dict[str, Tensor]:
    return {"_".join(key): batch[key] for key in given(loss, batch)}


def assert_same(one: TensorDictBase, other: TensorDictBase, **tolerance: float) -> None:
    assert list(one.keys()) == list(other.keys())
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def network_of(kind: str, loss: KeyedLoss) -> TensorDictModuleBase:
    return getattr(loss, NETWORKS[kind])
