"""Stored continuous actions, and spaces, bounds and actions that are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium.spaces as sp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from matwm_rl.box_actions import BoxActions
from matwm_rl.envs import AgentLayout, MockEnv, MultiAgentEnv, make_env, merge_rollout, wrap_env
from matwm_rl.envs.actions import BoxGroupActions
from matwm_rl.keys import ACTION, ALIVE
from tests.envs.continuous import UNLIKE, Arms, assert_merged

# ---------------------------------------------------------------------- stored data


@pytest.mark.parametrize("batch_size", [[], [2]])
def test_merged_data_of_agents_that_die(batch_size: list[int]) -> None:
    make = partial(MockEnv, batch_size=batch_size, continuous=True)
    assert_merged(MultiAgentEnv(make()), make(), steps=26)


def test_merged_data_of_unlike_bounds() -> None:
    timetable = {"a_1": {2: "die"}}
    make = partial(Arms, UNLIKE, timetable=timetable, length=5)
    assert_merged(wrap_env(make()), wrap_env(make()).base_env)


def test_the_layout_of_stored_data_is_told_the_bounds() -> None:
    stored = MockEnv(continuous=True).rollout(5)
    layout = AgentLayout.from_rollout(stored, action_bounds={"hunter": (-1, 1), "prey": ([0.0], [2.0])})
    assert layout == make_env("mock", continuous=True).layout
    merged = merge_rollout(stored, layout)
    alive = merged[ALIVE]
    assert torch.equal(merged[ACTION][:, :2][alive[:, :2]], stored["hunter", "action"][alive[:, :2]])
    assert not merged[ACTION][~alive].any() and not alive.all(), "what is stored of the dead may be anything"
    torch.testing.assert_close(merged[ACTION][:, 2, :1], stored["prey", "action"][:, 0] - 1)
    assert not merged[ACTION][:, 2, 1:].any(), "padding"


BOUNDS = {"hunter": (-1.0, 1.0), "prey": (0.0, 2.0)}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (None, r"bounds of group 'hunter'.*\(stored are .* to .*\); give action_bounds={'hunter': \(low, high\)}"),
        (BOUNDS | {"hunter": ([-1.0] * 3, 1.0)}, r"action_bounds of group 'hunter' are .*; its actions have 2 numbers"),
        (BOUNDS | {"prey": (0.0, torch.inf)}, r"agent 2 has actions from \[0.0\] to \[inf\]; .* finite bounds"),
        (BOUNDS | {"prey": (2.0, 0.0)}, r"agent 2 has actions from \[2.0\] to \[0.0\]; .* the lower below the upper"),
    ],
    ids=["missing", "of another size", "infinite", "swapped"],
)
def test_bounds_that_do_not_fit(bounds: Any, message: str) -> None:
    stored = MockEnv(continuous=True).rollout(5)
    with pytest.raises(ValueError, match=message):
        AgentLayout.from_rollout(stored, action_bounds=bounds)


def test_stored_actions_that_do_not_fit() -> None:
    stored = MockEnv(continuous=True).rollout(5)
    too_narrow = AgentLayout.from_rollout(stored, action_bounds=BOUNDS | {"prey": (0.0, 0.001)})
    with pytest.raises(ValueError, match=r"scaled to the bounds .* of agent 2; expected numbers from -1 to 1; correct"):
        merge_rollout(stored, too_narrow)
    layout = AgentLayout.from_rollout(stored, action_bounds=BOUNDS)
    nan = stored.clone()
    nan["hunter", "action"][2, 1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got the action \[nan, .*\] of agent 1"):
        merge_rollout(nan, layout)
    wide = stored.clone()
    wide["hunter", "action"] = stored["hunter", "action"].repeat(1, 1, 2)
    with pytest.raises(ValueError, match=r"merge_rollout reads.*\('hunter', 'action'\).*\[5, 2, 2\]"):
        merge_rollout(wide, layout)
    discrete = MockEnv().rollout(5)
    with pytest.raises(ValueError, match=r"actions of group 'hunter' are torch.int64; the layout has BoxActions"):
        merge_rollout(discrete, layout)
    with pytest.raises(ValueError, match=r"actions of group 'hunter' are torch.float32; the layout has DiscreteAct"):
        merge_rollout(stored, AgentLayout.from_rollout(discrete))
    mixed = stored.clone()
    mixed["prey", "action"] = torch.zeros(5, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"groups \['hunter'\] are continuous, those of \['prey'\] are discrete"):
        AgentLayout.from_rollout(mixed, action_bounds=BOUNDS, num_actions={"prey": 3})


def test_one_hot_actions_that_are_stored_as_floats() -> None:
    stored = MockEnv().rollout(5)
    stored["hunter", "action"] = one_hot(stored["hunter", "action"], 4).float()
    expected = merge_rollout(stored, MultiAgentEnv(MockEnv()).layout)
    stored["prey", "action"] = one_hot(stored["prey", "action"], 3).float()
    merged = merge_rollout(stored, AgentLayout.from_rollout(stored))
    assert torch.equal(merged[ACTION], expected[ACTION]), "masks tell that they are discrete"
    with pytest.raises(ValueError, match=r"groups \['hunter', 'prey'\] have action masks.*theirs are continuous"):
        AgentLayout.from_rollout(stored, action_bounds={"hunter": (0, 1), "prey": (0, 1)})


# ---------------------------------------------------------------------- bad spaces, bad actions


def box(low: float, high: float, size: int = 2, dtype: Any = np.float32) -> sp.Box:
    return sp.Box(low, high, (size,), dtype)


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"a_0": box(0, 1), "b_0": sp.Discrete(3)}, r"groups \['a'\] are continuous, those of \['b'\] are discrete"),
        (
            {"a_0": box(0, 1), "a_1": sp.Discrete(3)},
            r"groups \['a_0'\] are continuous, those of \['a_1'\] are discrete",
        ),
        (
            {"a_0": box(-np.inf, np.inf)},
            r"group 'a' has the action spec Unbounded.*one vector of numbers between bounds",
        ),
        ({"a_0": box(0, np.inf)}, r"agent 0 has actions from \[0.0, 0.0\] to \[inf, inf\]; .*between finite bounds"),
        ({"a_0": box(1, 1)}, r"agent 0 has actions from \[1.0, 1.0\] to \[1.0, 1.0\]; .*the lower below the upper"),
        ({"a_0": box(0, 3, dtype=np.int64)}, "group 'a' has the action spec .*one vector of numbers between bounds"),
        ({"a_0": sp.Box(0, 1, (2, 2))}, "group 'a' has the action spec .*one vector of numbers between bounds"),
        ({"a_0": sp.Dict({"x": box(0, 1)})}, r"one tensor under \('a', 'action'\).*one action of actions of several"),
    ],
    ids=["mixed", "mixed group", "unbounded", "half bounded", "constant", "whole numbers", "matrix", "dict"],
)
def test_action_spaces_that_are_refused(spaces: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        wrap_env(Arms(spaces))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda action: action.fill_(torch.nan),
            r"got the action \[nan, nan\] of agent 0; expected numbers from -1 to 1",
        ),
        (
            lambda action: action.index_fill_(0, torch.tensor(1), 1.25),
            r"the action \[1.25, 1.25\] of agent 1; expected n",
        ),
        (lambda action: action.fill_(0.5), r"\[0.5, 0.5\] of agent 2, which has 1 numbers; the rest must be 0"),
        (lambda action: action.long(), r"torch.int64; expected a vector of 2 numbers for each of 3 agents"),
        (lambda action: action[..., 0].long(), r"of shape \[3\] and torch.int64; expected a vector of 2 numbers"),
        (lambda action: action[..., :1], r"of shape \[3, 1\] .*; expected a vector of 2 numbers"),
    ],
    ids=["nan", "out of bounds", "beyond its own", "whole numbers", "indices", "too short"],
)
def test_actions_that_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    for env in (wrap_env(Arms(UNLIKE)), make_env("mock", continuous=True, num_envs=2)):
        data = env.reset()
        action = torch.zeros(*env.batch_size, 3, 2)
        changed = change(action) if not env.batch_size else torch.stack([change(row.clone()) for row in action])
        pattern = message if not env.batch_size else message.replace(r"\[3", r"\[2, 3")
        with pytest.raises(ValueError, match=rf"{pattern}.*the agents are \['"):
            env.step(data.set(ACTION, changed))


def test_rounding_does_not_leave_the_bounds() -> None:
    game = Arms(UNLIKE)
    env = wrap_env(game)
    action = torch.ones(3, 2) * env.layout.actions.legal()
    for sign in (1, -1):
        env.step(env.reset().set(ACTION, sign * (action + 5e-6 * action)))
        assert all(game.action_space(agent).contains(given) for agent, given in game.given[-1].items())


def test_bounds_are_each_agents_own() -> None:
    game = Arms(UNLIKE)
    env = wrap_env(game)
    assert env.layout.actions == BoxActions([[0, -2], [-1, 1], [10]], [[1, 6], [0, 3], [20]])
    assert env.group_map == {"a": ["a_0", "a_1"], "b": ["b_0"]}
    env.step(env.reset().set(ACTION, torch.tensor([[-1.0, 1.0], [0.0, -0.5], [0.2, 0.0]])))
    given = game.given[-1]
    assert [given[agent].tolist() for agent in ("a_0", "a_1")] == [[0, 6], [-0.5, 1.5]]
    assert (given["b_0"].tolist(), given["b_0"].dtype) == (pytest.approx([16]), np.float64)


def test_actions_go_to_the_environment_and_back() -> None:
    actions = BoxGroupActions([[0.0, -2.0], [1.0, 1.0]], [[1.0, 6.0], [3.0, 1.5]])
    dense = torch.rand(50, 2, 2) * 2 - 1
    torch.testing.assert_close(actions.to_dense(actions.from_dense(dense)), dense, rtol=0, atol=1e-5)
    assert actions.to_dense(actions.from_dense(dense.sign())).equal(dense.sign()), "bounds stay bounds"
