"""Configurations as plain values, which are stored in files and built again."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import pytest

from matwm_rl import presets
from matwm_rl.data import ReplayConfig, make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import (
    CategoricalLatentConfig,
    EncoderConfig,
    GaussianLatentConfig,
    LatentConfig,
    MLPEncoderConfig,
    WorldModel,
    WorldModelConfig,
    make_actor,
    make_critic,
)
from matwm_rl.objectives import ActorLossConfig, Advantage
from matwm_rl.settings import from_plain, to_plain
from matwm_rl.training import Learner, LearnerConfig
from matwm_rl.training.config import Precision


def kinds(value: Any) -> list[type]:
    if is_dataclass(value):
        return [type(value), *(kind for entry in vars(value).values() for kind in kinds(entry))]
    return [type(value)]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_comes_back_from_plain_values(name: str) -> None:
    config = replace(presets.PRESETS[name](), imports=["my_package.my_envs"])
    stored = json.loads(json.dumps(to_plain(config)))
    loaded = from_plain(presets.TrainConfig, stored)
    assert loaded == config
    # An enumeration is one again, not the text that equals it.
    assert kinds(loaded) == kinds(config)


def test_plain_values_are_of_python_alone() -> None:
    def check(value: Any) -> None:
        assert not isinstance(value, Enum) and type(value) in (dict, list, str, int, float, bool, type(None)), value
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(entry)

    check(to_plain(presets.vectors()))


def test_kinds_are_told_apart() -> None:
    stored = to_plain(WorldModelConfig(latent=GaussianLatentConfig(num_dims=8)))
    assert stored["kind"] == "WorldModelConfig" and stored["latent"] == {"kind": "GaussianLatentConfig", "num_dims": 8}
    assert from_plain(WorldModelConfig, stored).latent == GaussianLatentConfig(num_dims=8)


def test_enumerations_come_back() -> None:
    loaded = from_plain(ActorLossConfig, to_plain(ActorLossConfig(advantage=Advantage.standardize)))
    assert loaded.advantage is Advantage.standardize
    learner = presets.tiny().learner
    assert from_plain(type(learner), to_plain(learner)).precision is Precision.float32


def test_a_subclass_of_ones_own_comes_back() -> None:
    @dataclass(kw_only=True)
    class MyLatentConfig(LatentConfig):
        size: int = 3

    assert from_plain(LatentConfig, to_plain(MyLatentConfig(size=5))) == MyLatentConfig(size=5)


@pytest.mark.parametrize("kind", ["NoSuchConfig", "MLPEncoderConfig", None])
def test_an_unknown_kind_is_named_with_those_that_there_are(kind: str | None) -> None:
    with pytest.raises(ValueError, match=f"unknown kind of LatentConfig: {kind!r}; known are .*'GaussianLatentConfig'"):
        from_plain(LatentConfig, {"kind": kind, "num_dims": 8})


@pytest.mark.parametrize(
    ("change", "name"), [({"colour": "blue"}, "colour"), ({"num_classes": ...}, "num_classes")], ids=str
)
def test_entries_that_differ_are_named(change: dict[str, Any], name: str) -> None:
    stored = to_plain(CategoricalLatentConfig()) | change
    stored = {key: value for key, value in stored.items() if value is not ...}
    message = rf"CategoricalLatentConfig has the entries \['num_classes', 'num_dims'\].* differ in \['{name}'\]"
    with pytest.raises(ValueError, match=message):
        from_plain(LatentConfig, stored)


def test_a_wrong_entry_far_down_is_named_too() -> None:
    stored = to_plain(WorldModelConfig(encoder=MLPEncoderConfig(depth=1)))
    stored["encoder"]["width"] = 3
    with pytest.raises(ValueError, match=r"MLPEncoderConfig .*\['width'\]"):
        from_plain(WorldModelConfig, stored)
    stored["encoder"] = {"kind": "GaussianLatentConfig", "num_dims": 3}
    with pytest.raises(ValueError, match=f"unknown kind of {EncoderConfig.__name__}"):
        from_plain(WorldModelConfig, stored)


# -- what settings refuse ----------------------------------------------------------------------------------------------


def every_setting() -> list[tuple[type, str, Any]]:
    found: dict[tuple[type, str], Any] = {}

    def walk(config: Any) -> None:
        for entry in fields(config):
            value = getattr(config, entry.name)
            found[type(config), entry.name] = value
            if is_dataclass(value):
                walk(value)

    for preset in presets.PRESETS.values():
        walk(preset())
    return [(cls, name, value) for (cls, name), value in found.items()]


@pytest.mark.parametrize(
    ("cls", "name", "value"), every_setting(), ids=lambda value: str(getattr(value, "__name__", value))
)
def test_no_setting_takes_everything(cls: type, name: str, value: Any) -> None:
    """No number may be negative, NaN or infinite, no switch a text, no name empty; and none an object of no meaning."""
    wrong: list[Any] = [object(), -1, float("nan"), float("inf"), ""]
    for bad in [*wrong, "no"] if isinstance(value, bool) else wrong:
        with pytest.raises((ValueError, TypeError), match=rf"^{cls.__name__}\.{name} must be "):
            cls(**{name: bad})
        changed = cls()
        with pytest.raises((ValueError, TypeError), match=rf"^{cls.__name__}\.{name} must be "):
            setattr(changed, name, bad)
        assert getattr(changed, name) == getattr(cls(), name), "a refused value must not be kept"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WorldModelConfig(teammate_predictor="no"), "teammate_predictor must be True or False, got 'no'"),
        (lambda: WorldModelConfig(num_heads=0), "num_heads must be a positive integer, got 0"),
        (lambda: WorldModelConfig(num_heads=3), "hidden_size must be a multiple of 2 . num_heads, 6, got 512"),
        (lambda: WorldModelConfig(teammate_hidden_size=20), "teammate_hidden_size must be a multiple of .*16, got 20"),
        (lambda: WorldModelConfig(head_depth=-7), "head_depth must be an integer of at least 0, got -7"),
        (lambda: WorldModelConfig(dropout=1.0), "dropout must be a number of at least 0 and below 1, got 1.0"),
        (lambda: ReplayConfig(sequences=-4), "sequences must be a positive integer, got -4"),
        (lambda: ReplayConfig(recency_decay="off"), "recency_decay must be a number above 0 and at most 1, got 'off'"),
        (lambda: ReplayConfig(capacity=63), "sequence_length must be at most the capacity, 63, got 64"),
        (lambda: presets.TrainConfig(updates_per_batch=-1), "updates_per_batch must be a positive integer, got -1"),
        (lambda: presets.TrainConfig(log_every=0), "log_every must be a positive integer, got 0"),
        (lambda: presets.TrainConfig(num_threads=0), "num_threads must be a positive integer, got 0"),
        (lambda: presets.TrainConfig(device="gpu"), "device must be a device of PyTorch such as .* got 'gpu'"),
        (lambda: presets.TrainConfig(imports="my_envs"), "imports must be a list, got 'my_envs'"),
        (lambda: presets.TrainConfig(imports=["a", 3]), r"imports\[1\] must be a text, got 3"),
        (lambda: presets.TrainConfig(num_envs=4), "frames_per_batch must be a multiple of num_envs, 4, got 1"),
        (
            lambda: presets.TrainConfig(total_steps=999),
            "init_random_steps asks for 1000 .* total_steps has room for 999",
        ),
        (
            lambda: replace(presets.tiny(), total_steps=60, replay=ReplayConfig(sequence_length=61)),
            "replay.sequence_length asks for 61 steps of each of 1 environments, and total_steps has room for 60",
        ),
        (
            lambda: replace(presets.tiny(), num_envs=10, replay=ReplayConfig(capacity=70, sequence_length=8)),
            "replay.sequence_length asks for 8 steps of each of 10 environments, and total_steps has room for 6",
        ),
        (lambda: LearnerConfig(gama=0.9), "LearnerConfig has no entry 'gama'; near ones are gamma; the entries there"),
    ],
)
def test_what_contradicts_itself_or_never_learns_is_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_misspelt_entry_cannot_be_assigned() -> None:
    config = presets.tiny()
    with pytest.raises(AttributeError, match="LearnerConfig has no entry 'gama'; near ones are gamma"):
        config.learner.gama = 0.9  # type: ignore[attr-defined]


def test_what_was_assigned_is_checked_together_where_it_is_used() -> None:
    settings, env = presets.tiny(), make_env("mock", seed=0)
    model = WorldModel.from_env(env, settings.world_model)
    settings.learner.agent_epochs = 3
    with pytest.raises(ValueError, match="agent_epochs=3"):
        Learner(model, make_actor(model), make_critic(model), settings.learner)
    settings.world_model.num_heads = 3
    with pytest.raises(ValueError, match="hidden_size must be a multiple"):
        WorldModel.from_env(env, settings.world_model)
    settings.replay.capacity = 4
    with pytest.raises(ValueError, match="at most the capacity, 4"):
        make_replay(3, settings.replay)


def test_values_are_stored_as_plain_ones() -> None:
    config = LearnerConfig(horizon=np.int64(5), gamma=1, precision="bfloat16")
    assert json.dumps(to_plain(config)) and type(config.gamma) is float and config.precision is Precision.bfloat16
