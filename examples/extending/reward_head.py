"""A reward head of your own, which reads the whole transition (o, a, o').

The rewards of meeting.py are differences of distances less the cost of a step: what a head sees of them depends on what
it reads. The paper's reads the history. The preset's reads o', o' - o and a, and distances in o'.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import matwm_rl as mw
from examples.extending import environment  # noqa: F401, registers "mine/meeting"
from matwm_rl.modules import Head, HiddenRewardConfig, RewardHead, Transition


class TransitionReward(RewardHead):
    reads_successor = True

    def __init__(self, layout: mw.envs.AgentLayout, num_bins: int, num_cells: int) -> None:
        super().__init__()
        self.num_actions = layout.num_actions
        sizes = {"group_index": layout.group_index, "num_cells": num_cells, "depth": 2}
        # The outermost bins stand for very large rewards. With zero weights, the first predictions are near zero.
        self.head = Head(2 * layout.observation_shape[0] + layout.num_actions, num_bins, zero_init=True, **sizes)

    def forward(self, transition: Transition) -> Tensor:
        action = one_hot(transition.action, self.num_actions)
        return self.head(torch.cat([transition.observation, transition.next_observation, action], -1))


def main(steps: int = 4_000, updates: int = 300) -> None:
    cfg, env = mw.presets.vectors(), mw.make_env("mine/meeting", seed=0, num_envs=10)
    data, test = (env.rollout(length // 10, break_when_any_done=False) for length in (steps, steps // 4))
    test = mw.add_agent_entries(test)
    reward, goes_on = test["next", "agents", "reward"].squeeze(-1), ~test["next", "terminated"]
    print(f"standard deviation of rewards: {reward.std():.3f}")
    hidden, own = replace(cfg.world_model, reward=HiddenRewardConfig()), TransitionReward(env.layout, 255, 128)
    for config, parts in ((hidden, {}), (cfg.world_model, {}), (cfg.world_model, {"reward": own})):
        torch.manual_seed(0)
        model = mw.WorldModel.from_env(env, config, **parts)
        agents = (make(model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
        learner, replay = mw.Learner(model, *agents, cfg.learner), mw.make_replay(2, cfg.replay, num_envs=10)
        replay.extend(data)
        for _ in range(updates):
            learner.update_world_model(replay.sequences.sample())
        predicted = model.two_hot.decode(model(test.copy())["next", "agents", "reward_logits"])
        error = (predicted - reward)[goes_on.expand_as(reward)].square().mean().sqrt()
        print(f"{type(model.reward).__name__}, root mean squared error: {error:.3f}")


if __name__ == "__main__":
    main()
