from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.helpers import numbers, run_example


def test_the_loaded_model_predicts_as_the_trained_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, loaded, kept = run_example("offline_world_model", capsys, steps=300, updates=20, folder=tmp_path / "run")
    assert numbers(trained) == numbers(loaded)
    assert len(numbers(trained)) == len(numbers(kept)) == 3
    assert numbers(kept) == sorted(numbers(kept)), "what was last seen is the less true the longer ago"
    # Twenty updates already tell the observation from noise.
    assert numbers(trained)[0] < 10 * numbers(kept)[0]
    assert (tmp_path / "run" / "world_model.pt").exists()
