"""What agents know in the real environment: s_t of the present observation and of the episode so far.

See docs/algorithm.md, States, actors and critics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer

from matwm_rl import keys
from matwm_rl.arguments import check_ints, check_kinds
from matwm_rl.checks import batch_shape, check_type, read_entry, read_optional
from matwm_rl.functional import agents_first, agents_last
from matwm_rl.modules.state import STATE_KEYS
from matwm_rl.modules.world_model import WorldModel
from matwm_rl.settings import Settings, setting

HISTORY_CODE: NestedKey = ("history", "code")
HISTORY_ACTION: NestedKey = ("history", "action")
HISTORY_LENGTH: NestedKey = ("history", "length")
HISTORY_KEYS = [HISTORY_CODE, HISTORY_ACTION, HISTORY_LENGTH]
"""What a policy carries through an episode: stored latents and actions of the last W steps, and how many there are."""


@dataclass(kw_only=True)
class PolicyConfig(Settings):
    """Settings of :class:`~matwm_rl.modules.WorldModelPolicy`.

    Attributes:
        history_length: W, steps of history that the policy sees at most.

    Examples:
        >>> PolicyConfig(history_length=16)
        PolicyConfig(history_length=16)
    """

    history_length: int = setting(64, minimum=1)


class _History(NamedTuple):
    """The carried history of E environments, agents first, and what has just been seen."""

    code: Tensor
    """Stored latents ``[N, E, W, K]``."""
    action: Tensor
    """``[N, E, W]``."""
    length: Tensor
    """``[N, E]``."""
    newest: Tensor
    """Code of z_t, ``[N, E, 1, K]``."""
    alive: Tensor | None
    """Who lives, ``[N, E]``; ``None``: all."""


class StateEstimator(TensorDictModuleBase):
    """Write s_t of every agent: the posterior of the observation, and the history of this episode.

    Decentralised: what is written of agent i depends on agent i's observations and actions alone. The module is
    stateless. The last ``history_length`` steps travel in the tensordict as stored latents and actions, and the
    transformer runs over them again at every step. So every step of an episode costs the same, and the history is
    always read with the newest weights. Append :meth:`make_tensordict_primer` to the environment: it empties the
    history at every reset. Once the actions are chosen, :meth:`remember` carries it on. An agent that is not alive
    remembers nothing: one that joins late or returns begins with an empty history.

    :class:`WorldModelPolicy` is this followed by actors, :class:`WorldModelFeatures` this as a transform of the
    environment.

    Args:
        world_model: the shared world model.
        history_length: W, steps of history that are seen at most.

    Keys read: ``("agents", "observation")`` and the history, ``("history", "code")`` ``[*batch, N, W, K]``,
    ``("history", "action")`` ``[*batch, N, W, *action_shape]``, ``("history", "length")`` ``[*batch, N]``; optional
    ``("agents", "alive")`` ``[*batch, N]``.
    Keys written: ``("agents", "latent" | "hidden" | "teammate_logits")``, without gradient; shapes in
    :mod:`matwm_rl.keys`.

    Raises:
        ValueError: if ``history_length`` is below 1, or an entry has another shape.
        KeyError: if an entry is missing.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> estimator = StateEstimator(world_model, history_length=4)
        >>> env = env.append_transform(estimator.make_tensordict_primer())
        >>> step = env.rand_action(estimator(env.reset()))
        >>> step["agents", "hidden"].shape, estimator.remember(step)["next", "history", "length"].tolist()
        (torch.Size([3, 32]), [1, 1, 1])
    """

    def __init__(self, world_model: WorldModel, *, history_length: int = PolicyConfig.history_length) -> None:
        super().__init__()
        check_kinds(WorldModel, world_model=world_model)
        check_ints(1, history_length=history_length)
        self.world_model = world_model
        self.history_length = history_length
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ALIVE, *HISTORY_KEYS]
        self.out_keys: list[NestedKey] = list(STATE_KEYS)

    @property
    def history_shapes(self) -> dict[NestedKey, tuple[int, ...]]:
        """Shapes of the carried history, by keys, without batch dimensions."""
        model, length = self.world_model, self.history_length
        return {
            HISTORY_CODE: (model.num_agents, length, model.latent.num_dims),
            HISTORY_ACTION: (model.num_agents, length, *model.actions.action_shape),
            HISTORY_LENGTH: (model.num_agents,),
        }

    def history_specs(self) -> dict[NestedKey, Unbounded]:
        """Specs of the carried history, by keys, without batch dimensions; zeros are an empty one."""
        dtypes = self._history_dtypes
        return {key: Unbounded(shape, dtype=dtypes[key]) for key, shape in self.history_shapes.items()}

    @property
    def _history_dtypes(self) -> dict[NestedKey, torch.dtype]:
        model = self.world_model
        return {
            HISTORY_CODE: model.latent.code_dtype,
            HISTORY_ACTION: model.actions.dtype,
            HISTORY_LENGTH: torch.int64,
        }

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Make the transform that carries the history and empties it at every reset."""
        return TensorDictPrimer(self.history_specs(), default_value=0, reset_key="_reset", expand_specs=True)

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write s_t; see the class for keys."""
        return tensordict.update(self._estimate(tensordict)[0])

    def _estimate(self, tensordict: TensorDictBase) -> tuple[TensorDict, _History]:
        """Return s_t in a tensordict of its own, and what :meth:`_following_history` goes on from."""
        model, batch = self.world_model, self._batch(tensordict)
        shape = (*batch, model.num_agents, *model.observation_shape)
        latent = model.encode(self._flat(read_entry(tensordict, keys.OBSERVATION, self, shape), model.observation_dims))
        history = self._read_history(tensordict, batch, model.latent.to_code(latent))
        # The history is right-aligned: its last `length` steps are this episode's.
        place = torch.arange(self.history_length, device=history.length.device)
        valid = place >= self.history_length - history.length.unsqueeze(-1)
        latent = model.latent.from_code(torch.cat([history.code, history.newest], 2))
        state, _ = model.prefill(latent, history.action, valid)
        return TensorDict(state.entries(), batch_size=state.hidden.shape[1:2]).reshape(batch), history

    def remember(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the next step's history under ``"next"``: that of this step, then z_t and a_t.

        Args:
            tensordict: with what :meth:`forward` has read and written, and ``("agents", "action")``.
        """
        model, batch = self.world_model, tensordict.batch_size
        shape = (*batch, model.num_agents)
        action = read_entry(tensordict, keys.ACTION, self, (*shape, *model.actions.action_shape))
        latent = read_entry(tensordict, keys.LATENT, self, (*shape, model.latent.latent_size))
        history = self._read_history(tensordict, batch, self._flat(model.latent.to_code(latent), 1))
        for key, value in self._following_history(history, action).items():
            tensordict.set(("next", *key), value)
        return tensordict

    def _following_history(self, history: _History, action: Tensor) -> dict[NestedKey, Tensor]:
        """Return the next step's history by keys, after the actions ``[*batch, N]``."""
        event_dims = len(self.world_model.actions.action_shape)
        batch = action.shape[: action.ndim - 1 - event_dims]
        chosen = self._flat(action, event_dims).unsqueeze(2)
        length = (history.length + 1).clamp(max=self.history_length)
        following = {
            HISTORY_CODE: torch.cat([history.code[:, :, 1:], history.newest.to(history.code.dtype)], 2),
            HISTORY_ACTION: torch.cat([history.action[:, :, 1:], chosen], 2),
            HISTORY_LENGTH: length if history.alive is None else length.masked_fill(~history.alive, 0),
        }
        return {
            key: agents_last(value.reshape(value.shape[0], *batch, *value.shape[2:]), value.ndim - 2)
            for key, value in following.items()
        }

    def _batch(self, tensordict: TensorDictBase) -> torch.Size:
        return batch_shape(tensordict, keys.OBSERVATION, 1 + self.world_model.observation_dims, self)

    def _read_history(self, tensordict: TensorDictBase, batch: torch.Size, newest: Tensor) -> _History:
        note = "append make_tensordict_primer() to the environment, so that the history starts with every episode"
        dtypes = self._history_dtypes
        code, action, length = (
            self._flat(
                check_type(read_entry(tensordict, key, self, (*batch, *shape), note), f"{key}", dtypes[key]),
                len(shape) - 1,
            )
            for key, shape in self.history_shapes.items()
        )
        alive = read_optional(tensordict, keys.ALIVE, self, (*batch, self.world_model.num_agents))
        return _History(code, action, length, newest.unsqueeze(2), None if alive is None else self._flat(alive, 0))

    @staticmethod
    def _flat(value: Tensor, event_dims: int) -> Tensor:
        """Turn ``[*batch, N, *event]`` into ``[N, E, *event]``."""
        value = agents_first(value, event_dims)
        return value.reshape(value.shape[0], -1, *value.shape[value.ndim - event_dims :])
