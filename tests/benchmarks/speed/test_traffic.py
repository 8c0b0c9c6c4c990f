"""What goes between processes is counted by slow references, and the guide has these figures."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from traffic import main, traffic

import matwm_rl as mw

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "bytes: policy weights, to a worker, per synchronisation"
FRAME, BARE = "bytes: a frame as the policy leaves it", "bytes: a frame without the policy's history"


def saved_size(module: torch.nn.Module) -> int:
    file = io.BytesIO()
    torch.save([*module.parameters(), *module.buffers()], file)  # tensors that share memory are written once
    return file.tell()


def test_counts_are_those_of_slow_references() -> None:
    counted = traffic("tiny", "mock")
    cfg, env = mw.presets.tiny(), mw.make_env("mock", seed=0)
    world_model = mw.WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
    # A file has a few hundred bytes more for every tensor.
    policy = mw.WorldModelPolicy(world_model, actor, history_length=4)
    overhead = 400 * len([*policy.parameters(), *policy.buffers()])
    assert counted[WEIGHTS] < saved_size(policy) < counted[WEIGHTS] + overhead
    trained = [sum(parameter.numel() for parameter in part.parameters()) for part in (world_model, actor, critic)]
    assert counted["bytes: all gradients, per update"] == 4 * sum(trained)
    assert counted["bytes: all gradients, per env step"] == 4 * sum(trained) / cfg.frames_per_batch
    # The history stands in a step twice: before and after it.
    step = env.append_transform(policy.make_tensordict_primer()).rollout(1, policy)
    history = step["history"].bytes() + step["next", "history"].bytes()
    assert counted[FRAME] - counted[BARE] == history > 0


def test_the_guide_has_the_figures_of_vectors() -> None:
    counted = traffic("vectors", "mpe2/simple_spread_v3")
    lines = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    shown = {row[0]: row[3] for row in cells if len(row) == 5}
    steps = mw.presets.vectors().learner.agent_steps
    of_model = counted["bytes: gradients of the world model, per update"]
    of_agents = (counted["bytes: all gradients, per update"] - of_model) / steps
    assert shown["policy: world model and actors"] == f"{counted[WEIGHTS] / 1e6:.1f} MB"
    assert shown["frames, with the policy's history"] == f"{counted[FRAME] / 1e3:.0f} kB per frame"
    assert shown["frames, without it"] == f"{counted[BARE] / 1e3:.2f} kB per frame"
    assert shown["gradients of the world model"] == f"{of_model / 1e6:.1f} MB"
    assert shown["gradients of actors and critics"] == f"{steps} × {of_agents / 1e6:.2f} MB"
    assert shown["checkpoint: networks and optimizers"] == f"{counted['bytes: learner in a checkpoint'] / 1e6:.1f} MB"
    full = counted["bytes: replay in a checkpoint, when full"]
    assert shown["checkpoint: replay with 50,000 frames"] == f"{full / 1e6:.0f} MB"


def test_the_command_prints_a_column_for_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--env", "mock", "--presets", "tiny"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"mock +tiny", first) and len(lines) > 10
