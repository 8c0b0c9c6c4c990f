"""A training loop of one's own: three agents learn simple_spread inside the world model that they share."""

import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.training import RandomActions, evaluate


def main(total_steps: int = 2_000, random_steps: int = 1_000, warmup: int = 200, episodes: int = 30) -> None:
    torch.manual_seed(0)
    env = mw.make_env("mpe2/simple_spread_v3", seed=0)
    sizes = {"hidden_size": 128, "num_layers": 1, "num_heads": 4, "latent": "gaussian", "num_dims": 64}
    vectors = {"fourier_features": 4, "linear_skips": True, "coordinate_code": True, "reencode": True}
    world_model = mw.WorldModel.from_env(env, **sizes, **vectors, reward_input="next_observation")
    agents = {"num_cells": 128, "share_by_group": True}
    actor, critic = mw.make_actor(world_model, **agents), mw.make_critic(world_model, **agents)
    updates = {"world_model_lr": 3e-3, "actor_critic_lr": 1e-3, "critic_lr": 3e-3, "world_model_warmup": warmup}
    ppo = {"agent_epochs": 4, "standardize_advantage": True, "critic_warmup": 50, "entropy_coeff": 0.03}
    weights = mw.WorldModelLossWeights(reconstruction=1000.0, reward=50.0)
    config = mw.LearnerConfig(**updates, **ppo, loss_weights=weights, horizon=10, gamma=0.95)
    learner = mw.Learner(world_model, actor, critic, config)
    replay = mw.make_replay(num_agents=env.num_agents, sequences_per_agent=8, starts_per_agent=48, sequence_length=16)

    policy = mw.WorldModelPolicy(world_model, actor)
    env = TransformedEnv(env, policy.make_tensordict_primer())  # carries each episode's history for the policy
    steps = {"frames_per_batch": 5, "total_frames": total_steps, "init_random_frames": random_steps}
    # The primer above is all that the policy needs of an environment.
    collector = Collector(env, policy, **steps, auto_register_policy_transforms=False)

    for batch in collector:
        replay.extend(batch)
        if replay.env_steps >= random_steps:
            learner.update(replay)

    for name, acting in (("random", RandomActions()), ("trained", policy)):
        print(f"{name} agents, mean return: {evaluate(env, acting, episodes=episodes).per_group()['agent']:.1f}")


if __name__ == "__main__":
    main()
