"""The training loop of examples/simple_tag.py with a stopwatch, for whichever version of the package is on the path.

    PYTHONPATH=VERSION python benchmarks/preset_loop.py VERSION/examples/conf [--seconds 15] [OVERRIDE ...]

Prints one line of JSON: updates and wall seconds of the loop once training is under way, and how many of these seconds
went into the environments, into collecting besides (policy, collector) and into replay (writing, sampling).
throughput.py runs it for two versions in turns, so it may use only what both have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl
from matwm_rl import training
from matwm_rl.data import Replay, make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import RandomEpisodes, WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.training import Learner, LearnerConfig

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


def build(cfg: DictConfig, stepping: Stopwatch) -> tuple[Learner, Replay, Collector]:
    """Everything that the example's loop needs; ``stepping`` times the environments."""
    env = make_env(cfg.env, seed=cfg.seed, num_envs=cfg.num_envs, device=cfg.device)
    env._step, env._reset = stepping.around(env._step), stepping.around(env._reset)
    num_agents = env.layout.num_agents
    world_model = WorldModel.from_env(env, **cfg.world_model)
    actor = make_actor(world_model, **cfg.actor_critic)
    critic = make_critic(world_model, **cfg.actor_critic)
    learner = Learner(world_model, actor, critic, LearnerConfig.from_dict(cfg.learner))
    replay = make_replay(
        num_agents=num_agents,
        num_envs=cfg.num_envs,
        sequences_per_agent=max(1, round(cfg.sequences / num_agents)),
        starts_per_agent=cfg.starts_per_agent,
        decay=cfg.recency_decay if cfg.recency else 1.0,
        device=cfg.device,
        seed=cfg.seed,
        **cfg.replay,
    )
    explorer = RandomEpisodes(WorldModelPolicy(world_model, actor, **cfg.policy), probability=cfg.random_episodes)
    collector = Collector(
        TransformedEnv(env, explorer.make_tensordict_primer()),
        explorer,
        frames_per_batch=cfg.frames_per_batch,
        total_frames=-1,
        init_random_frames=cfg.init_random_steps,
        auto_register_policy_transforms=False,
    )
    return learner, replay, collector


def run_loop(cfg: DictConfig, seconds: float) -> dict[str, float]:
    """Train until the loop has run for so long behind its warm-up."""
    collecting, stepping, replaying = Stopwatch(), Stopwatch(), Stopwatch()
    learner, replay, collector = build(cfg, stepping)
    next_batch = collecting.around(iter(collector).__next__)
    publish_weights = collecting.around(collector.update_policy_weights_)
    store = replaying.around(replay.extend)
    # The learner samples by itself.
    for buffer in (replay.sequences, replay.starts):
        buffer.sample = replaying.around(buffer.sample)

    env_steps, trained_batches = 0, 0
    started, first_update = perf_counter(), 0
    while trained_batches <= WARM_UP_BATCHES or perf_counter() - started < seconds:
        batch = next_batch()
        store(batch)
        env_steps += batch.numel()
        if env_steps >= cfg.init_random_steps and replay.can_sample:
            for _ in range(cfg.updates_per_batch):
                learner.update(replay)
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
    parser.add_argument("conf", type=Path, help="folder of the configuration")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the loop, behind its warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    options = parser.parse_intermixed_args(arguments)
    with initialize_config_dir(str(options.conf.resolve()), version_base=None):
        cfg = compose("config", overrides=["preset=cpu", *options.overrides])
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(options.threads)
    # The baseline has no such function.
    if prepare := getattr(training, "prepare_process", None):
        prepare(num_threads=options.threads, matmul_precision=cfg.matmul_precision)
    result = run_loop(cfg, options.seconds)
    print(json.dumps({**result, "package": str(Path(matwm_rl.__file__).parents[1])}))


if __name__ == "__main__":
    main()
