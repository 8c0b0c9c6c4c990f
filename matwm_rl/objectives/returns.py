"""What the actor and the critic learn from: lambda-returns of imagined rollouts, and their scale."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.modules import PercentileValueNorm

from matwm_rl import keys
from matwm_rl.arguments import check_ints, check_kinds, check_numbers
from matwm_rl.checks import batch_shape, check_shape, check_writes, read_entry, read_output
from matwm_rl.loss_functions import lambda_return
from matwm_rl.processes import gather_from_processes
from matwm_rl.torchrl_internals import percentile_levels

GAMMA = 0.985
"""Discount factor (Table C.6)."""
LMBDA = 0.95
"""Lambda of the return (Table C.6)."""


def _next(key: NestedKey) -> NestedKey:
    return unravel_key(("next", key))


class LambdaReturn(TensorDictModuleBase):
    """Evaluate an imagined rollout once, for both losses (docs/algorithm.md, Actor and critic losses).

    Args:
        critic: writes ``("agents", "state_value")``.
        gamma: discount factor.
        lmbda: lambda of the return.
        reward_norm: ``world_model.two_hot.norm``, the running mean and spread of each agent's rewards. If given,
            values and returns are in units of the spread, and relative to the return of an agent that gets the mean
            reward for ever. So no setting of the losses depends on an environment's units, and critics can
            distinguish states whose rewards hardly differ.

    Keys read (batch ``[*S, H]``): what the critic reads, at the root and under ``"next"``;
    ``("next", "agents", "reward" | "continuation")``.

    Keys written, ``[*S, H, N, 1]``: ``("agents", "state_value")`` V(s_t), ``("agents", "lambda_return")`` G_t and
    ``("agents", "weight")``, the probability that the rollout has not ended before t (1 at t = 0).

    Raises:
        ValueError: if ``gamma`` or ``lmbda`` does not lie in [0, 1], or ``gamma`` is 1 with a ``reward_norm``; if the
            critic does not write state values, or an entry has another shape.
        KeyError: if an entry is missing.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(torch.zeros_like, in_keys=[("agents", "x")], out_keys=[("agents", "state_value")])
        >>> one = torch.ones(1, 3, 2, 1)
        >>> step = {"reward": one, "continuation": one, "x": one}
        >>> imagined = TensorDict({"agents": {"x": step["x"]}, "next": {"agents": step}}, batch_size=[1, 3])
        >>> LambdaReturn(critic, gamma=0.5, lmbda=1.0)(imagined)["agents", "lambda_return"][0, :, 0, 0].tolist()
        [1.75, 1.5, 1.0]
    """

    def __init__(
        self,
        critic: TensorDictModuleBase,
        *,
        gamma: float = GAMMA,
        lmbda: float = LMBDA,
        reward_norm: Any = None,
    ) -> None:
        super().__init__()
        check_numbers(minimum=0, maximum=1, gamma=gamma, lmbda=lmbda)
        if reward_norm is not None:
            check_kinds(nn.Module, reward_norm=reward_norm)
            if gamma == 1:
                raise ValueError(
                    f"gamma must be below 1 where rewards are normalised, got {gamma}: values are counted from what "
                    "the mean reward is worth for ever. Set world_model.normalize to false, or give no reward_norm"
                )
        check_kinds(nn.Module, critic=critic)
        check_writes(critic, [keys.STATE_VALUE], "the critic")
        self.critic = critic
        # Not registered as a submodule, because it is the world model's.
        self.__dict__["reward_norm"] = reward_norm
        self.gamma, self.lmbda = gamma, lmbda
        self.in_keys = [*critic.in_keys, *map(_next, critic.in_keys), keys.REWARD, keys.CONTINUATION]
        self.out_keys = [keys.STATE_VALUE, keys.LAMBDA_RETURN, keys.WEIGHT]

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write values, returns and weights into an imagined rollout."""
        batch = batch_shape(tensordict, keys.REWARD, 2, self)
        if not batch:
            raise ValueError("LambdaReturn reads rollouts of batch size [*S, H], got one without dimensions")
        time = len(batch) - 1
        reward = read_entry(tensordict, keys.REWARD, self, (*batch, None, 1))
        continuation = read_entry(tensordict, keys.CONTINUATION, self, reward.shape)
        for key in self.critic.in_keys:
            entry = read_entry(tensordict, key, self)
            check_shape(entry, f"LambdaReturn reads {key!r}", (*batch, *entry.shape[time + 1 :]))
            read_entry(tensordict, _next(key), self, entry.shape)
        # s_0 .. s_H in one call of the critic: the successors of all steps but the last are states themselves.
        with_last = {
            key: torch.cat([tensordict.get(key), tensordict.get(_next(key)).narrow(time, -1, 1)], time)
            for key in self.critic.in_keys
        }
        states = TensorDict(with_last, batch_size=(*batch[:-1], batch[-1] + 1), device=tensordict.device)
        values = read_output(
            self.critic(states), keys.STATE_VALUE, self.critic, (*states.shape, *reward.shape[time + 1 :])
        )
        reward, continuation, values = (entry.movedim(time, -1) for entry in (reward, continuation, values))
        usual = 0.0
        if (norm := self.reward_norm) is not None:
            scale = norm.agent_scale.unsqueeze(-1)
            reward = reward / scale
            usual = norm.agent_mean.unsqueeze(-1) / scale / (1 - self.gamma)
        returns = lambda_return(reward, continuation, values[..., 1:] + usual, self.gamma, self.lmbda) - usual
        reached = torch.cat([torch.ones_like(continuation[..., :1]), continuation[..., :-1]], -1).cumprod(-1)
        tensordict.set(keys.STATE_VALUE, values[..., :-1].movedim(-1, time))
        tensordict.set(keys.LAMBDA_RETURN, returns.movedim(-1, time))
        return tensordict.set(keys.WEIGHT, reached.movedim(-1, time))


class ReturnScale(PercentileValueNorm):
    """EMA of the 95th minus the 5th percentile of the returns, one per agent (Eq. 13).

    TorchRL's ``PercentileValueNorm`` with three additions: values of dead agents do not count, an agent's first update
    sets its percentiles instead of moving them by 1% from zero, and percentiles that are not finite change nothing.

    Args:
        num_agents: N.
        decay: of the moving average.

    Examples:
        >>> scale = ReturnScale(2)
        >>> scale.update(torch.linspace(0, 100, 101).unsqueeze(-1) * torch.tensor([1.0, 0.001]))
        >>> scale.scale().tolist()
        [90.0, 1.0]
    """

    seen: Tensor

    def __init__(self, num_agents: int, *, decay: float = 0.99) -> None:
        check_ints(1, num_agents=num_agents)
        check_numbers(minimum=0, below=1, decay=decay)
        super().__init__(shape=num_agents, rate=1 - decay)
        self.register_buffer("seen", torch.zeros(num_agents, dtype=torch.bool))

    @torch.no_grad()
    def update(self, value_target: Tensor, mask: Tensor | None = None) -> None:
        """Move the percentiles towards those of ``value_target [*batch, N]`` where ``mask [*batch, N]`` is true."""
        flat = value_target.detach().reshape(-1, *self.shape)
        if mask is not None:
            flat = torch.where(mask.reshape(flat.shape), flat, torch.nan)
        flat = gather_from_processes(flat)
        low, high = torch.nanquantile(flat, percentile_levels(self).to(flat), dim=0).to(self.low)
        usable = low.isfinite() & high.isfinite()
        rate = torch.where(self.seen, self.rate, 1.0).to(self.low)
        for average, batch in ((self.low, low), (self.high, high)):
            # An agent that is dead in the whole batch keeps its scale.
            average.lerp_(torch.where(usable, batch, average), rate)
        self.seen |= usable
