"""Acting in the real environment (section 3)."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer

from matwm_rl import keys
from matwm_rl.functional import agents_first, agents_last
from matwm_rl.modules.world_model import WorldModel

CONTEXT_CODE: NestedKey = ("context", "code")
CONTEXT_ACTION: NestedKey = ("context", "action")
CONTEXT_LENGTH: NestedKey = ("context", "length")
CONTEXT_KEYS = [CONTEXT_CODE, CONTEXT_ACTION, CONTEXT_LENGTH]


class WorldModelPolicy(TensorDictModuleBase):
    """All agents act: the posterior of the current observation, the history of this episode, then the actors.

    Decentralised: agent i's action depends on agent i's observations and actions alone. The policy is stateless; the
    last ``context_length`` steps travel in the tensordict as latent codes and actions, and the transformer runs over
    them again at every step. So every step of an episode costs the same, and the context is always read with the
    newest weights. Append :meth:`make_tensordict_primer` to the environment: it starts the context with every episode.

    Args:
        world_model: the shared world model.
        actor: reads s_t and ``("agents", "action_mask")``, writes ``("agents", "action")``.
        context_length: steps of history the policy sees at most.

    Keys read: ``("agents", "observation" | "action_mask")`` and the context W steps back, ``("context", "code")``
    ``[*batch, N, W, K]``, ``("context", "action")`` ``[*batch, N, W]``, ``("context", "length")`` ``[*batch, N]``.
    Keys written: ``("agents", "action" | "logits")`` and the context under ``"next"``.

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
        super().__init__()
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        self.world_model = world_model
        self.actor = actor
        self.context_length = context_length
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ACTION_MASK, *CONTEXT_KEYS]
        self.out_keys: list[NestedKey] = [keys.LOGITS, keys.ACTION, *(("next", *key) for key in CONTEXT_KEYS)]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that carries the context and empties it at every reset."""
        agents, length = self.world_model.num_agents, self.context_length
        code = self.world_model.latent
        specs = {
            CONTEXT_CODE: Unbounded((agents, length, code.num_dims), dtype=code.code_dtype),
            CONTEXT_ACTION: Unbounded((agents, length), dtype=torch.int64),
            CONTEXT_LENGTH: Unbounded((agents,), dtype=torch.int64),
        }
        return TensorDictPrimer(specs, default_value=0, reset_key="_reset", expand_specs=True)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every agent, under the exploration type in force."""
        model = self.world_model
        observation = tensordict.get(keys.OBSERVATION)
        missing = [key for key in CONTEXT_KEYS if key not in tensordict.keys(include_nested=True)]
        if missing:
            raise KeyError(
                f"{missing} not found: append policy.make_tensordict_primer() to the environment, "
                "so that the context starts with every episode"
            )
        batch = tensordict.batch_size
        latent = model.encode(self._flat(observation, model.observation_dims))
        code = self._flat(tensordict.get(CONTEXT_CODE), 2)
        action = self._flat(tensordict.get(CONTEXT_ACTION), 1)
        length = self._flat(tensordict.get(CONTEXT_LENGTH), 0)
        # The context is right-aligned: its last `length` steps are this episode's.
        valid = torch.arange(self.context_length, device=length.device) >= self.context_length - length.unsqueeze(-1)
        newest = model.latent.to_code(latent).unsqueeze(2)
        state, _ = model.prefill(model.latent.from_code(torch.cat([code, newest], 2)), action, valid)

        inputs = TensorDict(state.entries(), batch_size=state.hidden.shape[1:2]).reshape(batch)
        outputs = self.actor(inputs.set(keys.ACTION_MASK, tensordict.get(keys.ACTION_MASK)))
        tensordict.set(keys.ACTION, outputs.get(keys.ACTION))
        if (logits := outputs.get(keys.LOGITS, None)) is not None:
            tensordict.set(keys.LOGITS, logits)

        chosen = self._flat(outputs.get(keys.ACTION), 0).unsqueeze(-1)
        code = torch.cat([code[:, :, 1:], newest.to(code.dtype)], 2)
        tensordict.set(("next", *CONTEXT_CODE), self._batched(code, batch, 2))
        tensordict.set(("next", *CONTEXT_ACTION), self._batched(torch.cat([action[:, :, 1:], chosen], 2), batch, 1))
        tensordict.set(("next", *CONTEXT_LENGTH), self._batched((length + 1).clamp(max=self.context_length), batch, 0))
        return tensordict

    @staticmethod
    def _flat(value: Tensor, event_dims: int) -> Tensor:
        """``[*batch, N, *event]`` to ``[N, E, *event]``."""
        value = agents_first(value, event_dims)
        return value.reshape(value.shape[0], -1, *value.shape[value.ndim - event_dims :])

    @staticmethod
    def _batched(value: Tensor, batch: torch.Size, event_dims: int) -> Tensor:
        """``[N, E, *event]`` to ``[*batch, N, *event]``."""
        return agents_last(value.reshape(value.shape[0], *batch, *value.shape[2:]), event_dims)
