"""Acting in the real environment (section 3)."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import dispatch
from torch import nn

from matwm_rl import keys
from matwm_rl.checks import read_entry
from matwm_rl.modules.actor_critic import check_actor, read_action
from matwm_rl.modules.state_estimator import CONTEXT_KEYS, StateEstimator
from matwm_rl.modules.world_model import WorldModel


class WorldModelPolicy(StateEstimator):
    """All agents act (section 3): s_t of the current observation and of this episode's history, then the actors.

    Decentralised: agent i's action depends on agent i's observations and actions alone. The context is carried as by
    :class:`StateEstimator`: append :meth:`make_tensordict_primer` to the environment.

    Args:
        world_model: the shared world model.
        actor: reads s_t and ``("agents", "action_mask")``, writes ``("agents", "action")``.
        context_length: steps of history the policy sees at most.

    Keys read: ``("agents", "observation" | "action_mask")`` and the context W steps back, ``("context", "code")``
    ``[*batch, N, W, K]``, ``("context", "action")`` ``[*batch, N, W]``, ``("context", "length")`` ``[*batch, N]``.
    Keys written: ``("agents", "action")``, ``("agents", "logits")`` if the actor writes them, and the context under
    ``"next"``.

    Raises:
        ValueError: if the actor reads what is not part of s_t, does not write actions, or writes them in another shape;
            if ``context_length`` is below 1, or an entry that is read has another shape.
        KeyError: if an entry that is read is missing.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import make_actor
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> policy = WorldModelPolicy(world_model, make_actor(world_model, num_cells=16), context_length=4)
        >>> env = env.append_transform(policy.make_tensordict_primer())
        >>> env.rollout(3, policy)["agents", "action"].shape
        torch.Size([3, 3])
    """

    def __init__(self, world_model: WorldModel, actor: nn.Module, *, context_length: int = 16) -> None:
        super().__init__(world_model, context_length=context_length)
        check_actor(actor, world_model)
        self.actor = actor
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ACTION_MASK, *CONTEXT_KEYS]
        logits = [keys.LOGITS] if keys.LOGITS in getattr(actor, "out_keys", ()) else []
        self.out_keys: list[NestedKey] = [*logits, keys.ACTION, *(("next", *key) for key in CONTEXT_KEYS)]

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every agent, under the exploration type in force."""
        model, batch = self.world_model, self._batch(tensordict)
        mask = read_entry(tensordict, keys.ACTION_MASK, self, (*batch, model.num_agents, model.num_actions))
        state, memory = self._estimate(tensordict)
        outputs = self.actor(state.set(keys.ACTION_MASK, mask))
        action = read_action(outputs, self.actor, mask.shape[:-1])
        tensordict.set(keys.ACTION, action)
        if (logits := outputs.get(keys.LOGITS, None)) is not None:
            tensordict.set(keys.LOGITS, logits)
        for key, value in self._following_context(memory, action).items():
            tensordict.set(("next", *key), value)
        return tensordict
