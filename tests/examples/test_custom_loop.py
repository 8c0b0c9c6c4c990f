from __future__ import annotations

import pytest

from tests.examples.helpers import EXAMPLES, numbers, run_example


def test_agents_learn_and_are_compared_with_random_ones(capsys: pytest.CaptureFixture[str]) -> None:
    random, trained = run_example("custom_loop", capsys, total_steps=240, random_steps=220, warmup=2, episodes=2)
    assert random.startswith("random agents") and trained.startswith("trained agents")
    # Three agents cannot be nearer to three landmarks than at no distance, and are rewarded for nothing else.
    assert all(returns < 0 for line in (random, trained) for returns in numbers(line))
    assert numbers(random) != numbers(trained)


def test_it_has_forty_lines() -> None:
    lines = (EXAMPLES / "custom_loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
