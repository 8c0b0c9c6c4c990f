"""Numbers that are not finite: the update stops before anything changes, and the error says where they were born."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.objectives import ActorLossConfig, Regularizer
from matwm_rl.training import Learner, guard
from tests.helpers import make_learner, mock_replay
from tests.training.helpers import OPTIONS, assert_same, leaves, snapshot, update

NAN, INF = math.nan, math.inf


def assert_refused(learner: Learner, call: Callable[[], object], *words: str) -> None:
    before, updates = snapshot(learner), learner.updates
    with pytest.raises(FloatingPointError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)
    assert_same(learner.state_dict(), before)
    assert learner.updates == updates and not learner.world_model.training and learner.actor_loss.training


def spoil(module: nn.Module, number: float = NAN) -> None:
    """Let a module multiply what it gives by a number; its weights stay good."""
    module.register_forward_hook(lambda module, inputs, output: output * number)


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("key", "loss"), [(keys.REWARD, "loss_reward"), (keys.OBSERVATION, "loss_reconstruction")], ids=["reward", "state"]
)
def test_a_batch_with_such_a_number_is_named_and_changes_nothing(number: float, key: tuple, loss: str) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    batch = replay.sequences.sample()
    batch[key][1, 2, 2] = number
    batch[keys.ALIVE][1, 2, 2] = True
    words = [f"{number} in {key!r} of agent 'agent_2' at [1, 2, 2"]
    # Of an infinite reward the loss is finite, as targets beyond the bins saturate: replay is where it is refused.
    if key == keys.REWARD and math.isinf(number):
        assert learner.update_world_model(batch)[loss].isfinite()
    else:
        assert_refused(learner, lambda: learner.update_world_model(batch), f"{loss} is ", *words)


@pytest.mark.parametrize(
    ("part", "loss"),
    [
        ("reward", "loss_reward"),
        ("continuation", "loss_continuation"),
        ("action_mask", "loss_mask"),
        ("decoder", "loss_reconstruction"),
        ("teammates", "loss_teammate"),
        ("transformer", "loss_dynamics"),
    ],
)
def test_the_part_that_makes_it_is_named(part: str, loss: str) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    spoil(getattr(learner.world_model, part))
    batch = replay.sequences.sample()
    assert_refused(learner, lambda: learner.update_world_model(batch), f"{loss} is nan", f"is world_model.{part}")


def test_weights_that_are_not_finite_already_are_named() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    with torch.no_grad():
        next(iter(learner.critic.parameters()))[0] = NAN
    before = copy.deepcopy(learner.actor.state_dict())
    with pytest.raises(FloatingPointError, match=r"not finite already: critic\..* \(nan\).*last good checkpoint"):
        learner.update_agents(replay.starts.sample())
    assert_same(learner.actor.state_dict(), before)


class Root(torch.autograd.Function):
    """The identity, with a derivative that is not finite."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * INF


def test_a_gradient_alone_is_enough() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    learner.world_model.transformer.register_forward_hook(lambda module, inputs, output: Root.apply(output))
    batch = replay.sequences.sample()
    assert_refused(
        learner,
        lambda: learner.update_world_model(batch),
        "the gradient of loss_",
        "has the norm",
        "or in their deriva",
    )


@pytest.mark.parametrize(
    ("part", "name", "entry"),
    [("world_model", "reward", "'reward'"), ("critic", "module.0.module", "'state_value'")],
)
def test_what_is_imagined_is_looked_at_before_the_return_scale_and_the_agents_learn(
    part: str, name: str, entry: str
) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    spoil(getattr(learner, part).get_submodule(name))
    starts = replay.starts.sample()
    words = ("what was imagined", f"{entry}) of agent 'agent_0'", f"is {part}.{name}")
    assert_refused(learner, lambda: learner.update_agents(starts), *words)


class Bad(Regularizer):
    def forward(self, tensordict, dist, weight, valid):
        return (dist.logits.sum() * NAN).expand(3)


def test_a_bad_actor_loss_stops_the_critics_step_too() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    learner.actor_loss.regularizers.append(Bad(1.0))
    before = snapshot(learner)
    with pytest.raises(FloatingPointError, match="loss_actor is nan"):
        learner.update_agents(replay.starts.sample())
    after = learner.state_dict()
    for part in before.keys() - {"return_scale"}:
        assert_same(after[part], before[part])
    assert all(value.isfinite().all() for value in after["return_scale"].values())


def test_several_steps_on_a_rollout_stop_as_well() -> None:
    learner, replay = make_learner(agent_epochs=2, actor=ActorLossConfig(objective="ppo"), **OPTIONS), mock_replay()
    update(learner, replay)
    spoil(learner.world_model.continuation)
    starts = replay.starts.sample()
    assert_refused(learner, lambda: learner.update_agents(starts), "what was imagined", "world_model.continuation")


def test_on_a_gpu_the_step_is_skipped_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code on a CPU, whose fused Adam skips steps as the GPU's does."""
    monkeypatch.setattr(guard, "can_wait", lambda device: False)
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    batch, starts = replay.sequences.sample(), replay.starts.sample()
    before = snapshot(learner)
    batch[keys.REWARD][0] = NAN
    assert learner.update_world_model(batch)["loss_reward"].isnan()
    assert_same(learner.state_dict(), before)
    handle = learner.world_model.reward.register_forward_hook(lambda module, inputs, output: output * NAN)
    assert learner.update_agents(starts)["loss_actor"].isnan()
    handle.remove()
    after = learner.state_dict()
    for part in before.keys() - {"target_critic", "updates"}:
        assert_same(after[part], before[part])
    assert all(value.isfinite().all() for value in after["target_critic"].values())
    # The next step is taken again.
    update(learner, replay)
    assert any(
        not torch.equal(value, leaves(before)[path])
        for path, value in leaves(learner.state_dict()["actor"], "/actor").items()
    )


@pytest.mark.parametrize("reward", [1e38, -3e38])
def test_huge_rewards_saturate_and_the_weights_stay_finite(reward: float) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    for _ in range(3):
        batch = replay.sequences.sample()
        batch[keys.REWARD][:, ::2] = reward
        metrics = learner.update_world_model(batch).update(learner.update_agents(replay.starts.sample()))
        assert all(value.isfinite().all() for value in metrics.values())
    assert all(value.isfinite().all() for value in leaves(learner.state_dict()).values() if isinstance(value, Tensor))


def test_huge_observations_are_an_error_and_no_infinity_in_a_weight() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    batch = replay.sequences.sample()
    batch[keys.OBSERVATION][0, 0] = 3e38
    batch[keys.ALIVE][0, 0] = True
    assert_refused(learner, lambda: learner.update_world_model(batch), "loss_reconstruction is ", "world_model.encoder")
