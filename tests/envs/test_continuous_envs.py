"""Environments with continuous actions: what agents do in numbers from -1 to 1 is what the simulator is told to do."""

from __future__ import annotations

import json
from typing import Any

import gymnasium
import gymnasium.spaces as sp
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from matwm_rl.box_actions import BoxActions
from matwm_rl.envs import AgentLayout, SerialMultiAgentEnv, make_env, wrap_env
from matwm_rl.envs.families.game_batch import GameBatch
from matwm_rl.envs.registry import unwrap
from matwm_rl.keys import ACTION, ACTION_MASK, ALIVE, DONE, OBSERVATION, REWARD, TERMINATED, TRUNCATED
from tests.envs.continuous import CASES, UNLIKE, Arms, Case, assert_equal, assert_merged, every_case, play
from tests.envs.helpers import assert_legal

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
