"""Algorithm 2's two updates: of the world model, and of all agents inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule, ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives import LossModule, SoftUpdate

from matwm_rl import keys
from matwm_rl.arguments import check_ints, check_kinds, check_switches
from matwm_rl.functional import autocast, clip_grad_norm_per_agent_
from matwm_rl.modules import Imagination, WorldModel
from matwm_rl.objectives import (
    ActorLoss,
    ActorLossConfig,
    CriticLoss,
    LambdaReturn,
    PolicyObjective,
    WorldModelLoss,
    WorldModelLossWeights,
)
from matwm_rl.objectives.returns import GAMMA, LMBDA
from matwm_rl.settings import Settings, setting

_TRAINED = ("world_model", "actor", "critic", "world_model_optimizer", "actor_optimizer", "critic_optimizer")
"""Attributes of a learner that have a ``state_dict``, under the same names in the learner's own."""


class Precision(StrEnum):
    """Precision of matrix products; weights, losses and optimizers stay float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(kw_only=True)
class LearnerConfig(Settings):
    """Settings of :class:`Learner`; the defaults are the paper's (Table C.6, STORM where it is silent).

    Attributes:
        world_model_lr: learning rate of the world model.
        world_model_clip: largest gradient norm of the world model.
        loss_weights: weights of the terms of the world-model loss.
        actor_lr: learning rate of the actors.
        critic_lr: learning rate of the critics.
        actor_critic_clip: largest gradient norm of each actor, and of each critic. Networks that are no stack of
            agents' networks are clipped together.
        horizon: H, imagined steps; ``None``: by the number of agents, see :func:`horizon_by_agents`.
        gamma: discount factor.
        lmbda: lambda of the return.
        actor: settings of the actors' loss.
        agent_epochs: steps of every actor and critic on one imagined rollout; more than one needs ``actor.objective``
            ``ppo`` (ours).
        critic_decay: decay of the EMA critic.
        lr_decay_updates: if given, every learning rate falls with one over the root of 1 + updates / this (ours). What
            Adam's steps scatter averages out, and the length of a run need not be known.
        precision: of the matrix products.
        cuda_graphs: capture each update as one CUDA graph: on a GPU small networks otherwise wait for their hundreds of
            launches. Batches must then not change their shape.

    Raises:
        ValueError: if a number is out of range, several epochs are asked for with another objective than ``ppo``, or
            learning rates that fall with ``cuda_graphs``.

    Examples:
        >>> config = LearnerConfig(horizon=10, loss_weights=WorldModelLossWeights(reward=50.0))
        >>> config.gamma, config.loss_weights.mask
        (0.985, 0.5)
    """

    world_model_lr: float = setting(3e-5, above=0)
    world_model_clip: float = setting(1000.0, above=0)
    loss_weights: WorldModelLossWeights = field(default_factory=WorldModelLossWeights)
    actor_lr: float = setting(3e-4, above=0)
    critic_lr: float = setting(3e-4, above=0)
    actor_critic_clip: float = setting(100.0, above=0)
    horizon: int | None = setting(None, minimum=1)
    gamma: float = setting(GAMMA, minimum=0, maximum=1)
    lmbda: float = setting(LMBDA, minimum=0, maximum=1)
    actor: ActorLossConfig = field(default_factory=ActorLossConfig)
    agent_epochs: int = setting(1, minimum=1)
    critic_decay: float = setting(0.98, minimum=0, below=1)
    lr_decay_updates: int | None = setting(None, minimum=1)
    precision: Precision = Precision.float32
    cuda_graphs: bool = False

    def check(self) -> None:
        """Refuse several epochs without PPO, and learning rates that fall in CUDA graphs."""
        if self.agent_epochs > 1 and self.actor.objective != PolicyObjective.ppo:
            raise ValueError(
                f"agent_epochs={self.agent_epochs} takes several steps on one rollout, for which the actors' objective "
                f"must be 'ppo', got {str(self.actor.objective)!r}"
            )
        if self.cuda_graphs and self.lr_decay_updates is not None:
            raise ValueError("a CUDA graph repeats one update: with cuda_graphs, lr_decay_updates must be None")


def horizon_by_agents(num_agents: int) -> int:
    """The paper's number of imagined steps H (Table C.6).

    Args:
        num_agents: N.

    Examples:
        >>> [horizon_by_agents(n) for n in (3, 4, 20)]
        [16, 12, 8]
    """
    check_ints(1, num_agents=num_agents)
    return 16 if num_agents <= 3 else 12 if num_agents <= 6 else 8


class Learner:
    """The updates of Algorithm 2, and all the state that they change.

    There is one world model: the object given here is the one that the loss trains, that imagination dreams with and
    that a :class:`~matwm_rl.modules.WorldModelPolicy` over it acts with.

    Args:
        world_model: the shared world model.
        actor: actors of all agents; see :func:`~matwm_rl.modules.make_actor` for what they read and write.
        critic: critics of all agents; see :func:`~matwm_rl.modules.make_critic`.
        config: settings; by default the paper's.

    Attributes:
        world_model_loss: holds the world model's parameters, alone.
        actor_loss: holds the actors' parameters, alone.
        critic_loss: holds the critics' parameters and their EMA copy, alone.
        imagination: makes the imagined rollout.
        returns: writes its lambda-returns.
        updates: number of :meth:`update_agents` calls.

    Raises:
        ValueError: if a setting does not fit another, the device, or the networks; see also
            :class:`~matwm_rl.objectives.ActorLoss`, :class:`~matwm_rl.modules.Imagination` and
            :class:`~matwm_rl.objectives.LambdaReturn`.
        TypeError: if the actor has no ``get_dist``.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import make_replay
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import make_actor, make_critic
        >>> settings, env = presets.tiny(), make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, settings.world_model)
        >>> learner = Learner(world_model, make_actor(world_model), make_critic(world_model), settings.learner)
        >>> replay = make_replay(env.num_agents, settings.replay)
        >>> replay.extend(env.rollout(50, break_when_any_done=False))
        >>> metrics = learner.update_world_model(replay.sequences.sample())
        >>> metrics.update(learner.update_agents(replay.starts.sample()))["loss_reward"].shape
        torch.Size([])
    """

    def __init__(
        self,
        world_model: WorldModel,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModuleBase,
        config: LearnerConfig | None = None,
    ) -> None:
        self.config = cfg = LearnerConfig() if config is None else config
        check_kinds(LearnerConfig, config=cfg)
        cfg.check()
        check_kinds(WorldModel, world_model=world_model)
        check_kinds(nn.Module, actor=actor, critic=critic)
        self.world_model, self.actor, self.critic = world_model, actor, critic
        agents = world_model.num_agents
        self.world_model_loss = WorldModelLoss(world_model, weights=cfg.loss_weights)
        horizon = cfg.horizon or horizon_by_agents(agents)
        self.imagination = Imagination(world_model, actor, horizon=horizon, precision=cfg.precision)
        self.returns = LambdaReturn(critic, gamma=cfg.gamma, lmbda=cfg.lmbda)
        self.actor_loss = ActorLoss(actor, num_agents=agents, **cfg.actor.arguments())
        self.critic_loss = CriticLoss(critic)
        device = next(world_model.parameters()).device
        if cfg.cuda_graphs and device.type != "cuda":
            raise ValueError(f"cuda_graphs needs the world model on a CUDA device, it is on {device}")
        for loss in (self.actor_loss, self.critic_loss):
            loss.to(device)
        self.world_model_optimizer = self._optimizer(self.world_model_loss, cfg.world_model_lr)
        self.actor_optimizer = self._optimizer(self.actor_loss, cfg.actor_lr)
        self.critic_optimizer = self._optimizer(self.critic_loss, cfg.critic_lr)
        self.updates = 0
        self._build_callables()

    def _build_callables(self) -> None:
        """Build the target updater and the update callables, which refer to other attributes."""
        self.target_updater = SoftUpdate(self.critic_loss, eps=self.config.critic_decay)
        self._world_model_step = self._graphed(self._step_world_model)
        self._agents_step = self._graphed(self._step_agents)

    def __getstate__(self) -> dict[str, Any]:
        built = ("target_updater", "_world_model_step", "_agents_step")
        return {name: value for name, value in self.__dict__.items() if name not in built}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        target = self.critic_loss.target_critic_network_params
        # A new updater starts the EMA anew.
        ema = target.data.clone()
        self._build_callables()
        target.data.update_(ema)

    def _optimizer(self, loss: LossModule, lr: float) -> torch.optim.Optimizer:
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=lr, fused=True, capturable=self.config.cuda_graphs)

    def _graphed(self, step: Callable[[TensorDictBase], TensorDict]) -> Callable[[TensorDictBase], TensorDict]:
        return CudaGraphModule(step, in_keys=[], out_keys=[]) if self.config.cuda_graphs else step

    def update_world_model(self, sequences: TensorDictBase) -> TensorDict:
        """Take one optimizer step on one combined batch of all agents' sequences.

        Args:
            sequences: ``[B, T]``, of ``replay.sequences.sample()``.

        Returns:
            detached scalars for the log: all losses, ``kl``, ``world_model_grad_norm``.
        """
        self._decay_learning_rate(self.world_model_optimizer)
        if self.config.cuda_graphs:
            self.world_model.max_boundaries = sequences.numel()
        return self._world_model_step(sequences)

    def _step_world_model(self, sequences: TensorDictBase) -> TensorDict:
        self.world_model.train()
        with self._autocast():
            losses = self.world_model_loss(sequences)
        norm = _step(losses, self.world_model_optimizer, torch.nn.utils.clip_grad_norm_, self.config.world_model_clip)
        self.world_model.eval()
        return losses.detach().set("world_model_grad_norm", norm)

    def update_agents(self, starts: TensorDictBase, *, train_actors: bool = True) -> TensorDict:
        """Imagine from replayed starts, then take ``agent_epochs`` steps of every actor and critic.

        Args:
            starts: ``[S, C+1]``, of ``replay.starts.sample()``.
            train_actors: off while the critics warm up: then they alone learn.

        Returns:
            detached scalars for the log: ``loss_actor``, ``loss_critic``, ``entropy``, ``value``, ``return_scale``,
            ``imagined_reward``; what the actors' loss gives is missing while they do not learn.

        Raises:
            ValueError: with ``cuda_graphs``, if the actors are not to learn: a graph repeats one update.
        """
        check_switches(train_actors=train_actors)
        if self.config.cuda_graphs and not train_actors:
            raise ValueError("a CUDA graph repeats one update: with cuda_graphs, actors learn from the first update on")
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            self._decay_learning_rate(optimizer)
        metrics = self._agents_step(starts) if train_actors else self._step_agents(starts, train_actors=False)
        self.updates += 1
        return metrics

    def _step_agents(self, starts: TensorDictBase, *, train_actors: bool = True) -> TensorDict:
        cfg = self.config
        imagined = self.imagination(starts)
        with self._autocast():
            imagined = self.returns(imagined)
            if cfg.actor.objective == PolicyObjective.ppo:
                imagined.set(keys.ACTION_LOG_PROB, self._log_prob(imagined))
            if cfg.agent_epochs > 1:
                imagined.set(keys.SLOW_VALUE, self.critic_loss.slow_value(imagined))
        metrics = TensorDict({"imagined_reward": imagined["next", "agents", "reward"].mean()})
        learning = [(self.actor_loss, self.actor_optimizer)] if train_actors else []
        learning.append((self.critic_loss, self.critic_optimizer))
        for epoch in range(cfg.agent_epochs):
            # The return scale follows every rollout once.
            self.actor_loss.train(epoch == 0)
            for loss, optimizer in learning:
                with self._autocast():
                    losses = loss(imagined)
                _step(losses, optimizer, _clip_agents_, cfg.actor_critic_clip)
                metrics.update(losses.detach())
        self.actor_loss.train()
        self.target_updater.step()
        return metrics

    @torch.no_grad()
    def _log_prob(self, imagined: TensorDictBase) -> Tensor:
        """Return the log-probabilities ``[S, H, N]`` of imagined actions under the actors that chose them."""
        return self.actor.get_dist(imagined).log_prob(imagined.get(keys.ACTION))

    def _decay_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        # torch's LambdaLR is not used: it warns while actors do not step yet, and stores the number of updates again.
        if self.config.lr_decay_updates is not None:
            for group in optimizer.param_groups:
                group["lr"] = (1.0 + self.updates / self.config.lr_decay_updates) ** -0.5 * optimizer.defaults["lr"]

    def _autocast(self) -> torch.autocast:
        return autocast(next(self.world_model.parameters()).device, self.config.precision)

    def state_dict(self) -> dict[str, Any]:
        """Everything an update changes; every tensor once. Loads with ``torch.load(weights_only=True)``."""
        return {
            **{name: getattr(self, name).state_dict() for name in _TRAINED},
            "target_critic": self.critic_loss.target_critic_network_params.flatten_keys(".").to_dict(),
            "return_scale": self.actor_loss.return_scale.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, into the same objects; the world model then is in ``eval`` mode, as ever."""
        for name in _TRAINED:
            getattr(self, name).load_state_dict(state[name])
        self.actor_loss.return_scale.load_state_dict(state["return_scale"])
        target = self.critic_loss.target_critic_network_params
        target.data.update_(TensorDict(state["target_critic"]).unflatten_keys("."))
        self.updates = int(state["updates"])
        self.world_model.eval()


def _step(
    losses: TensorDict,
    optimizer: torch.optim.Optimizer,
    clip_: Callable[[list[Tensor], float], Tensor],
    max_norm: float,
) -> Tensor:
    """Take one optimizer step on the sum of the losses; returns the gradient's norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    torch.stack([value for key, value in losses.items() if key.startswith("loss_")]).sum().backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = clip_(parameters, max_norm)
    optimizer.step()
    return norm


def _clip_agents_(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Clip each network of a stack on its own; networks that are no stack, all in one."""
    clip_ = clip_grad_norm_per_agent_ if _is_stack(parameters) else torch.nn.utils.clip_grad_norm_
    return clip_(parameters, max_norm)


def _is_stack(parameters: Sequence[Tensor]) -> bool:
    """Return whether all hold networks along their first dimension; a bias of an ordinary layer has but one."""
    return all(parameter.ndim > 1 and len(parameter) == len(parameters[0]) for parameter in parameters)
