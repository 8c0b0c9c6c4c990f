"""The seconds of a training are those of learning, not of evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clock
import methods
import pytest
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from matwm_rl.evaluation import Evaluation, Matches, find_evaluation, register_evaluation, registry
from tests.benchmarks.comparison.stubs import MOCK


class Time:
    """The process's clock, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(clock, "process_time", lambda: self.now)


def test_a_pause_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    watch = clock.Clock()
    time.now += 3
    with pytest.raises(ValueError, match="in the pause"), watch.pause():
        time.now += 50
        raise ValueError("in the pause")
    time.now += 1
    assert watch.seconds == 4


def test_the_seconds_of_every_kept_policy_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    monkeypatch.setattr(registry, "_REGISTERED", registry._REGISTERED.copy())
    asked: list[Any] = []

    def play(env: EnvBase, policy: TensorDictModuleBase, **how: Any) -> Matches:
        time.now += 50
        asked.append((env, policy, how))
        return Matches({})

    register_evaluation("mine", Evaluation(play, references={"match": {"random": 1.0}}))
    clock.note_seconds("mine", tmp_path)
    assert find_evaluation("mine").references == {"match": {"random": 1.0}}

    def evaluate() -> None:
        find_evaluation("mine").play("env", "policy", episodes=3)  # type: ignore[arg-type, call-arg]

    time.now += 7  # of imports
    evaluate()  # untrained agents
    evaluate()  # random agents
    (tmp_path / "policies").mkdir()
    for steps, seconds in ((5, 20), (10, 30)):
        time.now += seconds
        evaluate()
        (tmp_path / "policies" / f"{steps:08d}.pt").touch()
    assert asked == [("env", "policy", {"episodes": 3})] * 4
    assert clock.noted_seconds(tmp_path, 2) == [20, 50]
    assert clock.noted_seconds(tmp_path, 3) == [None] * 3
    assert clock.noted_seconds(tmp_path / "policies", 1) == [None]


def test_a_model_free_method_is_timed_without_its_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time, shown = Time(monkeypatch), []

    def train(name: str, env_name: str, *, checkpoints: list[int], on_checkpoint: Any, **_: Any) -> None:
        for point in checkpoints:
            time.now += 5
            on_checkpoint(point, None)

    def on_checkpoint(env_steps: int, policy: Any, core_seconds: float | None) -> None:
        time.now += 50
        shown.append((env_steps, core_seconds))

    monkeypatch.setattr(methods.model_free, "train", train)
    methods.ModelFree("iql").train(MOCK, 0, tmp_path, on_checkpoint)
    assert json.dumps(shown) == "[[10, 5.0], [20, 10.0]]"
