"""Workers of a Ray cluster play with the world model that this process trains, each at its own pace.

python examples/ray_collection.py                 # starts Ray here, with two workers
python examples/ray_collection.py --address auto  # on the cluster that this machine belongs to
"""

import argparse
from dataclasses import replace
from functools import partial

import ray
import torch
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.training import prepare_process


def main(env: str, total_steps: int, seed: int, address: str = "local", episodes: int = 100, **changes) -> None:
    cfg, workers = replace(mw.presets.vectors(), **changes), 2
    ray.init(address, include_dashboard=False, **({"num_cpus": workers} if address == "local" else {}))
    torch.manual_seed(seed)
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)
    make = partial(mw.make_env, env)
    test_env = make(seed=1_000 + seed)
    world_model = mw.WorldModel.from_env(test_env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
    learner = mw.Learner(world_model, actor, critic, cfg.learner)
    replay = mw.make_replay(test_env.num_agents, cfg.replay, seed=seed)

    # The policy is sent to a worker once, when it starts; its weights, the world model's among them, with each batch that
    # the worker has delivered. Batches are whole episodes, so that those of different workers can follow each other.
    policy = mw.WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    collector = RayCollector(
        [partial(make, seed=workers * seed + index, num_envs=cfg.num_envs // workers) for index in range(workers)],
        policy,
        num_collectors=workers,
        sync=False,
        update_after_each_batch=True,
        frames_per_batch=cfg.frames_per_batch,
        trajs_per_batch=1,
        init_random_frames=cfg.init_random_steps,
        total_frames=100 * total_steps,  # it counts frames_per_batch for every episode; the loop below counts its steps
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="mpe2/simple_spread_v3")
    parser.add_argument("--total-steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", default="local", help="of the cluster: auto, or ray://HOST:10001")
    main(**vars(parser.parse_args()))
