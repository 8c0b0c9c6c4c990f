"""A training loop of one's own: three agents learn simple_spread inside the world model that they share."""

import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

import matwm_rl as mw
from matwm_rl.training import RandomActions, evaluate


def main(total_steps: int = 2_500, random_steps: int = 1_000, warmup: int = 200, episodes: int = 30) -> None:
    torch.manual_seed(0)
    env = mw.make_env("mpe2/simple_spread_v3", seed=0)
    world_model = mw.WorldModel.from_env(env, mw.WorldModelConfig.small())
    actor = mw.make_actor(world_model, num_cells=128, share_by_group=True)
    critic = mw.make_critic(world_model, num_cells=128, share_by_group=True)
    learner = mw.Learner(world_model, actor, critic, mw.LearnerConfig.small(world_model_warmup=warmup))
    replay = mw.make_replay(num_agents=env.num_agents, sequences_per_agent=10, starts_per_agent=48, sequence_length=16)

    policy = mw.WorldModelPolicy(world_model, actor)
    env = TransformedEnv(env, policy.make_tensordict_primer())  # carries each episode's history for the policy
    collector = Collector(
        env,
        policy,
        frames_per_batch=5,
        total_frames=total_steps,
        init_random_frames=random_steps,
        auto_register_policy_transforms=False,  # the primer above is all that the policy needs of an environment
    )
    for batch in collector:
        replay.extend(batch)
        if replay.env_steps >= random_steps:
            learner.update(replay)

    for name, acting in (("random", RandomActions()), ("trained", policy)):
        print(f"{name} agents, mean return: {evaluate(env, acting, episodes=episodes).per_group()['agent']:.1f}")


if __name__ == "__main__":
    main()
