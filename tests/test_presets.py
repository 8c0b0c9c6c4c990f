"""Presets: complete configurations, the same as functions and through Hydra, which refuses what there is not."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import (
    CategoricalLatentConfig,
    CoordinateEncoderConfig,
    GaussianLatentConfig,
    WorldModel,
    WorldModelConfig,
    WorldModelPolicy,
    make_actor,
    make_critic,
)
from matwm_rl.objectives import Advantage
from matwm_rl.training import Learner, LearnerConfig
from tests.training.helpers import update

every_preset = pytest.mark.parametrize("name", presets.PRESETS)


def without_date(config: presets.TrainConfig) -> presets.TrainConfig:
    """The run's folder is named after the time."""
    return replace(config, run_dir="runs/mine")


@every_preset
def test_a_preset_through_hydra_is_that_of_the_function(name: str) -> None:
    config = presets.compose([f"preset={name}"])
    assert isinstance(config, presets.TrainConfig) and isinstance(config.world_model, WorldModelConfig)
    assert without_date(config) == without_date(presets.PRESETS[name]())
    assert repr(without_date(config)) == repr(without_date(presets.PRESETS[name]()))
    assert "$" not in config.run_dir


def test_the_default_is_for_vectors_on_a_cpu_also_under_its_former_name() -> None:
    vectors = without_date(presets.vectors())
    assert without_date(presets.compose()) == without_date(presets.compose(["preset=cpu"])) == vectors


def test_the_papers_preset_is_what_the_parts_have_by_default() -> None:
    assert presets.paper() == presets.TrainConfig()
    assert presets.paper().world_model == WorldModelConfig() and presets.paper().learner == LearnerConfig()


@every_preset
def test_presets_are_values_and_not_shared(name: str) -> None:
    one, other = presets.PRESETS[name](), presets.PRESETS[name]()
    assert one == other
    one.imports.append("mine")
    one.learner.loss_weights.reward = 11.0
    assert other == presets.PRESETS[name]()


def test_overrides_reach_every_level() -> None:
    chosen = ["preset=paper", "seed=3", "world_model.latent.num_classes=7", "learner.actor.advantage=standardize"]
    config = presets.compose([*chosen, "learner.horizon=5", "max_minutes=null", "imports=[my_package.my_envs]"])
    assert config.seed == 3 and config.learner.horizon == 5 and config.max_minutes is None
    assert config.world_model.latent == CategoricalLatentConfig(num_classes=7)
    assert config.learner.actor.advantage is Advantage.standardize
    assert config.imports == ["my_package.my_envs"]


def test_arguments_of_the_environment_are_free() -> None:
    config = presets.compose(["env_kwargs.max_cycles=50", "env_kwargs.sizes=[1,2]", "env_kwargs.nested.name=text"])
    assert config.env_kwargs == {"max_cycles": 50, "sizes": [1, 2], "nested": {"name": "text"}}
    assert presets.compose(["env_kwargs={max_cycles: 25}"]).env_kwargs == {"max_cycles": 25}
    with pytest.raises(TypeError, match="env_kwargs must be a mapping whose names are text, got 3"):
        presets.TrainConfig(env_kwargs=3)
    with pytest.raises(ValueError, match="env_kwargs has 'num_envs', which is set by an entry of its own"):
        presets.TrainConfig(env_kwargs={"num_envs": 3})


@pytest.mark.parametrize(
    ("env", "name"),
    [("mpe2/simple_spread_v3", "simple_spread_v3"), ("mine.games:make_one", "make_one"), ("mock", "mock")],
)
def test_a_run_is_named_after_environment_seed_and_time(env: str, name: str) -> None:
    config = presets.compose(["preset=tiny", f"env={env}", "seed=3"])
    assert re.fullmatch(rf"runs/{name}-seed3-\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d", config.run_dir)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.gama=0.9", "there is no entry 'learner.gama'; near ones are learner.gamma, .*learner.critic_decay"),
        ("+learner.gama=0.9", "there is no entry 'learner.gama'; near ones are learner.gamma, "),
        ("horizon=3", "there is no entry 'horizon'; near ones are learner.horizon; .*total_steps"),
        ("+horizon=3", "there is no entry 'horizon'; near ones are learner.horizon; "),
        ("world_model.encoder.dept=1", "near ones are world_model.encoder.depth, "),
        ("world_model.latent.num_classes=3", "'num_classes' not in 'GaussianLatentConfig', which has num_dims$"),
        ("learner.gamma=high", "learner.gamma: Value 'high' .* could not be converted to Float"),
        ("num_envs=2.5", "num_envs: Value '2.5' .* could not be converted to Integer"),
        ("learner.precision=float16", r"learner.precision: .*expected one of \[float32, bfloat16\]"),
        ("learner.actor.advantage=center", r"advantage: .*expected one of \[return_scale, standardize\]"),
        ("world_model.latent=GaussianLatentConfig", "world_model.latent: .* not a subclass of LatentConfig"),
        ("learner.agent_epochs=0", "LearnerConfig.agent_epochs must be a positive integer, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_and_what_does_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.compose([override])


def test_an_unknown_preset_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(Exception, match=r"(?s)Could not find 'preset/papers'.*paper.*tiny.*vectors"):
        presets.compose(["preset=papers"])


def test_a_script_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hydra.main` composes it for a script's users."""
    seen = []
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", f"run_dir={tmp_path}/run"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["script.py", *quiet, *overrides])
        presets.store()
        main = hydra.main(version_base=None, config_path=str(tmp_path), config_name="train")
        main(lambda composed: seen.append(presets.to_config(composed)))()

    run("preset=tiny", "learner.gamma=0.5")
    assert seen == [presets.compose(["preset=tiny", "learner.gamma=0.5", f"run_dir={tmp_path}/run"])]
    with pytest.raises(ValueError, match="near ones are learner.gamma"):
        run("+learner.gama=0.5")
    with pytest.raises(hydra.errors.ConfigCompositionException, match=r"Could not override 'learner.gama'"):
        run("learner.gama=0.5")


def test_another_preset_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "mine", lambda: replace(presets.tiny(), seed=11))
    assert presets.compose(["preset=mine"]).seed == 11


SMALLER: dict[str, dict[str, Any]] = {
    "paper": {"hidden_size": 64, "num_layers": 1, "latent": CategoricalLatentConfig(num_dims=4, num_classes=4)}
}
"""The paper's sizes are for a GPU; what is tested is that all the kinds of its parts fit together."""


@every_preset
def test_every_preset_builds_what_it_takes_to_train(name: str) -> None:
    config = presets.PRESETS[name]()
    sizes = replace(config.world_model, **SMALLER.get(name, {}))
    env = make_env("mock", seed=0, num_envs=config.num_envs)
    world_model = WorldModel.from_env(env, sizes)
    actor = make_actor(world_model, config.actor_critic)
    learner = Learner(world_model, actor, make_critic(world_model, config.actor_critic), config.learner)
    policy = WorldModelPolicy(world_model, actor, history_length=config.policy.history_length)
    few = {"starts_per_agent": 4, "sequences": 3, "capacity": 400, "sequence_length": 8, "context_length": 2}
    replay = make_replay(env.num_agents, replace(config.replay, **few), num_envs=config.num_envs, seed=0)
    env = env.append_transform(policy.make_tensordict_primer())
    replay.extend(env.rollout(40, policy, break_when_any_done=False))
    metrics = update(learner, replay)
    assert all(torch.isfinite(value).all() for value in metrics.values())


def test_the_preset_for_vectors_departs_from_the_paper_where_it_says() -> None:
    config = presets.vectors()
    assert config.world_model.latent == GaussianLatentConfig()
    assert isinstance(config.world_model.encoder, CoordinateEncoderConfig)
    assert config.replay.capacity == presets.paper().replay.capacity
