from __future__ import annotations

import pytest

from tests.examples.helpers import numbers, run_example


def test_workers_fill_replay_and_the_learner_learns(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"total_steps": 600, "updates": 1, "episodes": 2}
    sizes |= {"init_random_steps": 300, "world_model_warmup": 2, "critic_warmup": 0}
    collected, random, trained = run_example("parallel_collection", capsys, **sizes)
    # Whole batches of whole episodes, of 25 steps each.
    assert int(collected.split()[0]) >= 600 and int(collected.split()[0]) % 100 == 0
    assert random.startswith("random agents") and trained.startswith("trained agents")
    assert numbers(random)[0] < 0 and numbers(trained)[0] < 0
    assert numbers(random) != numbers(trained)
