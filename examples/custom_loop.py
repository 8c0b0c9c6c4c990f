"""A training loop of your own: three agents learn simple_spread inside the world model that they share."""

from dataclasses import replace

import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate


def main(total_steps: int = 2_500, episodes: int = 30, **changes) -> None:
    torch.manual_seed(0)
    cfg = replace(mw.presets.vectors(), total_steps=total_steps, **changes)
    test_env, env = (mw.make_env("mpe2/simple_spread_v3", seed=seed, num_envs=cfg.num_envs) for seed in (1, 0))
    world_model = mw.WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
    learner = mw.Learner(world_model, actor, critic, cfg.learner)
    replay = mw.make_replay(env.num_agents, cfg.replay, num_envs=cfg.num_envs)
    policy = mw.WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    test_env, env = (TransformedEnv(e, policy.make_tensordict_primer()) for e in (test_env, env))  # carry histories
    frames = {"frames_per_batch": cfg.frames_per_batch, "total_frames": total_steps}
    frames |= {"init_random_frames": cfg.init_random_steps, "auto_register_policy_transforms": False}
    for batch in Collector(env, policy, **frames):
        replay.extend(batch)
        if replay.env_steps < cfg.init_random_steps:
            continue
        for _ in range(cfg.world_model_warmup if learner.updates == 0 else 0):
            learner.update_world_model(replay.sequences.sample())
        for _ in range(cfg.updates_per_batch):
            learner.update_world_model(replay.sequences.sample())
            learner.update_agents(replay.starts.sample(), train_actors=learner.updates >= cfg.critic_warmup)
    for name, acting in (("random", RandomActions(env.layout.actions)), ("trained", policy)):
        print(f"{name} agents, mean return: {evaluate(test_env, acting, episodes=episodes).per_group()['agent']:.1f}")


if __name__ == "__main__":
    main()
