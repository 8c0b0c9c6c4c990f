"""A user's own game: one short file, which the general script trains with nothing registered or edited elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.helpers import EXAMPLES, run_script


def test_the_game_is_trained_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "own_game.py").read_text(encoding="utf-8").splitlines()) <= 40
    settings = ("preset=tiny", "num_threads=1", "total_steps=60", f"run_dir={tmp_path}")
    run_script("train", "env=own_game:Corridor", "env_kwargs.steps=6", *settings, pictures=True)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["env_steps"] == 60 and summary["updates"] > 0
    assert set(summary["evaluation_per_agent"]["self_play"]) == {"walker", "keeper"}
    for picture in ("learning_curves.png", "episodes.gif", "imagination.png"):
        assert (tmp_path / picture).stat().st_size > 1000, capsys.readouterr().out
