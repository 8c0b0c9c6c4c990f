"""Teammate predictors: what the other agents do, from the focal agent's latents alone (docs/algorithm.md, World model).

All tensors are agent-major: ``[N, *batch, F]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import read_index
from matwm_rl.checks import check_shape
from matwm_rl.functional import at_least_float32
from matwm_rl.modules.stacked import LatentLinear, StackedLinear
from matwm_rl.modules.transformer import KVCache, Transformer


class TeammatePredictorBase(nn.Module):
    """Interface of teammate predictors, which predict the distributions of the other agents' actions.

    A predictor that reads the present latent alone is a subclass with one method, :meth:`logits`. One that remembers
    overrides :meth:`forward`, :meth:`prefill` and :meth:`step` as well. What it remembers is of its own choice and
    travels with the rollout as an explicit cache. In :class:`~matwm_rl.envs.ImaginationEnv`, where dreams begin anew
    beside others, that cache needs the methods ``replace_rows(rows, new)`` and ``make_room(keep)`` of
    :class:`~matwm_rl.modules.KVCache`. Give the predictor to :meth:`WorldModel.from_env(env, teammates=...)
    <matwm_rl.modules.WorldModel.from_env>`.

    Args:
        actions: the action space of the N agents.

    Attributes:
        num_outputs: (N-1) * P, what :meth:`logits` gives for every agent: the others in agent order, P numbers of each,
            which are logits of discrete actions, and locations and scales of continuous ones.

    Raises:
        NotImplementedError: by :meth:`forward`, :meth:`prefill` and :meth:`step`, if neither they nor :meth:`logits`
            are overridden.
        ValueError: by the same, if :meth:`logits` gives another shape.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> class Linear(TeammatePredictorBase):
        ...     def __init__(self, latent_size: int, actions: ActionSpace) -> None:
        ...         super().__init__(actions)
        ...         self.linear = nn.Linear(latent_size, self.num_outputs)
        ...
        ...     def logits(self, latent: Tensor) -> Tensor:
        ...         return self.linear(latent)
        >>> env, config = make_env("mock", seed=0), presets.tiny().world_model
        >>> teammates = Linear(config.latent.build().latent_size, env.layout.actions)
        >>> WorldModel.from_env(env, config, teammates=teammates).teammates
        Linear(
          (linear): Linear(in_features=16, out_features=8, bias=True)
        )
    """

    legal: Tensor

    def __init__(self, actions: ActionSpace) -> None:
        super().__init__()
        self.actions = actions
        self.num_agents, self.num_parameters = actions.num_agents, actions.num_parameters
        self.num_outputs = (self.num_agents - 1) * self.num_parameters
        self.register_buffer("legal", actions.legal_of_teammates(), persistent=False)

    def logits(self, latent: Tensor) -> Tensor:
        """Predict from the present latent alone, ``[N, *batch, Z]`` to ``[N, *batch, (N-1) * P]``.

        The latents come without gradient. What is said of actions that a teammate does not have is overwritten.
        """
        raise NotImplementedError(f"{type(self).__name__} must override `logits`, or `forward`, `prefill` and `step`")

    def forward(self, latent: Tensor, mask: Tensor) -> Tensor:
        """Predict at every step of whole sequences.

        Args:
            latent: ``[N, B, T, Z]``; detached here.
            mask: bool attention mask, ``[T, T]`` or ``[N * B, T, T]``: which steps a step may see.

        Returns:
            ``[N, B, T, N-1, P]``.
        """
        return self._predict(latent)

    def prefill(self, latent: Tensor, mask: Tensor, room: int) -> tuple[Tensor, Any]:
        """Predict ``[N, S, N-1, P]`` at the last of the steps ``[N, S, T, Z]``, and cache what ``room`` more need."""
        return self._predict(latent[:, :, -1]), None

    def step(self, latent: Tensor, cache: Any) -> Tensor:
        """Predict ``[N, S, N-1, P]`` at the next step ``latent [N, S, Z]``; the cache is written in place."""
        return self._predict(latent)

    def _predict(self, latent: Tensor) -> Tensor:
        return self._split(self.logits(latent.detach()))

    def _split(self, output: Tensor) -> Tensor:
        """Turn ``[N, *batch, (N-1) * P]`` into ``[N, *batch, N-1, P]``, in float32, without illegal actions."""
        name = f"{type(self).__name__} must give logits ((N-1) * P = {self.num_agents - 1} * {self.num_parameters})"
        check_shape(output, name, (self.num_agents, *[None] * (output.ndim - 2), self.num_outputs))
        parameters = at_least_float32(output).unflatten(-1, (self.num_agents - 1, self.num_parameters))
        legal = self.legal.view(self.num_agents, *[1] * (parameters.ndim - 3), *self.legal.shape[1:])
        return self.actions.mask_parameters(parameters, legal)


class TeammatePredictor(TeammatePredictorBase):
    """The paper's predictor: a transformer of its own over z_0..z_t, which enter with stop-gradient.

    Args:
        latent_size: Z.
        actions: the action space of the N agents.
        num_classes: of the latent space, see :class:`~matwm_rl.modules.LatentLinear`.
        group_index: group of each agent; the last layer is each group's own.
        features: width of the transformer.
        num_layers: blocks of the transformer.
        num_heads: attention heads.
        dropout: dropout of the transformer.

    Examples:
        >>> import torch
        >>> from matwm_rl.action_space import DiscreteActions
        >>> sizes = {"features": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
        >>> predictor = TeammatePredictor(
        ...     4, actions=DiscreteActions([5, 5, 3]), num_classes=None, group_index=[0, 0, 1], **sizes
        ... )
        >>> mask = torch.ones(6, 6, dtype=torch.bool).tril()
        >>> predictor(torch.zeros(3, 2, 6, 4), mask).shape
        torch.Size([3, 2, 6, 2, 5])
    """

    def __init__(
        self,
        latent_size: int,
        *,
        actions: ActionSpace,
        num_classes: int | None,
        group_index: Sequence[int],
        features: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
    ) -> None:
        super().__init__(actions)
        group_index = read_index("group_index", group_index, actions.num_agents)
        self.input = LatentLinear(latent_size, features, [0], num_classes=num_classes)
        self.transformer = Transformer(features, num_layers=num_layers, num_heads=num_heads, dropout=dropout)
        self.output = StackedLinear(features, self.num_outputs, group_index)

    def forward(self, latent: Tensor, mask: Tensor) -> Tensor:
        """See the base class."""
        tokens = self.input(latent.detach())
        return self._split(self.output(self.transformer(tokens.flatten(0, 1), mask).view(tokens.shape)))

    def prefill(self, latent: Tensor, mask: Tensor, room: int) -> tuple[Tensor, KVCache]:
        """See the base class."""
        tokens = self.input(latent.detach())
        hidden, cache = self.transformer.prefill(tokens.flatten(0, 1), mask, room)
        return self._split(self.output(hidden.view(*tokens.shape[:2], -1))), cache

    def step(self, latent: Tensor, cache: KVCache) -> Tensor:
        """See the base class."""
        tokens = self.input(latent.detach())
        return self._split(self.output(self.transformer.step(tokens.flatten(0, 1), cache).view(tokens.shape)))
