"""The baselines for continuous actions: bounded, padded with zeros, learning, and refused where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import model_free
import pytest
import torch
from continuous_learners import BOX_METHODS, make_learners
from learners import METHODS, Learner, Settings
from model_free import GroupPolicies, method_settings
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl.envs import AgentLayout, make_env
from matwm_rl.evaluation import RandomActions, evaluate

N, A, D = 3, 2, 5
"""Of the mock environment: agents, numbers of a hunter's action (the prey's has one), size of an observation."""
CONTINUOUS = {"continuous": True}
STOCHASTIC, GREEDY = ExplorationType.RANDOM, ExplorationType.DETERMINISTIC


def layout() -> AgentLayout:
    return make_env("mock", **CONTINUOUS).layout


def small(method: str, **overrides: Any) -> Settings:
    return replace(BOX_METHODS[method], **({"num_cells": (16,), "frames_per_batch": 20} | overrides))


def policies(learners: list[Learner]) -> GroupPolicies:
    return GroupPolicies([learner.group for learner in learners], [learner.policy for learner in learners])


def observed(*batch: int) -> TensorDict:
    agents = {"observation": torch.randn(*batch, N, D), "action_mask": layout().actions.legal().expand(*batch, N, A)}
    return TensorDict({"agents": TensorDict(agents, batch)}, batch)


def collected(policy: GroupPolicies, E: int = 4, T: int = 10) -> TensorDict:
    """Steps with both kinds of ends and deaths, acted on by a policy."""
    batch, after = observed(E, T), observed(E, T)
    batch["agents", "alive"] = torch.ones(E, T, N, dtype=torch.bool)
    after["agents", "alive"] = torch.rand(E, T, N) < 0.8
    after["agents", "reward"] = torch.randn(E, T, N, 1)
    after["done"] = torch.rand(E, T, 1) < 0.4
    after["terminated"] = after["done"] & (torch.rand(E, T, 1) < 0.5)
    return policy(batch).set("next", after)


@pytest.mark.parametrize("exploration", [STOCHASTIC, GREEDY])
@pytest.mark.parametrize("method", BOX_METHODS)
def test_actions_are_bounded_and_padded_with_zeros(method: str, exploration: ExplorationType) -> None:
    policy = policies(make_learners(layout(), small(method)))
    batch = observed(50, 20)
    with set_exploration_type(exploration):
        first, second = policy(batch.copy()), policy(batch.copy())
    action = first["agents", "action"]
    assert action.shape == (50, 20, N, A) and action.dtype == torch.float32
    assert layout().actions.problem(action) is None
    assert first["agents", "action_log_prob"].shape == (50, 20, N)
    own = layout().actions.legal().expand_as(action)
    assert (action[~own] == 0).all() and (action[own] != 0).all()
    assert action.equal(second["agents", "action"]) == (exploration == GREEDY)


@pytest.mark.parametrize("method", BOX_METHODS)
def test_agents_of_a_group_share_their_network(method: str) -> None:
    batch = observed(100)
    batch["agents", "observation"] = torch.randn(100, 1, D).expand(-1, N, -1)
    with set_exploration_type(GREEDY):
        action = policies(make_learners(layout(), small(method)))(batch)["agents", "action"]
    assert action[:, 0].equal(action[:, 1])
    assert not action[:, 0].equal(action[:, 2])


@pytest.mark.parametrize("method", BOX_METHODS)
def test_a_group_learns_and_leaves_the_others_alone(method: str) -> None:
    learners = make_learners(layout(), small(method))
    batch = collected(policies(learners))
    before = [[p.detach().clone() for network in one.networks for p in network] for one in learners]
    learners[0].learn(batch)
    after = [[p.detach() for network in one.networks for p in network] for one in learners]
    assert not any(map(torch.equal, before[0], after[0]))
    assert all(map(torch.equal, before[1], after[1]))


def test_a_group_learns_from_its_own_numbers() -> None:
    learners = make_learners(layout(), small("ippo"))
    batch = collected(policies(learners))
    hunters, prey = (learner.group.view(batch) for learner in learners)
    assert hunters["action"].equal(batch["agents", "action"][..., :2, :])
    assert prey["action"].equal(batch["agents", "action"][..., 2:, :1])
    # Nothing has been learnt yet, so that what was done is as likely as it was.
    for view, learner in ((hunters, learners[0]), (prey, learners[1])):
        log_prob = learner.policy.get_dist(view).log_prob(view["action"])
        torch.testing.assert_close(log_prob, view["action_log_prob"], rtol=1e-3, atol=1e-3)


def test_the_values_of_last_steps_are_their_rewards() -> None:
    learners = make_learners(layout(), small("isac"))
    view, loss = learners[0].group.view(collected(policies(learners))).flatten(0, 1), learners[0].loss
    view["next", "terminated"][:] = view["next", "done"][:] = True
    expected = 0.0
    for params in loss.qvalue_network_params.unbind(0):
        with params.to_module(loss.qvalue_network):
            value = loss.qvalue_network(view.copy())["state_action_value"]
        expected += (value - view["next", "reward"]).square().mean()
    assert len(loss.qvalue_network_params) == 2
    torch.testing.assert_close(loss(view)["loss_qvalue"], expected)


def test_the_temperature_falls_where_there_is_too_much_entropy() -> None:
    for target, sign in ((-5.0, 1.0), (5.0, -1.0)):
        learners = make_learners(layout(), small("isac", target_entropy=target))
        view, loss = learners[0].group.view(collected(policies(learners))).flatten(0, 1), learners[0].loss
        loss(view)["loss_alpha"].backward()
        assert loss.log_alpha.grad.sign() == sign
        assert loss.target_entropy == target * A


@pytest.mark.parametrize("method", ["ippo", "isac"])
def test_methods_learn(method: str) -> None:
    # Reward grows with the numbers of an action: 12 + 12 + 36 at best, 18 for random actions.
    env, found = make_env("mock", seed=1, **CONTINUOUS), []

    def on_checkpoint(_: int, policy: nn.Module) -> None:
        found.append(float(evaluate(env, policy, exploration=GREEDY).values.sum(-1).mean()))

    faster = {"minibatch_size": 50, "epochs": 5} if "ppo" in method else {"updates_per_step": 0.2}
    settings = small(method, frames_per_batch=100, lr=1e-2, **faster)
    plan = {"seed": 0, "total_steps": 500, "checkpoints": [500], "settings": settings}
    model_free.train(method, "mock", **plan, on_checkpoint=on_checkpoint, env_kwargs=CONTINUOUS)
    random = float(evaluate(env, RandomActions(env.layout.actions)).values.sum(-1).mean())
    assert found[0] > random + 0.4 * (60.0 - random)


def test_q_learning_refuses_continuous_actions() -> None:
    plan: dict[str, Any] = {"seed": 0, "total_steps": 20, "checkpoints": [20], "on_checkpoint": lambda *_: None}
    message = "'iql' learns discrete actions only; \\['ippo', 'isac', 'mappo'\\] learn continuous ones too"
    with pytest.raises(ValueError, match=message):
        model_free.train("iql", "mock", **plan, env_kwargs=CONTINUOUS)
    with pytest.raises(ValueError, match=message):
        method_settings("iql", continuous=True)


def test_settings_for_other_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="IQLSettings are not settings of a method for continuous actions"):
        make_learners(layout(), METHODS["iql"])
    with pytest.raises(ValueError, match="BoxISACSettings are not settings of a method for discrete actions"):
        make_learners(make_env("mock").layout, BOX_METHODS["isac"])
    assert method_settings("isac", continuous=False) is METHODS["isac"]
    assert method_settings("isac", continuous=True) is BOX_METHODS["isac"]
