from __future__ import annotations

import math

import pytest
import torch

from matwm_rl import Learner
from tests.examples.helpers import numbers, run_example


def test_own_parts_are_trained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    learners: list[Learner] = []
    before: list[dict[str, torch.Tensor]] = []

    class Watched(Learner):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            learners.append(self)
            before.append({name: value.clone() for name, value in own_parts(self).items()})

    monkeypatch.setattr("matwm_rl.Learner", Watched)
    teammates, random, trained = run_example(
        "swap_parts", capsys, rounds=2, steps=180, updates=8, warmup=10, episodes=1
    )
    found, guess = numbers(teammates)
    assert found < 1.2 * guess and guess == pytest.approx(math.log(5), abs=1e-3)
    assert numbers(random)[0] < 0 and numbers(trained)[0] < 0

    (learner,), (start,) = learners, before
    assert type(learner.world_model.teammates).__name__ == "PresentTeammates"
    for name, value in own_parts(learner).items():
        assert not torch.equal(value, start[name]), name


def own_parts(learner: Learner) -> dict[str, torch.Tensor]:
    parts = {"actor": learner.actor, "teammates": learner.world_model.teammates}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}
