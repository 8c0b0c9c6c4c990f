"""Bonuses on what the actors do, to be added to :class:`~matwm_rl.objectives.ActorLoss` (ours)."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution

from matwm_rl import keys
from matwm_rl.arguments import check_numbers
from matwm_rl.checks import read_entry
from matwm_rl.loss_functions import per_agent_mean


class Regularizer(nn.Module):
    """Interface of a bonus for every agent, which the actor loss subtracts with the weight ``coeff``.

    Take means over the batch with :func:`~matwm_rl.loss_functions.per_agent_mean`, which counts over all processes that
    learn together. A mean must not enter the elements of which another mean is taken: the processes' gradients would
    then be wrong.

    Args:
        coeff: weight of the bonus.

    Attributes:
        in_keys: what it reads of the imagined rollout.

    Raises:
        ValueError: if ``coeff`` is negative or not a number.

    Examples:
        >>> class FirstAction(Regularizer):
        ...     def forward(self, tensordict, dist, weight, valid):
        ...         return per_agent_mean(dist.probs[..., 0], weight, valid)
        >>> FirstAction(0.5).coeff
        0.5
    """

    in_keys: list[NestedKey] = []

    def __init__(self, coeff: float) -> None:
        super().__init__()
        check_numbers(minimum=0, coeff=coeff)
        self.coeff = coeff

    def forward(self, tensordict: TensorDictBase, dist: Distribution, weight: Tensor, valid: Tensor) -> Tensor:
        """Return the bonus of every agent.

        Args:
            tensordict: the imagined rollout ``[*S, H]``.
            dist: the actors' distribution in its states, ``[*S, H, N]``.
            weight: ``[*S, H, N]``, probability that the rollout reached the step.
            valid: bool ``[*S, H, N]``, which steps count.

        Returns:
            ``[N]``.
        """
        raise NotImplementedError


class MeanPolicyEntropy(Regularizer):
    """Entropy of every agent's mean policy over the batch (after arXiv:1912.05676).

    Unlike the entropy of the policy in each state, it does not penalise a deterministic policy that takes different
    actions in different states. It keeps an agent whose dreams do not show the effects of its actions, such as a
    speaker, from taking the same action in all states. For discrete actions.

    Args:
        coeff: weight of the bonus.

    Examples:
        >>> from torch.distributions import Categorical
        >>> probs = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # one start, two steps, one agent, two actions
        >>> one = torch.ones(1, 2, 1)
        >>> MeanPolicyEntropy(0.1)(None, Categorical(probs=probs), one, one.bool())
        tensor([0.6931])
    """

    def forward(self, tensordict: TensorDictBase, dist: Distribution, weight: Tensor, valid: Tensor) -> Tensor:
        """Return the entropies ``[N]``, in nats."""
        return _mean_policy_entropy(_probs(dist, self), weight, valid)


class Signalling(Regularizer):
    """How much an agent's actions tell about its observation, at steps where this observation does not change.

    After positive signalling (arXiv:1912.05676). An agent that does not observe the effects of its actions, such as a
    speaker, learns nothing from its own dreams. With this bonus it learns to take the same action for the same
    observation, and other agents can learn to read this action. Steps at which the observation changes give no bonus.
    For discrete actions.

    The bonus is twice the entropy of the mean policy, minus the cross-entropy between the policies of consecutive
    steps. The cross-entropy keeps an action from depending on time, which the hidden state contains but which says
    nothing about the observation. The entropy counts twice: with the mutual information alone, two observations could
    keep the same action although another action is unused.

    Args:
        coeff: weight of the bonus.
        tolerance: root mean square of z_{t+1} - z_t below which nothing has changed.

    Raises:
        ValueError: if ``coeff`` or ``tolerance`` is negative or not a number.

    Examples:
        >>> Signalling(1.0).tolerance
        0.02
    """

    in_keys: list[NestedKey] = [keys.LATENT]

    def __init__(self, coeff: float, *, tolerance: float = 0.02) -> None:
        super().__init__(coeff)
        check_numbers(minimum=0, tolerance=tolerance)
        self.tolerance = tolerance

    def forward(self, tensordict: TensorDictBase, dist: Distribution, weight: Tensor, valid: Tensor) -> Tensor:
        """Return the bonus ``[N]`` in nats: a mean over ``[*S, H - 1]``, to which changing observations add 0."""
        latent = read_entry(tensordict, keys.LATENT, self, (*weight.shape, None))
        probs = _probs(dist, self)
        unchanged = latent.diff(dim=-3).square().mean(-1).sqrt() < self.tolerance
        now, after, weight, valid = probs[..., :-1, :, :], probs[..., 1:, :, :], weight[..., :-1, :], valid[..., :-1, :]
        spread = _mean_policy_entropy(now, weight, valid & unchanged)
        share = per_agent_mean(unchanged.to(weight), weight, valid)
        likelihood = torch.where(unchanged, (after * now.clamp(min=1e-8).log()).sum(-1), 0.0)
        return 2 * spread * share + per_agent_mean(likelihood, weight, valid)


def _probs(dist: Distribution, reader: Regularizer) -> Tensor:
    probs = getattr(dist, "probs", None)
    if probs is None:
        raise TypeError(f"{type(reader).__name__} needs the probabilities of discrete actions, got {dist}")
    assert isinstance(probs, Tensor)
    return probs


def _mean_policy_entropy(probs: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """Entropy ``[N]`` in nats of every agent's policy ``[*S, H, N, A]``, averaged over the valid steps."""
    mean = per_agent_mean(probs, torch.where(valid, weight, 0.0))
    # Clamped: the slope of torch.special.entr at 0, where actions are illegal, is infinite.
    return -(mean * mean.clamp(min=1e-8).log()).sum(-1)
