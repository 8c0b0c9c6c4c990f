from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from matwm_rl import keys
from matwm_rl.objectives import WorldModelLossWeights
from matwm_rl.training.learner import Learner
from tests.helpers import LATENTS, grads, make_learner, make_model, mock_replay, random_batch, randomize, total

OPTIONS = {"world_model_lr": 1e-2, "actor_critic_lr": 1e-2}


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, with the loader that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """All entries of a state dict that are no containers."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{path}/{i}").items()}
    return {path: tree}


def assert_same(one: Any, other: Any) -> None:
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        same = torch.equal(value, other[path]) if isinstance(value, Tensor) else value == other[path]
        assert same, path


def snapshot(learner: Learner) -> dict[str, Any]:
    return copy.deepcopy(learner.state_dict())


def changed_parts(learner: Learner, before: dict[str, Any]) -> set[str]:
    after = learner.state_dict()
    return {
        part
        for part in before
        if any(
            not torch.equal(value, leaves(after[part])[path])
            for path, value in leaves(before[part]).items()
            if isinstance(value, Tensor) and path in leaves(after[part])
        )
    }


def test_the_parts_get_their_settings() -> None:
    weights = WorldModelLossWeights(reconstruction=2.0, reward=3.0)
    learner = make_learner(
        horizon=7,
        gamma=0.9,
        lmbda=0.8,
        entropy_coeff=0.02,
        center_advantage=True,
        standardize_advantage=True,
        clip_epsilon=0.3,
        mean_policy_entropy_coeff=0.4,
        signalling_coeff=0.6,
        signalling_tolerance=0.05,
        free_nats=0.7,
        loss_weights=weights,
        world_model_lr=1e-4,
        actor_critic_lr=2e-4,
        critic_lr=3e-4,
    )
    settings = learner.config
    of_actor = [
        "entropy_coeff",
        "center_advantage",
        "standardize_advantage",
        "clip_epsilon",
        "mean_policy_entropy_coeff",
        "signalling_coeff",
        "signalling_tolerance",
    ]
    for part, names in (
        (learner.actor_loss, of_actor),
        (learner.returns, ["gamma", "lmbda"]),
        (learner.imagination, ["horizon", "precision"]),
        (learner.world_model_loss, ["free_nats"]),
    ):
        for name in names:
            assert getattr(part, name) == getattr(settings, name), name
    assert learner.world_model_loss.weights == weights
    optimizers = (learner.world_model_optimizer, learner.actor_optimizer, learner.critic_optimizer)
    assert [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers] == pytest.approx([1e-4, 2e-4, 3e-4])


def test_update_changes_everything_and_reports_finite_numbers() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    before = snapshot(learner)
    metrics = learner.update(replay)
    learner.update(replay)
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
    learner, replay = make_learner(free_nats=0.0, **OPTIONS), mock_replay()
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


def test_a_group_with_huge_rewards_leaves_the_update_of_the_other_alone() -> None:
    learner, twin = (make_learner(actor_critic_clip=0.1, share_by_group=True) for _ in range(2))
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    torch.manual_seed(2)
    imagined = learner.imagination(mock_replay().starts.sample())
    spoilt = imagined.clone()
    spoilt[keys.REWARD][:, :, 0] += 1e4 * torch.randn_like(spoilt[keys.REWARD][:, :, 0])
    learner.update_actor_critic(imagined)
    twin.update_actor_critic(spoilt)
    for one, other in ((learner.actor, twin.actor), (learner.critic, twin.critic)):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            # The prey is a group of its own, the first hunter's group has another gradient.
            torch.testing.assert_close(p[1], q[1], rtol=1e-5, atol=1e-7)
            assert not torch.equal(p.grad[0], q.grad[0])


def test_an_agent_with_huge_rewards_leaves_the_others_update_alone() -> None:
    """Gradient clip and return scale are per agent: nothing of agent 0's dreams reaches the others' step."""
    learner, twin = make_learner(actor_critic_clip=0.1), make_learner(actor_critic_clip=0.1)
    starts = mock_replay().starts.sample()
    torch.manual_seed(2)
    imagined = learner.imagination(starts)
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    spoilt = imagined.clone()
    spoilt[keys.REWARD][:, :, 0] += 1e4 * torch.randn_like(spoilt[keys.REWARD][:, :, 0])
    for one, rollout in ((learner, imagined), (twin, spoilt)):
        one.imagination = lambda _, rollout=rollout: rollout.clone()
        one.update_agents(starts)
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
    again = twin.update_actor_critic(twin.imagination(starts))
    assert_same(twin.state_dict(), learner.state_dict())
    assert_same(again.to_dict(), metrics.to_dict())


# -- bfloat16 --------------------------------------------------------------------------------------------------------


def test_several_steps_on_one_rollout_keep_to_the_actors_that_dreamt_it() -> None:
    """One dream, one change of return scale and EMA critic; actors and critics step as often as asked."""
    learner = make_learner(**OPTIONS, agent_epochs=3, standardize_advantage=True)
    imagined = learner.imagination(mock_replay().starts.sample())
    with torch.no_grad():
        chosen = learner.actor.get_dist(imagined.clone()).log_prob(imagined[keys.ACTION])
    seen = []
    forward = learner.actor_loss.forward
    learner.actor_loss.forward = lambda td: (seen.append(td[keys.ACTION_LOG_PROB].clone()), forward(td))[1]
    slow_values = []
    slow_value = learner.critic_loss.slow_value
    learner.critic_loss.slow_value = lambda td: (slow_values.append(None), slow_value(td))[1]
    measured = []
    update = learner.actor_loss.return_scale.update
    learner.actor_loss.return_scale.update = lambda *args: (measured.append(args), update(*args))
    target = learner.critic_loss.target_critic_network_params
    before = target.clone().flatten_keys(".")
    learner.update_actor_critic(imagined)
    assert len(seen) == 3 and len(measured) == len(slow_values) == 1
    for log_prob in seen:
        torch.testing.assert_close(log_prob, chosen)
    for optimizer in (learner.actor_optimizer, learner.critic_optimizer):
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    after, now = target.flatten_keys("."), learner.critic_loss.critic_network_params.flatten_keys(".")
    for name in (name for name, value in before.items() if value.is_floating_point()):
        torch.testing.assert_close(after[name], 0.98 * before[name] + 0.02 * now[name])
    assert learner.actor_loss.training


def test_warm_ups_come_first_and_once() -> None:
    learner = make_learner(**OPTIONS, world_model_warmup=4, critic_warmup=2)
    replay = mock_replay()

    def world_model_steps() -> int:
        return max(int(state["step"]) for state in learner.world_model_optimizer.state.values())

    for update in range(3):
        before = snapshot(learner)
        learner.update(replay)
        assert world_model_steps() == 4 + update + 1
        assert ("actor" in changed_parts(learner, before)) == (update >= 2)
        assert "critic" in changed_parts(learner, before)


def test_learning_rates_fall_with_the_root_of_the_updates() -> None:
    learner = make_learner(**OPTIONS, critic_lr=2e-3, critic_warmup=2, lr_decay_updates=2)
    optimizers = (learner.world_model_optimizer, learner.actor_optimizer, learner.critic_optimizer)
    replay, first = mock_replay(), [optimizer.defaults["lr"] for optimizer in optimizers]
    for update in range(3):
        learner.update(replay)
        now = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert now == pytest.approx([lr / math.sqrt(1.0 + update / 2) for lr in first])
    # The number of updates is all that a restored learner needs to know.
    twin = make_learner(**OPTIONS, critic_lr=2e-3, critic_warmup=2, lr_decay_updates=2)
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    twin.update(replay)
    assert twin.world_model_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / math.sqrt(1.0 + 3 / 2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"agent_epochs": 0}, "agent_epochs must be positive, got 0"),
        ({"lr_decay_updates": 0}, "lr_decay_updates must be positive, got 0"),
        ({"critic_lr": -1.0}, "critic_lr must be positive, got -1.0"),
        ({"actor_critic_clip": 0.0}, "actor_critic_clip must be positive, got 0.0"),
        ({"critic_warmup": -1}, "critic_warmup must not be negative, got -1"),
        ({"world_model_warmup": -1}, "world_model_warmup must not be negative, got -1"),
        ({"free_nats": -0.5}, "free_nats must not be negative, got -0.5"),
        ({"clip_epsilon": -0.2}, "clip_epsilon must not be negative, got -0.2"),
        ({"signalling_tolerance": -0.1}, "signalling_tolerance must not be negative, got -0.1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_learner(**setting)


def test_a_restored_learner_acts_as_the_one_that_was_saved() -> None:
    learner, restored = make_learner(**OPTIONS), make_learner(**OPTIONS)
    learner.update(mock_replay())
    restored.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert not learner.world_model.training
    assert not restored.world_model.training


def make_pair(latent: str) -> tuple[Learner, Learner]:
    """The same networks, updated in float32 and in bfloat16."""
    torch.manual_seed(1)
    pair = [make_learner(make_model(latent=latent), precision=name) for name in ("float32", "bfloat16")]
    pair[1].load_state_dict(snapshot(pair[0]))
    return pair[0], pair[1]


def assert_near(rough: TensorDict, precise: TensorDict, relative: float) -> None:
    """Alike, but not the same: the products were taken in another precision."""
    losses = [key for key in precise.keys() if key.startswith("loss_")]
    assert losses and set(rough.keys()) == set(precise.keys())
    for key in losses:
        assert rough[key].dtype == torch.float32
        assert rough[key].item() == pytest.approx(precise[key].item(), rel=relative, abs=1e-3), key
    assert any(rough[key].item() != precise[key].item() for key in losses)


@pytest.mark.parametrize("latent", LATENTS)
def test_losses_in_bfloat16_are_near_those_in_float32(latent: str) -> None:
    precise, rough = make_pair(latent)
    sequences, starts = random_batch(40, 8), random_batch(60, 4)
    metrics = []
    for learner in (precise, rough):
        torch.manual_seed(5)
        metrics.append(learner.update_world_model(sequences))
    assert_near(metrics[1], metrics[0], 0.03)
    imagined = precise.imagination(starts)
    metrics = [learner.update_actor_critic(imagined.clone()) for learner in (precise, rough)]
    assert_near(metrics[1], metrics[0], 0.03)


@pytest.mark.parametrize("latent", LATENTS)
def test_a_whole_update_in_bfloat16_keeps_everything_that_lasts_in_float32(latent: str) -> None:
    _, learner = make_pair(latent)
    replay = mock_replay()
    products: set[tuple[str, bool, torch.dtype]] = set()
    linears = {
        "transformer": learner.world_model.transformer.blocks[0].qkv,
        "actor": learner.actor[0].module.mlp[-1],
        "critic": learner.critic[0].module.mlp[-1],
    }
    for name, linear in linears.items():
        linear.register_forward_hook(
            lambda _module, _inputs, out, name=name: products.add((name, torch.is_grad_enabled(), out.dtype))
        )
    before = snapshot(learner)
    for _ in range(2):
        metrics = learner.update(replay)
    # Both where they are trained and where they dream, act in dreams and evaluate them.
    assert products == {(name, grad, torch.bfloat16) for name in linears for grad in (True, False)}
    parts = {"world_model", "actor", "critic", "target_critic", "return_scale"}
    assert parts <= changed_parts(learner, before)
    for path, value in leaves(learner.state_dict()).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert value.dtype == torch.float32 and value.isfinite().all(), path
    for key, value in metrics.items():
        assert value.dtype == torch.float32 and value.isfinite().all(), key


@pytest.mark.parametrize("latent", LATENTS)
def test_in_bfloat16_too_every_parameter_is_trained(latent: str) -> None:
    """Weights cast for a pass without gradient must not stand in for those of the pass that trains them."""
    learner = make_learner(make_model(latent=latent), free_nats=0.0, precision="bfloat16", **OPTIONS)
    replay = mock_replay()
    learner.update_world_model(replay.sequences.sample())
    learner.update_agents(replay.starts.sample())
    for name in ("world_model", "actor", "critic"):
        parameters = getattr(learner, name).named_parameters()
        idle = [path for path, p in parameters if p.grad is None or not p.grad.any() or p.grad.dtype != torch.float32]
        assert not idle, name


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'float16'"):
        make_learner(precision="float16").update_world_model(random_batch())


# -- checkpoints -----------------------------------------------------------------------------------------------------


def update_from(learner: Learner, sequences: TensorDict, starts: TensorDict, seed: int) -> None:
    torch.manual_seed(seed)
    learner.update_world_model(sequences)
    learner.update_agents(starts)
    learner.updates += 1


@pytest.mark.parametrize("share_by_group", [False, True])
def test_resumed_learner_goes_on_exactly(share_by_group: bool) -> None:
    learner, replay = make_learner(share_by_group=share_by_group, **OPTIONS), mock_replay()
    data = [(replay.sequences.sample(), replay.starts.sample()) for _ in range(5)]
    for seed, (sequences, starts) in enumerate(data[:3]):
        update_from(learner, sequences, starts, seed)
    state = saved(learner.state_dict())
    resumed = make_learner(share_by_group=share_by_group, **OPTIONS)
    resumed.load_state_dict(state)
    assert_same(resumed.state_dict(), learner.state_dict())
    for seed, (sequences, starts) in enumerate(data[3:]):
        update_from(learner, sequences, starts, seed)
        update_from(resumed, sequences, starts, seed)
    assert_same(resumed.state_dict(), learner.state_dict())
    assert resumed.updates == 5


def test_loading_keeps_the_objects_and_their_ties() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    learner.update(replay)
    state = saved(learner.state_dict())
    resumed = make_learner(**OPTIONS)
    objects = [
        id(p) for p in (*resumed.world_model.parameters(), *resumed.actor.parameters(), *resumed.critic.parameters())
    ]
    resumed.load_state_dict(state)
    assert objects == [
        id(p) for p in (*resumed.world_model.parameters(), *resumed.actor.parameters(), *resumed.critic.parameters())
    ]
    before = snapshot(resumed)
    resumed.update(replay)
    # The optimizers still step what acts, dreams and evaluates, and the EMA copy still follows.
    assert {"world_model", "actor", "critic", "target_critic"} <= changed_parts(resumed, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copied_learner_goes_on_exactly_and_leaves_the_original_alone(copied: Callable[[Learner], Learner]) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    data = [(replay.sequences.sample(), replay.starts.sample()) for _ in range(4)]
    for seed, (sequences, starts) in enumerate(data[:2]):
        update_from(learner, sequences, starts, seed)
    before, other = snapshot(learner), copied(learner)
    for seed, (sequences, starts) in enumerate(data[2:]):
        update_from(other, sequences, starts, seed)
    assert_same(learner.state_dict(), before)
    for seed, (sequences, starts) in enumerate(data[2:]):
        update_from(learner, sequences, starts, seed)
    assert_same(other.state_dict(), learner.state_dict())


def test_state_of_another_size_is_refused() -> None:
    state = make_learner().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_learner(make_model(hidden_size=32)).load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {"action_counts": (3,), "group_index": (0,)},
        {"teammate_predictor": False},
        {"action_scaling": False, "group_layers": False, "predict_mask": False},
        {"latent": "fsq", "reward_input": "next_latent", "reward_interpolation": "symlog"},
        {
            "latent": "fsq",
            "num_dims": 12,
            "linear_skips": True,
            "coordinate_code": True,
            "reward_input": "next_observation",
            "fourier_features": 2,
            "reencode": True,
        },
        {"latent": "gaussian", "linear_skips": True, "coordinate_code": True, "num_dims": 12, "latent_width": 0.1},
        {"observation_shape": (3, 32, 32), "channels": 4},
        {"observation_shape": (3, 32, 32), "channels": 4, "latent": "gaussian"},
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
