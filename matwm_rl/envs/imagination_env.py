"""The world model as an environment, for any TorchRL policy and loss to be trained in.

Dimension letters: S starts (the batch), C context steps, N agents, A actions, D size of an observation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs.model_based import ModelBasedEnvBase

from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints, check_numbers, check_switches
from matwm_rl.envs.imagination_model import ImaginationModel
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.random_actions import LegalRandomActions
from matwm_rl.finite import first_non_finite, is_finite, is_readable
from matwm_rl.functional import agents_first, agents_last
from matwm_rl.keys import ACTION, ACTION_MASK, AGENTS, ALIVE, CONTINUATION, OBSERVATION
from matwm_rl.torchrl_internals import lock_batch


class ImaginationEnv(LegalRandomActions, ModelBasedEnvBase):
    """The world model as a TorchRL environment, in which any multi-agent policy and loss can be trained.

    The batch is S imagined episodes. Each begins at a replayed start, with the C real steps before it as its context,
    and goes on by what the world model predicts, as in :class:`~matwm_rl.modules.Imagination`: with the same
    random state, starts and actor, and with an ``end_threshold``, ``env.rollout(H, actor)`` gives the same steps. No
    gradient flows through it. Keys and shapes are those of :class:`MultiAgentEnv`, and the state:

    ======================================  ======================  ===================================================
    key                                     shape, dtype            content
    ======================================  ======================  ===================================================
    ``("agents", "action")``                ``[S, N]`` int64        or, of continuous actions, ``[S, N, A]`` float32
    ``("agents", "action_mask")``           ``[S, N, A]`` bool      predicted legal actions
    ``("agents", "alive")``                 ``[S, N]`` bool         the agent's imagined episode goes on
    ``("agents", "latent")``                ``[S, N, Z]``           z_t
    ``("agents", "hidden")``                ``[S, N, F]``           h_t
    ``("agents", "teammate_logits")``       ``[S, N, N-1, P]``      p_t
    ``("agents", "continuation")``          ``[S, N, 1]``           predicted probability that the last step was not
                                                                    the end; 1 at a start
    ``("agents", "observation")``           ``[S, N, D]``, images   with ``decode`` only: z_t decoded, in the form that
                                            ``[S, N, 3, *size]``    real observations have
    ``("next", "agents", "reward")``        ``[S, N, 1]`` float32   predicted reward
    ``("next", "done")`` and the like       ``[S, 1]`` bool         root ``done``, ``terminated``, ``truncated``
    ======================================  ======================  ===================================================

    **Ends.** Each agent's imagined episode ends independently, and its end is treated like a death in the real
    environment: the agent is no longer alive, has one legal action, observes zeros and is rewarded with zeros, and the
    others go on. What its state says from then on means nothing. Once all have ended, the row is ``terminated`` (and
    those who ended last stay alive in its last step). After ``max_steps`` it is ``truncated`` if anyone still lives.
    That is no end of the imagined episode: values bootstrap. For the agents' own ends, a loss reads the root's entries
    together with ``~("next", "agents", "alive")``.

    **State.** The model's caches lie in this object, as in any simulator: a step goes on from the last one, whatever
    state the given tensordict holds, so that old tensordicts cannot be stepped again. A partial reset gives the chosen
    rows new starts with their own contexts and leaves the others as they are.

    The world model is used as it is at every step, not copied: it may be trained in between (put it into ``eval`` mode
    before imagining). ``env.to(device)`` moves it, and then the environment has to be reset.

    Args:
        world_model: the shared world model; see :class:`~matwm_rl.envs.ImaginationModel`.
        starts: gives starts ``[S, C+1]``, always of the same size: an object with ``sample()``, such as
            ``replay.starts``, or a callable. It is asked once here, for sizes, and at every reset, partial ones
            included, of which only the rows to be reset are used. Keys read: ``("agents", "observation" | "action")``,
            ``("next", "agents", "done")``, optionally ``("agents", "alive")``: agents dead at the start stay so.
        max_steps: steps after which an imagined episode is truncated.
        decode: whether to give observations.
        layout: that of the real environment; decoded observations then are exactly zero where the agent's own are
            padded, and the environment has the same ``layout``.
        end_threshold: an agent's imagined episode ends when its predicted continuation falls below this; 0: never.
            With ``None`` it ends by chance, with the predicted probability, which is right on average for ends that
            cannot be foreseen too.

    Raises:
        ValueError: if an argument or the starts do not fit the world model or each other; by a step, if actions have
            another shape or are not the agents' own, or if only some of the unfinished rows are to be stepped.
        TypeError: if ``starts`` neither has ``sample()`` nor can be called.
        RuntimeError: by a step or a partial reset, if no imagined episode has begun.
        FloatingPointError: by a step on a CPU, if a predicted reward or continuation is not finite.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import add_agent_entries
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_actor
        >>> real = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(real, presets.tiny().world_model)
        >>> starts = add_agent_entries(real.rollout(12, break_when_any_done=False)).reshape(4, 3)
        >>> env = ImaginationEnv(world_model, lambda: starts, max_steps=5, decode=True, layout=real.layout)
        >>> env.rollout(7, make_actor(world_model), break_when_any_done=False)["next", "agents", "reward"].shape
        torch.Size([4, 7, 3, 1])
    """

    world_model: ImaginationModel
    _state: Any
    _caches: Any
    _ended: Tensor
    _steps: Tensor

    def __init__(
        self,
        world_model: ImaginationModel,
        starts: Any,
        *,
        max_steps: int,
        decode: bool = False,
        layout: AgentLayout | None = None,
        end_threshold: float | None = None,
    ) -> None:
        check_ints(1, max_steps=max_steps)
        check_switches(decode=decode)
        if end_threshold is not None:
            check_numbers(minimum=0, maximum=1, end_threshold=end_threshold)
        sample = getattr(starts, "sample", starts)
        if not callable(sample):
            raise TypeError(f"starts must have sample() or be callable, got {type(starts).__name__}")
        example = sample()
        if example.ndim != 2:
            raise ValueError(f"starts must be of batch size [S, context + 1], got {tuple(example.batch_size)}")
        super().__init__(world_model, device=world_model.legal.device, batch_size=example.batch_size[:1])
        # The base class steps any tensordict that it is given; this object holds S imagined episodes, and steps those.
        lock_batch(self)
        self._sample: Callable[[], TensorDictBase] = sample
        self._starts_size = example.batch_size
        self._is_image = example.get(OBSERVATION, default=torch.empty(0)).dtype == torch.uint8
        self.max_steps = max_steps
        self.decode = decode
        self.end_threshold = end_threshold
        self._padding: Tensor | None = None
        if layout is not None:
            self._fit(layout)
        self._make_specs(example)

    # ------------------------------------------------------------------ specs

    def _fit(self, layout: AgentLayout) -> None:
        if layout.actions != self.world_model.actions:
            raise ValueError(
                f"the world model is of agents with {self.world_model.actions}, the layout {layout.actions}"
            )
        self.layout = layout
        if not layout.is_image:
            sizes = torch.tensor(layout.observation_sizes, device=self.device).unsqueeze(-1)
            self._padding = torch.arange(layout.observation_shape[0], device=self.device) >= sizes

    @torch.no_grad()
    def _make_specs(self, starts: TensorDictBase) -> None:
        """Begin imagined episodes once to read the shapes of all entries; discard them."""
        self._begin(starts)
        example = self._output(~self._ended)
        hidden = self._state.hidden
        self._state = None
        batch, device = self.batch_size, self.device
        agents = torch.Size([*batch, self.num_agents])

        def composite(**specs: TensorSpec) -> Composite:
            return Composite({AGENTS: Composite(specs, shape=agents)}, shape=batch)

        self.observation_spec = composite(**{name: _spec(value) for name, value in example.get(AGENTS).items()})
        self.action_spec = composite(action=self.world_model.actions.spec(batch, device))
        self.reward_spec = composite(reward=Unbounded([*agents, 1], dtype=hidden.dtype, device=device))
        done = Categorical(2, shape=[*batch, 1], device=device, dtype=torch.bool)
        self.done_spec = Composite({name: done.clone() for name in ("done", "terminated", "truncated")}, shape=batch)

    @property
    def num_agents(self) -> int:
        """The number of agents N."""
        return self.world_model.actions.num_agents

    def agent_actions(self) -> ActionSpace:
        """Return the action space of all agents."""
        return self.world_model.actions

    def present_mask(self) -> Tensor:
        """Return each agent's own actions, bool ``[S, N, A]``."""
        return self.world_model.legal.expand(*self.batch_size, -1, -1)

    # ------------------------------------------------------------------ imagined episodes

    def _set_seed(self, seed: int | None) -> None:
        """Seed PyTorch's global random state, from which imagined episodes and the actions of policies are drawn."""
        if seed is not None:
            torch.manual_seed(seed)

    def to(self, device: torch.device | str) -> ImaginationEnv:
        """Move the environment and its world model to a device; if that is another, it has to be reset then."""
        before = self.device
        super().to(device)
        if self.device != before:
            self._state = None
            self._padding = None if self._padding is None else self._padding.to(self.device)
        return self

    @torch.no_grad()
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        rows = None if tensordict is None else tensordict.get("_reset", None)
        rows = None if rows is None else rows.reshape(self.batch_size)
        if rows is None or rows.all():
            self._begin(self._sample())
        else:
            self._check_begun()
            if rows.any():
                self._begin_anew(self._sample(), rows)
        return self._output(~self._ended)

    def _begin(self, starts: TensorDictBase) -> None:
        """Begin all imagined episodes."""
        starts = self._checked(starts)
        # Rows that are reset later begin at the cache's present position. With room for twice the longest imagined
        # episode, the positions that nobody sees any more are dropped once in max_steps steps.
        self._state, self._caches = self.world_model.start_from(starts, 2 * self.max_steps)
        self._ended = self._dead(starts)
        self._steps = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)

    def _begin_anew(self, starts: TensorDictBase, rows: Tensor) -> None:
        """Begin the imagined episodes of some rows ``[S]`` anew, beside the others."""
        starts = self._checked(starts)[rows]
        state, caches = self.world_model.start_from(starts)
        self._state = self._state.replace_rows(rows, state)
        self._caches.replace_rows(rows, caches)
        self._ended = self._ended.index_put((rows,), self._dead(starts))
        self._steps = self._steps.masked_fill(rows, 0)

    def _checked(self, starts: TensorDictBase) -> TensorDictBase:
        if starts.batch_size != self._starts_size:
            raise ValueError(
                f"got starts of batch size {tuple(starts.batch_size)}; expected [S, context + 1] = "
                f"{tuple(self._starts_size)}, as when this environment was made: its number of episodes is fixed"
            )
        return starts.to(self.device)

    def _check_begun(self) -> None:
        if self._state is None:
            raise RuntimeError("no imagined episode has begun: call env.reset() first, without a `_reset` mask")

    def _dead(self, starts: TensorDictBase) -> Tensor:
        alive = starts.get(ALIVE, None)
        if alive is None:
            return torch.zeros(len(starts), self.num_agents, dtype=torch.bool, device=self.device)
        return ~alive[:, -1]

    @torch.no_grad()
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._check_begun()
        action = tensordict.get(ACTION)
        self._check_action(action)
        self._check_going(tensordict.get("_step", None))
        living = ~self._ended
        self._caches.make_room(self._starts_size[1] - 1 + self.max_steps)
        chosen = agents_first(action, len(self.world_model.actions.action_shape))
        rollout = self.world_model.imagine(self._state, self._caches, lambda state, mask: chosen, 1)
        self._state = rollout.states[-1]
        step = rollout.pack()[:, 0].get("next")
        reward, continuation = (step.get((AGENTS, name)).squeeze(-1) for name in ("reward", "continuation"))
        for name, value in (("reward", reward), ("continuation", continuation)):
            if is_readable(value) and not is_finite(value):
                index, number = first_non_finite(value)
                raise FloatingPointError(
                    f"the world model gave {number} as {name} of agent {index[-1]} in imagined episode "
                    f"{index[0]}; its weights, its starts or what a part of your own gives are not finite"
                )
        threshold = torch.rand_like(continuation) if self.end_threshold is None else self.end_threshold
        self._ended = self._ended | (continuation < threshold)
        self._steps = self._steps + 1
        terminated = self._ended.all(-1, keepdim=True)
        truncated = (self._steps >= self.max_steps).unsqueeze(-1) & ~terminated
        output = self._output(torch.where(terminated, living, ~self._ended), continuation)
        output.set((AGENTS, "reward"), reward.masked_fill(~living, 0.0).unsqueeze(-1))
        output.set("done", terminated | truncated)
        return output.set("terminated", terminated).set("truncated", truncated)

    def _check_action(self, action: Tensor) -> None:
        problem = self.world_model.actions.problem(action)
        expected = self.full_action_spec[ACTION].shape
        if problem is None and action.shape != expected:
            problem = f"got actions of shape {list(action.shape)}; expected {list(expected)}"
        if problem is not None:
            raise ValueError(f"{problem}. Sample under {ACTION_MASK}, or with env.rand_action")

    def _check_going(self, going: Tensor | None) -> None:
        """Refuse a ``_step`` mask that leaves out an unfinished row."""
        over = self._ended.all(-1) | (self._steps >= self.max_steps)
        if going is not None and not (going.reshape(self.batch_size) | over).all():
            raise ValueError(f"got the `_step` mask {going.tolist()}; all unfinished rows must be stepped together")

    # ------------------------------------------------------------------ outputs

    def _output(self, alive: Tensor, continuation: Tensor | None = None) -> TensorDictBase:
        """Return present states by keys, for agents ``alive [S, N]`` and their last steps' ``continuation [S, N]``."""
        state, model = self._state, self.world_model
        legal = agents_last(model.legal_actions(state.latent)) & alive.unsqueeze(-1)
        # As in the real environment, the first action stays legal for agents that cannot act, so that distributions
        # can be made.
        self.world_model.actions.allow_one_(legal)
        if continuation is None:
            continuation = torch.ones(alive.shape, dtype=state.hidden.dtype, device=self.device)
        agents = TensorDict(
            {ACTION_MASK[1]: legal, ALIVE[1]: alive, CONTINUATION[2]: continuation.unsqueeze(-1)},
            batch_size=alive.shape,
            device=self.device,
        )
        output = TensorDict({AGENTS: agents}, batch_size=self.batch_size, device=self.device)
        for key, value in state.entries().items():
            output.set(key, value)
        return output.set(OBSERVATION, self._observation(alive)) if self.decode else output

    def _observation(self, alive: Tensor) -> Tensor:
        """Decode observations ``[S, N, *O]``, in the form of real ones: zero where padded or dead, images as bytes."""
        decoded = self.world_model.decode(self._state.latent)
        decoded = agents_last(decoded, decoded.ndim - 2)
        if self._is_image:
            decoded = (255 * decoded).round().clamp(0, 255).to(torch.uint8)
        elif self._padding is not None:
            decoded = decoded.masked_fill(self._padding, 0)
        return decoded.masked_fill(~alive.view(*alive.shape, *[1] * (decoded.ndim - 2)), 0)


def _spec(value: Tensor) -> TensorSpec:
    """Return the spec of entries with the shape and type of an example."""
    if value.dtype == torch.bool:
        return Categorical(2, shape=value.shape, dtype=torch.bool, device=value.device)
    if value.dtype == torch.uint8:
        return Bounded(0, 255, shape=value.shape, dtype=torch.uint8, device=value.device)
    return Unbounded(value.shape, dtype=value.dtype, device=value.device)
