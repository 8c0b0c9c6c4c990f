"""Two Ray workers play, this process learns, each at its own pace. On a cluster: RAY_ADDRESS=auto, or its address."""

import argparse
import os
from dataclasses import replace
from functools import partial

import ray
import torch
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.training import prepare_process

WORKERS = 2


def main(env: str, total_steps: int, seed: int = 0, episodes: int = 100, **changes) -> None:
    cfg = replace(mw.presets.vectors(), **changes)
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address, num_cpus=WORKERS if address == "local" else None, log_to_driver=False, logging_level="error")
    torch.manual_seed(seed)
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)
    make_env = partial(mw.make_env, env, num_envs=cfg.num_envs // WORKERS)
    test_env = mw.make_env(env, num_envs=cfg.evaluation.num_envs, seed=seed + 1_000)
    world_model = mw.WorldModel.from_env(test_env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
    policy = mw.WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    learner = mw.Learner(world_model, actor, critic, cfg.learner)
    replay = mw.make_replay(test_env.num_agents, cfg.replay, seed=seed)

    # A worker is sent the policy once, when it starts, and new weights, the world model's among them, after each batch
    # of its own. A batch is a whole episode, so that those of different workers can follow each other in replay.
    collector = RayCollector(
        [partial(make_env, seed=WORKERS * seed + index) for index in range(WORKERS)],
        policy,
        frames_per_batch=cfg.frames_per_batch,
        trajs_per_batch=1,
        total_frames=100 * total_steps,  # no limit: TorchRL counts frames_per_batch for an episode of any length
        init_random_frames=cfg.init_random_steps,
        update_after_each_batch=True,
        collector_kwargs={"traj_format": "cat", "auto_register_policy_transforms": True},
        remote_configs={"num_cpus": 1},
    )
    collector.update_policy_weights_()
    for batch in collector:
        replay.extend(batch)
        if replay.env_steps >= cfg.init_random_steps and replay.can_sample:
            for _ in range(cfg.world_model_warmup if learner.updates == 0 else 0):
                learner.update_world_model(replay.sequences.sample())
            # As many updates per step as in one process.
            due = (replay.env_steps - cfg.init_random_steps) * cfg.updates_per_batch / cfg.frames_per_batch
            while learner.updates < due:
                learner.update_world_model(replay.sequences.sample())
                learner.update_agents(replay.starts.sample(), train_actors=learner.updates >= cfg.critic_warmup)
        if replay.env_steps >= total_steps:
            break
    collector.shutdown()
    ray.shutdown()

    test_env = TransformedEnv(test_env, policy.make_tensordict_primer())
    for name, acting in (("random", RandomActions()), ("trained", policy)):
        returns = evaluate(test_env, acting, episodes=episodes).per_group()
        print(f"{name} agents, mean return: {', '.join(f'{group} {value:.1f}' for group, value in returns.items())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("env", "mpe2/simple_spread_v3"), ("total_steps", 10_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(**vars(parser.parse_args()))
