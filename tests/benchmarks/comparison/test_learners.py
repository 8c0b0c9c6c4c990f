"""The baselines are their textbook algorithms: targets and losses against loops over steps and agents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from learners import LEARNERS, METHODS, Group, Settings
from model_free import GroupPolicies
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl.envs import AgentLayout, make_env

N, A, D = 3, 4, 5
"""Of the mock environment: agents, actions of the one that has most, size of the largest observation."""
HUNTERS, PREY = 0, 1
GAMMA = METHODS["iql"].gamma


def layout() -> AgentLayout:
    return make_env("mock").layout


def small(method: str, **overrides: Any) -> Settings:
    return replace(METHODS[method], **({"num_cells": (16,), "frames_per_batch": 20} | overrides))


def make_learner(method: str, group: int = HUNTERS, **overrides: Any) -> Any:
    settings = small(method, **overrides)
    learner = LEARNERS[type(settings)](Group(layout(), group), settings)
    # Targets and networks that agree would hide which of them is asked.
    with torch.no_grad():
        for tensor in weights(learner.loss).values():
            tensor.add_(0.3 * torch.randn_like(tensor))
    return learner


def weights(loss: nn.Module) -> dict[str, Tensor]:
    """All that networks and targets are made of, and the temperature, by name."""
    named = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items() if "network_params" in name or name == "log_alpha"}


def network(loss: nn.Module, name: str, which: int | None = None) -> Callable[[Tensor], Tensor]:
    """One network of a loss, computed by hand from its two layers; ``which`` of an ensemble."""
    found = [tensor for key, tensor in weights(loss).items() if key.startswith(f"{name}_params.")]
    w1, b1, w2, b2 = found if which is None else [tensor[which] for tensor in found]
    return lambda x: w2 @ (w1 @ x + b1).relu() + b2


def log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")).log_softmax(-1)


def masks(*batch: int) -> Tensor:
    """Random legal actions, at least one for each agent; the prey has no last one."""
    mask = torch.rand(*batch, N, A) < 0.5
    mask[..., 2, A - 1] = False
    return mask.scatter(-1, torch.randint(A - 1, (*batch, N, 1)), True)


def collected(E: int = 4, T: int = 9) -> TensorDict:
    """Random steps with both kinds of ends, some in the midst, and deaths."""
    mask = masks(E, T)
    done = torch.rand(E, T, 1) < 0.4
    agents = {
        "observation": torch.randn(E, T, N, D),
        "action_mask": mask,
        "action": torch.multinomial(mask.flatten(0, 2).float(), 1).view(E, T, N),
        "action_log_prob": -torch.rand(E, T, N),
        "alive": torch.ones(E, T, N, dtype=torch.bool),
    }
    after = {
        "observation": torch.randn(E, T, N, D),
        "action_mask": masks(E, T),
        "alive": torch.rand(E, T, N) < 0.8,
        "reward": torch.randn(E, T, N, 1),
    }
    ends = {"done": done, "terminated": done & (torch.rand(E, T, 1) < 0.5)}
    return TensorDict({"agents": agents, "next": {"agents": after, **ends}}, batch_size=[E, T])


@pytest.mark.parametrize("method", METHODS)
def test_groups_share_nothing(method: str) -> None:
    hunters, prey = make_learner(method, HUNTERS), make_learner(method, PREY)
    before = [{name: tensor.clone() for name, tensor in weights(group.loss).items()} for group in (hunters, prey)]
    hunters.learn(collected())
    assert not any(before[0][name].equal(tensor) for name, tensor in weights(hunters.loss).items())
    assert all(before[1][name].equal(tensor) for name, tensor in weights(prey.loss).items())


@pytest.mark.parametrize("method", METHODS)
def test_agents_of_a_group_share_their_network(method: str) -> None:
    learners = [make_learner(method, group) for group in (HUNTERS, PREY)]
    policies = GroupPolicies([learner.group for learner in learners], [learner.policy for learner in learners])
    mask = torch.tensor([True, True, True, False]).expand(100, N, A)
    same = TensorDict({"observation": torch.randn(100, 1, D).expand(-1, N, -1), "action_mask": mask})
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = policies(TensorDict({"agents": same}, batch_size=[100]))["agents", "action"]
    assert action[:, 0].equal(action[:, 1])
    assert not action[:, 0].equal(action[:, 2])


@pytest.mark.parametrize("exploration", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
@pytest.mark.parametrize("method", METHODS)
def test_illegal_actions_are_never_chosen(method: str, exploration: ExplorationType) -> None:
    learners = [make_learner(method, group) for group in (HUNTERS, PREY)]
    policies = GroupPolicies([learner.group for learner in learners], [learner.policy for learner in learners])
    batch = collected(50, 20).select("agents")
    batch["agents"] = batch["agents"].select("observation", "action_mask")
    mask = batch["agents", "action_mask"]
    with set_exploration_type(exploration):
        first = policies(batch.copy())["agents", "action"].clone()
        second = policies(batch.copy())["agents", "action"]
    assert mask.gather(-1, first.unsqueeze(-1)).all()
    assert first.equal(second) == (exploration == ExplorationType.DETERMINISTIC)
    # Every action that is legal somewhere is also taken, except perhaps by one who is greedy.
    if exploration == ExplorationType.RANDOM:
        assert first[..., :2].unique().tolist() == [0, 1, 2, 3] and first[..., 2].unique().tolist() == [0, 1, 2]


def test_epsilon_falls_linearly_with_env_steps() -> None:
    learner = make_learner("iql", epsilon_steps=100)
    batch = collected(4, 10)
    found = []
    for _ in range(4):
        found.append(float(learner.explorer.eps))
        learner.learn(batch)
    torch.testing.assert_close(found, [1.0, 0.62, 0.24, 0.05], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["mappo", "ippo"])
def test_advantages_bootstrap_at_truncation_and_not_at_termination(method: str, float64: None) -> None:
    learner, batch = make_learner(method, lmbda=0.8), collected()
    view, critic = learner.with_advantage(batch), network(learner.loss, "critic_network")

    def value(observation: Tensor, agent: int) -> float:
        everything = torch.cat([observation.flatten(), torch.eye(2)[agent]])
        return float(critic(everything if method == "mappo" else observation[agent]))

    for e, agent in product(range(batch.shape[0]), range(2)):
        advantage = 0.0
        for t in reversed(range(batch.shape[1])):
            step = batch[e, t]
            dead = not step["next", "agents", "alive"][agent]
            now, after = (value(tensordict["agents", "observation"], agent) for tensordict in (step, step["next"]))
            bootstrap = 0.0 if step["next", "terminated"] or dead else GAMMA * after
            delta = float(step["next", "agents", "reward"][agent]) + bootstrap - now
            advantage = delta + (0.0 if step["next", "done"] or dead else GAMMA * 0.8 * advantage)
            assert float(view["advantage"][e, t, agent]) == pytest.approx(advantage)
            assert float(view["value_target"][e, t, agent]) == pytest.approx(advantage + now)


@pytest.mark.parametrize(("method", "depends"), [("mappo", True), ("ippo", False)])
def test_only_a_central_critic_sees_the_others(method: str, depends: bool) -> None:
    learner, batch = make_learner(method), collected()
    before = learner.with_advantage(batch.clone())["state_value"]
    batch["agents", "observation"][..., 2, :] += 1.0  # the prey's, of which the hunters' critic is asked
    assert (not learner.with_advantage(batch)["state_value"].allclose(before)) == depends


def test_ppo_sees_every_step_once_an_epoch() -> None:
    learner = make_learner("ippo", minibatch_size=5, epochs=3)
    batch = collected(4, 5)
    rewards = torch.stack([minibatch["next", "reward"] for minibatch in learner.minibatches(batch)])
    assert rewards.shape == (12, 5, 2, 1)
    expected = batch["next", "agents", "reward"][:, :, :2].flatten(0, 1)
    for epoch in rewards.view(3, 20, 2, 1):
        assert epoch[:, 0, 0].sort().values.equal(expected[:, 0, 0].sort().values)
        assert epoch.sum(1).flatten().sort().values.equal(expected.sum(1).flatten().sort().values)


def test_ppo_loss_is_the_clipped_one(float64: None) -> None:
    learner = make_learner("ippo")
    view = learner.with_advantage(collected()).flatten(0, 1)
    view["value_target"] = torch.randn_like(view["value_target"])
    actor, critic = network(learner.loss, "actor_network"), network(learner.loss, "critic_network")
    objectives, entropies, errors = [], [], []
    for step in view.flatten().unbind(0):
        log_probs = log_softmax(actor(step["observation"]), step["action_mask"])
        ratio, advantage = (log_probs[step["action"]] - step["action_log_prob"]).exp(), step["advantage"]
        objectives.append(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
        entropies.append(-sum(p.exp() * p for p in log_probs[step["action_mask"]]))
        errors.append((critic(step["observation"]) - step["value_target"]).square())
    losses = learner.loss(view)
    torch.testing.assert_close(losses["loss_objective"], -torch.stack(objectives).mean())
    torch.testing.assert_close(losses["loss_entropy"], -0.01 * torch.stack(entropies).mean())
    torch.testing.assert_close(losses["loss_critic"], torch.stack(errors).mean())


def replayed(learner: Any) -> TensorDictBase:
    """A view of random steps ``[B, n]``, some with one legal action next."""
    view = learner.group.view(collected()).flatten(0, 1)
    view["next", "action_mask"][:3] = torch.tensor([False, True, False, False])
    return view


def test_q_learning_targets_are_double_legal_and_end_at_terminations(float64: None) -> None:
    learner = make_learner("iql")
    view = replayed(learner)
    q, target = network(learner.loss, "value_network"), network(learner.loss, "target_value_network")
    errors = []
    for step in view.flatten().unbind(0):
        after = step["next"]
        legal = after["action_mask"].nonzero().squeeze(-1)
        best = legal[q(after["observation"])[legal].argmax()]
        bootstrap = 0.0 if after["terminated"] else target(after["observation"])[best]
        errors.append(q(step["observation"])[step["action"]] - after["reward"] - GAMMA * bootstrap)
    torch.testing.assert_close(learner.loss(view)["loss"], torch.stack(errors).square().mean())


def test_soft_actor_critic_loss_is_its_expectation_over_legal_actions(float64: None) -> None:
    learner = make_learner("isac")
    loss, view = learner.loss, replayed(learner)
    actor, log_alpha = network(loss, "actor_network"), weights(loss)["log_alpha"]
    critics, targets = ([network(loss, f"{kind}qvalue_network", i) for i in range(2)] for kind in ("", "target_"))

    def expectation(observation: Tensor, mask: Tensor, critics: Any, value: Any) -> Tensor:
        log_probs = log_softmax(actor(observation), mask)
        lowest = torch.minimum(*(critic(observation) for critic in critics))
        return sum(log_probs[a].exp() * value(log_probs[a], lowest[a]) for a in mask.nonzero().squeeze(-1))

    def soft_value(step: TensorDictBase, critics: Any) -> Tensor:
        soft = lambda log_prob, q: q - log_alpha.exp() * log_prob  # noqa: E731
        return expectation(step["observation"], step["action_mask"], critics, soft)

    q_losses, actor_losses, alpha_losses = [], [], []
    for step in view.flatten().unbind(0):
        after = step["next"]
        aim = after["reward"] + (0.0 if after["terminated"] else GAMMA * soft_value(after, targets))
        q_losses.append(sum((critic(step["observation"])[step["action"]] - aim).square() for critic in critics))
        actor_losses.append(-soft_value(step, critics))
        entropy = expectation(step["observation"], step["action_mask"], critics, lambda log_prob, q: -log_prob)
        alpha_losses.append(log_alpha * (entropy - 0.2 * math.log(4)))
    losses = loss(view)
    torch.testing.assert_close(losses["loss_qvalue"], torch.stack(q_losses).mean())
    torch.testing.assert_close(losses["loss_actor"], torch.stack(actor_losses).mean())
    torch.testing.assert_close(losses["loss_alpha"], torch.stack(alpha_losses).mean())


@pytest.mark.parametrize("method", ["iql", "isac"])
def test_values_of_illegal_actions_change_no_loss(method: str) -> None:
    learner = make_learner(method, PREY)
    view = replayed(learner)
    before = learner.loss(view.clone())
    for name, tensor in weights(learner.loss).items():
        if name.endswith("2.bias"):
            tensor[..., 3] += 100.0  # the prey has three actions
    torch.testing.assert_close(learner.loss(view).to_dict(), before.to_dict())


@pytest.mark.parametrize("method", ["iql", "isac"])
def test_replay_updates_follow_env_steps(method: str) -> None:
    learner, batch = make_learner(method, updates_per_step=0.3, batch_size=7, tau=0.1), collected(4, 10)[:, :5]
    sizes = [[len(minibatch) for minibatch in learner.minibatches(batch)] for _ in range(3)]
    assert sizes == [[7] * 6] * 3
    short = [len(list(learner.minibatches(batch[:, :1]))) for _ in range(5)]
    assert short == [1, 1, 2, 1, 1]
    old = {name: tensor.clone() for name, tensor in weights(learner.loss).items()}
    learner.step(learner.buffer.sample(7))
    for name, tensor in weights(learner.loss).items():
        if name.startswith("target_"):
            now = weights(learner.loss)[name.removeprefix("target_")]
            torch.testing.assert_close(tensor, 0.9 * old[name] + 0.1 * now)
