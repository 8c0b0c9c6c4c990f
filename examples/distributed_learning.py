"""Processes that learn as one: torchrun --nproc-per-node=2 examples/distributed_learning.py --env vmas/simple_tag."""

import argparse
import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.runs import split_run
from matwm_rl.training import distribute, prepare_process, save_checkpoint


def main(env: str, total_steps: int, seed: int, run_dir: str | None, episodes: int = 30, **changes) -> None:
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    rank, num_agents = dist.get_rank(), mw.make_env(env, seed=seed).num_agents
    cfg = replace(mw.presets.vectors(), total_steps=total_steps, seed=seed, **changes)
    cfg = split_run(cfg, rank=rank, world_size=dist.get_world_size(), num_agents=num_agents)
    torch.manual_seed(cfg.seed)  # another one in every process
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)

    make = {"num_envs": cfg.num_envs, "device": device}
    test_env, train_env = (mw.make_env(env, seed=cfg.seed + one, **make) for one in (1, 0))
    world_model = mw.WorldModel.from_env(train_env, cfg.world_model).to(device)
    actor, critic = (make(world_model, cfg.actor_critic).to(device) for make in (mw.make_actor, mw.make_critic))
    learner = distribute(mw.Learner(world_model, actor, critic, cfg.learner))  # the loop below stays as it is
    replay = mw.make_replay(num_agents, cfg.replay, num_envs=cfg.num_envs, device=device, seed=cfg.seed)
    policy = mw.WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    test_env, train_env = (TransformedEnv(e, policy.make_tensordict_primer()) for e in (test_env, train_env))
    frames = {"frames_per_batch": cfg.frames_per_batch, "total_frames": cfg.total_steps}
    frames |= {"init_random_frames": cfg.init_random_steps, "auto_register_policy_transforms": False}
    for batch in Collector(train_env, policy, **frames):
        replay.extend(batch)
        if replay.env_steps < cfg.init_random_steps or not replay.can_sample:
            continue
        for _ in range(cfg.world_model_warmup if learner.updates == 0 else 0):
            learner.update_world_model(replay.sequences.sample())
        for _ in range(cfg.updates_per_batch):
            learner.update_world_model(replay.sequences.sample())
            learner.update_agents(replay.starts.sample(), train_actors=learner.updates >= cfg.critic_warmup)
    dist.destroy_process_group()

    if rank == 0:  # all processes have the same weights
        if run_dir:
            save_checkpoint(run_dir, learner=learner, replay=replay, env_steps=replay.env_steps)
        for name, acting in (("random", RandomActions()), ("trained", policy)):
            print(f"{name} agents, mean returns: {evaluate(test_env, acting, episodes=episodes).per_group()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="mpe2/simple_spread_v3")
    parser.add_argument("--total-steps", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", help="folder of the checkpoint; without it none is saved")
    main(**vars(parser.parse_args()))
