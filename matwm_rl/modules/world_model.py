"""The world model of section 2: one module, shared by all agents.

Dimension letters: N agents, B sequences, T steps, C context steps, S starts, Z latent size, F hidden size, A actions.
Methods on tensors are agent-major (``[N, ...]``); :meth:`WorldModel.forward` reads and writes TorchRL's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.checks import batch_shape, check_shape, read_entry
from matwm_rl.functional import agents_first, agents_last, causal_segment_mask, segment_ids, shift_within_segments
from matwm_rl.modules.heads import TeammatePredictorBase
from matwm_rl.modules.latent import Latent, LatentCode
from matwm_rl.modules.transformer import KVCache, Transformer
from matwm_rl.modules.two_hot import TwoHot
from matwm_rl.modules.world_model_config import REWARD_INPUTS, WorldModelConfig, build_parts

TO_FOCAL = "rollouts get their per-agent entries from matwm_rl.data.to_focal"
"""What to do where an entry is missing that an environment does not give."""


@dataclass
class State:
    """What an actor sees of N agents (section 3): s_t = (z_t, h_t, p_t).

    Attributes:
        latent: z_t, ``[N, *batch, Z]``.
        hidden: h_t, the transformer's output after (z_{t-1}, a_{t-1}), zero at an episode's start; ``[N, *batch, F]``.
        teammate_logits: p_t, ``[N, *batch, N-1, A]`` (``[N, *batch, 0, A]`` without teammate predictor).

    Examples:
        >>> from matwm_rl.data import to_focal
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> starts = to_focal(env.rollout(8, break_when_any_done=False)).reshape(2, 4)
        >>> state, _ = world_model.start_from(starts)
        >>> state.latent.value.shape, state.entries()["agents", "latent"].shape
        (torch.Size([3, 2, 16]), torch.Size([2, 3, 16]))
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

    def graft(self, rows: Tensor, fresh: State) -> State:
        """A copy in which some rows are others.

        Args:
            rows: bool ``[S]``, which rows of the state ``[N, S]``.
            fresh: the new ones alone, in their order.
        """
        index = rows.nonzero().squeeze(-1)
        ones, new_ones = self.latent.ones, fresh.latent.ones
        return State(
            Latent(
                self.latent.value.index_copy(1, index, fresh.latent.value),
                ones if ones is None or new_ones is None else ones.index_copy(1, index, new_ones),
            ),
            self.hidden.index_copy(1, index, fresh.hidden),
            self.teammate_logits.index_copy(1, index, fresh.teammate_logits),
        )

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
    """What the model remembers of N x S histories: the caches of its transformer and of its teammate predictor.

    Attributes:
        sequence: the transformer's cache.
        teammates: what the teammate predictor remembers, for :class:`TeammatePredictor` a cache too; ``None`` where it
            remembers nothing, or there is none.

    Raises:
        TypeError: by :meth:`graft` and :meth:`make_room`, if what the teammate predictor remembers has none of its own.

    Examples:
        >>> from matwm_rl.data import to_focal
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> starts = to_focal(env.rollout(8, break_when_any_done=False)).reshape(2, 4)
        >>> state, context = world_model.start_from(starts, horizon=1)
        >>> _ = world_model.step(state, torch.zeros(3, 2).long(), context)
        >>> context.sequence.length  # three steps of context and one imagined
        4
    """

    sequence: KVCache
    teammates: Any

    @property
    def _memories(self) -> list[Any]:
        if self.teammates is None:
            return [self.sequence]
        if lacking := [name for name in ("graft", "make_room") if not hasattr(self.teammates, name)]:
            raise TypeError(
                f"what the teammate predictor remembers, a {type(self.teammates).__name__}, has no {lacking}: where "
                "dreams begin anew beside others (ImaginationEnv) it needs both, as matwm_rl.modules.KVCache has them"
            )
        return [self.sequence, self.teammates]

    def graft(self, rows: Tensor, fresh: Context) -> None:
        """Give some rows another history, in place; the others keep theirs.

        Args:
            rows: bool ``[S]``.
            fresh: histories of these rows alone, in their order.
        """
        # Agents lie one behind another in a memory, [N * S].
        rows = rows.repeat(self.sequence.bias.shape[1] // len(rows))
        for memory, new in zip(self._memories, fresh._memories, strict=True):
            memory.graft(rows, new)

    def make_room(self, keep: int) -> None:
        """Where a memory is full, forget all but the last ``keep`` positions, in place."""
        for memory in self._memories:
            memory.make_room(keep)


class WorldModel(TensorDictModuleBase):
    """The one world model of all agents (section 2), made of exchangeable parts.

    Build it with :meth:`from_env` or :meth:`from_layout`, or give the parts yourself. A part may also be replaced once
    the model is built, ``world_model.teammates = predictor``, before anything else is made from the model. Agents are a
    batch dimension: every part sees tensors ``[N, *batch, F]``.

    Args:
        encoder: observations ``[N, *batch, *O]`` to ``[N, *batch, latent.encoder_size]``.
        latent: the latent code.
        decoder: ``[N, *batch, Z]`` to observations.
        action_mixer: latents and actions to tokens ``[N, *batch, F]``.
        transformer: the causal sequence model.
        dynamics: ``[N, *batch, F]`` to ``latent.dynamics_size`` outputs that describe z_{t+1}.
        reward: head with ``two_hot.num_bins`` outputs.
        continuation: head with one output, the logit of c_t.
        end_reward: head from h_t for the rewards of steps that were an agent's last (c_t = 0), with as many outputs as
            ``reward``; needed where ``reward`` reads the successor, since an agent that dies has none. ``None``:
            ``reward`` is for all steps.
        two_hot: code of the reward.
        action_mask: head from z_t to A logits of m_t; ``None`` where there is no mask to learn.
        teammates: the teammate predictor, of any :class:`TeammatePredictorBase`, or ``None`` (ablation).
        reward_input: see :class:`WorldModelConfig`.
        reencode: see :class:`WorldModelConfig`.
        legal: bool ``[N, A]``, which actions each agent has at all.
        group_index: for each agent the group of like agents it is of; by default all are alike.
        observation_shape: ``[D]`` or ``[channels, S, S]``, after padding.

    Raises:
        ValueError: if ``group_index`` or ``reward_input`` do not fit; later, if a head has not as many outputs as the
            codes of latent and reward ask for.
        ValueError: if ``action_mask`` or ``end_reward`` is added or taken away later.
        TypeError: if the teammate predictor, here or later, is not a :class:`TeammatePredictorBase`.

    Attributes:
        observation_dims: dimensions of an observation, 1 for vectors, 3 for images.
        successors: how many successors of every agent the parallel pass encodes apart: those at ends of slices and
            episodes. ``None`` counts them in every batch, for which a GPU has to wait; set the number of steps per
            agent, B * T, where shapes must never change and nothing may wait (CUDA graphs). ``torch.compile`` takes
            B * T by itself.

    Keys read by :meth:`forward` (batch ``[*B, T]``): ``("agents", "observation")``, ``("agents", "action")``,
    ``("next", "agents", "observation")``, ``("next", "agents", "done")``, the latter as bool ``[*B, T, N, 1]``.

    A missing entry raises a ``KeyError``, one of another shape a ``ValueError``.

    Keys written: ``("agents", "latent" | "hidden" | "teammate_logits")``, that is s_t;
    ``("agents", "reconstruction")``; ``("agents", "mask_logits")`` if masks are learnt;
    ``("next", "agents", "posterior" | "prior")``, parameters of z_{t+1}'s distributions: ``[*B, T, N, K, C]``
    log-probabilities, or ``[*B, T, N, K, 2]`` means and log standard deviations of a Gaussian code;
    ``("next", "agents", "reward_logits")``, ``("next", "agents", "continuation_logits")``; and with ``end_reward``
    ``("next", "agents", "end_reward_logits")``.

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
        teammates: TeammatePredictorBase | None = None,
        end_reward: nn.Module | None = None,
        reward_input: str = "hidden",
        reencode: bool = False,
        observation_shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.encoder, self.latent, self.decoder = encoder, latent, decoder
        self.action_mixer, self.transformer = action_mixer, transformer
        self.dynamics, self.reward, self.continuation = dynamics, reward, continuation
        self.action_mask, self.teammates, self.end_reward = action_mask, teammates, end_reward
        self.two_hot = two_hot
        self.reward_input = reward_input
        self.reencode = reencode
        self.observation_shape = tuple(observation_shape)
        self.observation_dims = len(self.observation_shape)
        self.successors: int | None = None
        self.register_buffer("legal", legal, persistent=False)
        self.num_agents, self.num_actions = legal.shape
        self.group_index = [0] * self.num_agents if group_index is None else list(group_index)
        if reward_input not in REWARD_INPUTS:
            raise ValueError(f"reward_input must be one of {REWARD_INPUTS}, got {reward_input!r}")
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
            *([keys.END_REWARD_LOGITS] if end_reward is not None else []),
        ]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teammates" and value is not None and not isinstance(value, TeammatePredictorBase):
            raise TypeError(
                f"the teammate predictor must be a TeammatePredictorBase, got {type(value).__name__}; subclass it and "
                "override `logits`"
            )
        if name in ("action_mask", "end_reward") and (getattr(self, name, value) is None) != (value is None):
            raise ValueError(f"`{name}` decides what the model writes: give it, or None, when the model is built")
        super().__setattr__(name, value)

    @property
    def state_keys(self) -> list[NestedKey]:
        """Keys of :meth:`State.entries`."""
        return [keys.LATENT, keys.HIDDEN, keys.TEAMMATE_LOGITS, *([keys.LATENT_ONES] if self.latent.multi_hot else [])]

    @classmethod
    def from_env(cls, env: Any, config: WorldModelConfig | None = None, **overrides: Any) -> WorldModel:
        """Build a model that fits an environment made by :func:`~matwm_rl.envs.make_env`.

        Args:
            env: anything with a ``layout`` (:class:`~matwm_rl.envs.AgentLayout`), or a layout itself.
            config: sizes and switches.
            **overrides: entries of :class:`WorldModelConfig` that go before those of ``config``.

        Raises:
            AttributeError: if the environment has no ``layout``.
        """
        layout: Any = getattr(env, "layout", env)
        if not hasattr(layout, "observation_shape"):
            raise AttributeError(f"{type(env).__name__} has no `layout`; wrap it: MultiAgentEnv(env)")
        return cls.from_layout(
            observation_shape=layout.observation_shape,
            action_counts=layout.action_counts,
            group_index=layout.group_index,
            has_action_mask=layout.has_action_mask,
            config=replace(config or WorldModelConfig(), **overrides),
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
        return State(current, hidden, self._checked(logits, current)), Context(sequence, teammates)

    def start_from(self, starts: TensorDictBase, horizon: int = 0) -> tuple[State, Context]:
        """:meth:`prefill` from replayed starts.

        Args:
            starts: focal, ``[*S, C+1]``: C steps of context, then the start. Of the context counts what lies in the
                start's episode. Keys read: ``("agents", "observation" | "action")``, ``("next", "agents", "done")``.
            horizon: number of :meth:`step` calls that will follow.

        Returns:
            the states of the starts, S in one dimension, and the context for :meth:`step`.

        Raises:
            ValueError: if the batch is not ``[*S, C+1]``, or an entry has another shape.
            KeyError: if an entry is missing.
        """
        shape = batch_shape(starts, keys.ACTION, 1, self)
        if len(shape) < 2:
            raise ValueError(f"dreams begin with starts of batch size [*S, context + 1], got {tuple(shape)}")
        observation = self._sequences(starts, keys.OBSERVATION, shape, self.observation_shape)
        action = self._sequences(starts, keys.ACTION, shape)
        segments = segment_ids(self._sequences(starts, keys.AGENT_DONE, shape, [1]).squeeze(-1))
        valid = segments[..., :-1] == segments[..., -1:]
        return self.prefill(self.encode(observation), action[..., :-1], valid, horizon)

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
        latent = self.latent.sample_prior(self._output("dynamics", hidden), state.latent)
        if self.reencode:
            latent = self.encode(self.decode(latent))
        if self.teammates is None:
            return State(latent, hidden, self._no_teammates(latent))
        return State(latent, hidden, self._checked(self.teammates.step(latent, context.teammates), latent))

    def outcome(self, reached: State) -> tuple[Tensor, Tensor]:
        """What the steps brought that led to states s_{t+1}: h_{t+1} sums up (z_t, a_t).

        Args:
            reached: s_{t+1}, ``[N, *batch]``; of many steps at once, if wanted.

        Returns:
            rewards r_t, and probabilities that the episode goes on, ``[N, *batch]`` each. Where the last step's reward
            has a head of its own, r_t is the expectation over both.
        """
        match self.reward_input:
            case "hidden":
                read = reached.hidden
            case "next_latent":
                read = reached.latent.value
            case _:
                read = self.decode(reached.latent)
        reward = self.two_hot.decode(self._output("reward", read))
        continuation = self._output("continuation", reached.hidden).squeeze(-1).sigmoid()
        if self.end_reward is not None:
            reward = self.two_hot.decode(self._output("end_reward", reached.hidden)).lerp(reward, continuation)
        return reward, continuation

    def _output(self, part: str, read: Tensor) -> Tensor:
        """What a head makes of ``[N, *batch, F]``, if it has as many outputs as are read."""
        sizes = {"dynamics": self.latent.dynamics_size, "continuation": 1}
        out: Tensor = getattr(self, part)(read)
        size = sizes.get(part, self.two_hot.num_bins)
        return check_shape(out, f"the world model's {part} head must give outputs", (*read.shape[:-1], size))

    def _no_teammates(self, latent: Latent) -> Tensor:
        return latent.value.new_zeros(*latent.value.shape[:-1], 0, self.num_actions)

    def _checked(self, logits: Tensor, latent: Latent) -> Tensor:
        """What the teammate predictor said of the others, if it has said one logit for each of their actions."""
        shape = (*latent.value.shape[:-1], self.num_agents - 1, self.num_actions)
        return check_shape(logits, f"{type(self.teammates).__name__} must give logits", shape)

    # -- the parallel pass -------------------------------------------------------------------------------------------

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The sequence pass for training: see the class for keys."""
        # Not the tensordict's own batch size: it has none where tensors were given by keyword.
        shape = read_entry(tensordict, keys.ACTION, self, note=TO_FOCAL).shape[:-1]
        observation = self._sequences(tensordict, keys.OBSERVATION, shape, self.observation_shape)
        next_observation = self._sequences(tensordict, keys.NEXT_OBSERVATION, shape, self.observation_shape)
        action = self._sequences(tensordict, keys.ACTION, shape)
        done = self._sequences(tensordict, keys.AGENT_DONE, shape, [1]).squeeze(-1)

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
        if self.teammates is None:
            teammates = self._no_teammates(latent)
        else:
            teammates = self._checked(self.teammates(latent, mask), latent)
        outputs = {
            keys.LATENT: latent.value,
            keys.HIDDEN: shift_within_segments(hidden, segments),
            keys.TEAMMATE_LOGITS: teammates,
            keys.RECONSTRUCTION: self.decode(latent),
            keys.POSTERIOR: self.latent.posterior(next_features),
            keys.PRIOR: self.latent.prior(self._output("dynamics", hidden), latent),
            keys.REWARD_LOGITS: self._output("reward", read),
            keys.CONTINUATION_LOGITS: self._output("continuation", hidden),
        }
        if self.action_mask is not None:
            outputs[keys.MASK_LOGITS] = self.action_mask(latent.value)
        if self.end_reward is not None:
            outputs[keys.END_REWARD_LOGITS] = self._output("end_reward", hidden)
        for key, value in outputs.items():
            value = value.view(value.shape[0], *shape, *value.shape[3:])
            tensordict.set(key, agents_last(value, value.ndim - 1 - len(shape)))
        return tensordict

    def _sequences(
        self, tensordict: TensorDictBase, key: NestedKey, shape: torch.Size, event: Sequence[int] = ()
    ) -> Tensor:
        """Entry ``[*B, T, N, *event]`` as ``[N, B, T, *event]``, where ``shape`` is ``[*B, T]``."""
        if not shape:
            raise ValueError(f"WorldModel reads sequences of batch size [*B, T], got {key!r} of a single step")
        value = agents_first(read_entry(tensordict, key, self, (*shape, self.num_agents, *event), TO_FOCAL), len(event))
        return value.reshape(value.shape[0], -1, shape[-1], *event)

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
        if torch.compiler.is_compiling():
            # A shape that depends on data would break the graph.
            return boundary.shape[1]
        most = int(boundary.sum(1).max())
        return min(-(-most // 8) * 8, boundary.shape[1])
