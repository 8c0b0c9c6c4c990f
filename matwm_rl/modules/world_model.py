"""The world model of section 2: one module, shared by all agents.

Dimension letters: N agents, B sequences, T steps, C context steps, S starts, Z latent size, F hidden size, A actions.
Methods on tensors are agent-major (``[N, ...]``); :meth:`WorldModel.forward` reads and writes TorchRL's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.functional import agents_first, agents_last, causal_segment_mask, segment_ids, shift_within_segments
from matwm_rl.modules.heads import TeammatePredictor
from matwm_rl.modules.latent import Latent, LatentCode
from matwm_rl.modules.transformer import KVCache, Transformer
from matwm_rl.modules.two_hot import TwoHot
from matwm_rl.modules.world_model_config import WorldModelConfig, build_parts

if TYPE_CHECKING:
    from torchrl.envs import EnvBase


@dataclass
class State:
    """What an actor sees of N agents (section 3): s_t = (z_t, h_t, p_t).

    Attributes:
        latent: z_t, ``[N, *batch, Z]``.
        hidden: h_t, the transformer's output after (z_{t-1}, a_{t-1}), zero at an episode's start; ``[N, *batch, F]``.
        teammate_logits: p_t, ``[N, *batch, N-1, A]`` (``[N, *batch, 0, A]`` without teammate predictor).
    """

    latent: Latent
    hidden: Tensor
    teammate_logits: Tensor

    def __getitem__(self, index: Any) -> State:
        """Index the batch dimensions."""
        return State(self.latent[index], self.hidden[index], self.teammate_logits[index])

    def entries(self) -> dict[NestedKey, Tensor]:
        """The state by keys, in TorchRL's layout ``[*batch, N, ...]``; see :attr:`WorldModel.state_keys`."""
        entries: dict[NestedKey, Tensor] = {
            keys.LATENT: agents_last(self.latent.value),
            keys.HIDDEN: agents_last(self.hidden),
            keys.TEAMMATE_LOGITS: agents_last(self.teammate_logits, 2),
        }
        if self.latent.ones is not None:
            entries[keys.LATENT_ONES] = agents_last(self.latent.ones)
        return entries

    @staticmethod
    def stack(states: list[State], dim: int) -> State:
        """Stack along a new batch dimension."""
        return State(
            Latent.stack([state.latent for state in states], dim),
            torch.stack([state.hidden for state in states], dim),
            torch.stack([state.teammate_logits for state in states], dim),
        )


@dataclass
class Context:
    """What the model remembers of N x S histories: the caches of its two transformers."""

    sequence: KVCache
    teammates: KVCache | None


class WorldModel(TensorDictModuleBase):
    """The one world model of all agents (section 2), made of exchangeable parts.

    Build it with :meth:`from_env` or :meth:`from_layout`, or give the parts yourself. Agents are a batch dimension:
    every part sees tensors ``[N, *batch, F]``.

    Args:
        encoder: observations ``[N, *batch, *O]`` to ``[N, *batch, latent.encoder_size]``.
        latent: the latent code.
        decoder: ``[N, *batch, Z]`` to observations.
        action_mixer: latents and actions to tokens ``[N, *batch, F]``.
        transformer: the causal sequence model.
        dynamics: ``[N, *batch, F]`` to ``latent.dynamics_size`` outputs that describe z_{t+1}.
        reward: head with ``two_hot.num_bins`` outputs.
        continuation: head with one output, the logit of c_t.
        two_hot: code of the reward.
        action_mask: head from z_t to A logits of m_t; ``None`` where there is no mask to learn.
        teammates: the teammate predictor, or ``None`` (ablation).
        reward_input: see :class:`WorldModelConfig`.
        reencode: see :class:`WorldModelConfig`.
        legal: bool ``[N, A]``, which actions each agent has at all.
        group_index: for each agent the group of like agents it is of; by default all are alike.
        observation_dims: 1 for vectors, 3 for images.

    Attributes:
        successors: how many successors of every agent the parallel pass encodes apart: those at ends of slices and
            episodes. ``None`` counts them in every batch, for which a GPU has to wait; set the number of steps per
            agent, B * T, where shapes must never change and nothing may wait (CUDA graphs).

    Keys read by :meth:`forward` (batch ``[*B, T]``): ``("agents", "observation")``, ``("agents", "action")``,
    ``("next", "agents", "observation")``, ``("next", "agents", "done")``, the latter as bool ``[*B, T, N, 1]``.

    Keys written: ``("agents", "latent" | "hidden" | "teammate_logits")``, that is s_t;
    ``("agents", "reconstruction")``; ``("agents", "mask_logits")`` if masks are learnt;
    ``("next", "agents", "posterior" | "prior")``, parameters of z_{t+1}'s distributions: ``[*B, T, N, K, C]``
    log-probabilities, or ``[*B, T, N, K, 2]`` means and log standard deviations of a Gaussian code;
    ``("next", "agents", "reward_logits")``, ``("next", "agents", "continuation_logits")``.

    Examples:
        >>> from matwm_rl.data import to_focal
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> rollout = world_model(to_focal(env.rollout(6, break_when_any_done=False)))
        >>> rollout["agents", "latent"].shape
        torch.Size([6, 3, 16])
    """

    legal: Tensor

    def __init__(
        self,
        *,
        encoder: nn.Module,
        latent: LatentCode,
        decoder: nn.Module,
        action_mixer: nn.Module,
        transformer: Transformer,
        dynamics: nn.Module,
        reward: nn.Module,
        continuation: nn.Module,
        two_hot: TwoHot,
        legal: Tensor,
        group_index: Sequence[int] | None = None,
        action_mask: nn.Module | None = None,
        teammates: TeammatePredictor | None = None,
        reward_input: str = "hidden",
        reencode: bool = False,
        observation_dims: int = 1,
    ) -> None:
        super().__init__()
        self.encoder, self.latent, self.decoder = encoder, latent, decoder
        self.action_mixer, self.transformer = action_mixer, transformer
        self.dynamics, self.reward, self.continuation = dynamics, reward, continuation
        self.action_mask, self.teammates = action_mask, teammates
        self.two_hot = two_hot
        self.reward_input = reward_input
        self.reencode = reencode
        self.observation_dims = observation_dims
        self.successors: int | None = None
        self.register_buffer("legal", legal, persistent=False)
        self.num_agents, self.num_actions = legal.shape
        self.group_index = [0] * self.num_agents if group_index is None else list(group_index)
        if len(self.group_index) != self.num_agents:
            raise ValueError(f"group_index must name a group for each of {self.num_agents} agents, got {group_index}")
        self.in_keys: list[NestedKey] = [
            keys.OBSERVATION,
            keys.ACTION,
            keys.NEXT_OBSERVATION,
            keys.AGENT_DONE,
        ]
        self.out_keys: list[NestedKey] = [
            keys.LATENT,
            keys.HIDDEN,
            keys.TEAMMATE_LOGITS,
            keys.RECONSTRUCTION,
            *([keys.MASK_LOGITS] if action_mask is not None else []),
            keys.POSTERIOR,
            keys.PRIOR,
            keys.REWARD_LOGITS,
            keys.CONTINUATION_LOGITS,
        ]

    @property
    def state_keys(self) -> list[NestedKey]:
        """Keys of :meth:`State.entries`."""
        return [keys.LATENT, keys.HIDDEN, keys.TEAMMATE_LOGITS, *([keys.LATENT_ONES] if self.latent.multi_hot else [])]

    @classmethod
    def from_env(cls, env: EnvBase, **overrides: Any) -> WorldModel:
        """Build a model that fits an environment made by :func:`~matwm_rl.envs.make_env`.

        Args:
            env: anything with a ``layout`` (:class:`~matwm_rl.envs.AgentLayout`).
            **overrides: entries of :class:`WorldModelConfig`.

        Raises:
            AttributeError: if the environment has no ``layout``.
        """
        layout = getattr(env, "layout", None)
        if layout is None:
            raise AttributeError(f"{type(env).__name__} has no `layout`; wrap it: MultiAgentEnv(env)")
        return cls.from_layout(
            observation_shape=layout.observation_shape,
            action_counts=layout.action_counts,
            group_index=layout.group_index,
            has_action_mask=layout.has_action_mask,
            config=WorldModelConfig(**overrides),
        )

    @classmethod
    def from_layout(
        cls,
        *,
        observation_shape: Sequence[int],
        action_counts: Sequence[int],
        group_index: Sequence[int],
        has_action_mask: bool = False,
        config: WorldModelConfig | None = None,
    ) -> WorldModel:
        """Build a model from sizes alone.

        Args:
            observation_shape: ``[D]`` or ``[channels, S, S]``, after padding.
            action_counts: number of actions of each agent.
            group_index: group of each agent.
            has_action_mask: whether legal actions change from step to step.
            config: sizes and switches.
        """
        parts = build_parts(
            config or WorldModelConfig(), observation_shape, action_counts, group_index, has_action_mask
        )
        return cls(**parts)

    # -- verbs -------------------------------------------------------------------------------------------------------

    def encode(self, observation: Tensor) -> Latent:
        """Observations ``[N, *batch, *O]`` to posterior latents ``[N, *batch, Z]``."""
        return self.latent.sample_posterior(self.encoder(observation))

    def decode(self, latent: Latent) -> Tensor:
        """Latents ``[N, *batch, Z]`` to observations ``[N, *batch, *O]``."""
        return self.decoder(latent.value)

    def legal_actions(self, latent: Latent) -> Tensor:
        """Predicted legal actions at z ``[N, S, Z]``: bool ``[N, S, A]``, at least one true per row."""
        legal = self.legal.unsqueeze(1)
        if self.action_mask is None:
            return legal.expand(-1, latent.value.shape[1], -1)
        logits = self.action_mask(latent.value).masked_fill(~legal, -torch.inf)
        # Where none passes the threshold, the likeliest is taken: some action must be.
        return (logits > 0) | (logits == logits.amax(-1, keepdim=True))

    def prefill(self, latent: Latent, action: Tensor, valid: Tensor, horizon: int = 0) -> tuple[State, Context]:
        """Run a context through the model in parallel, and make room for ``horizon`` more steps.

        Args:
            latent: ``[N, S, C+1, Z]``, z of the context's C steps and of the current one.
            action: ``[N, S, C]``, actions of the context.
            valid: bool ``[N, S, C]``; which context steps belong to the current one's episode.
            horizon: number of :meth:`step` calls that will follow.

        Returns:
            the current state s_C and the context for :meth:`step`.
        """
        num_agents, starts, length = action.shape
        with_current = torch.cat([valid, valid.new_ones(num_agents, starts, 1)], -1).flatten(0, 1)
        mask = causal_segment_mask(with_current)
        current = latent[:, :, -1]
        if length:
            tokens = self.action_mixer(latent[:, :, :-1], action).flatten(0, 1)
            hidden, sequence = self.transformer.prefill(tokens, mask[:, :-1, :-1], horizon, valid.flatten(0, 1))
            hidden = hidden.view(num_agents, starts, -1) * valid[..., -1:]
        else:
            sequence = self.transformer.empty_cache(num_agents * starts, horizon)
            hidden = current.value.new_zeros(num_agents, starts, self.transformer.features)
        if self.teammates is None:
            return State(current, hidden, self._no_teammates(current)), Context(sequence, None)
        logits, teammates = self.teammates.prefill(latent, mask, horizon)
        return State(current, hidden, logits), Context(sequence, teammates)

    def step(self, state: State, action: Tensor, context: Context) -> State:
        """Imagine one step: sample z_{t+1} from the dynamics predictor.

        Args:
            state: s_t of N x S agents.
            action: ``[N, S]``.
            context: caches with room for one more step, written in place.

        Returns:
            s_{t+1}; :meth:`outcome` tells what the step brought.
        """
        tokens = self.action_mixer(state.latent, action)
        hidden = self.transformer.step(tokens.flatten(0, 1), context.sequence).view(tokens.shape)
        latent = self.latent.sample_prior(self.dynamics(hidden), state.latent)
        if self.reencode:
            latent = self.encode(self.decode(latent))
        if self.teammates is None or context.teammates is None:
            return State(latent, hidden, self._no_teammates(latent))
        return State(latent, hidden, self.teammates.step(latent, context.teammates))

    def outcome(self, reached: State) -> tuple[Tensor, Tensor]:
        """What the steps brought that led to states s_{t+1}: h_{t+1} sums up (z_t, a_t).

        Args:
            reached: s_{t+1}, ``[N, *batch]``; of many steps at once, if wanted.

        Returns:
            rewards r_t, and probabilities that the episode goes on, ``[N, *batch]`` each.
        """
        match self.reward_input:
            case "hidden":
                read = reached.hidden
            case "next_latent":
                read = reached.latent.value
            case _:
                read = self.decode(reached.latent)
        reward = self.two_hot.decode(self.reward(read))
        return reward, self.continuation(reached.hidden).squeeze(-1).sigmoid()

    def _no_teammates(self, latent: Latent) -> Tensor:
        return latent.value.new_zeros(*latent.value.shape[:-1], 0, self.num_actions)

    # -- the parallel pass -------------------------------------------------------------------------------------------

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The sequence pass for training: see the class for keys."""
        # Not the tensordict's own batch size: it has none where a loss was given its tensors by keyword.
        action = tensordict.get(keys.ACTION, None)
        shape = tensordict.batch_size if action is None else action.shape[:-1]
        observation = self._sequences(tensordict, keys.OBSERVATION, shape, self.observation_dims)
        next_observation = self._sequences(tensordict, keys.NEXT_OBSERVATION, shape, self.observation_dims)
        action = self._sequences(tensordict, keys.ACTION, shape, 0)
        done = self._sequences(tensordict, keys.AGENT_DONE, shape, 1).squeeze(-1)

        segments = segment_ids(done)
        mask = causal_segment_mask(segments.flatten(0, 1))
        features, next_features = self._encode_with_successors(observation, next_observation, done)
        latent = self.latent.sample_posterior(features)
        tokens = self.action_mixer(latent, action)
        hidden = self.transformer(tokens.flatten(0, 1), mask).view(tokens.shape)
        match self.reward_input:
            case "hidden":
                read = hidden
            case "next_latent":
                read = self.latent.sample_posterior(next_features).value
            case _:
                read = next_observation
        teammates = self._no_teammates(latent) if self.teammates is None else self.teammates(latent, mask)
        outputs = {
            keys.LATENT: latent.value,
            keys.HIDDEN: shift_within_segments(hidden, segments),
            keys.TEAMMATE_LOGITS: teammates,
            keys.RECONSTRUCTION: self.decode(latent),
            keys.POSTERIOR: self.latent.posterior(next_features),
            keys.PRIOR: self.latent.prior(self.dynamics(hidden), latent),
            keys.REWARD_LOGITS: self.reward(read),
            keys.CONTINUATION_LOGITS: self.continuation(hidden),
        }
        if self.action_mask is not None:
            outputs[keys.MASK_LOGITS] = self.action_mask(latent.value)
        for key, value in outputs.items():
            value = value.view(value.shape[0], *shape, *value.shape[3:])
            tensordict.set(key, agents_last(value, value.ndim - 1 - len(shape)))
        return tensordict

    def _sequences(self, tensordict: TensorDictBase, key: NestedKey, shape: torch.Size, event_dims: int) -> Tensor:
        """Entry ``[*B, T, N, *event]`` as ``[N, B, T, *event]``, where ``shape`` is ``[*B, T]``."""
        value = tensordict.get(key, None)
        expected = (*shape, self.num_agents)
        wrong = value is None or value.shape[: len(expected)] != expected or value.ndim != len(expected) + event_dims
        if wrong or not shape:
            found = "no entry" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(
                f"WorldModel reads {key} as [*batch, T, {self.num_agents} agents] with {event_dims} dimension(s) "
                f"behind, where [*batch, T] = {list(shape)} is that of {keys.ACTION}; found {found}. "
                "Rollouts get the per-agent entries from matwm_rl.data.to_focal"
            )
        value = agents_first(value, event_dims)
        return value.reshape(value.shape[0], -1, shape[-1], *value.shape[1 + len(shape) :])

    def _encode_with_successors(self, observation: Tensor, following: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        """Encode o_t and o_{t+1} of ``[N, B, T, *O]``; every step has a successor.

        Inside an episode the successor stands in the slice. At the slice's end and at an episode's end (where it is the
        true final observation) it is encoded apart, in the same call: per agent as many as the agent with most has.
        """
        num_agents, sequences, time = done.shape
        boundary = done.clone()
        boundary[..., -1] = True
        boundary = boundary.flatten(1)
        count = self.successors or self._count(boundary)
        where = boundary.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        agent = torch.arange(num_agents, device=where.device).unsqueeze(-1)
        flat = torch.cat([observation.flatten(1, 2), following.flatten(1, 2)[agent, where]], 1)
        features, apart = self.encoder(flat).split([flat.shape[1] - where.shape[1], where.shape[1]], 1)
        # Agents with fewer boundaries also re-encode inner successors: the same value, so that nothing changes.
        successors = torch.roll(features, -1, 1).index_put((agent, where), apart)
        shape = (num_agents, sequences, time, -1)
        return features.view(shape), successors.view(shape)

    @staticmethod
    def _count(boundary: Tensor) -> int:
        """How many successors to encode apart, ``boundary [N, B * T]``, rounded up: few different shapes are faster."""
        most = int(boundary.sum(1).max())
        return min(-(-most // 8) * 8, boundary.shape[1])
