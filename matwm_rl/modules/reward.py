"""Reward heads: what a transition is rewarded with (docs/algorithm.md, World model).

All tensors are agent-major: ``[N, *batch, F]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints, check_kinds
from matwm_rl.functional import at_least_float32
from matwm_rl.modules.encoders.features import MAX_DISTANCES, MAX_FREQUENCIES, FourierFeatures, PointDistances
from matwm_rl.modules.heads import Head
from matwm_rl.modules.running_norm import RunningNorm
from matwm_rl.modules.stacked import StackedLinear
from matwm_rl.modules.stacked_mlp import mlp
from matwm_rl.settings import Settings, setting


class Transition:
    """The steps from t to t+1 of N agents. A reward head reads from it what it needs.

    What takes a computation is computed when it is read for the first time.

    Args:
        latent: z_t, ``[N, *batch, Z]``.
        action: a_t, ``[N, *batch]``.
        hidden: h after (z_t, a_t), ``[N, *batch, F]``.
        next_latent: gives z_{t+1}, ``[N, *batch, Z]``.
        observation: gives o_t, ``[N, *batch, *O]``: the true one in training, z_t decoded in imagination.
        next_observation: gives o_{t+1}, the same.
        norm: by which the world model normalises observations, if it does.

    Examples:
        >>> zero = torch.zeros(3, 2, 4)
        >>> step = Transition(zero, zero[..., 0].long(), zero, lambda: zero, lambda: zero, lambda: zero + 1)
        >>> (step.next_observation - step.observation).mean()
        tensor(1.)
    """

    def __init__(
        self,
        latent: Tensor,
        action: Tensor,
        hidden: Tensor,
        next_latent: Callable[[], Tensor],
        observation: Callable[[], Tensor],
        next_observation: Callable[[], Tensor],
        norm: RunningNorm | None = None,
    ) -> None:
        self.norm = norm
        self.latent, self.action, self.hidden = latent, action, hidden
        self._next_latent, self._observation, self._next_observation = next_latent, observation, next_observation

    @cached_property
    def next_latent(self) -> Tensor:
        """z_{t+1}, ``[N, *batch, Z]``."""
        return self._next_latent()

    @cached_property
    def observation(self) -> Tensor:
        """o_t, ``[N, *batch, *O]``."""
        return self._observation()

    @cached_property
    def next_observation(self) -> Tensor:
        """o_{t+1}, ``[N, *batch, *O]``."""
        return self._next_observation()


class RewardHead(nn.Module):
    """Interface of reward heads, which predict the reward of a transition as logits over two-hot bins.

    Give an object of a subclass to :meth:`WorldModel.from_env(env, reward=...)
    <matwm_rl.modules.WorldModel.from_env>` for a reward head of your own.

    Its outputs should be zero at the start (``Head(zero_init=True)``): the outermost bins stand for very large rewards.

    Attributes:
        reads_successor: whether the head reads z_{t+1} or o_{t+1}. An agent has no successor after its last step, so
            the world model then has a second head, which reads h, for the reward of last steps.

    Examples:
        >>> class FromMovement(RewardHead):
        ...     reads_successor = True
        ...
        ...     def __init__(self, observation_size: int, num_bins: int) -> None:
        ...         super().__init__()
        ...         self.linear = nn.Linear(observation_size, num_bins)
        ...
        ...     def forward(self, transition: Transition) -> Tensor:
        ...         return self.linear(transition.next_observation - transition.observation)
        >>> zero = torch.zeros(3, 2, 4)
        >>> step = Transition(zero, zero[..., 0].long(), zero, lambda: zero, lambda: zero, lambda: zero)
        >>> FromMovement(4, 6)(step).shape
        torch.Size([3, 2, 6])
    """

    reads_successor = False

    def forward(self, transition: Transition) -> Tensor:
        """Logits ``[N, *batch, bins]``."""
        raise NotImplementedError


class HiddenReward(RewardHead):
    """The paper's reward predictor, which reads h.

    Args:
        head: ``[N, *batch, F]`` to ``[N, *batch, bins]``.

    Examples:
        >>> zero = torch.zeros(3, 2, 4)
        >>> step = Transition(zero, zero[..., 0].long(), zero, lambda: zero, lambda: zero, lambda: zero)
        >>> HiddenReward(nn.Linear(4, 6))(step).shape
        torch.Size([3, 2, 6])
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        check_kinds(nn.Module, head=head)
        self.head = head

    def forward(self, transition: Transition) -> Tensor:
        """Logits ``[N, *batch, bins]``."""
        return self.head(transition.hidden)


CHANGE_UNIT = 0.05
"""Reward heads read changes of normalised coordinates linearly up to about this size, and logarithmically above it."""


class ObservationReward(RewardHead):
    """Reads the next observation, how it differs from the one before, and the action (ours).

    A reward predictor that reads the history memorises it. Some rewards are for being at a place: the next observation
    shows these. Others are for getting nearer, or for something that vanishes, such as food that is eaten: the change
    shows these. The action shows what an action costs. A change enters as ``asinh(change / 0.05)``, so that slow
    coordinates are visible beside fast ones. The first and the last layer are each group's own; the outputs start at
    zero.

    Args:
        observation_size: D, size of the zero-padded observation.
        num_bins: number of outputs.
        actions: the action space.
        group_index: group of each of the N agents.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        fourier_features: frequencies of :class:`FourierFeatures` before the first layer.
        point_size: with 1 or more, :class:`PointDistances` of points with so many coordinates stand beside the
            coordinates, and have the Fourier features in their place.

    Examples:
        >>> from matwm_rl.action_space import DiscreteActions
        >>> sizes = {"num_cells": 8, "depth": 1, "fourier_features": 0, "point_size": 2}
        >>> head = ObservationReward(4, 6, actions=DiscreteActions([5, 5, 3]), group_index=[0, 0, 1], **sizes)
        >>> zero = torch.zeros(3, 5, 4)
        >>> head(Transition(zero, zero[..., 0].long(), zero, lambda: zero, lambda: zero, lambda: zero)).shape
        torch.Size([3, 5, 6])
    """

    reads_successor = True

    def __init__(
        self,
        observation_size: int,
        num_bins: int,
        *,
        actions: ActionSpace,
        group_index: Sequence[int],
        num_cells: int,
        depth: int,
        fourier_features: int,
        point_size: int,
    ) -> None:
        super().__init__()
        check_ints(1, observation_size=observation_size, num_bins=num_bins, num_cells=num_cells, depth=depth)
        check_ints(0, point_size=point_size)
        check_kinds(ActionSpace, actions=actions)
        self.actions = actions
        self.features = FourierFeatures(fourier_features)
        self.distances = PointDistances(observation_size, size=point_size) if point_size else None
        size = observation_size if self.distances is None else self.distances.num_distances
        features = size * self.features.size_factor + (0 if self.distances is None else observation_size)
        features += observation_size + actions.num_actions
        self.input = StackedLinear(features, num_cells, group_index)
        self.trunk = nn.Sequential(nn.LayerNorm(num_cells), nn.SiLU(), mlp(num_cells, num_cells, depth - 1))
        self.output = StackedLinear(num_cells, num_bins, group_index, zero_init=True)

    def forward(self, transition: Transition) -> Tensor:
        """Logits ``[N, *batch, bins]``."""
        observation = points = transition.next_observation
        change = observation - transition.observation
        if (norm := transition.norm) is not None:
            observation, points, change = norm.normalize(observation), norm.in_one_unit(points), norm.rescale(change)
        if self.distances is None:
            features = [self.features(observation)]
        else:
            features = [observation, self.features(self.distances(points))]
        features += [torch.asinh(change / CHANGE_UNIT), self.actions.encode(transition.action, observation.dtype)]
        return at_least_float32(self.output(self.trunk(self.input(torch.cat(features, -1)))))


@dataclass(kw_only=True)
class RewardConfig(Settings):
    """Settings of a reward head. Subclass it for a reward head of your own.

    Examples:
        >>> @dataclass(kw_only=True)
        ... class LinearRewardConfig(RewardConfig):
        ...     def build(self, observation_shape, hidden_size, num_bins, *, actions, group_index, depth):
        ...         return HiddenReward(nn.Linear(hidden_size, num_bins))
        >>> from matwm_rl.action_space import DiscreteActions
        >>> actions = DiscreteActions([5, 5, 3])
        >>> LinearRewardConfig().build([5], 8, 6, actions=actions, group_index=[0, 0, 1], depth=1).head
        Linear(in_features=8, out_features=6, bias=True)
    """

    def build(
        self,
        observation_shape: Sequence[int],
        hidden_size: int,
        num_bins: int,
        *,
        actions: ActionSpace,
        group_index: Sequence[int],
        depth: int,
    ) -> RewardHead:
        """Build the reward head.

        Args:
            observation_shape: ``[D]`` or ``[channels, S, S]``.
            hidden_size: F, also the width of hidden layers.
            num_bins: number of outputs.
            actions: the action space.
            group_index: group of each of the N agents.
            depth: number of hidden layers of a head that reads h.

        Raises:
            ValueError: if the head does not fit the observations.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class HiddenRewardConfig(RewardConfig):
    """The paper's reward predictor has no settings of its own; see :class:`HiddenReward`.

    Examples:
        >>> from matwm_rl.action_space import DiscreteActions
        >>> others = {"actions": DiscreteActions([5, 5, 3]), "group_index": [0, 0, 1], "depth": 1}
        >>> HiddenRewardConfig().build([5], 8, 6, **others).reads_successor
        False
    """

    def build(
        self,
        observation_shape: Sequence[int],
        hidden_size: int,
        num_bins: int,
        *,
        actions: ActionSpace,
        group_index: Sequence[int],
        depth: int,
    ) -> RewardHead:
        """Build the reward head."""
        return HiddenReward(
            Head(hidden_size, num_bins, group_index=group_index, num_cells=hidden_size, depth=depth, zero_init=True)
        )


@dataclass(kw_only=True)
class ObservationRewardConfig(RewardConfig):
    """Settings of :class:`ObservationReward`.

    Attributes:
        depth: number of hidden layers.
        fourier_features: frequencies of the sines and cosines that it also reads.
        point_size: coordinates of a point, whose distances it also reads; 0: none. Observations with more than 1,000
            distances, wider than 88 coordinates in the plane, are read without them: they grow as D squared.

    Raises:
        ValueError: by :meth:`build`, if observations are images.

    Examples:
        >>> from matwm_rl.action_space import DiscreteActions
        >>> others = {"actions": DiscreteActions([5, 5, 3]), "group_index": [0, 0, 1], "depth": 1}
        >>> ObservationRewardConfig(depth=1).build([4], 8, 6, **others).reads_successor
        True
    """

    depth: int = setting(2, minimum=1)
    fourier_features: int = setting(4, minimum=0, maximum=MAX_FREQUENCIES)
    point_size: int = setting(2, minimum=0)

    def build(
        self,
        observation_shape: Sequence[int],
        hidden_size: int,
        num_bins: int,
        *,
        actions: ActionSpace,
        group_index: Sequence[int],
        depth: int,
    ) -> RewardHead:
        """Build the reward head."""
        if len(observation_shape) != 1:
            raise ValueError("ObservationRewardConfig is for vector observations; for images take HiddenRewardConfig")
        points = -(-observation_shape[0] // self.point_size) if self.point_size > 0 else 0
        is_wide = points * (points + 1) // 2 > MAX_DISTANCES
        return ObservationReward(
            observation_shape[0],
            num_bins,
            actions=actions,
            group_index=group_index,
            num_cells=hidden_size,
            depth=self.depth,
            fourier_features=self.fourier_features,
            point_size=0 if is_wide else self.point_size,
        )
