from __future__ import annotations

import pytest

from tests.examples.helpers import EXAMPLES, numbers, run_example

SMALL = {"num_envs": 1, "init_random_steps": 220, "world_model_warmup": 2, "critic_warmup": 2}


def test_agents_learn_and_are_compared_with_random_ones(capsys: pytest.CaptureFixture[str]) -> None:
    random, trained = run_example("custom_loop", capsys, total_steps=240, episodes=2, **SMALL)
    assert random.startswith("random agents") and trained.startswith("trained agents")
    # Three agents cannot be nearer to three landmarks than at no distance, and are rewarded for nothing else.
    assert all(returns < 0 for line in (random, trained) for returns in numbers(line))
    assert numbers(random) != numbers(trained)


def test_it_has_forty_lines() -> None:
    lines = (EXAMPLES / "custom_loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
