"""Updates per second of one learner process with one thread, of one with two threads, and of two learner processes.

Each of two processes has half of every batch. They are timed twice: as one distributed learner (together), and as two
separate learners (apart). Separate learners never wait for each other, so their rate is the most that two processes
can reach together on the same machine.

    PYTHONPATH=. python benchmarks/speed/learner_processes.py [--rounds 3] [--updates 15] [OVERRIDE ...]

An update is one of the world model and one of all agents, on stored steps of the environment: no environment is played.
The four setups take turns, so that drift of the machine cancels. Prints a table in Markdown with the median over the
rounds, the ratio to one process with one thread, and the size of the gradients that are averaged in an update.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from traffic import gradient_bytes

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, make_actor, make_critic
from matwm_rl.runs import split_run
from matwm_rl.training import Learner, distribute, prepare_process

WAYS = ((1, 1, True), (1, 2, True), (2, 1, True), (2, 1, False))
"""Processes, threads of each, and whether they learn together."""


def time_updates(threads: int, together: bool, updates: int, overrides: Sequence[str]) -> dict[str, float] | None:
    """Return seconds per update, timed in one of the processes that torchrun has started; ``None`` in the others."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    cfg = presets.compose(["preset=vectors", "run_dir=none", *overrides])
    num_agents = make_env(cfg.env, seed=0).num_agents
    cfg = split_run(cfg, rank=rank, world_size=world_size, num_agents=num_agents)
    torch.manual_seed(cfg.seed)
    prepare_process(num_threads=threads, matmul_precision=cfg.matmul_precision)
    env = make_env(cfg.env, seed=cfg.seed, num_envs=cfg.num_envs)
    replay = make_replay(num_agents, cfg.replay, num_envs=cfg.num_envs, seed=cfg.seed)
    replay.extend(env.rollout(cfg.init_random_steps // cfg.num_envs, break_when_any_done=False))
    world_model = WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (make_actor, make_critic))
    learner = Learner(world_model, actor, critic, cfg.learner)
    together = together and world_size > 1
    if together:
        distribute(learner)
    seconds = []
    for _ in range(3 + updates):
        dist.barrier()
        begun = perf_counter()
        learner.update_world_model(replay.sequences.sample())
        learner.update_agents(replay.starts.sample())
        seconds.append(perf_counter() - begun)
    dist.destroy_process_group()
    averaged = gradient_bytes(learner) if together else 0
    return None if rank else {"seconds": median(seconds[3:]), "bytes": averaged}


def run(processes: int, threads: int, together: bool, options: argparse.Namespace) -> dict[str, float]:
    """Time one way in processes of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [__file__, "--worker", f"--threads={threads}", f"--updates={options.updates}", *options.overrides]
    words += [] if together else ["--apart"]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{processes} processes with {threads} threads failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(lines[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=15, help="that are timed, after three others")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    options = parser.parse_intermixed_args(arguments)
    if options.worker:
        if (result := time_updates(options.threads, not options.apart, options.updates, options.overrides)) is not None:
            print(json.dumps(result), flush=True)
        return
    results: dict[tuple[int, int, bool], list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            results[way].append(run(*way, options))
    print("| processes | threads of each | learn | updates/s | ratio | MB of gradients averaged in an update |")
    print("|---|---|---|---|---|---|")
    alone = median(result["seconds"] for result in results[WAYS[0]])
    for (processes, threads, together), measured in results.items():
        seconds = median(result["seconds"] for result in measured)
        averaged = measured[0]["bytes"] / 1e6
        learn = "alone" if processes == 1 else "together" if together else "apart"
        print(f"| {processes} | {threads} | {learn} | {1 / seconds:.2f} | {alone / seconds:.2f} | {averaged:.1f} |")


if __name__ == "__main__":
    main()
