"""What agents can do: the one place that knows whether an action is an index or a vector.

Legend: N agents; A entries of an action mask: the most actions of an agent, or the most numbers in an agent's action;
P numbers that describe one agent's action distribution; F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import cross_entropy
from torchrl.data import Categorical, TensorSpec

from matwm_rl.action_distribution import ActionDistribution
from matwm_rl.arguments import check_ints, read_index
from matwm_rl.checks import check_type
from matwm_rl.functional import first_entries, of_teammates, random_index, softmax_over_few

ILLEGAL_LOGIT = -1e9
"""Logit of an action that an agent does not have."""


class ActionSpace(ABC):
    """The actions of N agents, padded to one size.

    The layout of the agents owns it (:attr:`matwm_rl.envs.AgentLayout.actions`). Everything that draws, checks, embeds,
    predicts or scores actions asks it. Replay does not know it: it takes indices, and vectors of numbers from -1 to 1.
    Another kind of action is another subclass::

        class Angles(ActionSpace, kind="angles"): ...

    Args:
        kind: of a subclass that can be stored: the name under which :meth:`to_dict` and :meth:`from_dict` know it.

    Attributes:
        num_agents: N.
        num_actions: A, entries of one agent's action mask.
        num_parameters: P, numbers that describe one agent's action distribution: what actors and teammate predictors
            put out, under keys that are called logits for every kind of action. Of discrete actions, where P = A, these
            are logits.
        action_shape: shape of one agent's action; ``()`` for an index.
        dtype: of actions.
        distribution_class: makes a distribution of ``logits [*batch, N, P]`` and ``mask [*batch, N, A]``.
        has_probs: whether this distribution has ``probs``, probabilities of finitely many actions.

    Examples:
        >>> space: ActionSpace = DiscreteActions([3, 2])
        >>> space.random(space.legal().expand(7, -1, -1)).shape
        torch.Size([7, 2])
    """

    num_agents: int
    num_actions: int
    num_parameters: int
    action_shape: tuple[int, ...]
    dtype: torch.dtype
    distribution_class: Callable[..., Distribution]
    has_probs: bool
    _kinds: ClassVar[dict[str, type[ActionSpace]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            ActionSpace._kinds[kind] = cls

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values: the ``"kind"`` of the subclass and the arguments of its constructor."""

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ActionSpace:
        """Rebuild an action space from what :meth:`to_dict` returned.

        Raises:
            ValueError: if no subclass has the stored kind.

        Examples:
            >>> ActionSpace.from_dict({"kind": "discrete", "counts": [3, 2]})
            DiscreteActions(counts=[3, 2])
        """
        arguments = dict(stored)
        kind = arguments.pop("kind", None)
        if kind not in ActionSpace._kinds:
            raise ValueError(
                f"unknown kind of action space {kind!r}; known: {sorted(ActionSpace._kinds)}. A kind is known once the "
                'module of its class, `class Mine(ActionSpace, kind="mine")`, has been imported.'
            )
        return ActionSpace._kinds[kind](**arguments)

    @abstractmethod
    def legal(self) -> Tensor:
        """Return which of the A entries of the action mask belong to an action that the agent has, bool ``[N, A]``."""

    def legal_of_teammates(self) -> Tensor:
        """Return :meth:`legal` of every agent's teammates in agent order, bool ``[N, N-1, A]``."""
        return of_teammates(self.legal())

    @abstractmethod
    def spec(self, shape: Sequence[int], device: torch.device | str | None = None) -> TensorSpec:
        """TorchRL's spec of actions of batch ``shape``, ``[*shape, N, *action_shape]``."""

    @abstractmethod
    def problem(self, action: Tensor) -> str | None:
        """Describe what is wrong with actions ``[*batch, N, *action_shape]``, or return ``None`` if they are valid."""

    @abstractmethod
    def random(self, mask: Tensor) -> Tensor:
        """Draw actions ``[*batch, N, *action_shape]`` uniformly from what ``mask [*batch, N, A]`` allows."""

    @abstractmethod
    def allow_one_(self, mask: Tensor) -> Tensor:
        """Allow agents that cannot act one action, in place, so that a distribution can be made of every row.

        Args:
            mask: bool ``[*batch, N, A]``.

        Returns:
            the same tensor.
        """

    @abstractmethod
    def make_embedding(self, features: int, *, scaled: bool) -> nn.Module:
        """Build the part of the action mixer that embeds actions ``[N, *batch, *action_shape]`` as ``[N, *batch, F]``.

        Args:
            features: F.
            scaled: use action scaling, which gives every agent weights of its own. Without it all agents share them.
        """

    @abstractmethod
    def mask_parameters(self, parameters: Tensor, legal: Tensor, fill: float = ILLEGAL_LOGIT) -> Tensor:
        """Exclude from ``parameters [..., P]`` what ``legal``, bool ``[..., A]``, says an agent does not have.

        Args:
            parameters: ``[..., P]``.
            legal: bool ``[..., A]``.
            fill: what is written in their place.
        """

    @abstractmethod
    def are_drawable(self, parameters: Tensor, mask: Tensor) -> Tensor:
        """Return where ``parameters [..., P]`` can draw an action that ``mask [..., A]`` allows, bool ``[...]``."""

    @abstractmethod
    def mode(self, parameters: Tensor) -> Tensor:
        """Return the likeliest actions ``[..., *action_shape]`` of masked ``parameters [..., P]``."""

    @abstractmethod
    def encode(self, action: Tensor, dtype: torch.dtype) -> Tensor:
        """Return actions ``[..., *action_shape]`` as ``[..., A]`` numbers for networks to read."""

    @abstractmethod
    def features(self, parameters: Tensor) -> Tensor:
        """Bounded form ``[..., P]`` of predicted, masked action distributions, for networks to read."""

    @abstractmethod
    def negative_log_likelihood(self, parameters: Tensor, action: Tensor) -> Tensor:
        """Negative log-likelihood ``[...]``, in nats, of actions under predicted, masked distributions.

        Args:
            parameters: ``[..., P]``.
            action: ``[..., *action_shape]``.

        Raises:
            TypeError: if actions are of another dtype.
        """

    @abstractmethod
    def fit_constant(self, action: Tensor, mask: Tensor) -> Tensor:
        """Fit the best constant prediction of actions: the trivial predictor to compare others with.

        Args:
            action: ``[S, ..., *action_shape]``, S samples.
            mask: bool ``[S, ...]``, which samples count.

        Returns:
            parameters ``[..., P]``.
        """


@dataclass(frozen=True)
class DiscreteActions(ActionSpace, kind="discrete"):
    """Discrete actions: each agent takes the index of one of its own.

    Args:
        counts: number of actions of each of the N agents; the largest is A.

    Raises:
        ValueError: if there is no agent, or one has no action.

    Examples:
        >>> space = DiscreteActions([3, 2])
        >>> space.legal().tolist()
        [[True, True, True], [True, True, False]]
        >>> space.problem(torch.tensor([2, 2]))
        'got the actions [2, 2] of agents with [3, 2] actions'
    """

    action_shape = ()
    dtype = torch.int64
    distribution_class = ActionDistribution
    has_probs = True

    counts: list[int]
    kind: str = field(default="discrete", init=False, repr=False)
    """Kind of action space; stored with the counts."""

    def __post_init__(self) -> None:
        read_index("counts", self.counts)
        check_ints(1, **{f"counts[{agent}]": count for agent, count in enumerate(self.counts)})

    @property
    def num_agents(self) -> int:  # type: ignore[override]
        """The number of agents N."""
        return len(self.counts)

    @property
    def num_actions(self) -> int:  # type: ignore[override]
        """A, the most actions of any agent."""
        return max(self.counts)

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        """A logit for every action."""
        return self.num_actions

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": self.kind, "counts": list(self.counts)}

    def legal(self) -> Tensor:
        """See the base class."""
        return first_entries(self.counts)

    def spec(self, shape: Sequence[int], device: torch.device | str | None = None) -> TensorSpec:
        """See the base class; the spec's own mask holds the padding of agents with fewer actions, and no more."""
        size = torch.Size([*shape, self.num_agents])
        mask = self.legal().to(device)  # where None leaves it
        return _OwnActions(self.num_actions, shape=size, device=device, dtype=self.dtype, mask=mask)

    def problem(self, action: Tensor) -> str | None:
        """See the base class."""
        if action.shape[-1:] != (self.num_agents,) or action.is_floating_point():
            return (
                f"got actions of shape {list(action.shape)} and {action.dtype}; expected one index for each of "
                f"{self.num_agents} agents (of one-hot actions: argmax(-1))"
            )
        if ((action < 0) | (action >= _counts_on(tuple(self.counts), action.device))).any():
            return f"got the actions {action.tolist()} of agents with {self.counts} actions"
        return None

    def random(self, mask: Tensor) -> Tensor:
        """See the base class."""
        return random_index(mask)

    def allow_one_(self, mask: Tensor) -> Tensor:
        """See the base class: it is the first action."""
        mask[..., 0] |= ~mask.any(-1)
        return mask

    def make_embedding(self, features: int, *, scaled: bool) -> nn.Module:
        """See the base class and :class:`ActionRows`."""
        return ActionRows(self.counts, features, scaled=scaled)

    def mask_parameters(self, parameters: Tensor, legal: Tensor, fill: float = ILLEGAL_LOGIT) -> Tensor:
        """See the base class."""
        return parameters.masked_fill(~legal, fill)

    def are_drawable(self, parameters: Tensor, mask: Tensor) -> Tensor:
        """See the base class; a logit of minus infinity is an action without probability."""
        return parameters.masked_fill(~mask, -torch.inf).logsumexp(-1).isfinite()

    def mode(self, parameters: Tensor) -> Tensor:
        """See the base class."""
        return parameters.argmax(-1)

    def encode(self, action: Tensor, dtype: torch.dtype) -> Tensor:
        """See the base class: one-hot."""
        # torch.nn.functional.one_hot waits for the smallest index, to check it.
        return (action.unsqueeze(-1) == torch.arange(self.num_actions, device=action.device)).to(dtype)

    def features(self, parameters: Tensor) -> Tensor:
        """See the base class: probabilities, zero for actions that an agent does not have."""
        return softmax_over_few(parameters)

    def negative_log_likelihood(self, parameters: Tensor, action: Tensor) -> Tensor:
        """See the base class: the cross-entropy."""
        check_type(action, "a discrete agent's action is read", torch.int64)
        return cross_entropy(parameters.movedim(-1, 1), action, reduction="none")

    def fit_constant(self, action: Tensor, mask: Tensor) -> Tensor:
        """See the base class: logarithms of the frequencies."""
        taken = self.encode(action, action.dtype) * mask.unsqueeze(-1)
        frequency = taken.sum(0) / mask.sum(0).clamp(min=1).unsqueeze(-1)
        return frequency.clamp(min=1e-12).log()


class _OwnActions(Categorical):
    """Keeps the mask that it was made with: TorchRL's ``ActionMask`` would write one that is stale a step later."""

    def update_mask(self, mask: Tensor | None) -> None:
        if not hasattr(self, "mask"):
            super().update_mask(mask)


@lru_cache(maxsize=128)
def _counts_on(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return counts as a tensor that nobody may write into; kept, because environments need it at every step."""
    return torch.tensor(counts, device=device)


class ActionRows(nn.Module):
    """Rows of weights, one for every action: the linear map of one-hot actions, as a look-up.

    With action scaling, agent i's rows start at ``A_0 + .. + A_{i-1}``: this alone tells the shared model which agent
    is focal (docs/algorithm.md, World model). Without it all agents use the same rows.

    Args:
        counts: number of actions of each of the N agents.
        features: F, size of a row.
        scaled: action scaling on or off.

    Examples:
        >>> rows = ActionRows([5, 3], 8, scaled=True)
        >>> rows.rows.num_embeddings, rows(torch.zeros(2, 7, dtype=torch.long)).shape
        (8, torch.Size([2, 7, 8]))
    """

    offset: Tensor

    def __init__(self, counts: Sequence[int], features: int, *, scaled: bool) -> None:
        super().__init__()
        sizes = torch.tensor(list(counts))
        offset = sizes.cumsum(0) - sizes if scaled else torch.zeros_like(sizes)
        self.register_buffer("offset", offset, persistent=False)
        self.rows = nn.Embedding(int(sizes.sum() if scaled else sizes.max()), features)

    def forward(self, action: Tensor) -> Tensor:
        """Return the embeddings ``[N, *batch, F]`` of actions ``[N, *batch]``."""
        check_type(action, "a discrete agent's action is read", torch.int64)
        return self.rows(action + self.offset.view(-1, *[1] * (action.ndim - 1)))
