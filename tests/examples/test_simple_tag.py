"""The example runs from end to end, resumes, and its configuration fits the dataclasses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModelConfig
from matwm_rl.objectives import WorldModelLossWeights
from matwm_rl.training import LearnerConfig, load_policy, read_metrics

ROOT = Path(__file__).parents[2]
SMALL = [
    "num_envs=1",
    "num_threads=1",
    "init_random_steps=60",
    "frames_per_batch=20",
    "updates_per_batch=1",
    "log_every=20",
    "evaluation.every=60",
    "evaluation.episodes=2",
    "evaluation.final_episodes=2",
    "evaluation.num_envs=2",
    "sequences=8",
    "starts_per_agent=4",
    "world_model.hidden_size=32",
    "progress=false",
]
TAG = {
    "adversaries_vs_random_prey",
    "adversaries_vs_fleeing_prey",
    "prey_vs_random_adversaries",
    "prey_vs_chasing_adversaries",
}


def run(*overrides: str) -> None:
    command = [sys.executable, "examples/simple_tag.py", *SMALL, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def kept_policies(run_dir: Path) -> list[int]:
    """Env steps after which policies were kept."""
    return sorted(int(path.stem) for path in (run_dir / "policies").iterdir())


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base=None):
        return compose("config", overrides=list(overrides))


def test_trains_evaluates_draws_and_resumes(tmp_path: Path) -> None:
    run(f"run_dir={tmp_path}", "total_steps=120", "evaluation.keep_policies=true")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["env_steps"] == 120
    assert summary["updates"] == 4
    assert summary["wall_seconds"] > 0
    assert summary["resumed_from"] is None
    assert (summary["config"]["world_model"]["hidden_size"], summary["config"]["learner"]["gamma"]) == (32, 0.95)
    assert set(summary["evaluation"]) == TAG
    for picture in ("learning_curves.png", "episodes.gif", "imagination.png"):
        assert (tmp_path / picture).stat().st_size > 1000
    layout = make_env("mpe2/simple_tag_v3").layout
    policy = load_policy(tmp_path / "policy.pt", layout=layout)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    assert kept_policies(tmp_path) == [60, 120]
    kept = [load_policy(tmp_path / "policies" / f"{step:08d}.pt", layout=layout).state_dict() for step in (60, 120)]
    assert all(torch.equal(value, before[name]) for name, value in kept[1].items())
    assert any(not torch.equal(value, before[name]) for name, value in kept[0].items())

    run(f"run_dir={tmp_path}", "total_steps=200", "resume=true", "evaluation.keep_policies=true")
    assert kept_policies(tmp_path) == [60, 120, 180, 200]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["resumed_from"], summary["env_steps"], summary["updates"]) == (120, 200, 8)
    steps = [step for step, _ in read_metrics(tmp_path)["loss_reward"]]
    assert steps == sorted(set(steps)) and steps[-1] == 200
    after = load_policy(tmp_path / "policy.pt", layout=layout).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    replay = make_replay(num_agents=4, sequences_per_agent=2, starts_per_agent=4, sequence_length=16)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    replay.loads(checkpoint / "replay")
    observation = replay.sequences.storage[:]["observation"]
    assert not torch.equal(observation[120], observation[0]), "the episodes that the run began with came again"

    # Nothing is left to do.
    run(f"run_dir={tmp_path}", "total_steps=190", "resume=true")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["env_steps"], summary["updates"]) == (200, 8)
    for name, values in read_metrics(tmp_path).items():
        assert len(values) == len(dict(values)), name


@pytest.mark.parametrize("env", ["vmas/simple_tag", "mpe2/simple_speaker_listener_v4"])
def test_other_environments(tmp_path: Path, env: str) -> None:
    run(f"run_dir={tmp_path}", f"env={env}", "total_steps=80", "world_model.predict_mask=true")
    evaluation = json.loads((tmp_path / "summary.json").read_text())["evaluation"]
    assert set(evaluation) == (TAG if "simple_tag" in env else {"speaker", "listener"})
    assert not (tmp_path / "policies").exists()


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_every_setting_can_be_given_on_the_command_line(preset: str) -> None:
    """Hydra takes ``learner.gamma=0.9`` only if the configuration has such an entry."""
    cfg = config(f"preset={preset}")
    assert set(cfg.world_model) == {field.name for field in fields(WorldModelConfig)}
    assert set(cfg.learner) == {field.name for field in fields(LearnerConfig)}
    assert set(cfg.learner.loss_weights) == {field.name for field in fields(WorldModelLossWeights)}


def test_paper_preset_is_table_c6() -> None:
    """It has the defaults of the dataclasses, which are the paper's."""
    cfg = config("preset=paper")
    assert WorldModelConfig(**cfg.world_model) == WorldModelConfig()
    assert cfg.learner.horizon is None, "by the number of agents"
    assert LearnerConfig.from_dict({**cfg.learner, "horizon": 16}) == LearnerConfig()
    assert (cfg.sequences, cfg.replay.sequence_length, cfg.replay.context_length) == (16, 64, 8)
    assert (cfg.replay.capacity, cfg.recency_decay, cfg.init_random_steps) == (50_000, 0.9998, 1_000)
    assert cfg.frames_per_batch == cfg.updates_per_batch == cfg.num_envs == 1


def test_cpu_preset_is_what_scripts_call_small() -> None:
    """So that a script of one's own has the settings that the benchmarks are of."""
    cfg = config("preset=cpu")
    model, learner = WorldModelConfig.small(), LearnerConfig.small()
    assert model == WorldModelConfig(**cfg.world_model)
    assert learner == LearnerConfig.from_dict(OmegaConf.to_container(cfg.learner))


def test_ablation_switches_reach_the_model() -> None:
    cfg = config("teammate_predictor=false", "action_scaling=false")
    assert cfg.world_model.teammate_predictor is False
    assert cfg.world_model.action_scaling is False
