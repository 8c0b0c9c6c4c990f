"""The model-free methods for continuous actions: MAPPO, IPPO and SAC with TorchRL's ``TanhNormal``.

No script of its own: model_free.py trains with them. All that does not depend on the kind of actions is in learners.py.
Q-learning has no version for continuous actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from learners import LEARNERS, METHODS, Group, Learner, PPOLearner, PPOSettings, ReplayLearner, ReplaySettings, Settings
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.functional import pad
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss

from matwm_rl.envs import AgentLayout

LEAST_SCALE = 0.01
"""Of the normal distribution: densities and gradients stay finite."""


@dataclass(frozen=True, kw_only=True)
class BoxISACSettings(ReplaySettings):
    batch_size: int = 256
    updates_per_step: float = 0.25
    initial_temperature: float = 0.1
    target_entropy: float = 0.0  # for each number of an action, in nats; uniform actions have log 2


BOX_METHODS: dict[str, Settings] = {
    "mappo": METHODS["mappo"],
    "ippo": METHODS["ippo"],
    "isac": BoxISACSettings(),
}


class BoxGroup(Group):
    """A group whose agents take continuous actions of equal size.

    Attributes:
        num_actions: how many numbers the action of each of them has.
    """

    def own_action(self, action: Tensor) -> Tensor:
        """Return the group's actions ``[*batch, n, num_actions]`` of those of all agents ``[*batch, N, A]``."""
        return action[..., self.agents, : self.num_actions]

    def env_action(self, action: Tensor) -> Tensor:
        """Return the group's actions padded with zeros, ``[*batch, n, A]``."""
        return pad(action, (0, self.layout.num_actions - self.num_actions))

    def actor(self, settings: Settings) -> ProbabilisticActor:
        """Return a policy that samples from a normal distribution, at first a standard one, and takes the tanh of it.

        Agents that cannot act draw too; environments do not look at their actions.
        """
        network = nn.Sequential(self.mlp(settings, 2 * self.num_actions), NormalParamExtractor(scale_lb=LEAST_SCALE))
        return ProbabilisticActor(
            TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            return_log_prob=True,
        )


class BoxISACLearner(ReplayLearner):
    """Soft actor-critic with two critics and a learnt temperature."""

    def __init__(self, group: BoxGroup, settings: BoxISACSettings) -> None:
        self.policy = group.actor(settings)
        value = group.mlp(settings, 1, more_inputs=group.num_actions)
        self.loss = SACLoss(
            self.policy,
            TensorDictModule(value, in_keys=["observation", "action"], out_keys=["state_action_value"]),
            num_qvalue_nets=2,
            alpha_init=settings.initial_temperature,
            target_entropy=settings.target_entropy * group.num_actions,
            loss_function="l2",
        )
        critics = self.loss.qvalue_network_params.parameters()
        super().__init__(group, settings, [self.policy.parameters(), critics, [self.loss.log_alpha]])


BOX_LEARNERS: dict[type[Settings], Callable[[BoxGroup, Any], Learner]] = {
    PPOSettings: PPOLearner,
    BoxISACSettings: BoxISACLearner,
}


def make_learners(layout: AgentLayout, settings: Settings) -> list[Learner]:
    """Return a learner for each group of agents.

    Raises:
        ValueError: if the settings are not for this kind of actions.
    """
    continuous = not layout.actions.has_probs
    make_group, learners = (BoxGroup, BOX_LEARNERS) if continuous else (Group, LEARNERS)
    if type(settings) not in learners:
        kind = "continuous" if continuous else "discrete"
        raise ValueError(f"{type(settings).__name__} are not settings of a method for {kind} actions")
    return [learners[type(settings)](make_group(layout, index), settings) for index in range(len(layout.group_map))]
