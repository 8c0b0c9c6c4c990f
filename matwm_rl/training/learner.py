"""Algorithm 2's update: the world model once, then all agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule, ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import Tensor
from torchrl.objectives import LossModule, SoftUpdate

from matwm_rl import keys
from matwm_rl.data import Replay
from matwm_rl.functional import autocast, clip_grad_norm_per_agent_
from matwm_rl.modules import Imagination, WorldModel
from matwm_rl.objectives import ActorLoss, CriticLoss, LambdaReturn, WorldModelLoss, WorldModelLossWeights


@dataclass(kw_only=True)
class LearnerConfig:
    """Settings of :class:`Learner`; the defaults are the paper's (Table C.6, STORM where it is silent).

    Attributes:
        world_model_lr: learning rate of the world model.
        world_model_clip: largest gradient norm of the world model.
        actor_critic_lr: learning rate of actors and critics.
        critic_lr: learning rate of critics (ours); ``None``: that of the actors.
        actor_critic_clip: largest gradient norm of each actor, and of each critic, in the stack; of networks that are
            no stack, all in one.
        horizon: imagined steps H.
        gamma: discount factor.
        lmbda: lambda of the return.
        entropy_coeff: weight eta of the entropy bonus.
        center_advantage: see :class:`~matwm_rl.objectives.ActorLoss`.
        standardize_advantage: see :class:`~matwm_rl.objectives.ActorLoss`.
        agent_epochs: steps of every actor and critic on one imagined rollout; beyond one, the actors' are PPO's (ours).
        clip_epsilon: see :class:`~matwm_rl.objectives.ActorLoss`.
        mean_policy_entropy_coeff: see :class:`~matwm_rl.objectives.ActorLoss`.
        signalling_coeff: see :class:`~matwm_rl.objectives.ActorLoss`.
        signalling_tolerance: see :class:`~matwm_rl.objectives.ActorLoss`; in the units of the latent.
        world_model_warmup: updates of the world model alone before the first :meth:`Learner.update` (ours), so that
            agents do not begin by learning in a model that knows nothing.
        critic_warmup: updates in which the critics learn and the actors do not yet (ours).
        lr_decay_updates: if given, every learning rate falls with one over the root of 1 + updates / this (ours), so
            that what Adam's steps scatter averages out, without having to know how long a run will be.
        critic_decay: decay of the EMA critic.
        free_nats: clamp of the KL terms.
        cuda_graphs: capture the update of the world model, and that of the agents with their imagination, each as one
            CUDA graph: on a GPU small networks otherwise wait for their hundreds of launches. Batches must not change
            their shape then.
        precision: of the matrix products, ``"float32"`` or ``"bfloat16"``; weights, losses and optimizers stay float32.
        loss_weights: factors of the world-model loss's terms.

    Examples:
        >>> config = LearnerConfig(horizon=10, loss_weights=WorldModelLossWeights(reward=50.0))
        >>> config.gamma, config.loss_weights.mask
        (0.985, 0.5)
    """

    world_model_lr: float = 3e-5
    world_model_clip: float = 1000.0
    actor_critic_lr: float = 3e-4
    critic_lr: float | None = None
    actor_critic_clip: float = 100.0
    horizon: int = 16
    gamma: float = 0.985
    lmbda: float = 0.95
    entropy_coeff: float = 3e-4
    center_advantage: bool = False
    standardize_advantage: bool = False
    agent_epochs: int = 1
    clip_epsilon: float = 0.2
    mean_policy_entropy_coeff: float = 0.0
    signalling_coeff: float = 0.0
    signalling_tolerance: float = 0.02
    world_model_warmup: int = 0
    critic_warmup: int = 0
    lr_decay_updates: int | None = None
    critic_decay: float = 0.98
    free_nats: float = 1.0
    precision: str = "float32"
    cuda_graphs: bool = False
    loss_weights: WorldModelLossWeights = field(default_factory=WorldModelLossWeights)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> LearnerConfig:
        """Build from a nested mapping, such as a part of a configuration file.

        Examples:
            >>> LearnerConfig.from_dict({"gamma": 0.9, "loss_weights": {"reward": 2.0}}).loss_weights.reward
            2.0
        """
        entries = dict(entries)
        weights = WorldModelLossWeights(**entries.pop("loss_weights", {}))
        return cls(loss_weights=weights, **entries)

    @classmethod
    def small(cls, **overrides: Any) -> LearnerConfig:
        """What goes with :meth:`~matwm_rl.modules.WorldModelConfig.small`: few environment steps and few updates.

        Args:
            **overrides: entries that go before these.

        Examples:
            >>> config = LearnerConfig.small(horizon=15)
            >>> config.agent_epochs, config.world_model_lr, config.horizon
            (4, 0.003, 15)
        """
        entries: dict[str, Any] = {
            "world_model_lr": 3e-3,
            "actor_critic_lr": 1e-3,
            "critic_lr": 3e-3,
            "lr_decay_updates": 1000,
            "agent_epochs": 4,
            "standardize_advantage": True,
            "entropy_coeff": 0.03,
            "mean_policy_entropy_coeff": 0.1,
            "signalling_coeff": 1.0,
            "world_model_warmup": 200,
            "critic_warmup": 100,
            "horizon": 10,
            "gamma": 0.95,
            "loss_weights": WorldModelLossWeights(reconstruction=1000.0, reward=50.0),
        }
        return cls(**(entries | overrides))


class Learner:
    """One training step of everything (Algorithm 2), and all the state that it changes.

    There is one world model: the object given here is the one that the loss trains, that imagination dreams with and
    that a :class:`~matwm_rl.modules.WorldModelPolicy` over it acts with.

    Args:
        world_model: the shared world model.
        actor: actors of all agents; see :func:`~matwm_rl.modules.make_actor` for what they read and write.
        critic: critics of all agents; see :func:`~matwm_rl.modules.make_critic`.
        config: settings.

    Attributes:
        world_model_loss: holds the world model's parameters, alone.
        actor_loss: holds the actors' parameters, alone.
        critic_loss: holds the critics' parameters and their EMA copy, alone.
        imagination: the imagined rollout.
        returns: lambda-returns of it.

    Raises:
        ValueError: if a setting does not fit another, the device, or the networks; see also :class:`ActorLoss`,
            :class:`Imagination` and :class:`LambdaReturn`.
        TypeError: if the actor has no ``get_dist``.

    Examples:
        >>> from matwm_rl.data import make_replay
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import make_actor, make_critic
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> learner = Learner(world_model, make_actor(world_model), make_critic(world_model), LearnerConfig(horizon=3))
        >>> replay = make_replay(
        ...     num_agents=3, sequences_per_agent=2, starts_per_agent=4, sequence_length=8, context_length=2
        ... )
        >>> replay.extend(env.rollout(50, break_when_any_done=False))
        >>> metrics = learner.update(replay)
        >>> learner.updates, "loss_reward" in metrics
        (1, True)
    """

    def __init__(
        self,
        world_model: WorldModel,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModuleBase,
        config: LearnerConfig | None = None,
    ) -> None:
        self.config = cfg = config or LearnerConfig()
        _check(cfg)
        self.world_model, self.actor, self.critic = world_model, actor, critic
        self.world_model_loss = WorldModelLoss(world_model, weights=cfg.loss_weights, free_nats=cfg.free_nats)
        self.imagination = Imagination(world_model, actor, horizon=cfg.horizon, precision=cfg.precision)
        self.returns = LambdaReturn(critic, gamma=cfg.gamma, lmbda=cfg.lmbda)
        self.actor_loss = ActorLoss(
            actor,
            num_agents=world_model.num_agents,
            entropy_coeff=cfg.entropy_coeff,
            center_advantage=cfg.center_advantage,
            standardize_advantage=cfg.standardize_advantage,
            clip_epsilon=cfg.clip_epsilon,
            mean_policy_entropy_coeff=cfg.mean_policy_entropy_coeff,
            signalling_coeff=cfg.signalling_coeff,
            signalling_tolerance=cfg.signalling_tolerance,
        )
        self.critic_loss = CriticLoss(critic)
        device = next(world_model.parameters()).device
        if cfg.cuda_graphs and device.type != "cuda":
            raise ValueError(f"cuda_graphs needs the world model on a CUDA device, it is on {device}")
        if cfg.cuda_graphs and (cfg.critic_warmup or cfg.lr_decay_updates):
            raise ValueError(
                "a CUDA graph repeats one update: with cuda_graphs, critic_warmup must be 0 and lr_decay_updates None"
            )
        for loss in (self.actor_loss, self.critic_loss):
            loss.to(device)
        self.world_model_optimizer = self._optimizer(self.world_model_loss, cfg.world_model_lr)
        self.actor_optimizer = self._optimizer(self.actor_loss, cfg.actor_critic_lr)
        self.critic_optimizer = self._optimizer(self.critic_loss, cfg.critic_lr or cfg.actor_critic_lr)
        self.updates = 0
        self._wire()

    def _wire(self) -> None:
        """Make what holds on to other attributes."""
        self.target_updater = SoftUpdate(self.critic_loss, eps=self.config.critic_decay)
        self._run_world_model = self._graphed(self._step_world_model)
        self._run_agents = self._graphed(self._step_agents)

    def __getstate__(self) -> dict[str, Any]:
        wired = ("target_updater", "_run_world_model", "_run_agents")
        return {name: value for name, value in self.__dict__.items() if name not in wired}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        target = self.critic_loss.target_critic_network_params
        # A new updater starts the EMA anew.
        ema = target.data.clone()
        self._wire()
        target.data.update_(ema)

    def _optimizer(self, loss: LossModule, lr: float) -> torch.optim.Optimizer:
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=lr, fused=True, capturable=self.config.cuda_graphs)

    def _decay_learning_rates(self) -> None:
        # Not torch's LambdaLR: it warns of actors that do not step yet, and has a state beside the number of updates.
        if self.config.lr_decay_updates is None:
            return
        factor = (1.0 + self.updates / self.config.lr_decay_updates) ** -0.5
        for optimizer in (self.world_model_optimizer, self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]

    def _graphed(self, step: Callable[[TensorDictBase], TensorDict]) -> Callable[[TensorDictBase], TensorDict]:
        return CudaGraphModule(step, in_keys=[], out_keys=[]) if self.config.cuda_graphs else step

    def update(self, replay: Replay) -> TensorDict:
        """One update of the world model, then one of every actor and critic.

        Args:
            replay: sampled for both.

        Returns:
            detached scalars for the log: all losses, ``kl``, ``entropy``, ``value``, ``return_scale``,
            ``imagined_reward``, the world model's gradient norm. What the actors' loss gives is missing while
            ``critic_warmup`` lasts.
        """
        self._decay_learning_rates()
        for _ in range(0 if self.updates else self.config.world_model_warmup):
            self.update_world_model(replay.sequences.sample())
        metrics = self.update_world_model(replay.sequences.sample())
        metrics.update(self.update_agents(replay.starts.sample()))
        self.updates += 1
        return metrics

    def update_world_model(self, sequences: TensorDictBase) -> TensorDict:
        """One optimizer step on one combined batch of all agents' sequences ``[B, T]``."""
        if self.config.cuda_graphs:
            self.world_model.successors = sequences.numel()
        return self._run_world_model(sequences)

    def _step_world_model(self, sequences: TensorDictBase) -> TensorDict:
        self.world_model.train()
        with self._autocast():
            losses = self.world_model_loss(sequences)
        norm = self._step(losses, self.world_model_optimizer, self.config.world_model_clip, per_agent=False)
        self.world_model.eval()
        return losses.detach().set("world_model_grad_norm", norm)

    def update_agents(self, starts: TensorDictBase) -> TensorDict:
        """Imagine from replayed starts ``[S, C+1]``, then one step of every actor and critic."""
        return self._run_agents(starts)

    def _step_agents(self, starts: TensorDictBase) -> TensorDict:
        return self.update_actor_critic(self.imagination(starts))

    def update_actor_critic(self, imagined: TensorDictBase) -> TensorDict:
        """Steps of every actor and critic on an imagined rollout ``[S, H]``: ``agent_epochs`` of each."""
        cfg = self.config
        with self._autocast():
            imagined = self.returns(imagined)
            if cfg.agent_epochs > 1:
                imagined.set(keys.ACTION_LOG_PROB, self._log_prob(imagined))
                imagined.set(keys.SLOW_VALUE, self.critic_loss.slow_value(imagined))
        metrics = TensorDict({"imagined_reward": imagined["next", "agents", "reward"].mean()})
        learning = [(self.critic_loss, self.critic_optimizer)]
        if self.updates >= cfg.critic_warmup:
            learning.insert(0, (self.actor_loss, self.actor_optimizer))
        for epoch in range(cfg.agent_epochs):
            # The return scale follows every rollout once.
            self.actor_loss.train(epoch == 0)
            for loss, optimizer in learning:
                with self._autocast():
                    losses = loss(imagined)
                self._step(losses, optimizer, cfg.actor_critic_clip, per_agent=True)
                metrics.update(losses.detach())
        self.actor_loss.train()
        self.target_updater.step()
        return metrics

    @torch.no_grad()
    def _log_prob(self, imagined: TensorDictBase) -> Tensor:
        """Of the imagined actions under the actors that chose them, ``[S, H, N]``."""
        return self.actor.get_dist(imagined).log_prob(imagined.get(keys.ACTION))

    def _autocast(self) -> torch.autocast:
        return autocast(next(self.world_model.parameters()).device, self.config.precision)

    @staticmethod
    def _step(losses: TensorDict, optimizer: torch.optim.Optimizer, clip: float, *, per_agent: bool) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        torch.stack([value for key, value in losses.items() if key.startswith("loss_")]).sum().backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_ = clip_grad_norm_per_agent_ if per_agent and _is_stack(parameters) else torch.nn.utils.clip_grad_norm_
        norm = clip_(parameters, clip)
        optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Everything an update changes; every tensor once. Loads with ``torch.load(weights_only=True)``."""
        return {
            "world_model": self.world_model.state_dict(),
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target_critic": self.critic_loss.target_critic_network_params.flatten_keys(".").to_dict(),
            "return_scale": self.actor_loss.return_scale.state_dict(),
            "world_model_optimizer": self.world_model_optimizer.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, into the same objects; the world model then is in ``eval`` mode, as ever."""
        for name in (
            "world_model",
            "actor",
            "critic",
            "world_model_optimizer",
            "actor_optimizer",
            "critic_optimizer",
        ):
            getattr(self, name).load_state_dict(state[name])
        self.actor_loss.return_scale.load_state_dict(state["return_scale"])
        target = self.critic_loss.target_critic_network_params
        target.data.update_(TensorDict(state["target_critic"]).unflatten_keys("."))
        self.updates = int(state["updates"])
        self.world_model.eval()


def _check(cfg: LearnerConfig) -> None:
    """That numbers which no part checks for itself are in their range."""
    positive = ["world_model_lr", "world_model_clip", "actor_critic_lr", "critic_lr", "actor_critic_clip"]
    positive += ["agent_epochs", "lr_decay_updates"]
    for name in positive:
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("world_model_warmup", "critic_warmup", "free_nats"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(cfg, name)}")


def _is_stack(parameters: Sequence[Tensor]) -> bool:
    """Whether all have networks along their first dimension; a bias of an ordinary layer has one dimension alone."""
    return all(parameter.ndim > 1 and len(parameter) == len(parameters[0]) for parameter in parameters)
