"""The world model: one module, shared by all agents (docs/algorithm.md, World model).

Dimension letters: N agents, B sequences, T steps, C context steps, S starts, Z latent size, F hidden size, A actions.
Methods on tensors are agent-major (``[N, ...]``); :meth:`WorldModel.forward` reads and writes TorchRL's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_kinds, check_switches, read_index
from matwm_rl.checks import batch_shape, check_shape
from matwm_rl.functional import agents_last, causal_segment_mask, segment_ids, shift_within_segments
from matwm_rl.modules.builder import WorldModelConfig, build_parts, check_parts
from matwm_rl.modules.dynamics import Dynamics
from matwm_rl.modules.latents import LatentSpace
from matwm_rl.modules.outcome import continuation_logits, predict_outcome, reward_logits
from matwm_rl.modules.reward import RewardHead, Transition
from matwm_rl.modules.rollout import Act, Rollout, imagine
from matwm_rl.modules.running_norm import RunningNorm
from matwm_rl.modules.sequences import encode_with_successors, in_type_of, read_sequences, sequence_batch
from matwm_rl.modules.state import STATE_KEYS, Caches, State
from matwm_rl.modules.teammates import TeammatePredictorBase
from matwm_rl.modules.transformer import Transformer
from matwm_rl.modules.two_hot import TwoHot


class WorldModel(TensorDictModuleBase):
    """The one world model of all agents, made of exchangeable parts (docs/algorithm.md, World model).

    Build it with :meth:`from_env`, with parts of your own where you like, or give all parts here. Agents are a batch
    dimension: every part sees tensors ``[N, *batch, F]``.

    Args:
        actions: the action space of the N agents.
        observation_shape: ``[D]`` or ``[channels, S, S]``, after padding.
        group_index: for each agent the group of like agents that it belongs to; by default all are alike.
        encoder: observations ``[N, *batch, *O]`` to ``[N, *batch, latent.encoder_size]``.
        latent: the latent space.
        decoder: ``[N, *batch, Z]`` to observations.
        action_mixer: latents and actions to tokens ``[N, *batch, F]``.
        transformer: the causal sequence model.
        dynamics: how latents move on.
        reward: logits of the reward of a transition.
        continuation: head from h with one output, the logit of c_t.
        two_hot: distribution of the reward over bins.
        action_mask: head from z_t to A logits of m_t; ``None`` where there is no mask to learn.
        teammates: the teammate predictor, or ``None`` (ablation).
        end_reward: head from h for the rewards of an agent's last steps (c_t = 0), with as many outputs as ``reward``;
            needed where ``reward`` reads the successor, which an agent that dies does not have.
        reencode: whether imagined latents are decoded and encoded again; see :class:`WorldModelConfig`.
        observation_norm: brings vector observations to one scale. The world model's loss lets it take in what is seen.

    Raises:
        ValueError: if ``group_index`` does not fit; later, if a head has the wrong number of outputs.
        TypeError: if a part is not of its interface.

    Attributes:
        legal: bool ``[N, A]``, which actions each agent has at all.
        max_boundaries: how many ends of slices and episodes the parallel pass encodes apart, for every agent. ``None``
            counts them in every batch, for which a GPU has to wait. Set it to the number of steps per agent, B * T,
            where shapes must never change (CUDA graphs). ``torch.compile`` takes B * T by itself.
        recipe: the layout and the configuration that :meth:`from_env` built the model from; ``None`` where parts were
            given.

    Keys read by :meth:`forward` (batch ``[*B, T]``): ``("agents", "observation" | "action")``,
    ``("next", "agents", "observation" | "done")``, the latter bool ``[*B, T, N, 1]``. A missing entry raises a
    ``KeyError``, one of another shape a ``ValueError``.

    Keys written: s_t as ``("agents", "latent" | "hidden" | "teammate_logits")``; ``("agents", "reconstruction")``;
    ``("agents", "mask_logits")`` if masks are learnt; under ``("next", "agents")`` ``"posterior"`` and, where the
    dynamics have one, ``"prior"``, parameters of z_{t+1}'s distributions ``[*B, T, N, K, C]``; ``"dynamics_kl"`` and
    ``"representation_kl"``, how far the prediction is from the posterior ``[*B, T, N, 1]``; ``"reward_logits"``,
    ``"continuation_logits"`` and, with ``end_reward``, ``"end_reward_logits"``.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import add_agent_entries
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> rollout = world_model(add_agent_entries(env.rollout(6, break_when_any_done=False)))
        >>> rollout["agents", "latent"].shape
        torch.Size([6, 3, 16])
    """

    legal: Tensor

    def __init__(
        self,
        *,
        actions: ActionSpace,
        observation_shape: Sequence[int],
        encoder: nn.Module,
        latent: LatentSpace,
        decoder: nn.Module,
        action_mixer: nn.Module,
        transformer: Transformer,
        dynamics: Dynamics,
        reward: RewardHead,
        continuation: nn.Module,
        two_hot: TwoHot,
        group_index: Sequence[int] | None = None,
        action_mask: nn.Module | None = None,
        teammates: TeammatePredictorBase | None = None,
        end_reward: nn.Module | None = None,
        reencode: bool = False,
        observation_norm: RunningNorm | None = None,
    ) -> None:
        super().__init__()
        check_kinds(ActionSpace, actions=actions)
        check_switches(reencode=reencode)
        self.actions = actions
        self.num_agents, self.num_actions = actions.num_agents, actions.num_actions
        self.observation_shape = tuple(observation_shape)
        self.observation_dims = len(self.observation_shape)
        groups = [0] * self.num_agents if group_index is None else group_index
        self.group_index = read_index("group_index", groups, self.num_agents)
        self.encoder, self.latent, self.decoder, self.two_hot = encoder, latent, decoder, two_hot
        self.action_mixer, self.transformer, self.dynamics = action_mixer, transformer, dynamics
        self.reward, self.continuation, self.reencode = reward, continuation, reencode
        self.action_mask, self.teammates, self.end_reward = action_mask, teammates, end_reward
        self.observation_norm = observation_norm
        check_parts(self)
        self.max_boundaries: int | None = None
        self.recipe: tuple[Any, WorldModelConfig] | None = None
        self.register_buffer("legal", actions.legal(), persistent=False)
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ACTION, keys.NEXT_OBSERVATION, keys.AGENT_DONE]
        self.out_keys: list[NestedKey] = [
            *STATE_KEYS,
            keys.RECONSTRUCTION,
            *([keys.MASK_LOGITS] if action_mask is not None else []),
            keys.POSTERIOR,
            *([keys.PRIOR] if dynamics.has_prior else []),
            keys.DYNAMICS_KL,
            keys.REPRESENTATION_KL,
            keys.REWARD_LOGITS,
            keys.CONTINUATION_LOGITS,
            *([keys.END_REWARD_LOGITS] if end_reward is not None else []),
        ]

    @classmethod
    def from_env(cls, env: Any, config: WorldModelConfig | None = None, **parts: Any) -> WorldModel:
        """Build a model that fits an environment.

        Args:
            env: anything with a ``layout`` (:class:`~matwm_rl.envs.AgentLayout`), such as what
                :func:`~matwm_rl.envs.make_env` makes, or a layout itself.
            config: sizes and switches; by default the paper's.
            **parts: objects in place of parts that ``config`` would give; see :func:`~matwm_rl.modules.build_parts`.

        Raises:
            AttributeError: if the environment has no ``layout``.
            TypeError: if there is no part of a name.
        """
        layout: Any = getattr(env, "layout", env)
        if not hasattr(layout, "observation_shape"):
            raise AttributeError(f"{type(env).__name__} has no `layout`; wrap it: MultiAgentEnv(env)")
        config = WorldModelConfig() if config is None else deepcopy(config)
        model = cls(**build_parts(layout, config, **parts))
        model.recipe = None if parts else (layout, config)
        return model

    def encode(self, observation: Tensor) -> Tensor:
        """Encode observations ``[N, *batch, *O]`` to posterior latents ``[N, *batch, Z]``."""
        return self.latent.sample_posterior(self.features(observation))

    def features(self, observation: Tensor) -> Tensor:
        """Turn observations ``[N, *batch, *O]`` into the encoder's features ``[N, *batch, latent.encoder_size]``."""
        observation, norm = in_type_of(self.encoder, observation), self.observation_norm
        return self.encoder(observation if norm is None else norm.normalize(observation))

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents ``[N, *batch, Z]`` to observations ``[N, *batch, *O]``."""
        decoded = self.decoder(latent)
        return decoded if self.observation_norm is None else self.observation_norm.restore(decoded)

    def legal_actions(self, latent: Tensor) -> Tensor:
        """Predict the legal actions at z ``[N, S, Z]``: bool ``[N, S, A]``, at least one true per row."""
        legal = self.legal.unsqueeze(1)
        if self.action_mask is None:
            return legal.expand(-1, latent.shape[1], -1)
        logits = self.action_mask(latent).masked_fill(~legal, -torch.inf)
        # Some action must be legal: if no logit is positive, the largest counts.
        return (logits > 0) | (logits == logits.amax(-1, keepdim=True))

    def prefill(self, latent: Tensor, action: Tensor, valid: Tensor, horizon: int = 0) -> tuple[State, Caches]:
        """Run a context through the model in parallel, and make room for ``horizon`` more steps.

        Args:
            latent: ``[N, S, C+1, Z]``, z of the context's C steps and of the current one.
            action: ``[N, S, C]``, actions of the context.
            valid: bool ``[N, S, C]``; which context steps belong to the current one's episode.
            horizon: number of :meth:`step` calls that will follow.

        Returns:
            the current state s_C, and the caches for :meth:`step`.
        """
        num_agents, starts, length = valid.shape
        with_current = torch.cat([valid, valid.new_ones(num_agents, starts, 1)], -1).flatten(0, 1)
        mask = causal_segment_mask(with_current)
        current = latent[:, :, -1]
        if length:
            tokens = self.action_mixer(latent[:, :, :-1], action).flatten(0, 1)
            hidden, sequence = self.transformer.prefill(tokens, mask[:, :-1, :-1], horizon, valid.flatten(0, 1))
            hidden = hidden.view(num_agents, starts, -1) * valid[..., -1:]
        else:
            sequence = self.transformer.empty_cache(num_agents * starts, horizon)
            hidden = current.new_zeros(num_agents, starts, self.transformer.features)
        logits, cache = (None, None) if self.teammates is None else self.teammates.prefill(latent, mask, horizon)
        return State(current, hidden, self._teammate_logits(logits, current)), Caches(sequence, cache)

    def start_from(self, starts: TensorDictBase, horizon: int = 0) -> tuple[State, Caches]:
        """Encode replayed starts and run their contexts through the model: :meth:`encode`, then :meth:`prefill`.

        Args:
            starts: ``[*S, C+1]``: C steps of context, then the start. Context from earlier episodes is masked. Keys
                read: ``("agents", "observation" | "action")``, ``("next", "agents", "done")``.
            horizon: number of :meth:`step` calls that will follow.

        Returns:
            the states of the starts, S in one dimension, and the caches for :meth:`step`.

        Raises:
            ValueError: if the batch is not ``[*S, C+1]``, or an entry has another shape.
            KeyError: if an entry is missing.
        """
        shape = batch_shape(starts, keys.AGENT_DONE, 2, self)
        if len(shape) < 2:
            raise ValueError(f"imagination needs starts of batch size [*S, context + 1], got {tuple(shape)}")
        read = partial(read_sequences, starts, reader=self, shape=shape, agents=self.num_agents)
        observation = read(keys.OBSERVATION, event=self.observation_shape)
        action = read(keys.ACTION, event=self.actions.action_shape)
        segments = segment_ids(read(keys.AGENT_DONE, event=[1]).squeeze(-1))
        valid = segments[..., :-1] == segments[..., -1:]
        return self.prefill(self.encode(observation), action[:, :, :-1], valid, horizon)

    def step(self, state: State, action: Tensor, caches: Caches) -> State:
        """Imagine one step: draw z_{t+1} from the dynamics.

        Args:
            state: s_t of N x S agents.
            action: a_t, ``[N, S]``.
            caches: with room for one more step; written in place.

        Returns:
            s_{t+1}.
        """
        tokens = self.action_mixer(state.latent, action)
        hidden = self.transformer.step(tokens.flatten(0, 1), caches.sequence).view(tokens.shape)
        latent = self.dynamics.sample(hidden, state.latent)
        if self.reencode:
            latent = self.latent.sample_posterior(self.encoder(self.decoder(latent)))
        logits = None if self.teammates is None else self.teammates.step(latent, caches.teammates)
        return State(latent, hidden, self._teammate_logits(logits, latent))

    def predict_outcome(self, state: State, action: Tensor, following: State) -> tuple[Tensor, Tensor]:
        """Predict r_t and c_t of imagined steps, of many at once if wanted.

        Args:
            state: s_t, ``[N, *batch]``.
            action: a_t, ``[N, *batch]``.
            following: s_{t+1}, ``[N, *batch]``.

        Returns:
            r_t, expected over both heads where there are two, and probabilities of c_t, ``[N, *batch]`` each.
        """
        return predict_outcome(self, state, action, following)

    def imagine(self, state: State, caches: Caches, act: Act, horizon: int) -> Rollout:
        """Imagine ``horizon`` steps (Algorithm 1).

        Args:
            state: s_0 of N x S agents, of :meth:`start_from`.
            caches: with room for so many steps; written in place.
            act: chooses actions ``[N, S]``, given a state and its predicted legal actions, bool ``[N, S, A]``.
            horizon: H.

        Returns:
            the steps; :meth:`~matwm_rl.modules.Rollout.pack` writes them into a tensordict.
        """
        return imagine(self, state, caches, act, horizon)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run whole sequences through the model: see the class for keys."""
        shape = sequence_batch(tensordict, self, len(self.actions.action_shape))
        read = partial(read_sequences, tensordict, reader=self, shape=shape, agents=self.num_agents)
        both = (read(key, event=self.observation_shape) for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION))
        observation, next_observation = (in_type_of(self.encoder, observation) for observation in both)
        action = read(keys.ACTION, event=self.actions.action_shape)
        done = read(keys.AGENT_DONE, event=[1]).squeeze(-1)
        segments = segment_ids(done)
        mask = causal_segment_mask(segments.flatten(0, 1))
        features, next_features = encode_with_successors(
            self.features, observation, next_observation, done, self.max_boundaries
        )
        latent = self.latent.sample_posterior(features)
        tokens = self.action_mixer(latent, action)
        hidden = self.transformer(tokens.flatten(0, 1), mask).view(tokens.shape)
        step = Transition(
            latent,
            action,
            hidden,
            lambda: self.latent.sample_posterior(next_features),
            lambda: observation,
            lambda: next_observation,
            self.observation_norm,
        )
        logits = reward_logits(self, self.reward, step)
        teammates = None if self.teammates is None else self.teammates(latent, mask)
        posterior = self.latent.posterior(next_features)
        dynamics = self.dynamics.loss(hidden, latent, posterior)
        outputs = {
            keys.LATENT: latent,
            keys.HIDDEN: shift_within_segments(hidden, segments),
            keys.TEAMMATE_LOGITS: self._teammate_logits(teammates, latent),
            keys.RECONSTRUCTION: self.decode(latent),
            keys.POSTERIOR: posterior,
            keys.PRIOR: dynamics.prior,
            keys.DYNAMICS_KL: dynamics.dynamics.unsqueeze(-1),
            keys.REPRESENTATION_KL: dynamics.representation.unsqueeze(-1),
            keys.REWARD_LOGITS: logits,
            keys.CONTINUATION_LOGITS: continuation_logits(self, hidden),
            keys.MASK_LOGITS: None if self.action_mask is None else self.action_mask(latent),
            keys.END_REWARD_LOGITS: None if self.end_reward is None else reward_logits(self, self.end_reward, step),
        }
        for key in self.out_keys:
            value = outputs[key]
            assert value is not None, f"{key} is among out_keys"
            value = value.view(value.shape[0], *shape, *value.shape[3:])
            tensordict.set(key, agents_last(value, value.ndim - 1 - len(shape)))
        return tensordict

    def _teammate_logits(self, logits: Tensor | None, latent: Tensor) -> Tensor:
        """Return what the teammate predictor said, if it is of the right shape; of none, logits of no teammates."""
        if logits is None:
            return latent.new_zeros(*latent.shape[:-1], 0, self.actions.num_parameters)
        what = f"{type(self.teammates).__name__} must give logits"
        return check_shape(logits, what, (*latent.shape[:-1], self.num_agents - 1, self.actions.num_parameters))
