"""Model-free baselines from TorchRL's own losses, tuned for small budgets: MAPPO, IPPO, independent Q-learning and SAC.

    python benchmarks/model_free.py --method iql --environment mpe2/simple_tag_v3 --seed 0 --total-steps 25000

Prints the mean returns of sampled and of greedy actions at every checkpoint.

All methods see the environments as the world model does: through one dense group of agents. The agents of one original
group (the pursuers of simple_tag, the speaker) share a network and learn together; groups share nothing. A group's
agents are a batch dimension: its view of a batch (:meth:`Group.view`) is a single-agent batch ``[*batch, n]`` with
TorchRL's default keys, which its losses take as it is. Time limits are not terminations: values bootstrap from the true
last observation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MLP, EGreedyModule, MaskedCategorical, ProbabilisticActor, QValueActor
from torchrl.objectives import ClipPPOLoss, DiscreteSACLoss, DQNLoss, LossModule, SoftUpdate, ValueEstimators

from matwm_rl import keys
from matwm_rl.envs import AgentLayout, make_env
from matwm_rl.training import evaluate_matches, prepare_process

LOWEST_LOGIT = -1e9
"""Of an illegal action. Finite, because SAC multiplies log-probabilities by probabilities, and 0 times -inf is NaN."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all methods have.

    Attributes:
        num_envs: environments stepped side by side.
        frames_per_batch: environment steps between two rounds of updates.
        num_cells: hidden layers of every network, with ReLU.
        gamma: discount factor.
        lr: learning rate of Adam.
        adam_eps: its epsilon.
        max_grad_norm: gradients of each network are clipped to it.
    """

    num_envs: int = 10
    frames_per_batch: int = 250
    num_cells: tuple[int, ...] = (128, 128)
    gamma: float = 0.95
    lr: float = 1e-3
    adam_eps: float = 1e-6
    max_grad_norm: float = 5.0


@dataclass(frozen=True, kw_only=True)
class PPOSettings(Settings):
    """PPO for each agent.

    Attributes:
        central_critic: the critic sees what all agents observe (MAPPO), not its own agent's observation alone (IPPO).
        epochs: passes over every batch.
        minibatch_size: environment steps of a minibatch, with all agents of the group.
        lmbda: lambda of the generalised advantage estimate.
        clip_epsilon: trust region of the probability ratio.
        entropy_coeff: weight of the entropy bonus.
    """

    frames_per_batch: int = 1_000
    central_critic: bool
    epochs: int = 10
    minibatch_size: int = 250
    lmbda: float = 0.95
    clip_epsilon: float = 0.2
    entropy_coeff: float = 0.01


@dataclass(frozen=True, kw_only=True)
class ReplaySettings(Settings):
    """What learns from replay.

    Attributes:
        batch_size: sampled environment steps of an update, with all agents of the group.
        updates_per_step: gradient steps per environment step.
        tau: rate at which target networks follow.
    """

    batch_size: int = 128
    updates_per_step: float
    tau: float = 0.01


@dataclass(frozen=True, kw_only=True)
class IQLSettings(ReplaySettings):
    """Independent double Q-learning.

    Attributes:
        epsilon_start: probability of a random action at first.
        epsilon_end: and at last.
        epsilon_steps: environment steps in between, over which it falls linearly.
    """

    updates_per_step: float = 0.5
    epsilon_start: float = 1.0
    epsilon_end: float = 0.05
    epsilon_steps: int = 10_000


@dataclass(frozen=True, kw_only=True)
class ISACSettings(ReplaySettings):
    """Independent discrete soft actor-critic.

    Attributes:
        target_entropy_weight: target of the entropy, relative to that of uniform actions.
    """

    updates_per_step: float = 0.25
    target_entropy_weight: float = 0.2


METHODS: dict[str, Settings] = {
    "mappo": PPOSettings(central_critic=True),
    "ippo": PPOSettings(central_critic=False),
    "iql": IQLSettings(),
    "isac": ISACSettings(),
}


class Group:
    """The agents of one original group, neighbours in agent order.

    Args:
        layout: of the environment.
        index: which of its groups.
    """

    def __init__(self, layout: AgentLayout, index: int) -> None:
        members = [agent for agent, group in enumerate(layout.group_index) if group == index]
        self.agents = slice(members[0], members[-1] + 1)
        self.num_actions = max(layout.action_counts[self.agents])
        self.layout = layout

    def acting_view(self, tensordict: TensorDictBase) -> TensorDict:
        """What the group acts on: ``observation`` and ``action_mask``, batch ``[*batch, n]``."""
        observation, mask = tensordict.get(keys.OBSERVATION), tensordict.get(keys.ACTION_MASK)
        own = {"observation": observation[..., self.agents, :], "action_mask": mask[..., self.agents, :]}
        return TensorDict(own, batch_size=own["action_mask"].shape[:-1])

    def view(self, batch: TensorDictBase, *, state: bool = False) -> TensorDict:
        """What the group learns from, batch ``[*batch, n]``.

        Args:
            batch: collected steps.
            state: add ``state``, what all agents observe and which of the group is asked about.
        """
        now, after = self.acting_view(batch), self.acting_view(batch.get("next"))
        now["action"] = batch.get(keys.ACTION)[..., self.agents]
        log_prob = batch.get((keys.AGENTS, "action_log_prob"), None)
        if log_prob is not None:
            now["action_log_prob"] = log_prob[..., self.agents]
        after["reward"] = batch.get(keys.REWARD)[..., self.agents, :]
        # An agent that died had its own termination, although the episode goes on without it.
        dead = ~batch.get(keys.NEXT_ALIVE)[..., self.agents].unsqueeze(-1)
        after["terminated"] = batch.get(keys.TERMINATED).unsqueeze(-2) | dead
        after["done"] = batch.get(keys.DONE).unsqueeze(-2) | dead
        if state:
            now["state"] = self._state(batch.get(keys.OBSERVATION))
            after["state"] = self._state(batch.get(keys.NEXT_OBSERVATION))
        return now.set("next", after)

    def _state(self, observation: Tensor) -> Tensor:
        n = self.agents.stop - self.agents.start
        everything = observation.flatten(-2).unsqueeze(-2).expand(*observation.shape[:-2], n, -1)
        which = torch.eye(n, device=observation.device).expand(*everything.shape[:-1], n)
        return torch.cat([everything, which], -1)

    @property
    def state_size(self) -> int:
        """Size of ``state``."""
        layout = self.layout
        return layout.num_agents * layout.observation_shape[0] + self.agents.stop - self.agents.start


class Learner:
    """One group's networks and their updates.

    Attributes:
        policy: reads and writes a view of the group; explores under ``ExplorationType.RANDOM``.
    """

    policy: TensorDictModuleBase
    loss: LossModule

    def __init__(self, group: Group, settings: Settings, networks: Sequence[Sequence[nn.Parameter]]) -> None:
        self.group, self.settings, self.networks = group, settings, [list(network) for network in networks]
        every = [parameter for network in self.networks for parameter in network]
        self.optimizer = torch.optim.Adam(every, lr=settings.lr, eps=settings.adam_eps, fused=True)

    def learn(self, batch: TensorDictBase) -> None:
        """All updates that a collected batch ``[E, T]`` brings."""
        for minibatch in self.minibatches(batch):
            self.step(minibatch)

    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """Views ``[minibatch, n]`` to learn from, one by one."""
        raise NotImplementedError

    def step(self, minibatch: TensorDictBase) -> None:
        """One gradient step."""
        losses = self.loss(minibatch)
        total = sum(value for key, value in losses.items() if key.startswith("loss"))
        self.optimizer.zero_grad()
        total.backward()
        for network in self.networks:
            nn.utils.clip_grad_norm_(network, self.settings.max_grad_norm)
        self.optimizer.step()


def _mlp(settings: Settings, in_features: int, out_features: int) -> MLP:
    return MLP(in_features, out_features, num_cells=settings.num_cells, activation_class=nn.ReLU)


def _stochastic_actor(group: Group, settings: Settings) -> ProbabilisticActor:
    logits = _mlp(settings, group.layout.observation_shape[0], group.layout.num_actions)
    return ProbabilisticActor(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical,
        distribution_kwargs={"neg_inf": LOWEST_LOGIT},
        return_log_prob=True,
    )


class PPOLearner(Learner):
    """Clipped PPO with generalised advantage estimates."""

    def __init__(self, group: Group, settings: PPOSettings) -> None:
        layout = group.layout
        key, size = (
            ("state", group.state_size) if settings.central_critic else ("observation", layout.observation_shape[0])
        )
        self.policy = _stochastic_actor(group, settings)
        critic = TensorDictModule(_mlp(settings, size, 1), in_keys=[key], out_keys=["state_value"])
        self.loss = ClipPPOLoss(
            self.policy,
            critic,
            clip_epsilon=settings.clip_epsilon,
            entropy_coeff=settings.entropy_coeff,
            loss_critic_type="l2",
        )
        self.loss.make_value_estimator(ValueEstimators.GAE, gamma=settings.gamma, lmbda=settings.lmbda)
        self.central, self.epochs = settings.central_critic, settings.epochs
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(settings.frames_per_batch),
            sampler=SamplerWithoutReplacement(),
            batch_size=settings.minibatch_size,
        )
        super().__init__(group, settings, [self.policy.parameters(), critic.parameters()])

    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """Minibatches of the batch itself, several times over."""
        self.buffer.empty()
        self.buffer.extend(self.with_advantage(batch).flatten(0, 1))
        for _ in range(self.epochs):
            yield from self.buffer

    @torch.no_grad()
    def with_advantage(self, batch: TensorDictBase) -> TensorDictBase:
        """The view ``[E, T, n]`` with ``advantage`` and ``value_target``."""
        view = self.group.view(batch, state=self.central)
        parameters = {
            "params": self.loss.critic_network_params,
            "target_params": self.loss.target_critic_network_params,
        }
        return self.loss.value_estimator(view, **parameters, time_dim=1)


class ReplayLearner(Learner):
    """Uniform replay and target networks."""

    settings: ReplaySettings

    def __init__(
        self, group: Group, settings: ReplaySettings, networks: Sequence[Sequence[nn.Parameter]], capacity: int
    ) -> None:
        super().__init__(group, settings, networks)
        self.loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma)
        self.target_update = SoftUpdate(self.loss, tau=settings.tau)
        self.buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity))
        self.updates_due = 0.0

    def minibatches(self, batch: TensorDictBase) -> Iterator[TensorDictBase]:
        """As many samples of all steps so far as this batch of steps is worth."""
        self.buffer.extend(self.group.view(batch).flatten(0, 1))
        self.updates_due += batch.numel() * self.settings.updates_per_step
        updates, size = int(self.updates_due), self.settings.batch_size
        self.updates_due -= updates
        if updates:
            # One large sample is the same as many small ones, and faster.
            yield from self.buffer.sample(updates * size).split(size)

    def step(self, minibatch: TensorDictBase) -> None:
        """One gradient step, and the target networks follow."""
        super().step(minibatch)
        self.target_update.step()


class IQLLearner(ReplayLearner):
    """Double Q-learning, explored with epsilon-greedy actions."""

    def __init__(self, group: Group, settings: IQLSettings, capacity: int) -> None:
        layout = group.layout
        spec = Categorical(layout.num_actions)
        action_value = _mlp(settings, layout.observation_shape[0], layout.num_actions)
        greedy = QValueActor(action_value, in_keys=["observation"], spec=spec, action_mask_key="action_mask")
        self.epsilon = EGreedyModule(
            spec,
            eps_init=settings.epsilon_start,
            eps_end=settings.epsilon_end,
            annealing_num_steps=settings.epsilon_steps,
            action_mask_key="action_mask",
        )
        self.policy = TensorDictSequential(greedy, self.epsilon)
        self.loss = DQNLoss(greedy, action_space=spec, delay_value=True, double_dqn=True)
        super().__init__(group, settings, [greedy.parameters()], capacity)

    def learn(self, batch: TensorDictBase) -> None:
        """Updates, then less exploration."""
        super().learn(batch)
        self.epsilon.step(batch.numel())


class ISACLearner(ReplayLearner):
    """Discrete soft actor-critic with two critics and a learnt temperature."""

    def __init__(self, group: Group, settings: ISACSettings, capacity: int) -> None:
        layout = group.layout
        self.policy = _stochastic_actor(group, settings)
        action_value = _mlp(settings, layout.observation_shape[0], layout.num_actions)
        self.loss = DiscreteSACLoss(
            self.policy,
            TensorDictModule(action_value, in_keys=["observation"], out_keys=["action_value"]),
            action_space="categorical",
            num_actions=group.num_actions,
            target_entropy_weight=settings.target_entropy_weight,
            loss_function="l2",
        )
        critics = self.loss.qvalue_network_params.parameters()
        super().__init__(group, settings, [self.policy.parameters(), critics, [self.loss.log_alpha]], capacity)


class GroupPolicies(TensorDictModuleBase):
    """Every group's policy acts for its agents.

    Keys read: ``("agents", "observation")``, ``("agents", "action_mask")``; written: ``("agents", "action")`` and, where
    policies are stochastic, ``("agents", "action_log_prob")``.
    """

    def __init__(self, groups: Sequence[Group], policies: Sequence[TensorDictModuleBase]) -> None:
        super().__init__()
        self.groups, self.policies = list(groups), nn.ModuleList(policies)
        self.written = [key for key in ("action", "action_log_prob") if key in policies[0].out_keys]
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ACTION_MASK]
        self.out_keys: list[NestedKey] = [(keys.AGENTS, key) for key in self.written]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every agent."""
        views = [
            policy(group.acting_view(tensordict)) for group, policy in zip(self.groups, self.policies, strict=True)
        ]
        for key in self.written:
            tensordict.set((keys.AGENTS, key), torch.cat([view[key] for view in views], -1))
        return tensordict


def make_learner(group: Group, settings: Settings, capacity: int) -> Learner:
    """The learner that the settings are of; ``capacity`` environment steps are replayed."""
    if isinstance(settings, PPOSettings):
        return PPOLearner(group, settings)
    if isinstance(settings, IQLSettings):
        return IQLLearner(group, settings, capacity)
    if isinstance(settings, ISACSettings):
        return ISACLearner(group, settings, capacity)
    raise ValueError(f"expected settings of one of {sorted(METHODS)}, got {settings}")


def train(
    method: str,
    env_name: str,
    *,
    seed: int,
    total_steps: int,
    checkpoints: Sequence[int],
    on_checkpoint: Callable[[int, TensorDictModuleBase], None],
    settings: Settings | None = None,
) -> None:
    """Train and show the policy along the way.

    Args:
        method: one of :data:`METHODS`.
        env_name: as given to :func:`~matwm_rl.envs.make_env`; its agents observe vectors.
        seed: of environments, networks and sampling. What ``on_checkpoint`` draws changes nothing.
        total_steps: environment steps, rounded up to whole batches; in one, all agents of one environment act.
        checkpoints: environment steps from 1 to ``total_steps``.
        on_checkpoint: given the environment steps done and the policy, when they first reach a checkpoint. The policy
            samples under ``ExplorationType.RANDOM`` and is greedy under ``DETERMINISTIC``; it goes on learning
            afterwards.
        settings: instead of the method's.

    Raises:
        ValueError: if the method is unknown, a checkpoint can not be reached, or agents observe images.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {sorted(METHODS)}")
    if unreachable := [point for point in checkpoints if not 0 < point <= total_steps]:
        raise ValueError(f"checkpoints must lie from 1 to total_steps={total_steps}, got {unreachable}")
    settings = METHODS[method] if settings is None else settings
    torch.manual_seed(seed)
    env = make_env(env_name, seed=seed, num_envs=settings.num_envs)
    layout: AgentLayout = env.layout
    if layout.is_image:
        raise ValueError(f"these baselines are MLPs and need vector observations; {env_name!r} has images")
    groups = [Group(layout, index) for index in range(len(layout.group_map))]
    learners = [make_learner(group, settings, total_steps + settings.frames_per_batch) for group in groups]
    policy = GroupPolicies(groups, [learner.policy for learner in learners])
    collector = Collector(
        env,
        policy,
        frames_per_batch=settings.frames_per_batch,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    env_steps, ahead = 0, sorted(set(checkpoints))
    for batch in collector:
        env_steps += batch.numel()
        for learner in learners:
            learner.learn(batch)
        collector.update_policy_weights_()
        if ahead and env_steps >= ahead[0]:
            ahead = [point for point in ahead if point > env_steps]
            with torch.random.fork_rng():
                on_checkpoint(env_steps, policy)
        if env_steps >= total_steps:
            break
    collector.shutdown()


def main() -> None:
    """Train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    parser.add_argument("--environment", default="mpe2/simple_tag_v3", help="a name that make_env knows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total-steps", type=int, default=25_000)
    parser.add_argument("--every", type=int, default=5_000, help="environment steps between evaluations")
    parser.add_argument("--episodes", type=int, default=50, help="of every match")
    options = parser.parse_args()
    prepare_process(num_threads=1, matmul_precision="highest")
    test_env = make_env(options.environment, seed=10_000, num_envs=10)
    print(asdict(METHODS[options.method]))
    start, evaluating = perf_counter(), 0.0

    def on_checkpoint(env_steps: int, policy: TensorDictModuleBase) -> None:
        nonlocal evaluating
        began = perf_counter()
        print(f"{env_steps} steps, {began - start - evaluating:.0f} s of training", flush=True)
        for name, exploration in (("sampled", ExplorationType.RANDOM), ("greedy", ExplorationType.DETERMINISTIC)):
            settings: dict[str, Any] = {"episodes": options.episodes, "exploration": exploration}
            print(f"  {name}: {evaluate_matches(options.environment, test_env, policy, **settings)}", flush=True)
        evaluating += perf_counter() - began

    checkpoints = [*range(options.every, options.total_steps, options.every), options.total_steps]
    train(
        options.method,
        options.environment,
        seed=options.seed,
        total_steps=options.total_steps,
        checkpoints=checkpoints,
        on_checkpoint=on_checkpoint,
    )


if __name__ == "__main__":
    main()
