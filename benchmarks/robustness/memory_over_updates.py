"""Watch the memory of a process over many small updates, half of the world model and half of the agents.

python benchmarks/robustness/memory_over_updates.py --updates 100000
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, make_actor, make_critic
from matwm_rl.training import Learner, prepare_process

RESULT = Path(__file__).parents[1] / "results" / "robustness" / "memory_over_updates.json"


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    prepare_process(num_threads=1)
    torch.manual_seed(0)
    cfg = presets.tiny()
    env = make_env("mock", seed=0)
    world_model = WorldModel.from_env(env, replace(cfg.world_model, hidden_size=16, num_layers=1))
    learner = Learner(
        world_model,
        make_actor(world_model, cfg.actor_critic),
        make_critic(world_model, cfg.actor_critic),
        replace(cfg.learner, horizon=2),
    )
    replay = make_replay(env.num_agents, replace(cfg.replay, sequence_length=4, context_length=1), seed=0)
    rows, began, updates = [], time.monotonic(), 0
    while updates < args.updates:
        # Replay is written to as well, and wraps around many times.
        replay.extend(env.rollout(20, break_when_any_done=False))
        replay.end_episodes()
        for _ in range(20):
            learner.update_world_model(replay.sequences.sample())
            learner.update_agents(replay.starts.sample())
            updates += 2
        if updates % max(40, args.updates // 20) < 40:
            gc.collect()
            rows.append({"updates": updates, "resident_mb": round(resident_mb(), 1)})
            print(rows[-1], f"{time.monotonic() - began:.0f} s", flush=True)
    middle = next(row["resident_mb"] for row in rows if row["updates"] >= args.updates // 4)
    result = {
        "updates": updates,
        "growth_mb_in_the_last_three_quarters": round(rows[-1]["resident_mb"] - middle, 1),
        "rows": rows,
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
