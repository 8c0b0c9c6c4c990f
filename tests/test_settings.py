"""Configurations as plain values, which are stored in files and built again."""

from __future__ import annotations

import json
from dataclasses import dataclass, is_dataclass, replace
from enum import Enum
from typing import Any

import pytest

from matwm_rl import presets
from matwm_rl.modules import (
    CategoricalLatentConfig,
    EncoderConfig,
    GaussianLatentConfig,
    LatentConfig,
    MLPEncoderConfig,
    WorldModelConfig,
)
from matwm_rl.objectives import ActorLossConfig, Advantage
from matwm_rl.settings import from_plain, to_plain
from matwm_rl.training.learner import Precision


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
