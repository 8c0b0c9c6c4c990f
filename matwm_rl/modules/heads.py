"""Parts of the world model around its transformer: action mixer, heads, teammate predictor (section 2).

All tensors are agent-major: ``[N, *batch, F]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matwm_rl.checks import check_shape
from matwm_rl.functional import at_least_float32
from matwm_rl.modules.latent import Latent, read_latent
from matwm_rl.modules.stacked import StackedLinear, mlp
from matwm_rl.modules.transformer import KVCache, Transformer

ILLEGAL_LOGIT = -1e9
"""Logit of an action that an agent does not have."""


class ActionMixer(nn.Module):
    """Mix latent and action into one token: ``e_t = z_t W + E[offset_i + a_t]`` (section 2, action scaling).

    The linear map of a one-hot is a row look-up. With scaling, agent i's rows start at ``A_0 + .. + A_{i-1}``: this
    alone tells the shared model which agent is focal. Without it all agents use the same rows.

    Args:
        latent_size: Z.
        features: size of the token.
        action_counts: number of actions of each agent.
        scaled: action scaling on or off.

    Examples:
        >>> mixer = ActionMixer(4, 8, action_counts=[5, 3])
        >>> mixer.action_rows.num_embeddings
        8
        >>> mixer(Latent(torch.zeros(2, 7, 4)), torch.zeros(2, 7, dtype=torch.long)).shape
        torch.Size([2, 7, 8])
    """

    offset: Tensor

    def __init__(self, latent_size: int, features: int, *, action_counts: Sequence[int], scaled: bool = True) -> None:
        super().__init__()
        counts = torch.tensor(list(action_counts))
        offset = counts.cumsum(0) - counts if scaled else torch.zeros_like(counts)
        self.register_buffer("offset", offset, persistent=False)
        self.latent = StackedLinear(latent_size, features, [0])
        self.action_rows = nn.Embedding(int(counts.sum() if scaled else counts.max()), features)

    def forward(self, latent: Latent, action: Tensor) -> Tensor:
        """Latents ``[N, *batch, Z]`` and actions ``[N, *batch]`` to ``[N, *batch, F]``."""
        offset = self.offset.view(-1, *[1] * (action.ndim - 1))
        return read_latent(self.latent, latent) + self.action_rows(action + offset)


class Head(nn.Module):
    """MLP whose last layer is each group's own (section 2, unlike agents).

    Args:
        in_features: size of the input.
        out_features: size of the output.
        group_index: group of each of the N agents.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        zero_init: start the last layer at zero.
        linear_skip: add a linear map of the input (each group's own) to the output.

    Examples:
        >>> Head(4, 6, group_index=[0, 0, 1], num_cells=8, depth=1)(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_index: Sequence[int],
        num_cells: int = 512,
        depth: int = 2,
        zero_init: bool = False,
        linear_skip: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = mlp(in_features, num_cells, depth)
        self.skip = StackedLinear(in_features, out_features, group_index) if linear_skip else None
        self.output = StackedLinear(num_cells if depth else in_features, out_features, group_index, zero_init=zero_init)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, *batch, in] -> [N, *batch, out]``."""
        out = self.output(self.trunk(x))
        return at_least_float32(out if self.skip is None else out + self.skip(x))


class TeammatePredictorBase(nn.Module):
    """What the world model asks of a predictor of the others' actions (section 2); subclass it for one of your own.

    A predictor that reads the present latent alone is a subclass with one method, :meth:`logits`. One that remembers
    overrides :meth:`forward`, :meth:`prefill` and :meth:`step` as well; what it remembers is of its own choice, and
    travels with the rollout as an explicit cache. In :class:`~matwm_rl.envs.ImaginationEnv`, where dreams begin anew
    beside others, that cache needs the methods ``graft(rows, fresh)`` and ``make_room(keep)`` of
    :class:`~matwm_rl.modules.KVCache`. Put the predictor in the place of the model's own,
    ``world_model.teammates = predictor``, before actors, critics and optimizers are made.

    Args:
        action_counts: number of actions of each of the N agents.

    Attributes:
        num_outputs: (N-1) * A, what :meth:`logits` gives for every agent: the others in agent order, A logits of each.

    Raises:
        NotImplementedError: by :meth:`forward`, :meth:`prefill` and :meth:`step`, if neither they nor :meth:`logits`
            are overridden.
        ValueError: by the same, if :meth:`logits` gives another shape.

    Examples:
        >>> class Linear(TeammatePredictorBase):
        ...     def __init__(self, latent_size: int, action_counts: Sequence[int]) -> None:
        ...         super().__init__(action_counts)
        ...         self.linear = nn.Linear(latent_size, self.num_outputs)
        ...
        ...     def logits(self, latent: Latent) -> Tensor:
        ...         return self.linear(latent.value)
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> world_model.teammates = Linear(world_model.latent.latent_size, env.action_counts)
        >>> world_model.teammates(Latent(torch.zeros(3, 2, 6, 16)), torch.ones(6, 6).tril().bool()).shape
        torch.Size([3, 2, 6, 2, 4])
    """

    legal: Tensor

    def __init__(self, action_counts: Sequence[int]) -> None:
        super().__init__()
        self.num_agents, self.num_actions = len(action_counts), max(action_counts)
        self.num_outputs = (self.num_agents - 1) * self.num_actions
        others = [[n for j, n in enumerate(action_counts) if j != i] for i in range(self.num_agents)]
        counts = torch.tensor(others, dtype=torch.long).view(self.num_agents, self.num_agents - 1, 1)
        self.register_buffer("legal", torch.arange(self.num_actions) < counts, persistent=False)

    def logits(self, latent: Latent) -> Tensor:
        """Predict from the present latent alone, ``[N, *batch, Z]`` to ``[N, *batch, (N-1) * A]``.

        The latents come without gradient, and logits of actions that a teammate does not have are overwritten.
        """
        raise NotImplementedError(f"{type(self).__name__} must override `logits`, or `forward`, `prefill` and `step`")

    def forward(self, latent: Latent, mask: Tensor) -> Tensor:
        """Logits at every step of whole sequences.

        Args:
            latent: ``[N, B, T, Z]``; detached here.
            mask: bool attention mask, ``[T, T]`` or ``[N * B, T, T]``: which steps a step may see.

        Returns:
            ``[N, B, T, N-1, A]``.
        """
        return self._predict(latent)

    def prefill(self, latent: Latent, mask: Tensor, room: int) -> tuple[Tensor, Any]:
        """Logits ``[N, S, N-1, A]`` at the last of the steps ``[N, S, T, Z]``, and what ``room`` more need to know."""
        return self._predict(latent[:, :, -1]), None

    def step(self, latent: Latent, cache: Any) -> Tensor:
        """Logits ``[N, S, N-1, A]`` at the next step ``latent [N, S, Z]``; the cache is written in place."""
        return self._predict(latent)

    def _predict(self, latent: Latent) -> Tensor:
        return self._split(self.logits(latent.detach()))

    def _split(self, output: Tensor) -> Tensor:
        """``[N, *batch, (N-1) * A]`` to ``[N, *batch, N-1, A]``, in float32, without illegal actions."""
        name = f"{type(self).__name__} must give logits ((N-1) * A = {self.num_agents - 1} * {self.num_actions})"
        check_shape(output, name, (self.num_agents, *[None] * (output.ndim - 2), self.num_outputs))
        logits = at_least_float32(output).unflatten(-1, (self.num_agents - 1, self.num_actions))
        legal = self.legal.view(self.num_agents, *[1] * (logits.ndim - 3), *self.legal.shape[1:])
        return logits.masked_fill(~legal, ILLEGAL_LOGIT)


class TeammatePredictor(TeammatePredictorBase):
    """Predicts what every other agent does, from the focal agent's latents alone (section 2).

    A transformer of its own over z_0..z_t. The latents enter with stop-gradient. Logits of actions that an agent does
    not have are :data:`ILLEGAL_LOGIT`.

    Args:
        latent_size: Z.
        action_counts: number of actions of each of the N agents.
        group_index: group of each agent; the last layer is each group's own.
        features: width of the transformer.
        num_layers: blocks of the transformer.
        num_heads: attention heads.
        dropout: dropout of the transformer.

    Examples:
        >>> predictor = TeammatePredictor(4, action_counts=[5, 5, 3], group_index=[0, 0, 1], features=8, num_heads=2)
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> predictor(Latent(torch.zeros(3, 2, 6, 4)), mask).shape
        torch.Size([3, 2, 6, 2, 5])
    """

    def __init__(
        self,
        latent_size: int,
        *,
        action_counts: Sequence[int],
        group_index: Sequence[int],
        features: int = 512,
        num_layers: int = 2,
        num_heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(action_counts)
        self.input = StackedLinear(latent_size, features, [0])
        self.transformer = Transformer(features, num_layers=num_layers, num_heads=num_heads, dropout=dropout)
        self.output = StackedLinear(features, self.num_outputs, group_index)

    def _tokens(self, latent: Latent) -> Tensor:
        return read_latent(self.input, latent.detach())

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._split(self.output(hidden))

    def forward(self, latent: Latent, mask: Tensor) -> Tensor:
        """See the base class."""
        tokens = self._tokens(latent)
        return self._logits(self.transformer(tokens.flatten(0, 1), mask).view(tokens.shape))

    def prefill(self, latent: Latent, mask: Tensor, room: int) -> tuple[Tensor, KVCache]:
        """See the base class."""
        tokens = self._tokens(latent)
        hidden, cache = self.transformer.prefill(tokens.flatten(0, 1), mask, room)
        return self._logits(hidden.view(*tokens.shape[:2], -1)), cache

    def step(self, latent: Latent, cache: KVCache) -> Tensor:
        """See the base class."""
        tokens = self._tokens(latent)
        return self._logits(self.transformer.step(tokens.flatten(0, 1), cache).view(tokens.shape))
