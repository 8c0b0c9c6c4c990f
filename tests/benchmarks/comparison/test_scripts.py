"""The scripts of the comparison do what they say: against slow versions, and in the environments themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import scripts
import torch
from scripts import ListenerScript, SpreadScript, step_towards
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType

from matwm_rl.envs import make_env
from matwm_rl.evaluation import evaluate

SPREAD, LISTENER = "mpe2/simple_spread_v3", "mpe2/simple_speaker_listener_v4"
STAY, LEFT, RIGHT, DOWN, UP = range(5)


def slow_step(offset: Sequence[float], velocity: Sequence[float]) -> int:
    x, y = (o - scripts.GLIDE * v for o, v in zip(offset, velocity, strict=True))
    if abs(x) >= abs(y):
        return STAY if abs(x) < scripts.NEAR else RIGHT if x > 0 else LEFT
    return STAY if abs(y) < scripts.NEAR else UP if y > 0 else DOWN


@pytest.mark.parametrize(
    ("offset", "velocity", "action"),
    [
        ((0.3, 0.2), (0, 0), RIGHT),
        ((-0.3, 0.2), (0, 0), LEFT),
        ((0.1, 0.2), (0, 0), UP),
        ((0.1, -0.2), (0, 0), DOWN),
        ((0.04, -0.04), (0, 0), STAY),
        ((0.04, -0.06), (0, 0), DOWN),
        ((0.3, 0.2), (0.9, 0), UP),
        ((0.3, 0), (2, 0), LEFT),
        ((0.3, 0), (1.5, 0.1), STAY),
    ],
)
def test_a_step_goes_along_the_larger_axis_of_what_is_left(
    offset: Sequence[float], velocity: Sequence[float], action: int
) -> None:
    stepped = step_towards(torch.tensor(offset), torch.tensor(velocity))
    assert stepped.item() == action == slow_step(offset, velocity)


def test_spread_takes_the_assignment_with_the_least_way_to_go() -> None:
    layout = make_env(SPREAD).layout
    observation = torch.randn(40, 3, *layout.observation_shape)
    acted = SpreadScript(layout)(TensorDict({"agents": {"observation": observation}}, [40]))["agents", "action"]
    chosen = set()
    for one, actions in zip(observation.tolist(), acted.tolist(), strict=True):
        offsets = [[agent[4 + 2 * landmark : 6 + 2 * landmark] for landmark in range(3)] for agent in one]
        ways = {
            assigned: sum(math.hypot(*offsets[agent][landmark]) for agent, landmark in enumerate(assigned))
            for assigned in permutations(range(3))
        }
        best = min(ways, key=ways.__getitem__)
        chosen.add(best)
        assert actions == [slow_step(offsets[agent][best[agent]], one[agent][:2]) for agent in range(3)]
    assert len(chosen) == 6


@pytest.mark.parametrize("continuous", [False, True])
def test_spread_plays_far_better_than_chance(continuous: bool) -> None:
    env = make_env(SPREAD, num_envs=5, seed=0, continuous_actions=continuous)
    returns = evaluate(env, SpreadScript(env.layout), episodes=10, exploration=ExplorationType.DETERMINISTIC)
    # Random agents have -26, agents that overshoot -13.
    assert returns.values.mean() > -10


def test_the_listener_ends_at_the_goal() -> None:
    env = make_env(LISTENER, num_envs=12, seed=0)
    played = env.rollout(25, ListenerScript(env.layout))
    goals = played["agents", "observation"][:, 0, 0, :3].argmax(-1)
    assert set(goals.tolist()) == {0, 1, 2}
    # The environment's own word for it: the squared distance between the listener and the goal.
    last = -played["next", "agents", "reward"][:, -1, 1, 0]
    assert last.max() < 0.12**2
    assert (played["agents", "action"][:, :, 0] == goals.unsqueeze(-1)).all()


@pytest.mark.parametrize("script", [SpreadScript, ListenerScript])
def test_another_environment_is_refused(script: type) -> None:
    with pytest.raises(ValueError, match=rf"{script.__name__} plays mpe2 with .* got \{{'hunter': 2, 'prey': 1\}}"):
        script(make_env("mock").layout)
