from __future__ import annotations

import ast
import runpy
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from matwm_rl import presets
from matwm_rl.envs import make_env
from matwm_rl.evaluation import Matches
from matwm_rl.modules import WorldModelPolicy
from matwm_rl.training import load_policy
from tests.examples.helpers import EXAMPLES, run_script

SMALL = ["env=mock", "num_envs=2", "init_random_steps=40", "frames_per_batch=20", "num_threads=1"]
SMALL += ["matmul_precision=highest", "world_model_warmup=3", "critic_warmup=2"]
SMALL += ["evaluation.every=60", "evaluation.episodes=2", "evaluation.final_episodes=2"]


def train(*overrides: str) -> tuple[WorldModelPolicy, Matches]:
    # What it would set is the whole process's, and there are other tests in this one.
    with patch("matwm_rl.training.prepare_process"):
        cfg = replace(presets.compose([*SMALL, *overrides]), replay=presets.tiny().replay)
        return runpy.run_path(str(EXAMPLES / "algorithm.py"))["main"](cfg)


@pytest.mark.parametrize("preset", ["tiny", "vectors"])
def test_it_trains_and_evaluates(preset: str) -> None:
    _, matches = train(f"preset={preset}", "total_steps=60")
    # Every action of a hunter is rewarded with one or two times its number, 0 to 3, in each of six steps at most.
    hunter, prey = matches.summary().values()
    assert 0 < hunter < 27 and 0 < prey < 36


def test_it_trains_agents_with_continuous_actions_as_well() -> None:
    policy, matches = train("preset=vectors", "total_steps=60", "env_kwargs.continuous=true")
    assert not policy.world_model.actions.has_probs
    # Every number is from -1 to 1, of the prey from 0 to 2.
    hunter, prey = matches.summary().values()
    assert abs(hunter) < 18 and 0 < prey < 36


def test_it_trains_the_very_weights_of_the_script(tmp_path: Path) -> None:
    # The script has `Learner`, and also evaluates halfway.
    settings = [*SMALL, "preset=tiny", "total_steps=120", "updates_per_batch=2"]
    run_script("simple_tag", *settings, f"run_dir={tmp_path}", "progress=false")
    ours = train(*settings)[0].state_dict()
    theirs = load_policy(tmp_path / "policy.pt", layout=make_env("mock").layout).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_one_page_without_the_learner() -> None:
    source = (EXAMPLES / "algorithm.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 70
    imported = {
        name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert "Learner" not in imported and {"WorldModelLoss", "Imagination", "ActorLoss", "CriticLoss"} <= imported
