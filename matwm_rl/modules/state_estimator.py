"""What agents know in the real environment: s_t of the present observation and the episode so far (section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer

from matwm_rl import keys
from matwm_rl.checks import batch_shape, read_entry
from matwm_rl.functional import agents_first, agents_last
from matwm_rl.modules.latent import Latent
from matwm_rl.modules.world_model import WorldModel

CONTEXT_CODE: NestedKey = ("context", "code")
CONTEXT_ACTION: NestedKey = ("context", "action")
CONTEXT_LENGTH: NestedKey = ("context", "length")
CONTEXT_KEYS = [CONTEXT_CODE, CONTEXT_ACTION, CONTEXT_LENGTH]
"""What a policy carries through an episode: latent codes and actions of the last W steps, and how many there are."""


class _Memory(NamedTuple):
    """The carried context of E environments, agents first, and what has just been seen."""

    code: Tensor
    """Latent codes ``[N, E, W, K]``."""
    action: Tensor
    """``[N, E, W]``."""
    length: Tensor
    """``[N, E]``."""
    newest: Tensor
    """Code of z_t, ``[N, E, 1, K]``."""


class StateEstimator(TensorDictModuleBase):
    """Write s_t of every agent (section 3): the posterior of the observation, and the history of this episode.

    Decentralised: what is written of agent i depends on agent i's observations and actions alone. The module is
    stateless; the last ``context_length`` steps travel in the tensordict as latent codes and actions, and the
    transformer runs over them again at every step. So every step of an episode costs the same, and the context is
    always read with the newest weights. Append :meth:`make_tensordict_primer` to the environment: it starts the context
    with every episode; once the actions are chosen, :meth:`remember` carries it on.

    :class:`WorldModelPolicy` is this followed by actors, :class:`WorldModelFeatures` this as a transform of the
    environment.

    Args:
        world_model: the shared world model.
        context_length: steps W of history that are seen at most.

    Keys read: ``("agents", "observation")`` and the context, ``("context", "code")`` ``[*batch, N, W, K]``,
    ``("context", "action")`` ``[*batch, N, W]``, ``("context", "length")`` ``[*batch, N]``.
    Keys written: ``("agents", "latent" | "hidden" | "teammate_logits")``, without gradient, and of a multi-hot code
    ``("agents", "latent_ones")``; shapes in :mod:`matwm_rl.keys`.

    Raises:
        ValueError: if ``context_length`` is below 1, or an entry has another shape.
        KeyError: if an entry is missing.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> estimator = StateEstimator(world_model, context_length=4)
        >>> env = env.append_transform(estimator.make_tensordict_primer())
        >>> step = env.rand_action(estimator(env.reset()))
        >>> step["agents", "hidden"].shape, estimator.remember(step)["next", "context", "length"].tolist()
        (torch.Size([3, 32]), [1, 1, 1])
    """

    def __init__(self, world_model: WorldModel, *, context_length: int = 16) -> None:
        super().__init__()
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        self.world_model = world_model
        self.context_length = context_length
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, *CONTEXT_KEYS]
        self.out_keys: list[NestedKey] = world_model.state_keys

    @property
    def context_shapes(self) -> dict[NestedKey, tuple[int, ...]]:
        """Shapes of the carried context, by keys, without batch dimensions."""
        agents, length = self.world_model.num_agents, self.context_length
        code = (agents, length, self.world_model.latent.num_dims)
        return {CONTEXT_CODE: code, CONTEXT_ACTION: (agents, length), CONTEXT_LENGTH: (agents,)}

    def context_specs(self) -> dict[NestedKey, Unbounded]:
        """Specs of the carried context, by keys, without batch dimensions; zeros are an empty one."""
        dtypes = {CONTEXT_CODE: self.world_model.latent.code_dtype}
        return {key: Unbounded(shape, dtype=dtypes.get(key, torch.int64)) for key, shape in self.context_shapes.items()}

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that carries the context and empties it at every reset."""
        return TensorDictPrimer(self.context_specs(), default_value=0, reset_key="_reset", expand_specs=True)

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write s_t; see the class for keys."""
        return tensordict.update(self._estimate(tensordict)[0])

    def _estimate(self, tensordict: TensorDictBase) -> tuple[TensorDict, _Memory]:
        """s_t in a tensordict of its own, and what :meth:`_following_context` goes on from."""
        model, batch = self.world_model, self._batch(tensordict)
        shape = (*batch, model.num_agents, *model.observation_shape)
        latent = model.encode(self._flat(read_entry(tensordict, keys.OBSERVATION, self, shape), model.observation_dims))
        memory = self._memory(tensordict, batch, model.latent.to_code(latent))
        # The context is right-aligned: its last `length` steps are this episode's.
        place = torch.arange(self.context_length, device=memory.length.device)
        valid = place >= self.context_length - memory.length.unsqueeze(-1)
        latent = model.latent.from_code(torch.cat([memory.code, memory.newest], 2))
        state, _ = model.prefill(latent, memory.action, valid)
        return TensorDict(state.entries(), batch_size=state.hidden.shape[1:2]).reshape(batch), memory

    def remember(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the next step's context under ``"next"``: that of this step, then z_t and a_t.

        Args:
            tensordict: with what :meth:`forward` has read and written, and ``("agents", "action")``.
        """
        batch, agents = tensordict.batch_size, self.world_model.num_agents
        action = read_entry(tensordict, keys.ACTION, self, (*batch, agents))
        value = read_entry(tensordict, keys.LATENT, self, (*batch, agents, self.world_model.latent.latent_size))
        code = self.world_model.latent.to_code(Latent(value, tensordict.get(keys.LATENT_ONES, None)))
        memory = self._memory(tensordict, batch, self._flat(code, 1))
        for key, value in self._following_context(memory, action).items():
            tensordict.set(("next", *key), value)
        return tensordict

    def _following_context(self, memory: _Memory, action: Tensor) -> dict[NestedKey, Tensor]:
        """The next step's context by keys, after the actions ``[*batch, N]``."""
        batch, chosen = action.shape[:-1], self._flat(action, 0).unsqueeze(-1)
        following = {
            CONTEXT_CODE: torch.cat([memory.code[:, :, 1:], memory.newest.to(memory.code.dtype)], 2),
            CONTEXT_ACTION: torch.cat([memory.action[:, :, 1:], chosen], 2),
            CONTEXT_LENGTH: (memory.length + 1).clamp(max=self.context_length),
        }
        return {
            key: agents_last(value.reshape(value.shape[0], *batch, *value.shape[2:]), value.ndim - 2)
            for key, value in following.items()
        }

    def _batch(self, tensordict: TensorDictBase) -> torch.Size:
        return batch_shape(tensordict, keys.OBSERVATION, 1 + self.world_model.observation_dims, self)

    def _memory(self, tensordict: TensorDictBase, batch: torch.Size, newest: Tensor) -> _Memory:
        note = "append make_tensordict_primer() to the environment, so that the context starts with every episode"
        code, action, length = (
            self._flat(read_entry(tensordict, key, self, (*batch, *shape), note), len(shape) - 1)
            for key, shape in self.context_shapes.items()
        )
        return _Memory(code, action, length, newest.unsqueeze(2))

    @staticmethod
    def _flat(value: Tensor, event_dims: int) -> Tensor:
        """``[*batch, N, *event]`` to ``[N, E, *event]``."""
        value = agents_first(value, event_dims)
        return value.reshape(value.shape[0], -1, *value.shape[value.ndim - event_dims :])
