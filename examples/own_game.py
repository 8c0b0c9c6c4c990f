"""A walker has to pass a door that a keeper opens, at a price: `python examples/train.py env=own_game:Corridor`."""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv


class Corridor(ParallelEnv):
    metadata, render_mode, possible_agents, door = {"name": "corridor"}, "rgb_array", ["walker", "keeper"], 4
    action_space = {"walker": Discrete(3), "keeper": Discrete(2)}.get
    observation_space = {
        "walker": Dict(observation=Box(0, 1, (2,)), action_mask=Box(0, 1, (3,), np.int8)),
        "keeper": Dict(observation=Box(0, 1, (1,)), action_mask=Box(0, 1, (2,), np.int8)),
    }.get

    def __init__(self, steps=20):
        self.steps, self.random = steps, np.random.default_rng()

    def reset(self, seed=None, options=None):
        self.random = self.random if seed is None else np.random.default_rng(seed)
        self.cell, self.flag = self.random.permutation([0, 1, 2, 3, 5, 6, 7, 8])[:2]
        self.agents, self.time = list(self.possible_agents), 0
        return self.observe(), {agent: {} for agent in self.agents}

    def observe(self):  # the keeper does not see where the walker wants to go
        seen = {"walker": ([self.cell, self.flag], [self.cell > 0, 1, self.cell < 8]), "keeper": ([self.cell], [1, 1])}
        return {a: {"observation": np.float32(x) / 8, "action_mask": np.int8(mask)} for a, (x, mask) in seen.items()}

    def step(self, actions):
        before, to, self.time = abs(self.cell - self.flag), self.cell + actions["walker"] - 1, self.time + 1
        self.cell = self.cell if to == self.door and not actions["keeper"] else to
        arrived, late = self.cell == self.flag, self.time == self.steps
        reward = before - abs(self.cell - self.flag) + 5 * arrived - 0.5 * actions["keeper"]
        given = [dict.fromkeys(self.agents, value) for value in (reward, arrived, late, {})]
        self.agents = [] if arrived or late else self.agents
        return self.observe(), *given

    def render(self):
        colours = {self.door: (160, 120, 80), self.flag: (0, 160, 0), self.cell: (200, 0, 0)}
        return np.uint8([[colours.get(i, (255, 255, 255)) for i in range(9)]]).repeat(32, 0).repeat(32, 1)
