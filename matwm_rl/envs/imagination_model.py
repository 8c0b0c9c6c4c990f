"""What an environment of imagined episodes asks of a world model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tensordict import TensorDictBase
from torch import Tensor

from matwm_rl.action_space import ActionSpace


class ImaginationModel(Protocol):
    """What :class:`~matwm_rl.envs.ImaginationEnv` asks of a world model; :class:`~matwm_rl.modules.WorldModel` has it.

    Tensors are agent-major. States and caches are the model's own: a state has ``latent``, ``entries()`` and
    ``replace_rows(rows, new)``, caches have ``replace_rows(rows, new)`` and ``make_room(keep)``.

    Attributes:
        actions: the action space of the N agents.
        legal: bool ``[N, A]``, which actions each agent has at all.

    Examples:
        >>> import torch
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import add_agent_entries
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> env = make_env("mock", seed=0)
        >>> model: ImaginationModel = WorldModel.from_env(env, presets.tiny().world_model)
        >>> starts = add_agent_entries(env.rollout(8, break_when_any_done=False)).reshape(2, 4)
        >>> state, caches = model.start_from(starts, horizon=1)
        >>> rollout = model.imagine(state, caches, lambda state, mask: torch.zeros(3, 2).long(), horizon=1)
        >>> rollout.pack()["next", "agents", "reward"].shape
        torch.Size([2, 1, 3, 1])
    """

    actions: ActionSpace
    legal: Tensor

    def start_from(self, starts: TensorDictBase, horizon: int = 0) -> tuple[Any, Any]:
        """Return state and caches of replayed starts ``[S, C+1]``, with room for ``horizon`` steps."""

    def imagine(self, state: Any, caches: Any, act: Callable[[Any, Tensor], Tensor], horizon: int) -> Any:
        """Imagine with actions ``[N, S]`` of ``act``; the result has ``states`` and ``pack()``, ``[S, horizon]``."""

    def decode(self, latent: Any) -> Tensor:
        """Return observations ``[N, S, *O]`` of a state's latents; images from 0 to 1."""

    def legal_actions(self, latent: Any) -> Tensor:
        """Predict the legal actions, bool ``[N, S, A]``."""
