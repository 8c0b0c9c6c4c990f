"""Losses of small actors and critics, and slow arithmetic that several tests compare with."""

from __future__ import annotations

import math
from typing import Any

from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from matwm_rl.modules import ActorCriticConfig, make_actor, make_critic
from matwm_rl.objectives import ActorLoss, CriticLoss
from tests.helpers import COUNTS, make_model, random_imagined, randomize

N, S, H = len(COUNTS), 4, 5
SMALL = ActorCriticConfig(num_cells=8)


def make_actor_loss(**kwargs: Any) -> ActorLoss:
    actor = randomize(make_actor(make_model(), SMALL))
    return ActorLoss(actor, num_agents=N, **kwargs)


def make_critic_loss() -> CriticLoss:
    loss = CriticLoss(randomize(make_critic(make_model(), SMALL)))
    # As the learner does; from here on the EMA copy lags behind.
    SoftUpdate(loss, eps=0.98)
    randomize(loss.critic_network)
    return loss


def imagined(S: int = S, H: int = H, **kwargs: bool) -> TensorDict:
    return random_imagined(S, H, model=make_model(), **kwargs)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]
