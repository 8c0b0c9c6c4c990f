"""Kill a worker or a learner process of a training at random moments, and look at how the training ends.

    python benchmarks/robustness/kill_workers.py --kills 20
    python benchmarks/robustness/kill_workers.py --targets ray --kills 5

A training that has lost a process must end within a minute, with an error that names the process, and leave a
checkpoint that loads. Each kill has a training of its own, in the preset `tiny`, which goes on until it fails. The
moment is uniform over the seconds after its first checkpoint, so that it falls into collection, updates, the sending
of weights and the writing of checkpoints alike.

A target is a function that trains and calls `checkpoint` between its updates; `TARGETS` says how its process starts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.data import Replay
from matwm_rl.training import Learner, distribute, fail_with_workers, load_checkpoint, save_checkpoint

RESULT = Path(__file__).parents[1] / "results" / "robustness" / "kill_workers.json"
LIMIT = 60.0
"""Seconds after which a training that has not ended hangs."""


class Training:
    """The parts of a small training, and its checkpoints."""

    def __init__(self, run_dir: Path, num_envs: int = 1) -> None:
        cfg = mw.presets.tiny()
        torch.set_num_threads(1)
        self.run_dir = run_dir
        self.make = partial(mw.make_env, "mock", episode_length=5)
        env = self.make()
        world_model = mw.WorldModel.from_env(env, cfg.world_model)
        actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
        self.learner = Learner(world_model, actor, critic, cfg.learner)
        self.policy = mw.WorldModelPolicy(world_model, actor, history_length=4)
        self.replay: Replay = mw.make_replay(env.num_agents, cfg.replay, num_envs=num_envs, seed=0)

    def learn(self, batches: Iterable[Any], pids: Callable[[], list[int]], collector: Any) -> None:
        """Store, learn, send weights and save after every batch; tell the workers' pids with the first checkpoint."""
        for batch in batches:
            self.replay.extend(batch)
            if self.replay.can_sample:
                self.learner.update_world_model(self.replay.sequences.sample())
                self.learner.update_agents(self.replay.starts.sample())
                collector.update_policy_weights_()
                self.checkpoint(pids)

    def checkpoint(self, pids: Callable[[], list[int]]) -> None:
        """Save; the first time, tell whom to kill."""
        save_checkpoint(self.run_dir, learner=self.learner, replay=self.replay, env_steps=self.replay.env_steps)
        told = self.run_dir / "pids.json"
        if not told.exists():
            told.with_suffix(".new").write_text(json.dumps(pids()))
            told.with_suffix(".new").rename(told)


def with_processes(run_dir: Path) -> None:
    training = Training(run_dir)
    collector = Collector(
        [partial(training.make, seed=seed) for seed in (1, 2)],
        training.policy,
        num_collectors=2,
        sync=False,
        frames_per_batch=20,
        trajs_per_batch=1,
        traj_format="cat",
        total_frames=-1,
        auto_register_policy_transforms=True,
    )
    with fail_with_workers(collector.procs):
        training.learn(collector, lambda: [worker.pid for worker in collector.procs], collector)


def with_ray(run_dir: Path, *, sync: bool) -> None:
    import ray
    from torchrl.collectors.distributed import RayCollector

    ray.init(log_to_driver=False, logging_level="error")
    training = Training(run_dir, num_envs=2 if sync else 1)
    collector = RayCollector(
        [partial(training.make, seed=seed) for seed in (1, 2)],
        training.policy,
        sync=sync,
        frames_per_batch=20,
        total_frames=10**9,
        trajs_per_batch=None if sync else 1,
        collector_kwargs={"auto_register_policy_transforms": True} | ({} if sync else {"traj_format": "cat"}),
        remote_configs={"num_cpus": 0.1},
    )
    collector.update_policy_weights_()
    pids = ray.get([worker.__ray_call__.remote(lambda _: os.getpid()) for worker in collector.remote_collectors])
    with fail_with_workers(collector.remote_collectors):
        training.learn(collector, lambda: pids, collector)


def with_learners(run_dir: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    training = Training(run_dir)
    torch.manual_seed(rank)
    distribute(training.learner)
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    env = TransformedEnv(training.make(seed=rank), training.policy.make_tensordict_primer())
    collector = Collector(
        env, training.policy, frames_per_batch=20, total_frames=-1, auto_register_policy_transforms=False
    )
    if rank:
        training.checkpoint = lambda pids: None  # type: ignore[method-assign]
    training.learn(collector, lambda: pids, collector)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TARGETS: dict[str, tuple[list[str], Callable[[Path], None]]] = {
    "processes": ([sys.executable], with_processes),
    "ray": ([sys.executable], partial(with_ray, sync=False)),
    "ray in step": ([sys.executable], partial(with_ray, sync=True)),
    "learners": (TORCHRUN, with_learners),
}
"""What is killed: the command that starts a script, and the training in it."""


def kill_one(target: str, run_dir: Path, rng: random.Random, longest: float) -> dict[str, Any]:
    """Start a training, kill one of its processes, and tell how it ended."""
    run_dir.mkdir()
    log = run_dir / "log.txt"
    command = [*TARGETS[target][0], __file__, "--train", target, "--run-dir", str(run_dir)]
    with log.open("w") as output:
        training = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not (run_dir / "pids.json").exists():
            if training.poll() is not None:
                raise RuntimeError(f"the training ended before anybody was killed; see {log}")
            time.sleep(0.05)
        time.sleep(rng.uniform(0, longest))
        pid = rng.choice(json.loads((run_dir / "pids.json").read_text()))
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        try:
            code: int | None = training.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - killed
    finally:
        # A training that hangs, and what it has left behind.
        if training.poll() is None:
            os.killpg(training.pid, signal.SIGKILL)
    errors = re.split(r"^(?=\S*Error: )", log.read_text(), flags=re.MULTILINE)[1:]
    saved = Training(run_dir, num_envs=2 if target == "ray in step" else 1)
    steps = load_checkpoint(run_dir, learner=saved.learner, replay=saved.replay)["env_steps"]
    return {
        "target": target,
        "exit_code": code,
        "seconds": round(seconds, 1),
        # Before the root cause, torchrun lists the processes that it has ended itself.
        "names_process": bool(errors) and str(pid) in errors[-1].rpartition("Root Cause")[2],
        "error": errors[-1].strip() if errors else "",
        "checkpoint_steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each target")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--longest", type=float, default=5.0, help="seconds until the latest kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--train", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        TARGETS[args.train][1](args.run_dir)
        return
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_workers-"))
    results: dict[str, Any] = {}
    for target in args.targets:
        ends = []
        for number in range(args.kills):
            ends.append(kill_one(target, folder / f"{target.replace(' ', '-')}-{number}", rng, args.longest))
            print(json.dumps(ends[-1]), flush=True)
        results[target] = {
            "kills": len(ends),
            "hangs": sum(end["exit_code"] is None for end in ends),
            "ended_without_error": sum(end["exit_code"] == 0 for end in ends),
            "error_names_the_process": sum(end["names_process"] for end in ends),
            "checkpoint_whole": len(ends),  # load_checkpoint would have raised
            "most_seconds_until_the_end": max(end["seconds"] for end in ends),
        }
    print(json.dumps(results, indent=2))
    args.output.write_text(json.dumps(results | {"torch": torch.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()
