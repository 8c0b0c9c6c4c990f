"""Acting in the real environment (docs/algorithm.md, States, actors and critics)."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import dispatch
from torch import nn

from matwm_rl import keys
from matwm_rl.checks import read_entry
from matwm_rl.finite import is_readable
from matwm_rl.modules.actor_critic import check_actor, check_logits, read_action
from matwm_rl.modules.state_estimator import HISTORY_KEYS, PolicyConfig, StateEstimator
from matwm_rl.modules.world_model import WorldModel


class WorldModelPolicy(StateEstimator):
    """Choose the actions of all agents: s_t of the current observation and of this episode's history, then the actors.

    Decentralised: agent i's action depends on agent i's observations and actions alone. The history is carried as by
    :class:`StateEstimator`: append :meth:`make_tensordict_primer` to the environment.

    Args:
        world_model: the shared world model.
        actor: reads s_t and ``("agents", "action_mask")``, writes ``("agents", "action")``.
        history_length: W, steps of history that the policy sees at most.

    Keys read: ``("agents", "observation" | "action_mask")`` and the history W steps back, ``("history", "code")``
    ``[*batch, N, W, K]``, ``("history", "action")`` ``[*batch, N, W, *action_shape]``, ``("history", "length")``
    ``[*batch, N]``; optional ``("agents", "alive")``, without which all agents live.
    Keys written: ``("agents", "action")``, ``("agents", "logits")`` if the actor writes them, and the history under
    ``"next"``.

    Raises:
        ValueError: if the actor reads what is not part of s_t, does not write actions, or writes them in another shape;
            if ``history_length`` is below 1, or an entry that is read has another shape.
        KeyError: if an entry that is read is missing.
        FloatingPointError: on a CPU, if the actor's logits are no distribution over the legal actions.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import make_actor
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> policy = WorldModelPolicy(world_model, make_actor(world_model), history_length=4)
        >>> env = env.append_transform(policy.make_tensordict_primer())
        >>> env.rollout(3, policy)["agents", "action"].shape
        torch.Size([3, 3])
    """

    def __init__(
        self, world_model: WorldModel, actor: nn.Module, *, history_length: int = PolicyConfig.history_length
    ) -> None:
        super().__init__(world_model, history_length=history_length)
        check_actor(actor)
        self.actor = actor
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ACTION_MASK, keys.ALIVE, *HISTORY_KEYS]
        logits = [keys.LOGITS] if keys.LOGITS in getattr(actor, "out_keys", ()) else []
        self.out_keys: list[NestedKey] = [*logits, keys.ACTION, *(("next", *key) for key in HISTORY_KEYS)]

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every agent, under the exploration type in force."""
        model, batch = self.world_model, self._batch(tensordict)
        mask = read_entry(tensordict, keys.ACTION_MASK, self, (*batch, model.num_agents, model.num_actions))
        state, history = self._estimate(tensordict)
        outputs = self.actor(state.set(keys.ACTION_MASK, mask))
        logits = outputs.get(keys.LOGITS, None)
        if logits is not None and is_readable(logits):
            check_logits(outputs, model.actions, mask, self.actor)
        action = read_action(outputs, self.actor, model.actions, batch)
        tensordict.set(keys.ACTION, action)
        if logits is not None:
            tensordict.set(keys.LOGITS, logits)
        for key, value in self._following_history(history, action).items():
            tensordict.set(("next", *key), value)
        return tensordict
