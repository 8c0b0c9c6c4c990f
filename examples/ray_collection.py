"""Two workers of a Ray cluster play and this process learns: python examples/ray_collection.py [ENV] [STEPS] [SEED]."""

import os
import sys
from dataclasses import replace
from functools import partial

import ray
import torch
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.training import fail_with_workers, prepare_process


def main(env="mpe2/simple_spread_v3", total_steps=10_000, seed=0, *, workers=2, episodes=100, **changes) -> None:
    cfg, local = replace(mw.presets.vectors(), **changes), "RAY_ADDRESS" not in os.environ
    ray.init("local" if local else None, num_cpus=workers if local else None, log_to_driver=False)
    torch.manual_seed(seed)
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)
    test_env = mw.make_env(env, num_envs=cfg.evaluation.num_envs, seed=seed + 1_000)
    world_model = mw.WorldModel.from_env(test_env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
    policy = mw.WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    learner = mw.Learner(world_model, actor, critic, cfg.learner)
    replay = mw.make_replay(test_env.num_agents, cfg.replay, seed=seed)
    collector = RayCollector(  # sends the policy to a worker once, then new weights after every batch
        [partial(mw.make_env, env, num_envs=cfg.num_envs // workers, seed=workers * seed + i) for i in range(workers)],
        policy,
        frames_per_batch=cfg.frames_per_batch,
        trajs_per_batch=1,  # whole episodes, so that those of different workers can follow each other in replay
        total_frames=sys.maxsize,  # it would count frames_per_batch for an episode of any length
        init_random_frames=cfg.init_random_steps,
        update_after_each_batch=True,
        collector_kwargs={"traj_format": "cat", "auto_register_policy_transforms": True},
        remote_configs={"num_cpus": 1},
    )
    collector.update_policy_weights_()
    with fail_with_workers(collector.remote_collectors):
        for batch in collector:
            replay.extend(batch)
            steps = replay.env_steps - cfg.init_random_steps
            for _ in range(cfg.world_model_warmup if steps > 0 and learner.updates == 0 else 0):
                learner.update_world_model(replay.sequences.sample())
            while learner.updates < steps * cfg.updates_per_batch / cfg.frames_per_batch:  # as many as in one process
                learner.update_world_model(replay.sequences.sample())
                learner.update_agents(replay.starts.sample(), train_actors=learner.updates >= cfg.critic_warmup)
            if steps >= total_steps - cfg.init_random_steps:
                break
    collector.shutdown()
    test_env = TransformedEnv(test_env, policy.make_tensordict_primer())
    for name, acting in (("random", RandomActions(test_env.layout.actions)), ("trained", policy)):
        print(f"{name} agents, mean return: {evaluate(test_env, acting, episodes=episodes).per_group()}")


if __name__ == "__main__":
    main(*(int(word) if word.isdecimal() else word for word in sys.argv[1:]))
