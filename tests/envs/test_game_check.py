"""What PettingZoo environments return wrong is refused, with the agent and the step."""

from __future__ import annotations

from typing import Any

import gymnasium.spaces as sp
import numpy as np
import pytest
from pettingzoo import ParallelEnv
from torchrl.envs.libs.pettingzoo import PettingZooWrapper

from matwm_rl.envs import MultiAgentEnv, make_env

BOX = sp.Box(-9, 9, (3,), np.float32)
MASKED = sp.Dict({"observation": BOX, "action_mask": sp.Box(0, 1, (3,), np.int8)})


class Game(ParallelEnv):
    """Two agents, whose second does what a test says from the second step on."""

    metadata = {"name": "game"}
    possible_agents = ["a_0", "a_1"]

    def __init__(
        self,
        reward: Any = 1.0,
        observation: Any = None,
        mask: Any = None,
        lacks: str = "",
        start: int = 0,
        result: Any = None,
    ) -> None:
        self.reward, self.observation, self.mask, self.lacks, self.result = reward, observation, mask, lacks, result
        self.space, self.actions = BOX if mask is None else MASKED, sp.Discrete(3, start=start)
        self.taken: list[dict[str, int]] = []

    def observation_space(self, agent: str) -> sp.Space[Any]:
        return self.space

    def action_space(self, agent: str) -> sp.Space[Any]:
        return self.actions

    def observe(self) -> dict[str, Any]:
        wrong = self.steps == 2
        observations: dict[str, Any] = {agent: np.zeros(3, np.float32) for agent in self.possible_agents}
        if wrong and self.observation is not None:
            observations["a_1"] = self.observation
        if self.mask is not None:
            masks = {"a_0": np.ones(3, np.int8), "a_1": self.mask if wrong else np.ones(3, np.int8)}
            return {agent: {"observation": value, "action_mask": masks[agent]} for agent, value in observations.items()}
        return observations

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.steps, self.agents = 0, list(self.possible_agents)
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> Any:
        self.steps += 1
        self.taken.append(actions)
        if self.result is not None and self.steps == 2:
            return self.result
        rewards = {"a_0": 1.0, "a_1": self.reward if self.steps == 2 else 1.0}
        flags: tuple[dict[str, bool], ...] = tuple(dict.fromkeys(self.agents, self.steps == 5) for _ in range(2))
        given = {"rewards": rewards, "terminations": flags[0], "truncations": flags[1]}
        if self.steps == 2 and self.lacks:
            given[self.lacks].pop("a_1")
        self.agents = [] if self.steps == 5 else self.agents
        return self.observe(), *given.values(), {agent: {} for agent in self.possible_agents}


def play(game: Game) -> None:
    MultiAgentEnv(PettingZooWrapper(game, use_mask=True, done_on_any=False)).rollout(4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reward": "high"}, "the reward 'high' of 'a_1'.*expected one number"),
        ({"reward": None}, "the reward None of 'a_1'"),
        ({"reward": np.zeros(2)}, "the reward .* of 'a_1'"),
        ({"lacks": "rewards"}, "rewards without 'a_1', which acted"),
        ({"lacks": "terminations"}, "terminations without 'a_1'"),
        ({"observation": np.zeros(2)}, r"the observation of 'a_1' as float64 \[2\].*shape \[3\]"),
        ({"observation": "west"}, "the observation of 'a_1' as 'west'"),
        ({"observation": np.zeros(4), "mask": np.ones(3)}, r"the observation.observation of 'a_1' as float64 \[4\]"),
        ({"mask": np.zeros(3)}, "no legal action of 'a_1', which has not ended"),
        ({"mask": np.full(3, 2)}, r"the action mask \[2, 2, 2\] of 'a_1'.*3 entries of 0 or 1"),
        ({"mask": np.ones(2)}, r"(observation.action_mask|action mask).* of 'a_1'"),
        ({"result": ({}, {})}, r"\(dict, dict\).*a tuple of 5 dicts"),
        ({"result": "over"}, "str.*a tuple of 5 dicts"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the environment Game gave {message}.*step 2|{message}.*"):
        play(Game(**wrong))


def test_what_is_right_passes() -> None:
    for right in ({}, {"reward": 2}, {"reward": np.float64(2)}, {"mask": np.array([0, 1, 0])}):
        play(Game(**right))
    make_env("mpe2/simple_tag_v3").rollout(3)


def test_a_mask_at_the_end_may_be_empty() -> None:
    game = Game(mask=np.zeros(3))
    game.step, step = (lambda actions: end(step(actions))), game.step  # type: ignore[method-assign]

    def end(given: Any) -> Any:
        over = dict.fromkeys(game.possible_agents, game.steps == 2)
        game.agents = [] if game.steps == 2 else game.agents
        return given[0], given[1], over, over, given[4]

    play(game)


def test_actions_begin_at_the_start_of_their_space() -> None:
    game = Game(start=5)
    play(game)
    assert {action for step in game.taken for action in step.values()} <= {5, 6, 7}
