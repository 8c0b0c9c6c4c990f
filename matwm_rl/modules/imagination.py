"""Imagination (Algorithm 1): from replayed starts, a horizon of imagined steps, all agents and starts batched."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.arguments import check_ints, check_kinds
from matwm_rl.checks import read_optional
from matwm_rl.functional import agents_first, agents_last, autocast
from matwm_rl.modules.actor_critic import check_actor, read_action
from matwm_rl.modules.state import STATE_KEYS, State
from matwm_rl.modules.world_model import WorldModel


class Imagination(TensorDictModuleBase):
    """Imagine a rollout for each agent separately, from replayed starts; teammates are only predicted (Algorithm 1).

    No gradient flows through the rollout. Actions are sampled, whatever the exploration type outside.

    Args:
        world_model: the shared world model.
        actor: reads s_t and ``("agents", "action_mask")``, writes ``("agents", "action")``.
        horizon: H, number of imagined steps.
        precision: ``"float32"``, or ``"bfloat16"`` for the matrix products (states and rewards stay float32).

    Raises:
        ValueError: if ``horizon`` is below 1; if the actor reads what imagination does not have, does not write
            actions, or writes them in another shape; if an entry that is read has another shape.
        KeyError: if an entry that is read is missing.

    Keys read (batch ``[*S, C+1]``: C steps of context, then the start):
    ``("agents", "observation" | "action")``, ``("next", "agents", "done")``, optionally ``("agents", "alive")``.

    Keys written to the returned tensordict (batch ``[*S, H]``): s_t as ``("agents", "latent" | "hidden" |
    "teammate_logits")``, ``("agents", "action" | "action_mask")``, s_{t+1} under ``"next"``,
    ``("next", "agents", "reward" | "continuation")`` as ``[*S, H, N, 1]``, and ``("agents", "alive")`` ``[*S, H, N]``:
    false where the start was of a dead agent.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import add_agent_entries
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import make_actor
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> imagination = Imagination(world_model, make_actor(world_model), horizon=5)
        >>> starts = add_agent_entries(env.rollout(9, break_when_any_done=False).unsqueeze(0))
        >>> imagination(starts)["next", "agents", "reward"].shape
        torch.Size([1, 5, 3, 1])
    """

    def __init__(self, world_model: WorldModel, actor: nn.Module, *, horizon: int, precision: str = "float32") -> None:
        super().__init__()
        check_kinds(WorldModel, world_model=world_model)
        check_ints(1, horizon=horizon)
        autocast(torch.device("cpu"), precision)  # refuses what is no precision
        check_actor(actor)
        self.world_model = world_model
        self.actor = actor
        self.horizon = horizon
        self.precision = precision
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ACTION, keys.AGENT_DONE, keys.ALIVE]
        following: list[NestedKey] = [("next", *key) for key in STATE_KEYS]
        self.out_keys: list[NestedKey] = [
            *STATE_KEYS,
            keys.ACTION,
            keys.ACTION_MASK,
            keys.ALIVE,
            *following,
            keys.REWARD,
            keys.CONTINUATION,
        ]

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Imagine from every start: see the class for keys."""
        with autocast(self.world_model.legal.device, self.precision), set_exploration_type(ExplorationType.RANDOM):
            # torch.compile cannot trace inference tensors.
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode():
                state, caches = self.world_model.start_from(tensordict, self.horizon)
                rollout = self.world_model.imagine(state, caches, self._act, self.horizon)
            # Packed outside of inference mode, because a backward pass refuses inference tensors.
            imagined = rollout.pack()
        starts = tensordict.get(keys.AGENT_DONE).shape[:-1]
        imagined = imagined.reshape(*starts[:-2], self.horizon)
        alive = read_optional(tensordict, keys.ALIVE, self, starts)
        alive = self.world_model.legal.new_ones(starts[-1:]) if alive is None else alive[..., -1:, :]
        return imagined.set(keys.ALIVE, alive.expand(*imagined.shape, -1))

    def _act(self, state: State, mask: Tensor) -> Tensor:
        inputs = TensorDict({**state.entries(), keys.ACTION_MASK: agents_last(mask)}, batch_size=mask.shape[1:2])
        actions = self.world_model.actions
        action = read_action(self.actor(inputs), self.actor, actions, inputs.batch_size)
        return agents_first(action, len(actions.action_shape))
