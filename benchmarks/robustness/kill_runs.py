"""Kill a run at random moments, resume it, and compare it in the end with the run that nobody killed.

    python benchmarks/robustness/kill_runs.py --kills 200

Half of the kills wait until a checkpoint is being written. The script is examples/simple_tag.py with the preset `tiny`;
every attempt is a forked process, so that none has to import PyTorch again. The result must be the uninterrupted run's,
bit by bit: weights, metrics, evaluation. A kill may cost the steps since the last checkpoint, and no others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import matwm_rl.training.collector
from matwm_rl.evaluation import read_metrics
from matwm_rl.training import has_checkpoint

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "robustness" / "kill_runs.json"
CHECKPOINT_EVERY, FRAMES = 40, 20
SETTINGS = [
    "preset=tiny",
    "world_model.normalize=true",
    "env=mpe2/simple_tag_v3",
    "num_envs=2",
    "num_threads=1",
    "progress=false",
    f"frames_per_batch={FRAMES}",
    "init_random_steps=60",
    f"log_every={FRAMES}",
    f"checkpoint_every={CHECKPOINT_EVERY}",
    "evaluation.every=1000",
    "evaluation.episodes=2",
    "evaluation.final_episodes=2",
]


def start(run_dir: Path, total_steps: int) -> int:
    """Fork a process that runs the script, or goes on with it; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["simple_tag.py", *SETTINGS, f"run_dir={run_dir}", f"total_steps={total_steps}", "resume=true"]
    try:
        runpy.run_path(str(ROOT / "examples" / "simple_tag.py"), run_name="__main__")
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)


def wait(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the run ended with status {status}; see the log beside its folder")


def steps_logged(run_dir: Path) -> int:
    if not (run_dir / "metrics.csv").exists():
        return 0
    return max((values[-1][0] for values in read_metrics(run_dir).values()), default=0)


def steps_saved(run_dir: Path) -> int:
    if not has_checkpoint(run_dir):
        return 0
    newest = max((run_dir / "checkpoints").glob("[0-9]*"))
    return int(torch.load(newest / "state.pt", weights_only=True)["env_steps"])


def kill_in_time(pid: int, run_dir: Path, rng: random.Random, longest: float) -> str:
    """Kill the process at a random moment; return which: ``"anywhere"``, ``"writing"``, or ``"ended"`` if too late."""
    deadline = time.monotonic() + rng.uniform(0, longest)
    aim = rng.random() < 0.5
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return "ended"
        time.sleep(0.001)
    while aim:
        if any(run_dir.glob("checkpoints/.partial-*")):
            time.sleep(rng.uniform(0, 0.01))
            break
        if os.waitpid(pid, os.WNOHANG)[0]:
            return "ended"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "writing" if any(run_dir.glob("checkpoints/.partial-*")) else "anywhere"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the stored policy, by name."""

    def leaves(state: object, name: str = "") -> dict[str, torch.Tensor]:
        if isinstance(state, torch.Tensor):
            return {name: state}
        items = state.items() if isinstance(state, dict) else ()
        return {key: leaf for part, value in items for key, leaf in leaves(value, f"{name}.{part}").items()}

    return leaves(torch.load(run_dir / "policy.pt", weights_only=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--total-steps", type=int, default=2000, help="of each run; a new run begins when one has ended"
    )
    parser.add_argument("--longest", type=float, default=6.0, help="seconds until the latest kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Restarts come soon, so that they are tried, and so that little has to be played again.
    matwm_rl.training.collector.RESTART_EVERY = 300
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_runs-"))
    began = time.monotonic()
    whole = folder / "whole"
    wait(start(whole, args.total_steps))
    expected, metrics = weights(whole), (whole / "metrics.csv").read_text()
    evaluation = json.loads((whole / "summary.json").read_text())["evaluation"]

    kills: dict[str, int] = {"anywhere": 0, "writing": 0}
    lost, runs, attempt = [], 0, folder / "run-000"
    while sum(kills.values()) < args.kills or attempt.exists():
        pid = start(attempt, args.total_steps)
        if sum(kills.values()) < args.kills:
            how = kill_in_time(pid, attempt, rng, args.longest)
            if how != "ended":
                kills[how] += 1
                lost.append(max(0, steps_logged(attempt) - steps_saved(attempt)))
                continue
        else:
            wait(pid)
        found = weights(attempt)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), f"{attempt}: other weights"
        assert (attempt / "metrics.csv").read_text() == metrics, f"{attempt}: other metrics"
        assert json.loads((attempt / "summary.json").read_text())["evaluation"] == evaluation, f"{attempt}: evaluation"
        runs += 1
        attempt = folder / f"run-{runs:03d}"
    result = {
        "kills": sum(kills.values()),
        "while_a_checkpoint_was_written": kills["writing"],
        "runs_completed": runs,
        "bit_exact": True,
        "checkpoint_every": CHECKPOINT_EVERY,
        "most_steps_lost": max(lost, default=0),
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
    }
    assert result["most_steps_lost"] <= CHECKPOINT_EVERY, result
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
