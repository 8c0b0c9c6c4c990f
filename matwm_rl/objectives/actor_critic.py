"""Actor and critic losses of section 5, for all agents at once and each on its own dreams alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
    dispatch,
)
from torch import Tensor, nn
from torchrl.modules import SymExpTwoHot

from matwm_rl import keys
from matwm_rl.checks import check_shape, check_writes, read_entry, read_optional, read_output
from matwm_rl.functional import masked_mean
from matwm_rl.objectives.common import KeyedLoss
from matwm_rl.objectives.returns import ReturnScale


def _sum_per_agent(value: Tensor, event_dims: int = 0) -> Tensor:
    """``[*batch, N, *event]`` to ``[N, *event]``."""
    return value.reshape(-1, *value.shape[value.ndim - 1 - event_dims :]).sum(0)


def _per_agent_mean(value: Tensor, weight: Tensor, counted: Tensor) -> Tensor:
    """Weighted mean over the batch of ``[*batch, N]``: one number per agent, what does not count left out."""
    return _sum_per_agent(torch.where(counted, value * weight, 0.0)) / _sum_per_agent(counted).clamp(min=1)


class ActorLoss(KeyedLoss):
    r"""REINFORCE with the critic as baseline, returns scaled per agent, and an entropy bonus (section 5).

    .. math::
        -\mathrm{sg}\left(\frac{G_t - V(s_t)}{\max(1, S)}\right) \ln \pi(a_t | s_t) - \eta H(\pi)

    weighted by the probability that the rollout reached t; mean over starts and steps, sum over agents. Where the batch
    tells with what log-probability its actions were chosen, the loss is PPO's (arXiv:1707.06347): the first term is
    clipped in the ratio of new to old probability, so that several steps can be taken on one rollout. So an actor's
    gradient is that of its own agent's loss alone, and that of an actor which several agents share the sum of theirs.

    Args:
        actor_network: has ``get_dist(tensordict)``; reads s_t and ``("agents", "action_mask")``.
        num_agents: N.
        entropy_coeff: eta.
        scale_decay: decay of the moving average of the return scale S.
        center_advantage: subtract each agent's mean advantage over the batch (ours). While a young critic lags behind
            the returns, all advantages have one sign, and every sampled action would be reinforced alike.
        standardize_advantage: centre advantages, and divide them by max(1, their standard deviation over the batch) in
            place of max(1, S) (ours). S is the range of returns over all states; where states differ far more than
            actions do, what actions change becomes too small to outweigh the entropy bonus.
        clip_epsilon: how far the ratio of probabilities counts, where the batch has log-probabilities.
        mean_policy_entropy_coeff: weight of the entropy of every agent's mean policy over the batch (ours, after
            arXiv:1912.05676). Unlike the entropy of each state's policy it costs nothing to act one way in one state
            and another way in the next: an agent whose dreams do not show what its actions are for, such as a speaker,
            does not come to say the same in all states.
        signalling_coeff: weight of how much an agent's actions tell of what it sees, over the steps at which it sees
            nothing change (ours, after arXiv:1912.05676). An agent that sees nothing of what its actions do, such as a
            speaker, learns nothing from its own dreams; so it comes to do one thing where it sees one thing, and others
            can learn to read it. Agents whose observations move are left alone.
        signalling_tolerance: root mean square of z_{t+1} - z_t below which nothing has changed.

    Keys read (batch ``[*S, H]``): the actor's, ``("agents", "action" | "lambda_return" | "state_value" | "weight")``,
    optionally ``("agents", "alive" | "action_log_prob")``, with ``signalling_coeff`` also ``("agents", "latent")``.
    Keys written: ``loss_actor``, ``entropy`` in nats, ``return_scale`` ``[N]``.

    Raises:
        TypeError: if the actor has no ``get_dist``.
        KeyError: if an entry of the batch is missing.
        ValueError: if a setting is out of its range, or an entry or log-probabilities have another shape.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_actor
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), hidden_size=32, num_heads=2)
        >>> loss = ActorLoss(make_actor(world_model, num_cells=16), num_agents=3)
        >>> loss.out_keys
        ['loss_actor', 'entropy', 'return_scale']
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = keys.ACTION
        action_log_prob: NestedKey = keys.ACTION_LOG_PROB
        alive: NestedKey = keys.ALIVE
        lambda_return: NestedKey = keys.LAMBDA_RETURN
        latent: NestedKey = keys.LATENT
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
        entropy_coeff: float = 3e-4,
        scale_decay: float = 0.99,
        center_advantage: bool = False,
        standardize_advantage: bool = False,
        clip_epsilon: float = 0.2,
        mean_policy_entropy_coeff: float = 0.0,
        signalling_coeff: float = 0.0,
        signalling_tolerance: float = 0.02,
    ) -> None:
        if not hasattr(actor_network, "get_dist"):
            raise TypeError(
                f"ActorLoss needs an actor with `get_dist`, such as TorchRL's ProbabilisticActor, got a "
                f"{type(actor_network).__name__}"
            )
        for name, value in (("clip_epsilon", clip_epsilon), ("signalling_tolerance", signalling_tolerance)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        super().__init__()
        self.num_agents = num_agents
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)
        self.entropy_coeff = entropy_coeff
        self.center_advantage = center_advantage
        self.standardize_advantage = standardize_advantage
        self.clip_epsilon = clip_epsilon
        self.mean_policy_entropy_coeff = mean_policy_entropy_coeff
        self.signalling_coeff = signalling_coeff
        self.signalling_tolerance = signalling_tolerance
        self.return_scale = ReturnScale(num_agents, decay=scale_decay)
        self._set_in_keys()

    def _read_keys(self) -> list[NestedKey]:
        k = self.tensor_keys
        read = [k.action, k.action_log_prob, k.alive, k.lambda_return, k.state_value, k.weight]
        read += [k.latent] if self.signalling_coeff else []
        return list(dict.fromkeys([*self.actor_network.in_keys, *read]))

    def _written_keys(self) -> list[NestedKey]:
        return ["loss_actor", "entropy", "return_scale"]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Loss of an imagined rollout ``[*S, H]``; in training mode the return scale is updated first."""
        k = self.tensor_keys
        action = read_entry(tensordict, k.action, self)
        check_shape(action, f"{type(self).__name__} reads {k.action!r}", (*action.shape[:-1], self.num_agents))
        shape = action.shape
        returns, value, weight = (
            read_entry(tensordict, key, self, (*shape, 1)).squeeze(-1)
            for key in (k.lambda_return, k.state_value, k.weight)
        )
        read_optional(tensordict, k.alive, self, shape)
        alive = self._counted(tensordict, k.alive, returns)
        if self.training:
            self.return_scale.update(returns, alive)
        advantage = self._advantage((returns - value).detach(), torch.where(alive, weight, 0.0))
        for key in self.actor_network.in_keys:
            read_entry(tensordict, key, self.actor_network)
        with self._using(self.actor_network_params, self.actor_network):
            dist = self.actor_network.get_dist(tensordict.select(*self.actor_network.in_keys))
        log_prob, entropy = dist.log_prob(action), dist.entropy()
        for what, found in (("log-probabilities", log_prob), ("entropies", entropy)):
            check_shape(found, f"the distribution of {type(self.actor_network).__name__} must give {what}", shape)
        gain = advantage * log_prob
        if (old_log_prob := read_optional(tensordict, k.action_log_prob, self, shape)) is not None:
            ratio = (log_prob - old_log_prob).exp()
            clipped = ratio.clamp(1 - self.clip_epsilon, 1 + self.clip_epsilon)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = _per_agent_mean(-gain - self.entropy_coeff * entropy, weight, alive).sum()
        if self.mean_policy_entropy_coeff:
            loss = loss - self.mean_policy_entropy_coeff * self._mean_policy_entropy(dist.probs, weight, alive).sum()
        if self.signalling_coeff:
            latent = read_entry(tensordict, k.latent, self, (*shape, None))
            loss = loss - self.signalling_coeff * self._signalling(dist.probs, latent, weight, alive).sum()
        entropy, scale = masked_mean(entropy.detach(), alive), self.return_scale.scale()
        return self._written({"loss_actor": loss, "entropy": entropy, "return_scale": scale})

    @staticmethod
    def _mean_policy_entropy(probs: Tensor, weight: Tensor, counted: Tensor) -> Tensor:
        """Entropy ``[N]`` in nats of every agent's policy ``[*S, H, N, A]``, averaged over the steps that count."""
        weight = torch.where(counted, weight, 0.0).unsqueeze(-1)
        mean = _sum_per_agent(probs * weight, 1) / _sum_per_agent(weight, 1).clamp(min=1e-6)
        # Clamped: the slope of torch.special.entr at 0, where actions are illegal, is infinite.
        return -(mean * mean.clamp(min=1e-8).log()).sum(-1)

    def _signalling(self, probs: Tensor, latent: Tensor, weight: Tensor, alive: Tensor) -> Tensor:
        """What actions tell of what is seen, ``[N]`` in nats: a mean over the steps ``[*S, H - 1]``, 0 where it moves.

        The entropy of the mean policy, less the cross-entropy of a step's policy with the one before: time, which the
        hidden state tells, is no information. The former counts twice, lest two observations share an action while
        another is free, which is a resting point of the mutual information.
        """
        unchanged = latent.diff(dim=-3).square().mean(-1).sqrt() < self.signalling_tolerance
        now, after, weight, alive = probs[..., :-1, :, :], probs[..., 1:, :, :], weight[..., :-1, :], alive[..., :-1, :]
        spread = self._mean_policy_entropy(now, weight, alive & unchanged)
        told = 2 * spread + (after * now.clamp(min=1e-8).log()).sum(-1)
        return _per_agent_mean(torch.where(unchanged, told, 0.0), weight, alive)

    def _advantage(self, advantage: Tensor, counted: Tensor) -> Tensor:
        """``[*S, H, N]``, each agent's on its own; ``counted`` is the weight of every step."""

        def mean(value: Tensor) -> Tensor:
            return _sum_per_agent(value * counted) / _sum_per_agent(counted).clamp(min=1e-6)

        if self.center_advantage or self.standardize_advantage:
            advantage = advantage - mean(advantage)
        if self.standardize_advantage:
            return advantage / mean(advantage.square()).sqrt().clamp(min=1.0)
        return advantage / self.return_scale.scale()


class CriticLoss(KeyedLoss):
    """Two-hot regression of V(s_t) towards the lambda-return and the value of an EMA copy of the critic (section 5).

    Weighted and averaged as :class:`ActorLoss`. The EMA copy lies in ``target_critic_network_params``; move it with
    TorchRL's ``SoftUpdate(loss, eps=0.98)``.

    Args:
        critic_network: writes ``("agents", "state_value_logits")`` and ``("agents", "state_value")``.
        two_hot: code of the value logits; by default the critic's own, else TorchRL's ``SymExpTwoHot``.

    Keys read (batch ``[*S, H]``): the critic's, ``("agents", "lambda_return" | "weight")``, optionally
    ``("agents", "alive")``, and ``("agents", "slow_value")``, what :meth:`slow_value` gave for this batch: it is the
    same in every one of several steps on it. Keys written: ``loss_critic``, ``value`` (mean V of the EMA copy, for
    logs).

    Raises:
        KeyError: if an entry of the batch is missing, or one that the critic was to write.
        ValueError: if one has another shape, or the critic does not say that it writes what it must.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_critic
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), hidden_size=32, num_heads=2)
        >>> CriticLoss(make_critic(world_model, num_cells=16)).out_keys
        ['loss_critic', 'value']
    """

    @dataclass
    class _AcceptedKeys:
        alive: NestedKey = keys.ALIVE
        lambda_return: NestedKey = keys.LAMBDA_RETURN
        slow_value: NestedKey = keys.SLOW_VALUE
        state_value: NestedKey = keys.STATE_VALUE
        state_value_logits: NestedKey = keys.STATE_VALUE_LOGITS
        weight: NestedKey = keys.WEIGHT

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    critic_network: TensorDictModuleBase
    critic_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams
    _logits_network: TensorDictModuleBase

    def __init__(self, critic_network: TensorDictModuleBase, *, two_hot: nn.Module | None = None) -> None:
        super().__init__()
        self.convert_to_functional(critic_network, "critic_network", create_target_params=True)
        codes = (module for module in critic_network.modules() if isinstance(module, SymExpTwoHot))
        self._hold_two_hot(two_hot or next(codes, None) or SymExpTwoHot(), critic_network)
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        # The critic as far as its logits; the number is wanted of the EMA copy alone.
        network, logits = self.critic_network, self.tensor_keys.state_value_logits
        if isinstance(network, TensorDictSequential) and logits in network.out_keys:
            network = network.select_subsequence(out_keys=[logits])
        self.__dict__["_logits_network"] = network

    def _read_keys(self) -> list[NestedKey]:
        k = self.tensor_keys
        read = [k.alive, k.lambda_return, k.slow_value, k.weight]
        return list(dict.fromkeys([*self.critic_network.in_keys, *read]))

    def _written_keys(self) -> list[NestedKey]:
        return ["loss_critic", "value"]

    @torch.no_grad()
    def slow_value(self, tensordict: TensorDictBase) -> Tensor:
        """Value ``[*batch, N, 1]`` of the EMA copy of the critic, of any batch with the critic's keys."""
        return self._slow_value(tensordict)

    def _slow_value(self, tensordict: TensorDictBase, shape: Sequence[int] | None = None) -> Tensor:
        critic = self.critic_network
        with self._using(self.target_critic_network_params, critic):
            return read_output(critic(self._states(tensordict)), self.tensor_keys.state_value, critic, shape)

    def _states(self, tensordict: TensorDictBase) -> TensorDictBase:
        for key in self.critic_network.in_keys:
            read_entry(tensordict, key, self.critic_network)
        return tensordict.select(*self.critic_network.in_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Loss of an imagined rollout ``[*S, H]``."""
        k, critic = self.tensor_keys, self.critic_network
        check_writes(critic, [k.state_value_logits, k.state_value], "the critic")
        returns = read_entry(tensordict, k.lambda_return, self).detach()
        check_shape(returns, f"{type(self).__name__} reads {k.lambda_return!r}", (*returns.shape[:-1], 1))
        weight = read_entry(tensordict, k.weight, self, returns.shape).squeeze(-1)
        with self._using(self.critic_network_params, critic):
            logits = self._logits_network(self._states(tensordict))
            logits = read_output(logits, k.state_value_logits, critic, (*returns.shape[:-1], None))
        slow_value = read_optional(tensordict, k.slow_value, self, returns.shape)
        if slow_value is None:
            with torch.no_grad():
                # Not of the tensordict's batch size, which it has none of where it was made of keywords.
                slow_value = self._slow_value(tensordict, returns.shape)
        slow_value, returns = slow_value.squeeze(-1), returns.squeeze(-1)
        # The code's constants may be the critic's too, and are where its parameters are.
        with self._using(self.critic_network_params, critic):
            # Cross-entropy is linear in its target: one pass over the logits for the sum of both.
            target = self.two_hot.encode(returns) + self.two_hot.encode(slow_value)
        check_shape(logits, f"{type(critic).__name__} must write {k.state_value_logits!r}", target.shape)
        error = -(target * logits.log_softmax(-1)).sum(-1)
        read_optional(tensordict, k.alive, self, returns.shape)
        alive = self._counted(tensordict, k.alive, returns)
        loss = _per_agent_mean(error, weight, alive).sum()
        return self._written({"loss_critic": loss, "value": masked_mean(slow_value, alive)})
