from __future__ import annotations

import pytest
import ray

from tests.examples.helpers import numbers, run_example


def test_workers_of_a_cluster_play_and_the_learner_learns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sizes = {"env": "mpe2/simple_spread_v3", "total_steps": 300, "episodes": 2, "updates_per_batch": 1}
    sizes |= {"init_random_steps": 240, "world_model_warmup": 1, "critic_warmup": 0}
    try:
        lines = run_example("ray_collection", capsys, **sizes)
    finally:
        ray.shutdown()
    random, trained = (line for line in lines if "agents" in line)
    assert random.startswith("random agents") and trained.startswith("trained agents")
    assert numbers(random)[0] < 0 and numbers(trained)[0] < 0
    assert numbers(random) != numbers(trained)
