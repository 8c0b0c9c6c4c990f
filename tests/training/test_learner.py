"""The two updates: what they change, by how much, and what they report."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from matwm_rl import keys
from matwm_rl.loss_functions import per_agent_mean
from matwm_rl.modules import (
    CoordinateEncoderConfig,
    GaussianLatentConfig,
    ObservationRewardConfig,
)
from matwm_rl.objectives import ActorLossConfig, MeanPolicyEntropy, Regularizer, Signalling, WorldModelLossWeights
from matwm_rl.training import Learner, guard
from tests.helpers import grads, make_learner, make_model, mock_replay, random_batch, randomize, total
from tests.training.helpers import OPTIONS, assert_same, changed_parts, learn_from, snapshot, update


def test_the_parts_get_their_settings() -> None:
    weights = WorldModelLossWeights(reconstruction=2.0, reward=3.0)
    actor = ActorLossConfig(
        entropy_coeff=0.02,
        advantage="standardize",
        objective="ppo",
        mean_policy_entropy_coeff=0.4,
        signalling_coeff=0.6,
    )
    rates = {"world_model_lr": 1e-4, "actor_lr": 2e-4, "critic_lr": 3e-4}
    learner = make_learner(horizon=7, gamma=0.9, lmbda=0.8, actor=actor, loss_weights=weights, **rates)
    assert (learner.returns.gamma, learner.returns.lmbda) == (0.9, 0.8)
    assert learner.imagination.horizon == 7 and learner.imagination.precision == learner.config.precision
    for name in ("entropy_coeff", "advantage", "objective"):
        assert getattr(learner.actor_loss, name) == getattr(actor, name), name
    bonuses = [(type(bonus), bonus.coeff) for bonus in learner.actor_loss.regularizers]
    assert bonuses == [(MeanPolicyEntropy, 0.4), (Signalling, 0.6)]
    assert len(make_learner().actor_loss.regularizers) == 0
    assert learner.world_model_loss.weights == weights
    optimizers = (learner.world_model_optimizer, learner.actor_optimizer, learner.critic_optimizer)
    assert [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers] == pytest.approx([1e-4, 2e-4, 3e-4])


def test_the_horizon_is_by_default_the_papers_for_so_many_agents() -> None:
    assert make_learner(horizon=None).imagination.horizon == 16
    assert make_learner(make_model((3,) * 4, (0,) * 4), horizon=None).imagination.horizon == 12


def test_update_changes_everything_and_reports_finite_numbers() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    before = snapshot(learner)
    metrics = update(learner, replay)
    update(learner, replay)
    assert learner.updates == 2
    parts = {"world_model", "actor", "critic", "target_critic", "return_scale"}
    assert parts <= changed_parts(learner, before)
    assert all(value.isfinite().all() and not value.requires_grad for value in metrics.values())
    losses = {"reconstruction", "reward", "continuation", "teammate", "mask", "dynamics", "representation"}
    expected = {f"loss_{name}" for name in losses | {"actor", "critic"}}
    assert expected | {"kl", "entropy", "value", "return_scale", "world_model_grad_norm"} <= set(metrics.keys())


def test_world_model_update_leaves_the_agents_and_theirs_the_world_model() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    before = snapshot(learner)
    learner.update_world_model(replay.sequences.sample())
    assert changed_parts(learner, before) == {"world_model"}
    before = snapshot(learner)
    learner.update_agents(replay.starts.sample())
    assert "world_model" not in changed_parts(learner, before)
    assert {"actor", "critic", "target_critic", "return_scale"} <= changed_parts(learner, before)
    assert all(p.requires_grad for p in learner.world_model.parameters())


def test_every_parameter_of_the_world_model_is_trained() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    learner.world_model_loss.free_nats = 0.0
    learner.update_world_model(replay.sequences.sample())
    idle = [name for name, p in learner.world_model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_one_adam_step_of_the_sum_of_the_losses() -> None:
    """Against Adam's first step by hand: lr * g / (|g| + eps)."""
    learner, batch = make_learner(**OPTIONS), random_batch()
    before = [p.detach().clone() for p in learner.world_model.parameters()]
    torch.manual_seed(2)
    gradient = grads(total(learner.world_model_loss(batch)), learner.world_model.parameters())
    torch.manual_seed(2)
    metrics = learner.update_world_model(batch)
    for old, g, new in zip(before, gradient, learner.world_model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 1e-2 * g / (g.abs() + 1e-8), rtol=1e-3, atol=1e-4)
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    torch.testing.assert_close(metrics["world_model_grad_norm"], norm)


def test_world_model_gradient_is_clipped() -> None:
    learner = make_learner(world_model_clip=1e-3)
    learner.update_world_model(random_batch())
    norm = torch.stack([p.grad.square().sum() for p in learner.world_model.parameters()]).sum().sqrt()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("share_by_group", [False, True])
def test_each_networks_gradient_is_clipped_on_its_own(share_by_group: bool) -> None:
    learner, replay = make_learner(actor_critic_clip=1e-3, share_by_group=share_by_group), mock_replay()
    learner.update_agents(replay.starts.sample())
    for optimizer in (learner.actor_optimizer, learner.critic_optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert {len(p) for p in parameters} == {2 if share_by_group else 3}
        for n in range(len(parameters[0])):
            norm = sum(float(p.grad[n].square().sum()) for p in parameters) ** 0.5
            assert norm == pytest.approx(1e-3, rel=1e-2)


def test_a_network_of_ordinary_layers_is_clipped_as_one() -> None:
    """Whatever the shapes of its weights are."""
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    network(torch.randn(5, 3)).square().sum().backward()
    guard.clipping_of(network)(list(network.parameters()), 1e-3)
    norm = torch.stack([p.grad.square().sum() for p in network.parameters()]).sum().sqrt()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_bonus_of_ones_own_changes_what_actors_learn() -> None:
    class FirstAction(Regularizer):
        def forward(self, tensordict, dist, weight, valid):
            return per_agent_mean(dist.probs[..., 0], weight, valid)

    shares = []
    for regularizers in ([], [FirstAction(100.0)]):
        first, replay = make_learner(actor_lr=1e-2), mock_replay()
        learner = Learner(first.world_model, first.actor, first.critic, first.config, regularizers=regularizers)
        for _ in range(10):
            update(learner, replay)
        imagined = learner.imagination(replay.starts.sample())
        shares.append(learner.actor.get_dist(imagined).probs[..., 0].mean())
    assert shares[1] > shares[0] + 0.2


def test_a_group_with_huge_rewards_leaves_the_update_of_the_other_alone() -> None:
    learner, twin = (make_learner(actor_critic_clip=0.1, share_by_group=True) for _ in range(2))
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    torch.manual_seed(2)
    imagined = learner.imagination(mock_replay().starts.sample())
    spoilt = imagined.clone()
    spoilt[keys.REWARD][:, :, 0] += 1e4 * torch.randn_like(spoilt[keys.REWARD][:, :, 0])
    learn_from(learner, imagined)
    learn_from(twin, spoilt)
    for one, other in ((learner.actor, twin.actor), (learner.critic, twin.critic)):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            # The prey is a group of its own, the first hunter's group has another gradient.
            torch.testing.assert_close(p[1], q[1], rtol=1e-5, atol=1e-7)
            assert not torch.equal(p.grad[0], q.grad[0])


def test_an_agent_with_huge_rewards_leaves_the_others_update_alone() -> None:
    """Gradient clip and return scale are per agent: nothing of agent 0's dreams reaches the others' step."""
    learner, twin = make_learner(actor_critic_clip=0.1), make_learner(actor_critic_clip=0.1)
    torch.manual_seed(2)
    imagined = learner.imagination(mock_replay().starts.sample())
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    spoilt = imagined.clone()
    spoilt[keys.REWARD][:, :, 0] += 1e4 * torch.randn_like(spoilt[keys.REWARD][:, :, 0])
    learn_from(learner, imagined)
    learn_from(twin, spoilt)
    for one, other in ((learner.actor, twin.actor), (learner.critic, twin.critic)):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p[1:], q[1:], rtol=1e-5, atol=1e-7)
    assert any(
        not torch.equal(p[0], q[0]) for p, q in zip(learner.critic.parameters(), twin.critic.parameters(), strict=True)
    )


def test_ema_critic_moves_by_its_decay_after_the_critics_step() -> None:
    learner, replay = make_learner(critic_decay=0.9, **OPTIONS), mock_replay()
    before = {name: value.clone() for name, value in learner.state_dict()["target_critic"].items()}
    learner.update_agents(replay.starts.sample())
    after, critic = learner.state_dict()["target_critic"], learner.critic.state_dict()
    for name, value in critic.items():
        torch.testing.assert_close(after[name], 0.9 * before[name] + 0.1 * value)
        assert not torch.equal(after[name], before[name])
    # Constants are not averaged: the bins, and where each agent's weights start.
    constants = dict(learner.critic.named_buffers())
    assert set(after) - set(critic) <= set(constants)
    for name in set(after) - set(critic):
        assert torch.equal(after[name], constants[name])


def test_training_mode_is_left_as_acting_wants_it() -> None:
    learner = make_learner(make_model(dropout=0.5))
    learner.update_world_model(random_batch())
    assert not learner.world_model.training
    modes: list[bool] = []
    learner.world_model.transformer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    learner.update_world_model(random_batch())
    assert modes == [True]


def test_updating_the_agents_is_imagining_and_one_step_of_actors_and_critics() -> None:
    learner, twin = make_learner(**OPTIONS), make_learner(**OPTIONS)
    twin.load_state_dict(snapshot(learner))
    starts = mock_replay().starts.sample()
    torch.manual_seed(5)
    metrics = learner.update_agents(starts)
    torch.manual_seed(5)
    again = learn_from(twin, twin.imagination(starts))
    assert_same(twin.state_dict(), learner.state_dict())
    assert_same(again.to_dict(), metrics.to_dict())


def test_each_of_several_steps_takes_its_part_of_what_the_same_actors_dreamt() -> None:
    """One dream, one change of the EMA critic; actors and critics step as often as asked."""
    ppo = ActorLossConfig(advantage="standardize", objective="ppo")
    learner = make_learner(**OPTIONS, agent_epochs=2, agent_minibatches=2, actor=ppo)
    imagined = learner.imagination(mock_replay().starts.sample())
    with torch.no_grad():
        chosen = learner.actor.get_dist(imagined.clone()).log_prob(imagined[keys.ACTION])
    seen = []
    forward = learner.actor_loss.forward
    learner.actor_loss.forward = lambda td: (seen.append(td[keys.ACTION_LOG_PROB].clone()), forward(td))[1]
    slow_values = []
    slow_value = learner.critic_loss.slow_value
    learner.critic_loss.slow_value = lambda td: (slow_values.append(None), slow_value(td))[1]
    target = learner.critic_loss.target_critic_network_params
    before = target.clone().flatten_keys(".")
    learn_from(learner, imagined)
    assert len(seen) == 4 and len(slow_values) == 1
    torch.testing.assert_close(torch.cat(seen), torch.cat(2 * [chosen[0::2], chosen[1::2]]))
    for optimizer in (learner.actor_optimizer, learner.critic_optimizer):
        assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    after, now = target.flatten_keys("."), learner.critic_loss.critic_network_params.flatten_keys(".")
    for name in (name for name, value in before.items() if value.is_floating_point()):
        torch.testing.assert_close(after[name], 0.98 * before[name] + 0.02 * now[name])
    assert learner.actor_loss.training


def test_there_is_no_warm_up_but_the_callers() -> None:
    """The first update already trains everything, and an update takes one step."""
    learner, replay = make_learner(**OPTIONS), mock_replay()
    before = snapshot(learner)
    update(learner, replay)
    assert {"world_model", "actor", "critic", "target_critic", "return_scale"} <= changed_parts(learner, before)
    for optimizer in (learner.world_model_optimizer, learner.actor_optimizer, learner.critic_optimizer):
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_while_the_critics_warm_up_they_alone_learn() -> None:
    learner, twin, replay = make_learner(**OPTIONS), make_learner(**OPTIONS), mock_replay()
    twin.load_state_dict(snapshot(learner))
    before, starts = snapshot(learner), replay.starts.sample()
    torch.manual_seed(5)
    metrics = learner.update_agents(starts, train_actors=False)
    assert changed_parts(learner, before) == {"critic", "target_critic"}
    assert not learner.actor_optimizer.state and learner.updates == 1
    assert {"loss_critic", "value", "imagined_reward"} == set(metrics.keys())
    # They learn what they would learn beside the actors.
    torch.manual_seed(5)
    twin.update_agents(starts)
    assert_same(twin.critic.state_dict(), learner.critic.state_dict())
    before = snapshot(learner)
    learner.update_agents(starts)
    assert {"actor", "critic", "target_critic", "return_scale"} <= changed_parts(learner, before)


def test_learning_rates_fall_with_the_root_of_the_updates() -> None:
    options = OPTIONS | {"critic_lr": 2e-3, "lr_decay_updates": 2}
    learner = make_learner(**options)
    optimizers = (learner.world_model_optimizer, learner.actor_optimizer, learner.critic_optimizer)
    replay, first = mock_replay(), [optimizer.defaults["lr"] for optimizer in optimizers]
    for number in range(3):
        update(learner, replay, train_actors=number > 0)
        now = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert now == pytest.approx([lr / math.sqrt(1.0 + number / 2) for lr in first])
    # The number of updates is all that a restored learner needs to know.
    twin = make_learner(**options)
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    update(twin, replay)
    assert twin.world_model_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / math.sqrt(1.0 + 3 / 2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"agent_epochs": 0}, "LearnerConfig.agent_epochs must be a positive integer, got 0"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be a positive integer, got 0"),
        ({"horizon": 0}, "horizon must be a positive integer, got 0"),
        ({"critic_lr": -1.0}, "critic_lr must be a positive number, got -1.0"),
        ({"actor_critic_clip": 0.0}, "actor_critic_clip must be a positive number, got 0.0"),
        ({"agent_epochs": 2}, "agent_epochs=2, .* must be 'ppo', got 'reinforce'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_learner(**setting)


@pytest.mark.parametrize(
    "options",
    [
        {"action_counts": (3,), "group_index": (0,)},
        {"teammate_predictor": False},
        {"action_scaling": False, "group_layers": False, "has_action_mask": False},
        {"reward": ObservationRewardConfig(), "reward_interpolation": "symlog"},
        {
            "latent": GaussianLatentConfig(num_dims=12),
            "encoder": CoordinateEncoderConfig(fourier_features=2),
            "reward": ObservationRewardConfig(point_size=0),
            "reencode": True,
        },
        {"observation_shape": (3, 32, 32)},
        {"observation_shape": (3, 32, 32), "latent": "gaussian"},
    ],
    ids=str,
)
def test_every_switch_trains(options: dict[str, Any]) -> None:
    learner = make_learner(make_model(**options), **OPTIONS)
    data = {key: options[key] for key in ("action_counts", "observation_shape") if key in options}
    before = snapshot(learner)
    learner.update_world_model(random_batch(2, 5, **data))
    metrics = learner.update_agents(random_batch(4, 4, **data))
    assert all(value.isfinite().all() for value in metrics.values())
    assert {"world_model", "actor", "critic"} <= changed_parts(learner, before)
    assert all(p.isfinite().all() for p in learner.world_model.parameters())


def test_the_model_learns_what_the_mock_environment_does() -> None:
    """A smoke test with teeth: after some updates the losses that can fall have fallen far."""
    learner, replay = make_learner(randomize(make_model(hidden_size=32), 0.0), world_model_lr=3e-3), mock_replay()
    history = [learner.update_world_model(replay.sequences.sample()) for _ in range(150)]
    first, last = (torch.stack(part).mean(0) for part in (history[:5], history[-5:]))
    assert last["loss_reconstruction"] < 0.3 * first["loss_reconstruction"]
    factors = {"reconstruction": 0.3, "reward": 0.3, "continuation": 0.5, "mask": 0.8, "dynamics": 0.8, "teammate": 0.9}
    for name, factor in factors.items():
        assert last[f"loss_{name}"] < factor * first[f"loss_{name}"], name
