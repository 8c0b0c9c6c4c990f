"""The training loop of examples/simple_tag.py with a stopwatch.

    PYTHONPATH=. python benchmarks/speed/preset_loop.py [--seconds 15] [--threads 1] [OVERRIDE ...]

Prints one line of JSON: the updates and wall seconds of the loop after its warm-up, how many of these seconds were
spent on the environments, on collecting apart from them (policy, collector) and on replay (writing, sampling), and the
folder of the package. throughput.py runs it for two versions in turns, each version with the preset_loop.py of its own
checkout; so this script uses this version's API alone, and only the line of JSON has to stay the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl
from matwm_rl import presets
from matwm_rl.data import Replay, make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.training import Learner, prepare_process

WARM_UP_BATCHES = 3


class Stopwatch:
    """Adds up the seconds of the calls of wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start

        return watched


def configuration(overrides: Sequence[str]) -> presets.TrainConfig:
    """Return the preset that is measured."""
    return presets.compose(["preset=vectors", "run_dir=none", *overrides])


def build(cfg: presets.TrainConfig, stepping: Stopwatch) -> tuple[Learner, Replay, Collector]:
    """Build what the loop of the example needs; ``stepping`` times the environments."""
    env = make_env(cfg.env, seed=cfg.seed, num_envs=cfg.num_envs, device=cfg.env_device)
    env._step, env._reset = stepping.around(env._step), stepping.around(env._reset)
    world_model = WorldModel.from_env(env, cfg.world_model).to(cfg.device)
    actor = make_actor(world_model, cfg.actor_critic).to(cfg.device)
    critic = make_critic(world_model, cfg.actor_critic).to(cfg.device)
    learner = Learner(world_model, actor, critic, cfg.learner)
    replay = make_replay(env.num_agents, cfg.replay, num_envs=cfg.num_envs, device=cfg.device, seed=cfg.seed)
    policy = WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    collector = Collector(
        TransformedEnv(env, policy.make_tensordict_primer()),
        policy,
        device=cfg.env_device,
        frames_per_batch=cfg.frames_per_batch,
        total_frames=-1,
        init_random_frames=cfg.init_random_steps,
        auto_register_policy_transforms=False,
    )
    return learner, replay, collector


def run_loop(cfg: presets.TrainConfig, seconds: float) -> dict[str, float]:
    """Train for so many seconds after the first batches, which are not timed: nor are the world model's first updates.

    The critics begin alone, as in a training.
    """
    collecting, stepping, replaying = Stopwatch(), Stopwatch(), Stopwatch()
    learner, replay, collector = build(cfg, stepping)
    next_batch = collecting.around(iter(collector).__next__)
    publish_weights = collecting.around(collector.update_policy_weights_)
    store = replaying.around(replay.extend)
    sample_sequences, sample_starts = map(replaying.around, (replay.sequences.sample, replay.starts.sample))

    env_steps, trained_batches = 0, 0
    started, first_update = perf_counter(), 0
    while trained_batches <= WARM_UP_BATCHES or perf_counter() - started < seconds:
        batch = next_batch()
        store(batch)
        env_steps += batch.numel()
        if env_steps >= cfg.init_random_steps and replay.can_sample:
            for _ in range(cfg.world_model_warmup if learner.updates == 0 else 0):
                learner.update_world_model(sample_sequences())
            for _ in range(cfg.updates_per_batch):
                learner.update_world_model(sample_sequences())
                learner.update_agents(sample_starts(), train_actors=learner.updates >= cfg.critic_warmup)
            publish_weights()
            trained_batches += 1
        if trained_batches == WARM_UP_BATCHES:
            started, first_update = perf_counter(), learner.updates
            collecting.seconds = stepping.seconds = replaying.seconds = 0.0
    result = {
        "updates": learner.updates - first_update,
        "seconds": perf_counter() - started,
        "environment": stepping.seconds,
        "collecting": collecting.seconds - stepping.seconds,
        "replay": replaying.seconds,
    }
    collector.shutdown()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the loop, after its warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    options = parser.parse_intermixed_args(arguments)
    cfg = configuration(options.overrides)
    torch.manual_seed(cfg.seed)
    prepare_process(num_threads=options.threads, matmul_precision=cfg.matmul_precision)
    result = run_loop(cfg, options.seconds)
    print(json.dumps({**result, "package": str(Path(matwm_rl.__file__).parents[1])}))


if __name__ == "__main__":
    main()
