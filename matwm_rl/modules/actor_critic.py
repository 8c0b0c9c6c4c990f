"""Actors and critics of all agents, with stacked weights (docs/algorithm.md, States, actors and critics)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from matwm_rl import keys
from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints, check_kinds
from matwm_rl.checks import check_reads, check_shape, check_writes, read_output
from matwm_rl.finite import is_finite
from matwm_rl.functional import agents_first, agents_last, at_least_float32
from matwm_rl.modules.stacked import LatentLinear
from matwm_rl.modules.stacked_mlp import StackedMLP, StackedNormSiLU, StackedSequential
from matwm_rl.modules.state import STATE_KEYS
from matwm_rl.modules.two_hot import TwoHot
from matwm_rl.modules.world_model import WorldModel
from matwm_rl.settings import Settings, setting


@dataclass(kw_only=True)
class ActorCriticConfig(Settings):
    """Sizes of the networks of :func:`make_actor` and :func:`make_critic`; the defaults are the paper's.

    Attributes:
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        share_by_group: one network for all agents of a group of the environment (ours), which learns from the dreams of
            all of them. Off, the paper's: every agent has its own.

    Examples:
        >>> ActorCriticConfig(num_cells=128).depth
        2
    """

    num_cells: int = setting(512, minimum=1)
    depth: int = setting(2, minimum=0)
    share_by_group: bool = False


class StateMLP(nn.Module):
    """A stack of MLPs, each agent's on its own s_t = (z_t, h_t, p_t), in TorchRL's layout.

    Predictions of teammates enter in a bounded form: of discrete actions as probabilities, of continuous actions as
    locations and scales.

    Args:
        world_model: gives the sizes; no reference to it is kept.
        out_features: number of outputs; they start at zero, so that a policy starts uniform (a
            continuous one broad, see :class:`~matwm_rl.action_distribution.BoxDistribution`) and a value at 0.
        config: sizes.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> world_model = WorldModel.from_env(make_env("mock"), presets.tiny().world_model)
        >>> net = StateMLP(world_model, 5, presets.tiny().actor_critic)
        >>> net(torch.zeros(7, 3, 16), torch.zeros(7, 3, 32), torch.zeros(7, 3, 2, 4)).shape
        torch.Size([7, 3, 5])
    """

    def __init__(self, world_model: WorldModel, out_features: int, config: ActorCriticConfig) -> None:
        super().__init__()
        check_kinds(WorldModel, world_model=world_model)
        check_kinds(ActorCriticConfig, config=config)
        check_ints(1, out_features=out_features)
        self.config, self.actions = config, world_model.actions
        index = world_model.group_index if config.share_by_group else range(world_model.num_agents)
        self.sizes = (world_model.latent.latent_size, world_model.transformer.features)
        self.others = 0 if world_model.teammates is None else world_model.num_agents - 1
        self.input = LatentLinear(
            world_model.latent.latent_size,
            config.num_cells if config.depth else out_features,
            index,
            num_classes=world_model.latent.num_classes,
            extra_features=world_model.transformer.features + self.others * world_model.actions.num_parameters,
            zero_init=not config.depth,
        )
        self.rest = StackedSequential()
        if config.depth:
            width, depth = config.num_cells, config.depth - 1
            self.rest.append(StackedNormSiLU(width, index))
            self.rest.append(StackedMLP(width, out_features, stack_index=index, num_cells=width, depth=depth))

    def forward(self, latent: Tensor, hidden: Tensor, teammate_logits: Tensor) -> Tensor:
        """Apply each agent's MLP.

        Args:
            latent: ``[*batch, N, Z]``.
            hidden: ``[*batch, N, F]``.
            teammate_logits: ``[*batch, N, N-1, P]``.

        Returns:
            ``[*batch, N, out_features]``.
        """
        agents, (latent_size, hidden_size) = self.actions.num_agents, self.sizes
        check_shape(latent, "StateMLP reads 'latent'", (*latent.shape[:-2], agents, latent_size))
        check_shape(hidden, "StateMLP reads 'hidden'", (*latent.shape[:-2], agents, hidden_size))
        logits = (*latent.shape[:-2], agents, self.others, self.actions.num_parameters)
        check_shape(teammate_logits, "StateMLP reads 'teammate_logits'", logits)
        teammates = self.actions.features(agents_first(teammate_logits, 2)).flatten(-2)
        out = self.rest(self.input(agents_first(latent), torch.cat([agents_first(hidden), teammates], -1)))
        # Contiguous in the layout of the output, because later steps read the 255 logits of every state one by one.
        return agents_last(at_least_float32(out)).contiguous()


def make_actor(world_model: WorldModel, config: ActorCriticConfig | None = None) -> ProbabilisticTensorDictSequential:
    """Make the actors of all agents, pi_i(a given s_t), as one TorchRL ``ProbabilisticActor``.

    Only sizes are read from the world model; the actor holds no reference to it.

    Args:
        world_model: gives the sizes.
        config: sizes of the networks; by default the paper's.

    Keys read: ``("agents", "latent" | "hidden" | "teammate_logits" | "action_mask")``; written:
    ``("agents", "logits" | "action")``. The distribution never gives weight to an action that the mask forbids. Of
    continuous actions the logits are the parameters of a :class:`~matwm_rl.action_distribution.BoxDistribution`.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), presets.tiny().world_model)
        >>> make_actor(world_model).out_keys
        [('agents', 'logits'), ('agents', 'action')]
    """
    check_kinds(WorldModel, world_model=world_model)
    size = world_model.actions.num_parameters
    network = StateMLP(world_model, size, ActorCriticConfig() if config is None else config)
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=STATE_KEYS, out_keys=[keys.LOGITS]),
        in_keys={"logits": keys.LOGITS, "mask": keys.ACTION_MASK},
        out_keys=[keys.ACTION],
        distribution_class=world_model.actions.distribution_class,
    )


def make_critic(
    world_model: WorldModel, config: ActorCriticConfig | None = None, *, two_hot: TwoHot | None = None
) -> TensorDictSequential:
    """Make the critics of all agents, V_i(s_t) as two-hot logits and as a number.

    Args:
        world_model: gives the sizes.
        config: sizes of the networks; by default the paper's.
        two_hot: distribution of the value over bins; by default as that of the world model's rewards.

    Keys read: ``("agents", "latent" | "hidden" | "teammate_logits")``; written:
    ``("agents", "state_value_logits")`` ``[*batch, N, bins]`` and ``("agents", "state_value")`` ``[*batch, N, 1]``.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), presets.tiny().world_model)
        >>> make_critic(world_model).out_keys
        [('agents', 'state_value_logits'), ('agents', 'state_value')]
    """
    check_kinds(WorldModel, world_model=world_model)
    if two_hot is None:
        two_hot = deepcopy(world_model.two_hot)
        two_hot.norm = None  # values come normalised: LambdaReturn(reward_norm=...)
    check_kinds(TwoHot, two_hot=two_hot)
    network = StateMLP(world_model, two_hot.num_bins, ActorCriticConfig() if config is None else config)
    return TensorDictSequential(
        TensorDictModule(network, in_keys=STATE_KEYS, out_keys=[keys.STATE_VALUE_LOGITS]),
        TensorDictModule(two_hot, in_keys=[keys.STATE_VALUE_LOGITS], out_keys=[keys.STATE_VALUE]),
    )


def check_actor(actor: nn.Module) -> None:
    """Check that an actor can act on s_t, as far as its keys tell.

    Raises:
        ValueError: if it reads what is not part of s_t, or does not write ``("agents", "action")``.
    """
    available: list[NestedKey] = [*STATE_KEYS, keys.ACTION_MASK]
    check_reads(actor, available, "the actor")
    check_writes(actor, [keys.ACTION], "the actor")


def read_action(outputs: TensorDictBase, actor: nn.Module, actions: ActionSpace, batch: Sequence[int]) -> Tensor:
    """Read the actions ``[*batch, N, *action_shape]`` that an actor has written.

    Args:
        outputs: of the actor.
        actor: for the message.
        actions: the action space.
        batch: sizes of the batch.

    Raises:
        KeyError: if it has written none.
        ValueError: if they have another shape or type.
    """
    note = "an actor writes one action for every agent"
    note += "; of one-hot actions write argmax(-1)" if actions.has_probs else ", numbers from -1 to 1"
    action = read_output(outputs, keys.ACTION, actor, (*batch, actions.num_agents, *actions.action_shape), note)
    if action.is_floating_point() != actions.dtype.is_floating_point:
        name = type(actor).__name__
        raise ValueError(f"{name} must write {keys.ACTION!r} as {actions.dtype}, found {action.dtype}; {note}")
    return action.to(actions.dtype) if action.is_floating_point() else action


def check_logits(outputs: TensorDictBase, actions: ActionSpace, mask: Tensor, actor: nn.Module) -> None:
    """Check that the logits of an actor, if it has written any, are a distribution. This reads their values.

    With NaN logits the first action would be drawn, even where the mask forbids it. A logit of minus infinity is an
    action without probability. The logits of illegal actions do not matter.

    Args:
        outputs: of the actor.
        actions: the action space.
        mask: bool ``[*batch, N, A]``, the legal actions.
        actor: for the message.

    Raises:
        FloatingPointError: if the logits of some agent's legal actions are no distribution.
    """
    logits = outputs.get(keys.LOGITS, None)
    if logits is None or is_finite(logits):
        return
    if (bad := ~actions.are_drawable(logits, mask)).any():
        index = bad.nonzero()[0].tolist()
        raise FloatingPointError(
            f"{type(actor).__name__} gave agent {index[-1]} the logits {logits[tuple(index)].tolist()}, from which no "
            "legal action can be drawn. Its weights or its inputs are not finite: act with the last good ones"
        )
