"""Running means and spreads, against loops in float64; and that units of an environment do not matter."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from matwm_rl import keys, presets
from matwm_rl.modules import CoordinateEncoderConfig, GaussianLatentConfig, ObservationRewardConfig, RunningNorm, TwoHot
from matwm_rl.objectives import ActorLossConfig, WorldModelLoss, WorldModelLossWeights
from tests.helpers import SIZE, make_learner, make_model, mock_replay, random_batch, total

NORMALIZED = {
    "normalize": True,
    "latent": GaussianLatentConfig(num_dims=10),
    "encoder": CoordinateEncoderConfig(),
    "reward": ObservationRewardConfig(),
}


def slow_moments(batches: list[tuple[Tensor, Tensor]], group: list[int], g: int, d: int) -> tuple[float, float]:
    """Mean and variance of one number of one group, every batch counting alike."""
    means, squares = [], []
    for value, valid in batches:
        numbers = [
            float(value[n, b, d])
            for n in range(len(group))
            if group[n] == g
            for b in range(value.shape[1])
            if valid[n, b]
        ]
        if numbers:
            means.append(sum(numbers) / len(numbers))
            squares.append(sum(x * x for x in numbers) / len(numbers))
    mean = sum(means) / len(means)
    return mean, sum(squares) / len(squares) - mean**2


def test_mean_and_spread_are_those_of_all_batches(float64: None) -> None:
    group, norm = [0, 1, 0], RunningNorm(2, group_index=[0, 1, 0], spread=0.5)
    scales = torch.tensor([3.0, 0.01])
    batches = [(scales * torch.randn(3, 40, 2) + 7, torch.rand(3, 40) < 0.7) for _ in range(5)]
    batches[2][1][1] = False  # a batch in which nobody of the second group lives
    for value, valid in batches:
        norm.update(value.view(3, 8, 5, 2), valid.view(3, 8, 5))
    for g in range(2):
        for d in range(2):
            mean, variance = slow_moments(batches, group, g, d)
            usual = math.sqrt(sum(slow_moments(batches, group, g, each)[1] for each in range(2)) / 2)
            assert float(norm.mean[g, d]) == pytest.approx(mean, rel=1e-9)
            # Those of less than half the usual spread are magnified to half of it.
            assert float(norm.scale[g, d]) == pytest.approx(min(2 * math.sqrt(variance), usual) / 0.5, rel=1e-9)
    value = batches[0][0]
    for n in range(3):
        expected = (value[n] - norm.mean[group[n]]) / norm.scale[group[n]]
        torch.testing.assert_close(norm.normalize(value)[n], expected)
    torch.testing.assert_close(norm.restore(norm.normalize(value)), value)


def test_old_batches_fade_at_the_smallest_rate(float64: None) -> None:
    norm = RunningNorm(1, group_index=[0], min_rate=0.25)
    mean = 0.0
    for batch in range(20):
        value = torch.randn(1, 6, 1)
        norm.update(value)
        rate = max(1 / (batch + 1), 0.25)
        mean += rate * (float(value.mean()) - mean)
    assert float(norm.mean) == pytest.approx(mean, rel=1e-9)


def test_nothing_is_changed_before_the_first_batch() -> None:
    value = torch.randn(2, 5, 3)
    norm = RunningNorm(3, group_index=[0, 1])
    assert torch.equal(norm.normalize(value), value) and torch.equal(norm.restore(value), value)
    norm.update(value, torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(norm.normalize(value), value)


def test_what_is_not_finite_does_not_count() -> None:
    value = torch.randn(2, 5, 3)
    broken = value.clone()
    broken[0, 1, 2], broken[1, 3, 0] = math.nan, math.inf
    valid = torch.ones(2, 5, dtype=torch.bool)
    norms = [RunningNorm(3, group_index=[0, 1]) for _ in range(2)]
    norms[0].update(broken)
    valid[0, 1] = valid[1, 3] = False
    norms[1].update(value, valid)
    for name, expected in norms[1].state_dict().items():
        assert torch.equal(norms[0].state_dict()[name], expected), name


def test_constants_and_rare_events_are_not_blown_up() -> None:
    value = torch.zeros(1, 10_000, 4)
    value[..., 0].normal_()
    value[..., 1] = 0.8 + 1e-8 * torch.randn(1, 10_000)  # constant but for rounding
    value[0, 7, 2] = 1.0  # a flag that was up once
    norm = RunningNorm(4, group_index=[0])
    norm.update(value)
    usual = math.sqrt((1 + 0.05**2) / 2)  # of the first and of the flag, whose spread counts as a twentieth
    for number, scale in enumerate([usual, usual, 2 * 0.05, usual]):
        assert float(norm.scale[0, number]) == pytest.approx(scale, rel=0.02), number
    assert float(norm.unit) == pytest.approx(usual, rel=0.02)
    constant = RunningNorm(1, group_index=[0])
    constant.update(torch.full((1, 9, 1), -0.3))
    assert constant.normalize(torch.tensor([[[-0.3]]])).abs() < 1e-6 and float(constant.scale) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size"),
        ({"spread": 0.0}, "spread"),
        ({"min_rate": 0.0}, "min_rate"),
        ({"min_rate": 1.5}, "min_rate"),
        ({"group_index": [0, -1]}, "group_index"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"size": 2, "group_index": [0]} | arguments
    with pytest.raises(ValueError, match=message):
        RunningNorm(given.pop("size"), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RunningNorm takes in"):
        RunningNorm(2, group_index=[0, 0]).update(torch.zeros(2, 5, 3))


# -- in the world model, the critics and the losses -----------------------------------------------------------------


def test_two_hot_distributions_are_over_normalised_numbers(float64: None) -> None:
    two_hot, plain = TwoHot(norm=RunningNorm(1, group_index=[0, 1])), TwoHot()
    target = torch.tensor([3.0, 0.001]) * torch.randn(50, 2) + torch.tensor([-20.0, 5.0])
    two_hot.update(target, torch.ones(50, 2, dtype=torch.bool))
    mean, spread = target.mean(0), target.std(0, correction=0)
    logits = torch.randn(50, 2, 255)
    torch.testing.assert_close(two_hot.loss(logits, target), plain.loss(logits, (target - mean) / spread))
    torch.testing.assert_close(two_hot.decode(logits), plain.decode(logits) * spread + mean)
    torch.testing.assert_close(two_hot.decode(two_hot.encode(target).log()), target)


def scaled(batch: TensorDict, observation: float, reward: float) -> TensorDict:
    """The same experience, measured in other units."""
    batch = batch.clone()
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        batch[key] = batch[key] * observation
    batch[keys.REWARD] = batch[keys.REWARD] * reward
    return batch


@pytest.mark.parametrize("units", [(1024.0, 2**-9), (2**-12, 256.0)])
def test_an_environments_units_change_nothing(float64: None, units: tuple[float, float]) -> None:
    """World model, actors and critics learn the same weights from observations and rewards in any unit."""
    actor = ActorLossConfig(objective="ppo", advantage="standardize", entropy_coeff=0.01)
    learner = make_learner(
        make_model(**NORMALIZED), actor=actor, agent_epochs=2, loss_weights=WorldModelLossWeights(reconstruction=100.0)
    )
    other = copy.deepcopy(learner)
    replay = mock_replay()
    for step in range(3):
        sequences, starts = replay.sequences.sample(), replay.starts.sample()
        for each, factors in ((learner, (1.0, 1.0)), (other, units)):
            torch.manual_seed(step)
            each.update_world_model(scaled(sequences, *factors))
            each.update_agents(scaled(starts, *factors))
    for name in ("world_model", "actor", "critic"):
        theirs = dict(getattr(other, name).named_parameters())
        for key, parameter in getattr(learner, name).named_parameters():
            torch.testing.assert_close(theirs[key], parameter, rtol=1e-6, atol=1e-9, msg=f"{name}.{key}")
    assert other.returns.reward_norm is other.world_model.two_hot.norm


def test_the_loss_takes_in_what_the_living_see_while_the_model_trains() -> None:
    model, batch = make_model(**NORMALIZED), random_batch()
    loss = WorldModelLoss(model)
    model.eval()
    loss(batch)
    assert not model.observation_norm.batches.any() and not model.two_hot.norm.batches.any()
    model.train()
    loss(batch)
    alive = batch[keys.ALIVE]
    for group, members in enumerate([[0, 1], [2]]):
        seen = torch.cat([batch[keys.OBSERVATION][..., n, :][alive[..., n]] for n in members])
        rewards = torch.cat([batch[keys.REWARD][..., n, 0][alive[..., n]] for n in members])
        torch.testing.assert_close(model.observation_norm.mean[group], seen.mean(0))
        torch.testing.assert_close(model.two_hot.norm.mean[group, 0], rewards.mean())


def test_observations_are_decoded_in_their_own_units_and_their_error_is_relative() -> None:
    model, batch = make_model(**NORMALIZED).train(), random_batch(deaths=False)
    scale = torch.tensor([1.0, 0.01, 100.0, 3.0, 0.5])
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        batch[key] = batch[key] * scale + 5
    loss = WorldModelLoss(model)
    losses = loss(batch)
    model.eval()
    out = model(batch.copy())
    norm = model.observation_norm
    error = out[keys.RECONSTRUCTION] - batch[keys.OBSERVATION]
    expected = (error / norm.scale[torch.tensor([0, 0, 1])]).square().sum(-1).mean()
    torch.testing.assert_close(losses["loss_reconstruction"], expected, rtol=0.2, atol=0.05)  # trained with noise
    observation = batch[keys.OBSERVATION].movedim(2, 0)
    torch.testing.assert_close(model.decode(model.encode(observation)), out[keys.RECONSTRUCTION].movedim(2, 0))
    assert model.observation_norm.size == SIZE and not list(model.observation_norm.parameters())


def test_gradients_do_not_pass_the_statistics() -> None:
    model, batch = make_model(**NORMALIZED).train(), random_batch()
    for key in (keys.OBSERVATION, keys.REWARD):
        batch[key] = batch[key].requires_grad_()
    total(WorldModelLoss(model)(batch)).backward()
    assert all(not buffer.requires_grad for buffer in model.buffers())


def test_only_the_preset_of_vectors_normalises() -> None:
    assert presets.vectors().world_model.normalize and not presets.paper().world_model.normalize
    images = make_model(observation_shape=(3, 16, 16), normalize=True)
    assert images.observation_norm is None and images.two_hot.norm is not None
