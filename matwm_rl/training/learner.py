"""Algorithm 2's two updates: of the world model, and of all agents inside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule, ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives import LossModule, SoftUpdate

from matwm_rl import keys
from matwm_rl.arguments import check_kinds, check_switches
from matwm_rl.finite import is_finite, shorten
from matwm_rl.functional import autocast
from matwm_rl.loss_functions import masked_mean
from matwm_rl.modules import Imagination, WorldModel
from matwm_rl.objectives import (
    ActorLoss,
    CriticLoss,
    LambdaReturn,
    PolicyObjective,
    Regularizer,
    WorldModelLoss,
)
from matwm_rl.processes import largest_of_processes, learning_together
from matwm_rl.training import guard
from matwm_rl.training.config import LearnerConfig, horizon_by_agents
from matwm_rl.training.learner_state import NETWORKS, check_learner_state, describe, learner_state, load_learner_state

if TYPE_CHECKING:
    from matwm_rl.training.distributed import LearnerGroup


# TorchRL's Trainer does not serve: its update is one loss on one sample. Here the world model and the agents have
# samples of their own, and actors and critics learn from a rollout that is imagined and evaluated once for all of them.
class Learner:
    """The updates of Algorithm 2, and all the state that they change.

    There is one world model: the object given here is the one that the loss trains, that imagination dreams with and
    that a :class:`~matwm_rl.modules.WorldModelPolicy` over it acts with.

    Args:
        world_model: the shared world model.
        actor: actors of all agents; see :func:`~matwm_rl.modules.make_actor` for what they read and write.
        critic: critics of all agents; see :func:`~matwm_rl.modules.make_critic`.
        config: settings; by default the paper's.
        regularizers: bonuses of your own on what the actors do, beside those of ``config.actor``.

    Attributes:
        world_model_loss: holds the world model's parameters, alone.
        actor_loss: holds the actors' parameters, alone.
        critic_loss: holds the critics' parameters and their EMA copy, alone.
        imagination: makes the imagined rollout.
        returns: writes its lambda-returns.
        updates: number of :meth:`update_agents` calls.
        group: ``None``, or the processes that learn together, see :func:`~matwm_rl.training.distribute`.
        built: what the networks are made of, see :func:`~matwm_rl.training.learner_state.describe`.

    Raises:
        ValueError: if a setting does not fit another, the device, or the networks; see also
            :class:`~matwm_rl.objectives.ActorLoss`, :class:`~matwm_rl.modules.Imagination` and
            :class:`~matwm_rl.objectives.LambdaReturn`.
        TypeError: if the actor has no ``get_dist``.
        RuntimeError: on a GPU, if an update of which a part reads the value of a tensor cannot become a CUDA graph.

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
        *,
        regularizers: Sequence[Regularizer] = (),
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
        self.returns = LambdaReturn(critic, gamma=cfg.gamma, lmbda=cfg.lmbda, reward_norm=world_model.two_hot.norm)
        self.actor_loss = ActorLoss(actor, **cfg.actor.arguments(world_model.actions, regularizers))
        self.critic_loss = CriticLoss(critic)
        device = next(world_model.parameters()).device
        for loss in (self.actor_loss, self.critic_loss):
            loss.to(device)
        world_model.eval()  # but for its own updates
        self._clip_actor_, self._clip_critic_ = guard.clipping_of(actor), guard.clipping_of(critic)
        self.updates = 0
        self.group: LearnerGroup | None = None
        self._graphs: dict[object, CudaGraphModule] = {}
        self.world_model_optimizer = self._optimizer(self.world_model_loss, cfg.world_model_lr)
        self.actor_optimizer = self._optimizer(self.actor_loss, cfg.actor_lr)
        self.critic_optimizer = self._optimizer(self.critic_loss, cfg.critic_lr)
        self.built = {name: describe(part) for name, part in zip(NETWORKS, (world_model, actor, critic), strict=True)}
        self.target_updater = SoftUpdate(self.critic_loss, eps=cfg.critic_decay)

    def __getstate__(self) -> dict[str, Any]:
        # The target updater and the graphs refer to tensors of this learner. A copy builds its own, and learns alone.
        state = {name: value for name, value in self.__dict__.items() if name != "target_updater"}
        return {**state, "_graphs": {}, "group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        target = self.critic_loss.target_critic_network_params
        # A new updater starts the EMA anew.
        ema = target.data.clone()
        self.target_updater = SoftUpdate(self.critic_loss, eps=self.config.critic_decay)
        target.data.update_(ema)

    def _optimizer(self, loss: LossModule, lr: float) -> torch.optim.Optimizer:
        trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        capturable = self.config.cuda_graphs and trained[0].device.type == "cuda"
        # A graph always reads the learning rate from the same memory, so the rate has to be a tensor.
        rate = torch.tensor(lr, device=trained[0].device) if capturable else lr
        return torch.optim.Adam(trained, lr=rate, fused=True, capturable=capturable)

    @property
    def captures_graphs(self) -> bool:
        """Whether updates run as CUDA graphs.

        They do if ``cuda_graphs`` is on, the networks were on a GPU when the learner was built, and no other processes
        learn with it.
        """
        return self.world_model_optimizer.defaults["capturable"] and self.group is None

    def _take(self, step: Callable[[TensorDictBase], TensorDict], batch: TensorDictBase) -> TensorDict:
        if not self.captures_graphs:
            with self._together(batch):
                return step(batch)
        entries = batch.items(include_nested=True, leaves_only=True)
        form = step.__name__, frozenset((name, value.shape, value.dtype) for name, value in entries)
        if form not in self._graphs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it takes TensorDict out of PyTorch's pytree, which is not used here
                self._graphs[form] = CudaGraphModule(step, in_keys=[], out_keys=[])
        try:
            return self._graphs[form](batch.copy())  # it puts other tensors into what it is given
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            raise RuntimeError(
                "an update could not be captured as a CUDA graph. A part of your own may read the value of a tensor "
                "(`if tensor`, `.item()`), or give one a shape that depends on values: let it not, or set cuda_graphs "
                "of LearnerConfig to False"
            ) from error

    def update_world_model(self, sequences: TensorDictBase) -> TensorDict:
        """Take one optimizer step on one combined batch of all agents' sequences.

        Args:
            sequences: ``[B, T]``, of ``replay.sequences.sample()``.

        Returns:
            detached scalars for the log: all losses, ``kl``, ``world_model_grad_norm``.

        Raises:
            FloatingPointError: on a CPU, if a loss or the gradient is not finite, before any weight changes. On a GPU
                the optimizer skips the step, and the returned numbers tell.
        """
        self._decay_learning_rate(self.world_model_optimizer, self.config.world_model_lr)
        return self._take(self._step_world_model, sequences)

    def _step_world_model(self, sequences: TensorDictBase) -> TensorDict:
        clip, clip_ = self.config.world_model_clip, torch.nn.utils.clip_grad_norm_
        max_boundaries = self.world_model.max_boundaries
        if self.captures_graphs:
            self.world_model.max_boundaries = sequences.numel()
        self.world_model.train()
        try:
            with self._autocast():
                losses = self._losses(self.world_model_loss, sequences)
            gradient = guard.backward(losses, self.world_model_optimizer, clip_, clip)
            guard.step([gradient], self._diagnosis(sequences, self.world_model, self.world_model_loss))
        finally:
            self.world_model.eval()
            self.world_model.max_boundaries = max_boundaries
        return losses.detach().set("world_model_grad_norm", gradient.norm)

    def update_agents(self, starts: TensorDictBase, *, train_actors: bool = True) -> TensorDict:
        """Imagine from replayed starts, then let actors and critics pass over it ``agent_epochs`` times in minibatches.

        Args:
            starts: ``[S, C+1]``, of ``replay.starts.sample()``.
            train_actors: off while the critics warm up: this call then trains the critics only.

        Returns:
            detached scalars for the log: ``loss_actor``, ``loss_critic``, ``entropy``, ``value``, ``return_scale``,
            ``imagined_reward``; what the actors' loss gives is missing while they do not learn.

        Raises:
            FloatingPointError: as :meth:`update_world_model`, also of what is imagined.
        """
        check_switches(train_actors=train_actors)
        self._decay_learning_rate(self.actor_optimizer, self.config.actor_lr)
        self._decay_learning_rate(self.critic_optimizer, self.config.critic_lr)
        metrics = self._take(self._step_agents if train_actors else self._step_critics, starts)
        self.updates += 1
        return metrics

    def _step_critics(self, starts: TensorDictBase) -> TensorDict:
        return self._step_agents(starts, train_actors=False)

    def _step_agents(self, starts: TensorDictBase, *, train_actors: bool = True) -> TensorDict:
        cfg, imagined = self.config, self._imagine(starts)
        diagnosis = self._diagnosis(starts, self.actor_loss, self._losses_of_agents)
        returns = imagined.get(keys.LAMBDA_RETURN)
        # An error in one process is one in all of them, which would otherwise wait for it.
        if guard.can_wait(returns.device) and largest_of_processes(torch.tensor(not is_finite(returns)).int()):
            problem = shorten(list(guard.bad_entries(imagined, diagnosis.agents)))
            raise FloatingPointError(diagnosis.explain(f"what was imagined is not finite: {problem}"))
        metrics = TensorDict({"imagined_reward": masked_mean(imagined["next", "agents", "reward"], None)})
        learning = [(self.actor_loss, self.actor_optimizer, self._clip_actor_)] if train_actors else []
        learning.append((self.critic_loss, self.critic_optimizer, self._clip_critic_))
        # Minibatch i of n has the starts i, i + n, i + 2n and so on. If several processes have equal parts of the
        # starts, their i-th minibatches together are the i-th minibatch of one process that has all starts.
        count = min(cfg.agent_minibatches, len(imagined))
        for part in cfg.agent_epochs * [imagined[first::count] for first in range(count)]:
            gradients = []
            for loss, optimizer, clip_ in learning:
                with self._autocast():
                    losses = self._losses(loss, part)
                gradients.append(guard.backward(losses, optimizer, clip_, cfg.actor_critic_clip))
                metrics.update(losses.detach())
            guard.step(gradients, diagnosis)
        self.target_updater.step()
        return metrics

    def _together(self, batch: TensorDictBase) -> AbstractContextManager[None]:
        return nullcontext() if self.group is None else self.group.together(batch)

    def _losses(self, loss: LossModule, batch: TensorDictBase) -> TensorDictBase:
        return loss(batch) if self.group is None else self.group.losses(loss, batch)

    def _imagine(self, starts: TensorDictBase) -> TensorDictBase:
        """Return an imagined rollout with all that the agents' losses read."""
        imagined = self.imagination(starts)
        with self._autocast():
            imagined = self.returns(imagined)
            if self.config.actor.objective == PolicyObjective.ppo:
                imagined.set(keys.ACTION_LOG_PROB, self._log_prob(imagined))
            if self.config.agent_steps > 1:
                imagined.set(keys.SLOW_VALUE, self.critic_loss.slow_value(imagined))
        return imagined

    def _losses_of_agents(self, starts: TensorDictBase) -> None:
        imagined = self._imagine(starts)
        for loss in (self.actor_loss, self.critic_loss):
            loss(imagined)

    def _diagnosis(
        self, batch: TensorDictBase, in_training: nn.Module, compute_losses: Callable[[TensorDictBase], object]
    ) -> guard.Diagnosis:
        networks = {"world_model": self.world_model, "actor": self.actor, "critic": self.critic}
        recipe, agents = self.world_model.recipe, [str(index) for index in range(self.world_model.num_agents)]

        def run() -> None:
            in_training.eval()  # running statistics stay as they are
            try:
                with learning_together(None):  # other processes may find a cause before they get here
                    compute_losses(batch)
            finally:
                in_training.train()

        return guard.Diagnosis(batch, networks, agents if recipe is None else recipe[0].agent_names, run)

    @torch.no_grad()
    def _log_prob(self, imagined: TensorDictBase) -> Tensor:
        """Return the log-probabilities ``[S, H, N]`` of imagined actions under the actors that chose them."""
        return self.actor.get_dist(imagined).log_prob(imagined.get(keys.ACTION))

    def _decay_learning_rate(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        # torch's LambdaLR is not used: it warns while actors do not step yet, and stores the number of updates again.
        if self.config.lr_decay_updates is not None:
            rate = (1.0 + self.updates / self.config.lr_decay_updates) ** -0.5 * lr
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def _autocast(self) -> torch.autocast:
        return autocast(next(self.world_model.parameters()).device, self.config.precision)

    def state_dict(self) -> dict[str, Any]:
        """Everything an update changes; every tensor once. Loads with ``torch.load(weights_only=True)``."""
        return learner_state(self)

    def check_state_dict(self, state: Any, *, source: str = "the state") -> None:
        """Check that :meth:`load_state_dict` can restore a state, and change nothing.

        Args:
            state: what :meth:`state_dict` returned, perhaps in another process.
            source: what the message calls it.

        Raises:
            ValueError: if an entry, an optimizer's too, is missing, unknown, or of another shape or type than here.
        """
        check_learner_state(self, state, source=source)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, into the same objects; the world model then is in ``eval`` mode, as ever.

        All settings stay those this learner was built with, the learning rates too.

        Raises:
            ValueError: if the state does not fit, see :meth:`check_state_dict`; then nothing is changed.
        """
        self.check_state_dict(state)
        load_learner_state(self, state)
        self._graphs.clear()  # they hold on to the moments of before
