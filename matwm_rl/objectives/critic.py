"""The critics' losses of all agents; each learns from its own imagined rollouts only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams, TensorDictSequential, dispatch
from torch import Tensor, nn
from torchrl.modules import SymExpTwoHot

from matwm_rl import keys
from matwm_rl.arguments import check_kinds
from matwm_rl.checks import check_shape, check_writes, read_entry, read_optional, read_output
from matwm_rl.loss_functions import masked_mean, per_agent_mean
from matwm_rl.objectives.common import KeyedLoss


class CriticLoss(KeyedLoss):
    """Two-hot regression of V(s_t) towards the lambda-return and the value of an EMA copy of the critic.

    See docs/algorithm.md, Actor and critic losses. Weighted and averaged as
    :class:`~matwm_rl.objectives.ActorLoss`. The EMA copy lies in ``target_critic_network_params``; move it with
    TorchRL's ``SoftUpdate(loss, eps=0.98)``.

    Args:
        critic_network: writes ``("agents", "state_value_logits")`` and ``("agents", "state_value")``.
        two_hot: turns the value logits into numbers; by default the critic's own, else TorchRL's ``SymExpTwoHot``.

    Keys read (batch ``[*S, H]``): the critic's, ``("agents", "lambda_return" | "weight")``, optionally
    ``("agents", "alive")``, and ``("agents", "slow_value")``, what :meth:`slow_value` gave for this batch: it is the
    same in every one of several steps on it. Keys written: ``loss_critic``, ``value`` (mean V of the EMA copy, for
    logs).

    Raises:
        KeyError: if an entry of the batch is missing, or one that the critic was to write.
        ValueError: if one has another shape, or the critic does not say that it writes what it must.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_critic
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), presets.tiny().world_model)
        >>> CriticLoss(make_critic(world_model)).out_keys
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
        check_kinds(nn.Module, critic_network=critic_network)
        super().__init__()
        self.convert_to_functional(critic_network, "critic_network", create_target_params=True)
        own = (module for module in critic_network.modules() if isinstance(module, SymExpTwoHot))
        self._hold_two_hot(two_hot or next(own, None) or SymExpTwoHot(), critic_network)
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        # The critic without its last step from logits to a number, which only the EMA copy has to take.
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
        """Return the value ``[*batch, N, 1]`` of the critic's EMA copy, of any batch with the critic's keys."""
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
        weight = read_entry(tensordict, k.weight, self, returns.shape, f"that of {k.lambda_return!r}").squeeze(-1)
        with self._using(self.critic_network_params, critic):
            logits = self._logits_network(self._states(tensordict))
            logits = read_output(logits, k.state_value_logits, critic, (*returns.shape[:-1], None))
        slow_value = read_optional(tensordict, k.slow_value, self, returns.shape)
        if slow_value is None:
            with torch.no_grad():
                # The shape is given, because a tensordict made from keyword arguments has no batch size.
                slow_value = self._slow_value(tensordict, returns.shape)
        slow_value, returns = slow_value.squeeze(-1), returns.squeeze(-1)
        bins = (*returns.shape, self.two_hot.num_bins)
        check_shape(logits, f"{type(critic).__name__} must write {k.state_value_logits!r}", bins)
        # The two-hot bins may belong to the critic, and are then among its parameters and buffers.
        with self._using(self.critic_network_params, critic):
            if hasattr(self.two_hot, "joint_loss"):  # ours; TorchRL's takes one target at a time
                error = self.two_hot.joint_loss(logits, returns, slow_value)
            else:
                error = self.two_hot.loss(logits, returns) + self.two_hot.loss(logits, slow_value)
        read_optional(tensordict, k.alive, self, returns.shape)
        alive = self._valid_mask(tensordict, k.alive, returns)
        loss = per_agent_mean(error, weight, alive).sum()
        return self._written({"loss_critic": loss, "value": masked_mean(slow_value, alive)})
