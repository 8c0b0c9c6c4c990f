"""What the world model knows of a moment, and what it keeps of the past.

Dimension letters: N agents, S starts, Z latent size, F hidden size, P numbers of an action distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from matwm_rl import keys
from matwm_rl.functional import agents_last
from matwm_rl.modules.transformer import KVCache

STATE_KEYS: list[NestedKey] = [keys.LATENT, keys.HIDDEN, keys.TEAMMATE_LOGITS]
"""Keys of the state s_t = (z_t, h_t, p_t)."""


@dataclass
class State:
    """What an actor sees of N agents: s_t = (z_t, h_t, p_t) (docs/algorithm.md, States, actors and critics).

    Attributes:
        latent: z_t, ``[N, *batch, Z]``.
        hidden: h_t, the transformer's output after (z_{t-1}, a_{t-1}), zero at an episode's start; ``[N, *batch, F]``.
        teammate_logits: p_t, ``[N, *batch, N-1, P]`` (``[N, *batch, 0, P]`` without teammate predictor).

    Examples:
        >>> state = State(torch.zeros(3, 2, 16), torch.zeros(3, 2, 8), torch.zeros(3, 2, 2, 5))
        >>> state.entries()["agents", "latent"].shape
        torch.Size([2, 3, 16])
    """

    latent: Tensor
    hidden: Tensor
    teammate_logits: Tensor

    def __getitem__(self, index: Any) -> State:
        """Index the batch dimensions."""
        return State(self.latent[index], self.hidden[index], self.teammate_logits[index])

    def entries(self) -> dict[NestedKey, Tensor]:
        """Return the state under :data:`STATE_KEYS`, in TorchRL's layout ``[*batch, N, ...]``."""
        return {
            keys.LATENT: agents_last(self.latent),
            keys.HIDDEN: agents_last(self.hidden),
            keys.TEAMMATE_LOGITS: agents_last(self.teammate_logits, 2),
        }

    def replace_rows(self, rows: Tensor, new: State) -> State:
        """Return a copy with the given rows replaced.

        Args:
            rows: bool ``[S]``, which rows of the state ``[N, S]``.
            new: these rows alone, in their order.
        """
        index = rows.nonzero().squeeze(-1)
        return State(
            self.latent.index_copy(1, index, new.latent),
            self.hidden.index_copy(1, index, new.hidden),
            self.teammate_logits.index_copy(1, index, new.teammate_logits),
        )

    @staticmethod
    def stack(states: list[State], dim: int) -> State:
        """Stack along a new batch dimension."""
        return State(
            torch.stack([state.latent for state in states], dim),
            torch.stack([state.hidden for state in states], dim),
            torch.stack([state.teammate_logits for state in states], dim),
        )


@dataclass
class Caches:
    """What the model keeps of N x S pasts: the caches of its transformer and of its teammate predictor.

    Attributes:
        sequence: the transformer's cache.
        teammates: what the teammate predictor keeps, for :class:`~matwm_rl.modules.TeammatePredictor` a cache too;
            ``None`` where it keeps nothing, or there is none.

    Raises:
        TypeError: by :meth:`replace_rows` and :meth:`make_room`, if what the teammate predictor keeps lacks these
            methods.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import add_agent_entries
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> starts = add_agent_entries(env.rollout(8, break_when_any_done=False)).reshape(2, 4)
        >>> state, caches = world_model.start_from(starts, horizon=1)
        >>> _ = world_model.step(state, torch.zeros(3, 2).long(), caches)
        >>> caches.sequence.length  # three steps of context and one imagined
        4
    """

    sequence: KVCache
    teammates: Any

    @property
    def _all(self) -> list[Any]:
        if self.teammates is None:
            return [self.sequence]
        if lacking := [name for name in ("replace_rows", "make_room") if not hasattr(self.teammates, name)]:
            raise TypeError(
                f"the teammate predictor's cache, a {type(self.teammates).__name__}, has no {lacking}. Where dreams "
                "begin anew beside others (ImaginationEnv) it needs both, as matwm_rl.modules.KVCache has them"
            )
        return [self.sequence, self.teammates]

    def replace_rows(self, rows: Tensor, new: Caches) -> None:
        """Give some rows another past, in place; the others keep theirs.

        Args:
            rows: bool ``[S]``.
            new: pasts of these rows alone, in their order.
        """
        # Agents lie one behind another in a cache, [N * S].
        rows = rows.repeat(self.sequence.bias.shape[1] // len(rows))
        for cache, other in zip(self._all, new._all, strict=True):
            cache.replace_rows(rows, other)

    def make_room(self, keep: int) -> None:
        """Drop all but the last ``keep`` positions of every cache that is full, in place."""
        for cache in self._all:
            cache.make_room(keep)
