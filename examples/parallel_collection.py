"""Two processes play with the world model that a third one trains, each at its own pace."""

import time
from dataclasses import replace
from functools import partial

import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.training import fail_with_workers


def main(total_steps: int = 3_000, updates: int = 15, episodes: int = 30, **changes) -> None:
    cfg = replace(mw.presets.vectors(), **changes)
    torch.manual_seed(0)
    make = partial(mw.make_env, "mpe2/simple_spread_v3")
    env = make(seed=0)
    world_model = mw.WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
    learner = mw.Learner(world_model, actor, critic, cfg.learner)
    replay = mw.make_replay(env.num_agents, cfg.replay)

    # Workers have the policy of this process: one object, whose weights, the world model's among them, lie in shared
    # memory. Each gives four whole episodes at a time, so that replay sees no seams. With sync=True they would wait for
    # each other, and for the learner.
    policy = mw.WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    collector = Collector(
        [partial(make, seed=seed) for seed in (1, 2)],
        policy,
        num_collectors=2,
        sync=False,
        frames_per_batch=100,
        trajs_per_batch=4,
        traj_format="cat",
        total_frames=total_steps,
        auto_register_policy_transforms=True,  # every worker's environment gets the policy's primer
    )
    began = learnt = 0.0
    with fail_with_workers(collector.procs):  # TorchRL would wait for a dead worker for ever
        for batch in collector:
            replay.extend(batch)
            if replay.env_steps >= cfg.init_random_steps:
                since = time.monotonic()
                began = began or since
                for _ in range(cfg.world_model_warmup if learner.updates == 0 else 0):
                    learner.update_world_model(replay.sequences.sample())
                for _ in range(updates):
                    learner.update_world_model(replay.sequences.sample())
                    learner.update_agents(replay.starts.sample(), train_actors=learner.updates >= cfg.critic_warmup)
                collector.update_policy_weights_()
                learnt += time.monotonic() - since
    waited = 1 - learnt / (time.monotonic() - began)
    collector.shutdown()

    print(f"{replay.env_steps} steps by 2 workers; the learner waited for them {waited:.0%} of the time")
    env = TransformedEnv(env, policy.make_tensordict_primer())
    for name, acting in (("random", RandomActions(env.layout.actions)), ("trained", policy)):
        print(f"{name} agents, mean return: {evaluate(env, acting, episodes=episodes).per_group()['agent']:.1f}")


if __name__ == "__main__":
    main()
