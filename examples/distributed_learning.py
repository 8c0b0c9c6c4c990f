"""Processes that learn as one: torchrun --nproc-per-node 2 examples/distributed_learning.py [ENV] [STEPS] [SEED]."""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.runs import split_run
from matwm_rl.training import distribute, has_checkpoint, load_checkpoint, prepare_process, save_checkpoint


def main(env="mpe2/simple_spread_v3", total_steps=10_000, seed=0, run_dir="", *, episodes=100, **changes) -> None:
    dist.init_process_group("gloo")  # for GPUs see docs/scaling.md
    rank, world_size, num_agents = dist.get_rank(), dist.get_world_size(), mw.make_env(env, seed=seed).num_agents
    cfg = replace(mw.presets.vectors(), total_steps=total_steps, seed=seed, **changes)
    cfg = split_run(cfg, rank=rank, world_size=world_size, num_agents=num_agents)  # this process's part
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)
    test_env, env = (mw.make_env(env, seed=cfg.seed + i, num_envs=cfg.num_envs) for i in (1_000, 0))
    world_model = mw.WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
    learner = mw.Learner(world_model, actor, critic, cfg.learner)
    replay = mw.make_replay(num_agents, cfg.replay, num_envs=cfg.num_envs)  # draws as torch does
    if run_dir and has_checkpoint(run_dir):  # all go on with the learner and the replay of the first process
        load_checkpoint(run_dir, learner=learner, replay=replay)
        replay.end_episodes()
    torch.manual_seed(cfg.seed + replay.env_steps)  # other random numbers in every process
    distribute(learner)  # the one call; what follows is the loop of one process
    policy = mw.WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    test_env, env = (TransformedEnv(e, policy.make_tensordict_primer()) for e in (test_env, env))
    frames = {"frames_per_batch": cfg.frames_per_batch, "total_frames": max(0, cfg.total_steps - replay.env_steps)}
    frames |= {"init_random_frames": max(0, cfg.init_random_steps - replay.env_steps)}
    for batch in Collector(env, policy, auto_register_policy_transforms=False, **frames):
        replay.extend(batch)
        if replay.env_steps < cfg.init_random_steps or not replay.can_sample:
            continue
        for _ in range(cfg.world_model_warmup if learner.updates == 0 else 0):
            learner.update_world_model(replay.sequences.sample())
        for _ in range(cfg.updates_per_batch):
            learner.update_world_model(replay.sequences.sample())
            learner.update_agents(replay.starts.sample(), train_actors=learner.updates >= cfg.critic_warmup)
        if rank == 0 and run_dir and replay.env_steps % cfg.checkpoint_every < cfg.frames_per_batch:
            save_checkpoint(run_dir, learner=learner, replay=replay, env_steps=replay.env_steps)
    if rank == 0:  # all have the same weights
        for name, acting in (("random", RandomActions(env.layout.actions)), ("trained", policy)):
            print(f"{name} agents, mean return: {evaluate(test_env, acting, episodes=episodes).per_group()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(int(word) if word.isdecimal() else word for word in sys.argv[1:]))
