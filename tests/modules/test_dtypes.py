"""Models in float64 take the observations of environments, which are float32 or bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from matwm_rl import presets
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import make_env
from matwm_rl.modules import Imagination, WorldModel, WorldModelConfig, WorldModelPolicy, make_actor
from matwm_rl.objectives import WorldModelLoss
from tests.helpers import make_model, random_batch


@pytest.fixture
def default_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def play_and_learn(config: WorldModelConfig, *, double: bool) -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, config)
    policy = WorldModelPolicy(model, make_actor(model), history_length=4)
    if double:
        policy.double()
    rollout = env.append_transform(policy.make_tensordict_primer()).rollout(5, policy)
    assert rollout["agents", "observation"].dtype == torch.float32
    batch = add_agent_entries(rollout.exclude("history", ("next", "history")))
    losses = WorldModelLoss(model)(batch)
    sum(value for name, value in losses.items() if name.startswith("loss")).backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float64
        assert parameter.grad is None or parameter.grad.isfinite().all()
    dream = Imagination(model, policy.actor, horizon=2)(batch.unsqueeze(0))
    assert dream["next", "agents", "reward"].isfinite().all()


@pytest.mark.parametrize("preset", [presets.tiny, presets.vectors])
def test_a_model_turned_to_float64(preset: object) -> None:
    play_and_learn(preset().world_model, double=True)  # type: ignore[operator]


@pytest.mark.parametrize("preset", [presets.tiny, presets.vectors])
def test_a_default_type_of_float64(preset: object, default_double: None) -> None:
    play_and_learn(preset().world_model, double=False)  # type: ignore[operator]


def test_images_in_float64() -> None:
    model = make_model(observation_shape=(4, 32, 32)).double()
    out = model(random_batch(2, 3, observation_shape=(4, 32, 32)))
    assert out["agents", "reconstruction"].shape[-3:] == (4, 32, 32)
    assert out["agents", "latent"].dtype == torch.float64


def test_a_default_device() -> None:
    torch.set_default_device("cpu")
    try:
        assert make_env("mock", seed=0).rollout(3)["agents", "observation"].shape == (3, 3, 5)
    finally:
        torch.set_default_device(None)


def test_large_values_keep_losses_and_gradients_finite() -> None:
    model = make_model(latent="gaussian")
    batch = random_batch(2, 4)
    for key in (("agents", "observation"), ("next", "agents", "observation")):
        batch[key] = 1000 * batch[key].abs()
    losses = WorldModelLoss(model)(batch)
    assert all(value.isfinite() for value in losses.values())
    sum(value for name, value in losses.items() if name.startswith("loss")).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
