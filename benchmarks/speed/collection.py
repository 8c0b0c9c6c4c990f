"""Frames per second of 1, 2 and 4 collecting workers, processes and Ray, without learning; a table in Markdown.

    python benchmarks/speed/collection.py --env mpe2/simple_spread_v3 --seconds 20

All workers act with the same policy, of the preset `vectors`, in an environment each. They deliver whole episodes at
their own pace. Seconds to start are those until the first episode has arrived; a synchronisation is one call of
`update_policy_weights_`, which waits until every worker has answered, between two of its batches.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torchrl.collectors import Collector
from torchrl.collectors.distributed import RayCollector

import matwm_rl as mw

SYNCHRONISATIONS = 5


@contextmanager
def processes(make: list[Any], policy: mw.WorldModelPolicy, **options: Any) -> Iterator[Any]:
    inner = options.pop("collector_kwargs")
    collector = Collector(make, policy, num_collectors=len(make), sync=False, **options, **inner)
    try:
        yield collector
    finally:
        collector.shutdown()


@contextmanager
def ray_actors(make: list[Any], policy: mw.WorldModelPolicy, **options: Any) -> Iterator[Any]:
    collector = RayCollector(make, policy, remote_configs={"num_cpus": 0.01}, **options)
    collector.update_policy_weights_()
    try:
        yield collector
    finally:
        collector.shutdown()


def measure(collecting: Any, make: list[Any], policy: mw.WorldModelPolicy, seconds: float) -> dict[str, float]:
    began = time.monotonic()
    options = {"frames_per_batch": 25, "trajs_per_batch": 1, "total_frames": 10**9}
    inner = {"traj_format": "cat", "auto_register_policy_transforms": True}
    frames = 0
    with collecting(make, policy, collector_kwargs=inner, **options) as collector:
        batches = iter(collector)
        next(batches)
        started = time.monotonic() - began
        # All workers have begun when as many batches have come as each may have waiting.
        for _ in range(3 * len(make)):
            next(batches)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            frames += next(batches).numel()
        rate = frames / (time.monotonic() - began)
        began = time.monotonic()
        for _ in range(SYNCHRONISATIONS):
            collector.update_policy_weights_()
        return {"start": started, "rate": rate, "sending": (time.monotonic() - began) / SYNCHRONISATIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="mpe2/simple_spread_v3")
    parser.add_argument("--num-envs", type=int, default=1, help="environments of each worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error")
    torch.set_num_threads(1)
    cfg = mw.presets.vectors()
    make = partial(mw.make_env, args.env, num_envs=args.num_envs)
    model = mw.WorldModel.from_env(make(), cfg.world_model)
    actor = mw.make_actor(model, cfg.actor_critic)
    policy = mw.WorldModelPolicy(model, actor, history_length=cfg.policy.history_length)
    sent = sum(tensor.nbytes for tensor in [*policy.parameters(), *policy.buffers()])
    cores, load = os.cpu_count(), os.getloadavg()[0]
    print(f"{args.env}, {args.num_envs} environment(s) per worker; {cores} cores, load {load:.1f} before")
    print(f"A synchronisation sends {sent / 1e6:.2f} MB to each Ray worker; processes share that memory.\n")
    print("| workers | backend | frames per second | seconds to start | seconds per synchronisation |")
    print("|---|---|---|---|---|", flush=True)
    for name, collecting in (("processes", processes), ("Ray", ray_actors)):
        for count in args.workers:
            workers = [partial(make, seed=seed) for seed in range(count)]
            found = measure(collecting, workers, policy, args.seconds)
            print(
                f"| {count} | {name} | {found['rate']:.0f} | {found['start']:.0f} | {found['sending']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
