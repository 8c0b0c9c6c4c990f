from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from matwm_rl import presets
from tests.examples.helpers import EXAMPLES, numbers, run_example


@pytest.mark.parametrize("preset", ["tiny", "vectors"])
def test_it_trains_and_evaluates(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    small = {"env": "mock", "num_envs": 1, "total_steps": 60, "init_random_steps": 40}
    small |= {"world_model_warmup": 1, "critic_warmup": 1, "replay": presets.tiny().replay}
    cfg = replace(presets.PRESETS[preset](), **small)
    (line,) = run_example("algorithm", capsys, cfg=cfg, episodes=2)
    assert line.startswith("seed 0, 60 steps:")
    # Every action of a hunter is rewarded with one or two times its number, 0 to 3, in each of six steps at most.
    hunter, prey = numbers(line)
    assert 0 < hunter < 27 and 0 < prey < 36


def test_it_is_one_page_without_the_learner() -> None:
    source = (EXAMPLES / "algorithm.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 70
    imported = {
        name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert "Learner" not in imported and {"WorldModelLoss", "Imagination", "ActorLoss", "CriticLoss"} <= imported
