"""The model-free methods: their settings, and how the agents of one group learn with TorchRL's own losses.

No script of its own: model_free.py trains with them. Actions are discrete here; continuous_learners.py has what differs
where they are continuous. The agents of one original group (the pursuers of simple_tag, the
speaker) share a network and learn together; groups share nothing. A group's agents are a batch dimension: its view of a
batch (:meth:`Group.view`) is a single-agent batch ``[*batch, n]`` with TorchRL's default keys, which its losses take
unchanged. Time limits are not terminations: values bootstrap from the true last observation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Categorical, LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.modules import MLP, EGreedyModule, MaskedCategorical, ProbabilisticActor, QValueActor
from torchrl.objectives import ClipPPOLoss, DiscreteSACLoss, DQNLoss, LossModule, SoftUpdate, ValueEstimators

from matwm_rl import keys
from matwm_rl.envs import AgentLayout

LOWEST_LOGIT = -1e9
"""Logit of an illegal action: finite, since SAC multiplies log-probabilities by probabilities, and 0 x -inf is NaN."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    num_envs: int = 10
    frames_per_batch: int = 250  # environment steps between two rounds of updates
    num_cells: tuple[int, ...] = (128, 128)  # of every network, with ReLU
    gamma: float = 0.95
    lr: float = 1e-3
    adam_eps: float = 1e-6
    max_grad_norm: float = 5.0  # of each network


@dataclass(frozen=True, kw_only=True)
class PPOSettings(Settings):
    central_critic: bool  # reads all observations (MAPPO) or its own agent's alone (IPPO)
    frames_per_batch: int = 1_000
    epochs: int = 10
    minibatch_size: int = 250  # environment steps, with all agents of the group
    lmbda: float = 0.95
    clip_epsilon: float = 0.2
    entropy_coeff: float = 0.01


@dataclass(frozen=True, kw_only=True)
class ReplaySettings(Settings):
    memory_size: int = 100_000
    batch_size: int = 128  # environment steps, with all agents of the group
    updates_per_step: float  # gradient steps per environment step
    tau: float = 0.01  # rate at which target networks follow


@dataclass(frozen=True, kw_only=True)
class IQLSettings(ReplaySettings):
    updates_per_step: float = 0.5
    epsilon_start: float = 1.0  # probability of a random action, which falls linearly
    epsilon_end: float = 0.05
    epsilon_steps: int = 10_000


@dataclass(frozen=True, kw_only=True)
class ISACSettings(ReplaySettings):
    updates_per_step: float = 0.25
    target_entropy_weight: float = 0.2  # of the entropy of uniform actions


METHODS: dict[str, Settings] = {
    "mappo": PPOSettings(central_critic=True),
    "ippo": PPOSettings(central_critic=False),
    "iql": IQLSettings(),
    "isac": ISACSettings(),
}


class Group:
    """The agents of one original group, which are consecutive in agent order.

    Attributes:
        agents: their place among all agents.
        size: n, how many they are.
        num_actions: how many actions each of them has.
    """

    def __init__(self, layout: AgentLayout, index: int) -> None:
        first, size = layout.group_index.index(index), layout.group_index.count(index)
        self.agents = slice(first, first + size)
        self.size = size
        self.num_actions = max(layout.action_counts[self.agents])
        self.layout = layout

    def acting_view(self, tensordict: TensorDictBase) -> TensorDict:
        """Return the entries that the group acts on, ``[*batch, n]``."""
        observation = tensordict.get(keys.OBSERVATION)[..., self.agents, :]
        mask = tensordict.get(keys.ACTION_MASK)[..., self.agents, :]
        return TensorDict({"observation": observation, "action_mask": mask}, batch_size=mask.shape[:-1])

    def view(self, batch: TensorDictBase) -> TensorDict:
        """Return the transitions that the group learns from, ``[*batch, n]``."""
        now, after = self.acting_view(batch), self.acting_view(batch.get("next"))
        now["action"] = self.own_action(batch.get(keys.ACTION))
        if (log_prob := batch.get((keys.AGENTS, "action_log_prob"), None)) is not None:
            now["action_log_prob"] = log_prob[..., self.agents]
        # The episode of a dead agent has ended, although the other agents play on.
        dead = ~batch.get(keys.NEXT_ALIVE)[..., self.agents].unsqueeze(-1)
        after["done"] = batch.get(keys.DONE).unsqueeze(-2) | dead
        after["terminated"] = batch.get(keys.TERMINATED).unsqueeze(-2) | dead
        after["reward"] = batch.get(keys.REWARD)[..., self.agents, :]
        return now.set("next", after)

    def own_action(self, action: Tensor) -> Tensor:
        """Return the group's actions ``[*batch, n]`` of those of all agents ``[*batch, N]``."""
        return action[..., self.agents]

    def env_action(self, action: Tensor) -> Tensor:
        """Return the group's actions as the environment takes them."""
        return action

    def state(self, observation: Tensor) -> Tensor:
        """Return all observations and a one-hot index of the agent in its group, ``[*batch, n, S]``."""
        everything = observation.flatten(-2).unsqueeze(-2).expand(*observation.shape[:-2], self.size, -1)
        which = torch.eye(self.size, device=observation.device).expand(*everything.shape[:-1], -1)
        return torch.cat([everything, which], -1)

    def mlp(self, settings: Settings, out_features: int, *, more_inputs: int = 0) -> MLP:
        """Return a network that reads one agent's observation, and so many numbers more."""
        return _mlp(settings, self.layout.observation_shape[0] + more_inputs, out_features)

    def actor(self, settings: Settings) -> ProbabilisticActor:
        """Return a policy that samples legal actions."""
        logits = self.mlp(settings, self.layout.num_actions)
        return ProbabilisticActor(
            TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
            in_keys={"logits": "logits", "mask": "action_mask"},
            distribution_class=MaskedCategorical,
            distribution_kwargs={"neg_inf": LOWEST_LOGIT},
            return_log_prob=True,
        )


def _mlp(settings: Settings, in_features: int, out_features: int) -> MLP:
    return MLP(in_features, out_features, num_cells=settings.num_cells, activation_class=nn.ReLU)


class Learner:
    """One group's networks and their updates.

    Attributes:
        group: whose agents learn.
        policy: reads and writes a view of the group; explores under ``ExplorationType.RANDOM``.
    """

    group: Group
    policy: TensorDictModuleBase
    loss: LossModule

    def __init__(self, settings: Settings, networks: Sequence[Iterable[nn.Parameter]]) -> None:
        self.networks, self.max_grad_norm = [list(network) for network in networks], settings.max_grad_norm
        parameters = [parameter for network in self.networks for parameter in network]
        self.optimizer = torch.optim.Adam(parameters, lr=settings.lr, eps=settings.adam_eps, fused=True)

    def learn(self, batch: TensorDictBase) -> None:
        """Carry out all updates after a collected batch ``[E, T]``."""
        for minibatch in self.minibatches(batch):
            self.step(minibatch)

    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield views ``[minibatch, n]`` to learn from."""
        raise NotImplementedError

    def step(self, minibatch: TensorDictBase) -> None:
        """Take one gradient step."""
        losses = self.loss(minibatch)
        self.optimizer.zero_grad()
        sum(loss for key, loss in losses.items() if key.startswith("loss")).backward()
        for network in self.networks:
            nn.utils.clip_grad_norm_(network, self.max_grad_norm)
        self.optimizer.step()


class PPOLearner(Learner):
    """Clipped PPO with generalised advantage estimates."""

    def __init__(self, group: Group, settings: PPOSettings) -> None:
        self.group, self.settings = group, settings
        self.policy = group.actor(settings)
        if settings.central_critic:
            state_size = group.layout.num_agents * group.layout.observation_shape[0] + group.size
            value, key = _mlp(settings, state_size, 1), "state"
        else:
            value, key = group.mlp(settings, 1), "observation"
        critic = TensorDictModule(value, in_keys=[key], out_keys=["state_value"])
        self.loss = ClipPPOLoss(
            self.policy,
            critic,
            clip_epsilon=settings.clip_epsilon,
            entropy_coeff=settings.entropy_coeff,
            loss_critic_type="l2",
        )
        self.loss.make_value_estimator(ValueEstimators.GAE, gamma=settings.gamma, lmbda=settings.lmbda)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(settings.frames_per_batch),
            sampler=SamplerWithoutReplacement(),
            batch_size=settings.minibatch_size,
        )
        super().__init__(settings, [self.policy.parameters(), critic.parameters()])

    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield minibatches of the batch, once per epoch each."""
        self.buffer.empty()
        self.buffer.extend(self.with_advantage(batch).flatten(0, 1))
        for _ in range(self.settings.epochs):
            yield from self.buffer

    @torch.no_grad()
    def with_advantage(self, batch: TensorDictBase) -> TensorDictBase:
        """Return the view ``[E, T, n]`` with ``advantage`` and ``value_target``."""
        view = self.group.view(batch)
        if self.settings.central_critic:
            view["state"] = self.group.state(batch.get(keys.OBSERVATION))
            view["next", "state"] = self.group.state(batch.get(keys.NEXT_OBSERVATION))
        params, target_params = self.loss.critic_network_params, self.loss.target_critic_network_params
        return self.loss.value_estimator(view, params=params, target_params=target_params, time_dim=1)


class ReplayLearner(Learner):
    """Uniform replay and target networks."""

    def __init__(self, group: Group, settings: ReplaySettings, networks: Sequence[Iterable[nn.Parameter]]) -> None:
        super().__init__(settings, networks)
        self.group, self.settings = group, settings
        self.loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma)
        self.target_update = SoftUpdate(self.loss, tau=settings.tau)
        self.buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(settings.memory_size))
        self.env_steps, self.updates = 0, 0

    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield as many samples as gradient steps are due after this batch."""
        self.buffer.extend(self.group.view(batch).flatten(0, 1))
        self.env_steps += batch.numel()
        size, due = self.settings.batch_size, round(self.env_steps * self.settings.updates_per_step) - self.updates
        self.updates += due
        # One large sample is the same as many small ones, and faster.
        yield from self.buffer.sample(due * size).split(size) if due else ()

    def step(self, minibatch: TensorDictBase) -> None:
        """Take one gradient step, then move the target networks."""
        super().step(minibatch)
        self.target_update.step()


class IQLLearner(ReplayLearner):
    """Double Q-learning with epsilon-greedy exploration."""

    def __init__(self, group: Group, settings: IQLSettings) -> None:
        spec, mask = Categorical(group.layout.num_actions), {"action_mask_key": "action_mask"}
        values = group.mlp(settings, group.layout.num_actions)
        greedy = QValueActor(values, in_keys=["observation"], spec=spec, **mask)
        start, end, steps = settings.epsilon_start, settings.epsilon_end, settings.epsilon_steps
        self.explorer = EGreedyModule(spec, eps_init=start, eps_end=end, annealing_num_steps=steps, **mask)
        self.policy = TensorDictSequential(greedy, self.explorer)
        self.loss = DQNLoss(greedy, action_space=spec, delay_value=True, double_dqn=True)
        super().__init__(group, settings, [greedy.parameters()])

    def learn(self, batch: TensorDictBase) -> None:
        """Update, then lower the exploration rate."""
        super().learn(batch)
        self.explorer.step(batch.numel())


class ISACLearner(ReplayLearner):
    """Discrete soft actor-critic with two critics and a learnt temperature."""

    def __init__(self, group: Group, settings: ISACSettings) -> None:
        self.policy = group.actor(settings)
        values = group.mlp(settings, group.layout.num_actions)
        self.loss = DiscreteSACLoss(
            self.policy,
            TensorDictModule(values, in_keys=["observation"], out_keys=["action_value"]),
            action_space="categorical",
            num_actions=group.num_actions,
            target_entropy_weight=settings.target_entropy_weight,
            loss_function="l2",
        )
        critics = self.loss.qvalue_network_params.parameters()
        super().__init__(group, settings, [self.policy.parameters(), critics, [self.loss.log_alpha]])


LEARNERS: dict[type[Settings], Callable[[Group, Any], Learner]] = {
    PPOSettings: PPOLearner,
    IQLSettings: IQLLearner,
    ISACSettings: ISACLearner,
}
