"""Actors and critics: one per agent, or one per group of like agents, with stacked weights (section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import MaskedCategorical, ProbabilisticActor

from matwm_rl import keys
from matwm_rl.checks import check_reads, check_writes, read_output
from matwm_rl.functional import agents_first, agents_last, sample_index, softmax_over_few, at_least_float32
from matwm_rl.modules.stacked import StackedMLP
from matwm_rl.modules.two_hot import TwoHot
from matwm_rl.modules.world_model import WorldModel


class StateMLP(nn.Module):
    """A stack of MLPs, each agent's on its own s_t = (z_t, h_t, p_t) (section 3), in TorchRL's layout.

    Teammates' logits enter as probabilities: bounded, and zero for actions that a teammate does not have.

    Args:
        latent_size: Z.
        hidden_size: F.
        teammate_size: (N-1) * A, or 0 without teammate predictor.
        out_features: number of outputs.
        stack_index: for each of the N agents, which MLP of the stack it uses.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.

    Examples:
        >>> net = StateMLP(4, 8, 10, 5, stack_index=range(3), num_cells=16)
        >>> net(torch.zeros(7, 3, 4), torch.zeros(7, 3, 8), torch.zeros(7, 3, 2, 5)).shape
        torch.Size([7, 3, 5])
    """

    def __init__(
        self,
        latent_size: int,
        hidden_size: int,
        teammate_size: int,
        out_features: int,
        *,
        stack_index: Sequence[int],
        num_cells: int = 512,
        depth: int = 2,
    ) -> None:
        super().__init__()
        size = latent_size + hidden_size + teammate_size
        self.mlp = StackedMLP(size, out_features, stack_index=stack_index, num_cells=num_cells, depth=depth)

    def forward(self, latent: Tensor, hidden: Tensor, teammate_logits: Tensor) -> Tensor:
        """Apply each agent's MLP.

        Args:
            latent: ``[*batch, N, Z]``, or for a multi-hot z the positions of its ones, int64 ``[*batch, N, K]``.
            hidden: ``[*batch, N, F]``.
            teammate_logits: ``[*batch, N, N-1, A]``.

        Returns:
            ``[*batch, N, out_features]``.
        """
        latent, hidden, teammates = agents_first(latent), agents_first(hidden), agents_first(teammate_logits, 2)
        behind = [hidden, softmax_over_few(teammates).flatten(-2)]
        if latent.is_floating_point():
            out = self.mlp(torch.cat([latent, *behind], -1))
        else:
            out = self.mlp(torch.cat(behind, -1), ones=latent)
        # In the order of the keys, so that what is done to 255 logits of every state runs over memory in order.
        return agents_last(at_least_float32(out)).contiguous()


class ActionDistribution(MaskedCategorical):
    """TorchRL's ``MaskedCategorical``, drawn by the inverse of the cumulative distribution.

    ``torch.multinomial`` takes four times as long, and the checks that distributions make by default would have a GPU
    waited for at every step.

    Examples:
        >>> mask = torch.tensor([False, True, False])
        >>> ActionDistribution(logits=torch.zeros(3), mask=mask).sample()
        tensor(1)
    """

    _validate_args = False

    def sample(self, sample_shape: torch.Size | Sequence[int] | None = None) -> Tensor:
        """Draw actions ``[*sample_shape, *batch]``."""
        probs = softmax_over_few(self.logits)
        return sample_index(probs.expand(*(sample_shape or ()), *probs.shape))

    @property
    def deterministic_sample(self) -> Tensor:
        """The likeliest actions ``[*batch]``; TorchRL asks for them under deterministic exploration."""
        return self.logits.argmax(-1)


def _state_network(
    world_model: WorldModel, out_key: NestedKey, out_features: int, *, num_cells: int, depth: int, share_by_group: bool
) -> TensorDictModule:
    """A :class:`StateMLP` with its keys: of a multi-hot z it reads the positions of its ones, which it looks up."""
    teammates = 0 if world_model.teammates is None else (world_model.num_agents - 1) * world_model.num_actions
    network = StateMLP(
        world_model.latent.latent_size,
        world_model.transformer.features,
        teammates,
        out_features,
        stack_index=world_model.group_index if share_by_group else range(world_model.num_agents),
        num_cells=num_cells,
        depth=depth,
    )
    latent = keys.LATENT_ONES if world_model.latent.multi_hot else keys.LATENT
    return TensorDictModule(network, in_keys=[latent, keys.HIDDEN, keys.TEAMMATE_LOGITS], out_keys=[out_key])


def make_actor(
    world_model: WorldModel, *, num_cells: int = 512, depth: int = 2, share_by_group: bool = False
) -> ProbabilisticTensorDictSequential:
    """Actors of all agents, pi_i(a given s_t), as one TorchRL ``ProbabilisticActor`` (section 3).

    Only sizes are read from the world model; the actor holds no reference to it.

    Args:
        world_model: gives the sizes.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        share_by_group: one actor for all agents of a group of the environment (ours), which learns from the dreams of
            all of them; off = the paper's, every agent its own.

    Keys read: ``("agents", "latent" | "hidden" | "teammate_logits" | "action_mask")``, of a multi-hot code
    ``("agents", "latent_ones")`` in place of the latent; written: ``("agents", "logits" | "action")``. The distribution
    never gives weight to an action that the mask forbids.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), hidden_size=32, num_heads=2)
        >>> make_actor(world_model, num_cells=16).out_keys
        [('agents', 'logits'), ('agents', 'action')]
    """
    return ProbabilisticActor(
        _state_network(
            world_model,
            keys.LOGITS,
            world_model.num_actions,
            num_cells=num_cells,
            depth=depth,
            share_by_group=share_by_group,
        ),
        in_keys={"logits": keys.LOGITS, "mask": keys.ACTION_MASK},
        out_keys=[keys.ACTION],
        distribution_class=ActionDistribution,
    )


def make_critic(
    world_model: WorldModel,
    *,
    num_cells: int = 512,
    depth: int = 2,
    share_by_group: bool = False,
    two_hot: TwoHot | None = None,
) -> TensorDictSequential:
    """Critics of all agents, V_i(s_t) as two-hot logits and as a number (section 3).

    Args:
        world_model: gives the sizes.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        share_by_group: see :func:`make_actor`.
        two_hot: code of the value; by default that of the world model's rewards.

    Keys read: ``("agents", "latent" | "hidden" | "teammate_logits")``, of a multi-hot code
    ``("agents", "latent_ones")`` in place of the latent; written: ``("agents", "state_value_logits")``
    ``[*batch, N, bins]`` and ``("agents", "state_value")`` ``[*batch, N, 1]``.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), hidden_size=32, num_heads=2)
        >>> make_critic(world_model, num_cells=16).out_keys
        [('agents', 'state_value_logits'), ('agents', 'state_value')]
    """
    two_hot = two_hot or deepcopy(world_model.two_hot)
    return TensorDictSequential(
        _state_network(
            world_model,
            keys.STATE_VALUE_LOGITS,
            two_hot.num_bins,
            num_cells=num_cells,
            depth=depth,
            share_by_group=share_by_group,
        ),
        TensorDictModule(two_hot, in_keys=[keys.STATE_VALUE_LOGITS], out_keys=[keys.STATE_VALUE]),
    )


def check_actor(actor: nn.Module, world_model: WorldModel) -> None:
    """Check that an actor can act in this world model, as far as its keys tell.

    Raises:
        ValueError: if it reads what is not part of s_t, or does not write ``("agents", "action")``.
    """
    check_reads(actor, [*world_model.state_keys, keys.ACTION_MASK], "the actor")
    check_writes(actor, [keys.ACTION], "the actor")


def read_action(outputs: TensorDictBase, actor: nn.Module, shape: Sequence[int]) -> Tensor:
    """The actions ``[*batch, N]`` that an actor has written.

    Raises:
        KeyError: if it has written none.
        ValueError: if they have another shape, or are not integers.
    """
    note = "an actor writes the index of one action for every agent: of one-hot actions, argmax(-1)"
    action = read_output(outputs, keys.ACTION, actor, shape, note)
    if action.is_floating_point():
        raise ValueError(f"{type(actor).__name__} must write {keys.ACTION!r} as integers, found {action.dtype}; {note}")
    return action
