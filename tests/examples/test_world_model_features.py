from __future__ import annotations

import pytest

from tests.examples.helpers import numbers, run_example


def test_ppo_learns_from_features(capsys: pytest.CaptureFixture[str]) -> None:
    random, trained = run_example("world_model_features", capsys, random_steps=500, updates=15, steps=100, episodes=10)
    assert random.startswith("random agents") and trained.startswith("trained agents")
    # The listener's reward is its squared distance from a landmark, negative.
    assert numbers(random)[0] < 0 and numbers(trained)[0] < 0
