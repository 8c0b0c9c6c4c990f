"""Environments with continuous actions: what agents do in numbers from -1 to 1 is what the simulator is told to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import gymnasium.spaces as sp
import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from matwm_rl.box_actions import BoxActions
from matwm_rl.envs import AgentLayout, MockEnv, MultiAgentEnv, SerialMultiAgentEnv, make_env, merge_rollout, wrap_env
from matwm_rl.envs.actions import BoxGroupActions
from matwm_rl.envs.families.game_batch import GameBatch
from matwm_rl.envs.registry import unwrap
from matwm_rl.keys import ACTION, ACTION_MASK, ALIVE, DONE, OBSERVATION, REWARD, TERMINATED, TRUNCATED
from tests.envs.helpers import assert_legal
from tests.envs.population import Population

CONTINUOUS = {"continuous_actions": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An environment whose episodes are of seven steps, and the bounds of its actions."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    package: str
    low: list[list[float]]
    high: list[list[float]]

    def make(self, **kwargs: Any) -> Any:
        pytest.importorskip(self.package, reason=f"{self.package} is not installed")
        return make_env(self.name, **self.kwargs, **kwargs)

    @property
    def is_vmas(self) -> bool:
        return self.name.startswith("vmas/")

    def raw(self) -> Any:
        """The environment itself, without anything of this library or of TorchRL around it."""
        import importlib

        family, task = self.name.split("/")
        if family == "vmas":
            return importlib.import_module("vmas").make_env(task, num_envs=1, seed=None, **self.kwargs)
        if family == "mamujoco":
            from gymnasium_robotics import mamujoco_v1

            return mamujoco_v1.parallel_env(*task.split("-"), **self.kwargs)
        package = {"mpe2": "mpe2", "sisl": "pettingzoo.sisl"}[family]
        return importlib.import_module(f"{package}.{task}").parallel_env(**self.kwargs)


def same(bound: float, sizes: list[int]) -> list[list[float]]:
    return [[bound] * size for size in sizes]


CASES = {
    "mpe2 tag": Case(
        name="mpe2/simple_tag_v3",
        kwargs={"max_cycles": 7} | CONTINUOUS,
        package="mpe2",
        low=same(0, [5] * 4),
        high=same(1, [5] * 4),
    ),
    "mpe2 speaker": Case(
        name="mpe2/simple_speaker_listener_v4",
        kwargs={"max_cycles": 7} | CONTINUOUS,
        package="mpe2",
        low=same(0, [3, 5]),
        high=same(1, [3, 5]),
    ),
    "vmas tag": Case(
        name="vmas/simple_tag",
        kwargs={"max_steps": 7} | CONTINUOUS,
        package="vmas",
        low=same(-1, [2] * 4),
        high=same(1, [2] * 4),
    ),
    "vmas balance": Case(
        name="vmas/balance",
        kwargs={"max_steps": 7} | CONTINUOUS,
        package="vmas",
        low=same(-1, [2] * 3),
        high=same(1, [2] * 3),
    ),
    "multiwalker": Case(
        name="sisl/multiwalker_v9",
        kwargs={"max_cycles": 7},
        package="Box2D",
        low=same(-1, [4] * 3),
        high=same(1, [4] * 3),
    ),
    "half cheetah": Case(
        name="mamujoco/HalfCheetah-2x3",
        kwargs={"max_episode_steps": 7},
        package="gymnasium_robotics",
        low=same(-1, [3] * 2),
        high=same(1, [3] * 2),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Arms(Population):
    """The population, whose agents take the vectors of their action spaces."""

    def __init__(self, spaces: dict[str, sp.Space[Any]], **kwargs: Any) -> None:
        super().__init__(tuple(spaces), **kwargs)
        self.spaces = spaces

    def action_space(self, agent: str) -> Any:
        return self.spaces[agent]

    def step(self, actions: dict[str, Any]) -> Any:
        returned = super().step(dict.fromkeys(actions, 0))
        self.given[-1] = {agent: np.array(action) for agent, action in actions.items()}
        return returned


UNLIKE: dict[str, sp.Space[Any]] = {
    "a_0": sp.Box(np.float32([0, -2]), np.float32([1, 6])),
    "a_1": sp.Box(np.float32([-1, 1]), np.float32([0, 3])),
    "b_0": sp.Box(10, 20, (1,), np.float64),
}
"""Two agents of one group whose bounds differ, and one with fewer numbers."""


def play(env: EnvBase, actions: Tensor) -> TensorDictBase:
    """Play actions ``[*E, T, N, A]`` from a reset on, over the ends of episodes."""
    data, steps = env.reset(), []
    for action in actions.unbind(-3):
        step, data = env.step_and_maybe_reset(data.set(ACTION, action))
        steps.append(step)
    return torch.stack(steps, env.batch_dims)


def assert_equal(one: TensorDictBase, other: TensorDictBase) -> None:
    keys = {str(key): key for key in one.keys(True, True)}
    assert keys.keys() == {str(key) for key in other.keys(True, True)}
    for key in keys.values():
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6, msg=lambda found, key=key: f"{key} {found}")


# ---------------------------------------------------------------------- all environments


@every_case
def test_specs_bounds_and_random_actions(case: Case) -> None:
    env = case.make(seed=0)
    check_env_specs(env)
    expected = BoxActions(case.low, case.high)
    assert (env.layout.actions, env.action_counts) == (expected, [len(own) for own in case.low])
    assert not env.layout.has_action_mask
    assert AgentLayout.from_dict(json.loads(json.dumps(env.layout.to_dict()))) == env.layout
    data = env.rollout(20, break_when_any_done=False)
    shape = (*data.batch_size, env.num_agents, expected.num_actions)
    assert (data[ACTION].shape, data[ACTION].dtype) == (shape, torch.float32)
    assert (data[ACTION_MASK] == expected.legal()).all() and data[ALIVE].all()
    assert_legal(data)
    drawn = data[ACTION][..., expected.legal()].flatten(0, -2)
    assert (drawn.amin(0) < -0.5).all() and (drawn.amax(0) > 0.5).all()
    assert data[TRUNCATED].sum() == 2 and not data[TERMINATED].any(), "the time limit, and nothing else"


@every_case
def test_the_simulator_gets_actions_in_its_own_units(case: Case) -> None:
    env = case.make(seed=5)
    names, start = env.layout.agent_names, env.reset()
    data = env.rollout(6, tensordict=start, auto_reset=False)
    if case.is_vmas:
        data = data[0]
    # VMAS keeps one random state for all its environments, so the raw one plays after, not beside.
    raw = case.raw()
    if case.is_vmas:
        raw.seed(5)
        observation = dict(zip(names, raw.reset(), strict=True))
    else:
        raw.reset(seed=5)
        observation, _ = raw.reset()
    for step in data:
        for row, size, name in zip(step[OBSERVATION], env.layout.observation_sizes, names, strict=True):
            seen = np.asarray(observation[name], np.float32).reshape(-1)
            np.testing.assert_allclose(row[:size].numpy(), seen, atol=1e-5)
            assert not row[size:].any(), "padding"
        own = {
            name: np.float32(low) + (row[: len(low)].numpy() + 1) / 2 * (np.float32(high) - np.float32(low))
            for name, row, low, high in zip(names, step[ACTION], case.low, case.high, strict=True)
        }
        if case.is_vmas:
            moved, rewards, *_ = raw.step([torch.from_numpy(action)[None] for action in own.values()])
            observation, reward = (dict(zip(names, given, strict=True)) for given in (moved, rewards))
        else:
            observation, reward, *_ = raw.step(own)
        earned = [float(reward[name]) for name in names]
        assert step[REWARD].squeeze(-1).tolist() == pytest.approx(earned, abs=1e-4)


@every_case
def test_seeds_decide_everything(case: Case) -> None:
    first = case.make(seed=3)
    actions = first.layout.actions.random(first.layout.actions.legal().expand(*first.batch_size, 9, -1, -1))
    played = play(first, actions)
    again, other = (play(case.make(seed=seed), actions) for seed in (3, 4))
    first.set_seed(3)
    assert_equal(play(first, actions), played)
    assert_equal(again, played)
    assert (other[OBSERVATION] - played[OBSERVATION]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].is_vmas])
def test_several_environments_are_single_ones(name: str) -> None:
    case = CASES[name]
    batch = case.make(seed=3, num_envs=2)
    assert isinstance(unwrap(batch), GameBatch) == (not case.name.startswith("sisl/"))
    serial = SerialMultiAgentEnv(2, case.make)
    serial.set_seed(3)
    data = batch.rollout(10, break_when_any_done=False)
    assert data[DONE].any()
    assert_equal(play(serial, data[ACTION]), data)
    seed: int | None = 3
    for own in data:
        single = case.make()
        seed = single.set_seed(seed)
        assert_equal(play(single, own[ACTION]), own)


@every_case
def test_merged_data_equals_the_live_environment(case: Case) -> None:
    env = case.make(seed=3)
    assert_merged(env, case.make(seed=3).base_env, max_steps=7 if case.is_vmas else None)


# ---------------------------------------------------------------------- stored data


def assert_merged(env: MultiAgentEnv, base: EnvBase, steps: int = 16, **kwargs: Any) -> None:
    """Play an environment and, with the same actions, the base environment; merge what this gives."""
    live = env.rollout(steps, break_when_any_done=False)
    assert live[DONE].any()
    data, stored, space = base.reset(), [], env.layout.actions
    for action in live[ACTION].unbind(-3):
        start = 0
        for group, names in env.group_map.items():
            rows = slice(start, start := start + len(names))
            low, high = torch.tensor(space.low[rows]), torch.tensor(space.high[rows])
            own = low + (action[..., rows, : low.shape[-1]] + 1) / 2 * (high - low)
            data[group, "action"] = own.to(base.full_action_spec[group, "action"].dtype)
        step, data = base.step_and_maybe_reset(data)
        stored.append(step)
    rollout = torch.stack(stored, base.batch_dims)
    merged = merge_rollout(rollout, env.layout, **kwargs)
    # By keys, as the root of live data has the number of the episode too.
    assert_equal(merged, live.select(*merged.keys(True, True)))


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


# ---------------------------------------------------------------------- agents that die


def test_the_dead_act_with_zeros() -> None:
    game = Arms(UNLIKE, timetable={"a_0": {2: "die"}}, length=5)
    env = wrap_env(game)
    check_env_specs(env)
    game.given.clear()
    data = env.rollout(8, break_when_any_done=False)
    assert data[ALIVE][:, 0].tolist() == [True, True, False, False, False, True, True, False]
    assert not data[ACTION_MASK][~data[ALIVE]].any() and not data[ACTION][~data[ALIVE]].any()
    assert_legal(data)
    assert game.given[2]["a_0"].tolist() == [0.5, 2], "the middle of its bounds, which is not read"


def test_walkers_that_fall() -> None:
    pytest.importorskip("Box2D", reason="Box2D is not installed")
    env = make_env("sisl/multiwalker_v9", seed=0, terminate_on_fall=False, max_cycles=95)
    data = env.rollout(110, break_when_any_done=False)
    alive = data[ALIVE]
    assert not alive.all() and alive.any(-1).all() and alive[95].all(), "choose another seed"
    assert not data[ACTION][~alive].any() and not data[OBSERVATION][~alive].any()
    assert data[TRUNCATED].any() and not data[TERMINATED].any()
    assert_legal(data)


# ---------------------------------------------------------------------- Gymnasium


class Pull(gymnasium.Env):
    """Of two agents, the second of whom has more numbers; for three steps."""

    observation_space = sp.Tuple((sp.Box(-9, 9, (2,)), sp.Box(-9, 9, (2,))))
    action_space = sp.Tuple((sp.Box(0, 4, (1,)), sp.Box(-1, 1, (3,))))
    metadata = {"render_modes": []}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return [np.zeros(2, np.float32)] * 2, {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.time += 1
        pull = [np.float32([own.sum(), self.time]) for own in action]
        return pull, [float(own.sum()) for own in action], False, self.time == 3, {}


def test_gymnasium_environments_with_tuples_of_boxes() -> None:
    env = wrap_env(Pull())
    check_env_specs(env)
    assert env.layout.actions == BoxActions([[0.0], [-1.0] * 3], [[4.0], [1.0] * 3])
    data = env.rollout(7, break_when_any_done=False)
    assert_legal(data)
    own = torch.stack([2 * (data[ACTION][:, 0, 0] + 1), data[ACTION][:, 1].sum(-1)], -1)
    torch.testing.assert_close(data[REWARD].squeeze(-1), own)
    assert data[TRUNCATED].sum() == 2
