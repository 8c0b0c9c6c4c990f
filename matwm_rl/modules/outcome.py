"""What a step brings, as the world model predicts it: its reward, and whether the episode goes on.

All tensors are agent-major: ``[N, *batch, F]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from matwm_rl.checks import check_shape
from matwm_rl.functional import agents_first, agents_last
from matwm_rl.modules.reward import RewardHead, Transition
from matwm_rl.modules.state import State

if TYPE_CHECKING:
    from matwm_rl.modules.world_model import WorldModel


def reward_logits(model: WorldModel, head: nn.Module, step: Transition) -> Tensor:
    """Logits ``[N, *batch, bins]`` of the reward, from the head of transitions or from the head of last steps.

    Raises:
        ValueError: if the head gives another number of logits.
    """
    logits = head(step) if isinstance(head, RewardHead) else head(step.hidden)
    what = f"the reward head {type(head).__name__} must give logits"
    return check_shape(logits, what, (*step.hidden.shape[:-1], model.two_hot.num_bins))


def continuation_logits(model: WorldModel, hidden: Tensor) -> Tensor:
    """Logits ``[N, *batch, 1]`` of c_t.

    Raises:
        ValueError: if the head gives another number of logits.
    """
    what = "the continuation head must give logits"
    return check_shape(model.continuation(hidden), what, (*hidden.shape[:-1], 1))


def predict_outcome(model: WorldModel, state: State, action: Tensor, following: State) -> tuple[Tensor, Tensor]:
    """Predict r_t and c_t of imagined steps; see :meth:`~matwm_rl.modules.WorldModel.predict_outcome`."""
    step = Transition(
        state.latent,
        action,
        following.hidden,
        lambda: following.latent,
        lambda: model.decode(state.latent),
        lambda: model.decode(following.latent),
        model.observation_norm,
    )
    reward = _reward(model, model.reward, step)
    continuation = continuation_logits(model, following.hidden).squeeze(-1).sigmoid()
    if model.end_reward is not None:
        reward = _reward(model, model.end_reward, step).lerp(reward, continuation)
    return reward, continuation


def _reward(model: WorldModel, head: nn.Module, step: Transition) -> Tensor:
    # TwoHot scales each agent's rewards by its own statistics, and expects logits [*batch, N, bins].
    logits = agents_last(reward_logits(model, head, step))
    return agents_first(model.two_hot.decode(logits), 0)
