"""The one imagined rollout, and its one packing into a tensordict (Algorithm 1).

:class:`~matwm_rl.modules.Imagination`, :class:`~matwm_rl.envs.ImaginationEnv` and the open-loop evaluation all use it;
they differ in who chooses the actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict
from torch import Tensor

from matwm_rl import keys
from matwm_rl.functional import agents_last
from matwm_rl.modules.state import Caches, State

if TYPE_CHECKING:
    from matwm_rl.modules.world_model import WorldModel

Act = Callable[[State, Tensor], Tensor]
"""Chooses actions ``[N, S]`` in states ``[N, S]``, given the predicted legal actions, bool ``[N, S, A]``."""


@dataclass
class Rollout:
    """H imagined steps of N x S agents; made by :meth:`WorldModel.imagine <matwm_rl.modules.WorldModel.imagine>`.

    Attributes:
        world_model: the model that they were imagined with.
        states: s_0 .. s_H, each ``[N, S]``.
        actions: a_0 .. a_{H-1}, each ``[N, S, *action_shape]``.
        masks: the predicted legal actions of steps 0 .. H-1, each bool ``[N, S, A]``.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import add_agent_entries
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> starts = add_agent_entries(env.rollout(8, break_when_any_done=False)).reshape(2, 4)
        >>> state, caches = world_model.start_from(starts, horizon=5)
        >>> rollout = world_model.imagine(state, caches, lambda state, mask: mask.int().argmax(-1), horizon=5)
        >>> rollout.pack()["next", "agents", "reward"].shape
        torch.Size([2, 5, 3, 1])
    """

    world_model: WorldModel
    states: list[State]
    actions: list[Tensor]
    masks: list[Tensor]

    def pack(self) -> TensorDict:
        """Predict rewards and continuations of all steps at once, and write everything under its keys.

        Returns:
            ``[S, H]``: s_t, ``("agents", "action" | "action_mask")``; under ``"next"`` s_{t+1} and
            ``("agents", "reward" | "continuation")`` ``[S, H, N, 1]``.
        """
        states = State.stack(self.states, 2)
        action = torch.stack(self.actions, 2)
        state, following = states[:, :, :-1], states[:, :, 1:]
        reward, continuation = self.world_model.predict_outcome(state, action, following)
        packed = TensorDict({}, batch_size=action.shape[1:3], device=action.device)
        for key, value in states.entries().items():
            packed.set(key, value[:, :-1])
            packed.set(("next", *key), value[:, 1:])
        packed.set(keys.ACTION, agents_last(action, action.ndim - 3))
        packed.set(keys.ACTION_MASK, agents_last(torch.stack(self.masks, 2)))
        packed.set(keys.REWARD, agents_last(reward, 0).unsqueeze(-1))
        return packed.set(keys.CONTINUATION, agents_last(continuation, 0).unsqueeze(-1))


def imagine(world_model: WorldModel, state: State, caches: Caches, act: Act, horizon: int) -> Rollout:
    """Imagine; see :meth:`WorldModel.imagine <matwm_rl.modules.WorldModel.imagine>`."""
    states, actions, masks = [state], [], []
    for _ in range(horizon):
        masks.append(world_model.legal_actions(states[-1].latent))
        actions.append(act(states[-1], masks[-1]))
        states.append(world_model.step(states[-1], actions[-1], caches))
    return Rollout(world_model, states, actions, masks)
