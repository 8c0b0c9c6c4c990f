"""The actors' losses of all agents; each learns from its own imagined rollouts only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictParams, dispatch
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints, check_kinds, check_numbers, read_choice
from matwm_rl.checks import check_shape, read_entry, read_optional
from matwm_rl.loss_functions import masked_mean, per_agent_mean
from matwm_rl.objectives.common import KeyedLoss
from matwm_rl.objectives.regularizers import MeanPolicyEntropy, Regularizer, Signalling
from matwm_rl.objectives.returns import ReturnScale
from matwm_rl.settings import Settings, setting


class Advantage(StrEnum):
    """How advantages G_t - V(s_t) are normalised, for each agent apart."""

    return_scale = "return_scale"
    """The paper's: divided by max(1, S), S the range of the returns over all states."""
    standardize = "standardize"
    """Ours: less their mean, divided by max(1, their standard deviation) over the batch. Where states differ far more
    than actions do, advantages over the range of returns are too small to outweigh the entropy bonus."""


class PolicyObjective(StrEnum):
    """What is maximised of the actions that were taken."""

    reinforce = "reinforce"
    """The paper's: the advantage times the log-probability. One step on a rollout."""
    ppo = "ppo"
    """PPO's clipped ratio (arXiv:1707.06347; ours), so that several steps can be taken on one rollout."""


@dataclass(kw_only=True)
class ActorLossConfig(Settings):
    """Settings of :class:`ActorLoss`; the defaults are the paper's, STORM's where it is silent.

    Attributes:
        entropy_coeff: eta, weight of the entropy bonus.
        advantage: how advantages are normalised.
        objective: ``reinforce`` (the paper's) or ``ppo``.
        mean_policy_entropy_coeff: weight of :class:`MeanPolicyEntropy` (ours); 0: none.
        signalling_coeff: weight of :class:`Signalling` (ours); 0: none. Both bonuses need the probabilities of discrete
            actions, and are left out where actions are continuous.

    Examples:
        >>> from matwm_rl.action_space import DiscreteActions
        >>> config = ActorLossConfig(entropy_coeff=0.01, signalling_coeff=1.0)
        >>> config.arguments(DiscreteActions([5, 5]))["regularizers"]
        [Signalling()]
    """

    entropy_coeff: float = setting(3e-4, minimum=0)
    advantage: Advantage = Advantage.return_scale
    objective: PolicyObjective = PolicyObjective.reinforce
    mean_policy_entropy_coeff: float = setting(0.0, minimum=0)
    signalling_coeff: float = setting(0.0, minimum=0)

    def arguments(self, actions: ActionSpace, regularizers: Sequence[Regularizer] = ()) -> dict[str, Any]:
        """Return the keyword arguments of :class:`ActorLoss` for agents with these actions.

        Bonuses are objects; those of the settings with a weight of 0, and those that do not fit the actions, are left
        out. ``regularizers`` of your own are added to them.
        """
        bonuses = [MeanPolicyEntropy(self.mean_policy_entropy_coeff), Signalling(self.signalling_coeff)]
        return {
            "num_agents": actions.num_agents,
            "entropy_coeff": self.entropy_coeff,
            "advantage": self.advantage,
            "objective": self.objective,
            "regularizers": [*(bonus for bonus in bonuses if bonus.coeff and actions.has_probs), *regularizers],
        }


class ActorLoss(KeyedLoss):
    r"""REINFORCE or PPO with the critic as baseline, and an entropy bonus.

    See docs/algorithm.md, Actor and critic losses. REINFORCE is

    .. math::
        -\mathrm{sg}\left(\frac{G_t - V(s_t)}{\max(1, S)}\right) \ln \pi(a_t | s_t) - \eta H(\pi)

    weighted by the probability that the rollout reached t; mean over starts and steps, sum over agents. So an actor's
    gradient is that of its own agent's loss alone, and that of an actor which several agents share the sum of theirs.
    PPO clips the first term in the ratio of the new to the old probability.

    Args:
        actor_network: has ``get_dist(tensordict)``; reads s_t and ``("agents", "action_mask")``.
        num_agents: N.
        entropy_coeff: eta.
        advantage: see :class:`Advantage`.
        objective: see :class:`PolicyObjective`.
        regularizers: bonuses on what the actors do.
        scale_decay: decay of the moving average of the return scale S.
        clip_epsilon: how far PPO's ratio of probabilities counts.

    Keys read (batch ``[*S, H]``): the actor's, ``("agents", "action" | "lambda_return" | "state_value" | "weight")``,
    optionally ``("agents", "alive")``, with PPO ``("agents", "action_log_prob")``, and those of the regularizers.
    Keys written: ``loss_actor``, ``entropy`` in nats, ``return_scale`` ``[N]``.

    Raises:
        TypeError: if the actor has no ``get_dist``.
        KeyError: if an entry of the batch is missing.
        ValueError: if a setting is out of its range, or an entry or log-probabilities have another shape.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_actor
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), presets.tiny().world_model)
        >>> loss = ActorLoss(make_actor(world_model), num_agents=3, regularizers=[MeanPolicyEntropy(0.1)])
        >>> loss.out_keys
        ['loss_actor', 'entropy', 'return_scale']
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = keys.ACTION
        action_log_prob: NestedKey = keys.ACTION_LOG_PROB
        alive: NestedKey = keys.ALIVE
        lambda_return: NestedKey = keys.LAMBDA_RETURN
        state_value: NestedKey = keys.STATE_VALUE
        weight: NestedKey = keys.WEIGHT

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    actor_network: ProbabilisticTensorDictSequential
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        *,
        num_agents: int,
        entropy_coeff: float = ActorLossConfig.entropy_coeff,
        advantage: str = ActorLossConfig.advantage,
        objective: str = ActorLossConfig.objective,
        regularizers: Sequence[Regularizer] = (),
        scale_decay: float = 0.99,
        clip_epsilon: float = 0.2,
    ) -> None:
        if not hasattr(actor_network, "get_dist"):
            raise TypeError(
                f"ActorLoss needs an actor with `get_dist`, such as TorchRL's ProbabilisticActor, got a "
                f"{type(actor_network).__name__}"
            )
        check_ints(1, num_agents=num_agents)
        check_numbers(minimum=0, entropy_coeff=entropy_coeff, clip_epsilon=clip_epsilon)
        check_kinds((list, tuple), regularizers=regularizers)
        for place, regularizer in enumerate(regularizers):
            check_kinds(Regularizer, **{f"regularizers[{place}]": regularizer})
        super().__init__()
        self.num_agents = num_agents
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)
        self.entropy_coeff = entropy_coeff
        self.advantage = read_choice("advantage", advantage, Advantage)
        self.objective = read_choice("objective", objective, PolicyObjective)
        self.clip_epsilon = clip_epsilon
        self.regularizers = nn.ModuleList(regularizers)
        self.return_scale = ReturnScale(num_agents, decay=scale_decay)
        self._set_in_keys()

    def _read_keys(self) -> list[NestedKey]:
        k = self.tensor_keys
        read = [*self.actor_network.in_keys, k.action, k.alive, k.lambda_return, k.state_value, k.weight]
        read += [k.action_log_prob] if self.objective == PolicyObjective.ppo else []
        for regularizer in self.regularizers:
            assert isinstance(regularizer, Regularizer)
            read += regularizer.in_keys
        return list(dict.fromkeys(read))

    def _written_keys(self) -> list[NestedKey]:
        return ["loss_actor", "entropy", "return_scale"]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the loss of an imagined rollout ``[*S, H]``; in training mode the return scale is updated first."""
        k = self.tensor_keys
        action = read_entry(tensordict, k.action, self)
        returns = read_entry(tensordict, k.lambda_return, self)
        check_shape(
            returns, f"{type(self).__name__} reads {k.lambda_return!r}", (*returns.shape[:-2], self.num_agents, 1)
        )
        shape, returns = returns.shape[:-1], returns.squeeze(-1)
        check_shape(action, f"{type(self).__name__} reads {k.action!r}", (*shape, *action.shape[len(shape) :]))
        value, weight = (
            read_entry(tensordict, key, self, (*shape, 1)).squeeze(-1) for key in (k.state_value, k.weight)
        )
        read_optional(tensordict, k.alive, self, shape)
        valid = self._valid_mask(tensordict, k.alive, returns)
        if self.training:
            self.return_scale.update(returns, valid)
        advantage = self._normalised((returns - value).detach(), torch.where(valid, weight, 0.0))
        for key in self.actor_network.in_keys:
            read_entry(tensordict, key, self.actor_network)
        with self._using(self.actor_network_params, self.actor_network):
            dist = self.actor_network.get_dist(tensordict.select(*self.actor_network.in_keys))
        log_prob, entropy = dist.log_prob(action), dist.entropy()
        for what, found in (("log-probabilities", log_prob), ("entropies", entropy)):
            check_shape(found, f"the distribution of {type(self.actor_network).__name__} must give {what}", shape)
        gain = self._gain(advantage, log_prob, tensordict)
        loss = per_agent_mean(-gain - self.entropy_coeff * entropy, weight, valid).sum()
        for bonus in self.regularizers:
            loss = loss - bonus.coeff * bonus(tensordict, dist, weight, valid).sum()
        entropy, scale = masked_mean(entropy.detach(), valid), self.return_scale.scale()
        return self._written({"loss_actor": loss, "entropy": entropy, "return_scale": scale})

    def _gain(self, advantage: Tensor, log_prob: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Return what is to be maximised of every action, ``[*S, H, N]``."""
        if self.objective == PolicyObjective.reinforce:
            return advantage * log_prob
        note = "PPO needs the log-probabilities that the actions were chosen with: actor.get_dist(...).log_prob(action)"
        old = read_entry(tensordict, self.tensor_keys.action_log_prob, self, log_prob.shape, note)
        ratio = (log_prob - old).exp()
        clipped = ratio.clamp(1 - self.clip_epsilon, 1 + self.clip_epsilon)
        return torch.minimum(ratio * advantage, clipped * advantage)

    def _normalised(self, advantage: Tensor, weight: Tensor) -> Tensor:
        """Normalise ``[*S, H, N]``, each agent's on its own; steps that do not count have weight 0."""
        if self.advantage == Advantage.return_scale:
            return advantage / self.return_scale.scale()
        advantage = advantage - per_agent_mean(advantage, weight)
        return advantage / per_agent_mean(advantage.square(), weight).sqrt().clamp(min=1.0)
