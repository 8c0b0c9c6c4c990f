"""Settings of the learner."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from matwm_rl.arguments import check_ints
from matwm_rl.objectives import ActorLossConfig, PolicyObjective, WorldModelLossWeights
from matwm_rl.objectives.returns import GAMMA, LMBDA
from matwm_rl.settings import Settings, setting


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
        agent_epochs: passes of actors and critics over one imagined rollout (ours).
        agent_minibatches: optimizer steps in a pass, each on an equal part of the rollout's starts (ours). More than
            one step on a rollout needs ``actor.objective`` ``ppo``.
        critic_decay: decay of the EMA critic.
        lr_decay_updates: if given, every learning rate is divided by the square root of 1 + updates / this (ours).
            This averages out the noise of Adam's steps, and the length of a run need not be known.
        precision: of the matrix products.
        cuda_graphs: on a GPU, capture each update as one CUDA graph: otherwise the GPU waits while the CPU launches
            thousands of small operations. Parts of your own must then not read values of tensors, and plain numbers
            in them stay what they were at the capture. Batches of another shape are captured anew. On a CPU, and where
            several processes learn together, nothing is captured.

    Raises:
        ValueError: if a number is out of range, or several steps are asked for with another objective than ``ppo``.

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
    agent_minibatches: int = setting(1, minimum=1)
    critic_decay: float = setting(0.98, minimum=0, below=1)
    lr_decay_updates: int | None = setting(None, minimum=1)
    precision: Precision = Precision.float32
    cuda_graphs: bool = True

    @property
    def agent_steps(self) -> int:
        """Optimizer steps of every actor and critic on one imagined rollout."""
        return self.agent_epochs * self.agent_minibatches

    def check(self) -> None:
        """Refuse several steps without PPO."""
        if self.agent_steps > 1 and self.actor.objective != PolicyObjective.ppo:
            raise ValueError(
                f"agent_epochs={self.agent_epochs}, agent_minibatches={self.agent_minibatches} take several steps on "
                f"one rollout, for which the actors' objective must be 'ppo', got {str(self.actor.objective)!r}"
            )


def horizon_by_agents(num_agents: int) -> int:
    """Return the paper's number of imagined steps H (Table C.6).

    Args:
        num_agents: N.

    Examples:
        >>> [horizon_by_agents(n) for n in (3, 4, 20)]
        [16, 12, 8]
    """
    check_ints(1, num_agents=num_agents)
    return 16 if num_agents <= 3 else 12 if num_agents <= 6 else 8
