"""One call around anybody's environment: what is read, what is left alone, and what is refused."""

from __future__ import annotations

from typing import Any

import gymnasium
import gymnasium.spaces as sp
import numpy as np
import pytest
import torch
from mpe2 import simple_tag_v3
from pettingzoo import ParallelEnv

from matwm_rl.envs import MockEnv, MultiAgentEnv, make_env, render_frame, wrap_env
from matwm_rl.keys import ACTION, ACTION_MASK, ALIVE, OBSERVATION, REWARD, TERMINATED, TRUNCATED
from tests.envs.helpers import assert_legal
from tests.envs.population import Population
from tests.envs.stand_ins import meltingpot, smac
from tests.envs.test_environments import Fruit


class Unlike(ParallelEnv):
    """Agents whose names look like one group, but whose sizes and actions differ; infos of all kinds.

    Args:
        masked: who has a mask of legal actions in the infos, where action 0 is legal alone.
        from_step: in which step these masks begin.
        stranger: whether an unknown agent shows up.
    """

    metadata = {"name": "unlike"}

    def __init__(self, masked: tuple[str, ...] = (), from_step: int = 0, stranger: bool = False) -> None:
        self.sizes = {"a_0": (3, 2), "a_1": (4, 2), "a_2": (3, 2), "a_3": (3, 5), "b": (1, 2)}
        self.possible_agents = list(self.sizes)
        self.masked, self.from_step, self.stranger = masked, from_step, stranger

    def observation_space(self, agent: str) -> sp.Box:
        return sp.Box(0, 9, (self.sizes[agent][0],))

    def action_space(self, agent: str) -> sp.Discrete:
        return sp.Discrete(self.sizes[agent][1])

    def _seen(self) -> tuple[dict[str, Any], dict[str, Any]]:
        observations = {a: np.full(self.sizes[a][0], i, np.float32) for i, a in enumerate(self.agents)}
        if self.stranger and self.time:
            observations["c"] = observations["b"]
        infos: dict[str, Any] = {agent: {"said": "a word"} for agent in self.agents if agent != "b"}
        for agent in self.masked if self.time >= self.from_step else ():
            infos[agent]["action_mask"] = np.eye(self.sizes[agent][1], dtype=np.int8)[0]
        return observations, infos

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.agents, self.time = list(self.possible_agents), 0
        return self._seen()

    def step(self, actions: dict[str, int]) -> Any:
        self.time += 1
        observations, infos = self._seen()
        infos |= {"a_0": infos["a_0"] | {f"new_{self.time}": [1, 2]}}
        return (
            observations,
            dict.fromkeys(self.agents, 1.0),
            *[dict.fromkeys(self.agents, False) for _ in range(2)],
            infos,
        )


def test_agents_of_unequal_spaces_get_groups_of_their_own() -> None:
    env = wrap_env(Unlike())
    assert env.group_map == {"a_0": ["a_0", "a_2"], "a_1": ["a_1"], "a_3": ["a_3"], "b": ["b"]}
    assert env.layout.observation_sizes == [3, 3, 4, 3, 1] and env.action_counts == [2, 2, 2, 5, 2]
    assert env.rollout(3)[OBSERVATION][0, :, 0].tolist() == [0, 2, 1, 3, 4]
    given = {"one": ["a_0"], "rest": ["a_2"], "wide": ["a_1"], "more": ["a_3"], "b": ["b"]}
    assert wrap_env(Unlike(), group_map=given).group_map == given
    with pytest.raises(ValueError, match="group 'one' holds agents of unequal observations or actions"):
        wrap_env(Unlike(), group_map={"one": ["a_0", "a_1"]})
    with pytest.raises(ValueError, match=r"group 'one' holds the unknown agents \['a_9'\]"):
        wrap_env(Unlike(), group_map={"one": ["a_9"]})


def test_masks_in_the_infos_of_some_agents_are_obeyed_and_other_infos_ignored() -> None:
    env = wrap_env(Unlike(masked=("a_0", "a_3")))
    assert env.layout.has_action_mask
    data = env.rollout(4)
    assert data[ACTION_MASK][:, [0, 3]].sum(-1).eq(1).all() and not data[ACTION][:, [0, 3]].any()
    assert data[ACTION_MASK][:, 1].sum(-1).eq(2).all()
    assert_legal(data)


def test_masks_that_begin_later_are_refused() -> None:
    with pytest.raises(ValueError, match="the infos of 'a_0' have an action mask after a step, but none after the res"):
        wrap_env(Unlike(masked=("a_0",), from_step=1)).rollout(2)


def test_masks_in_infos_of_agents_that_join_late() -> None:
    class Late(Population):
        def reset(self, seed: int | None = None, options: Any = None) -> Any:
            observations, infos = super().reset(seed, options)
            return observations, {agent: {"action_mask": np.array([0, 1, 0])} for agent in infos}

        def step(self, actions: dict[str, int]) -> Any:
            *given, infos = super().step(actions)
            return *given, {agent: {"action_mask": np.array([0, 0, 1])} for agent in infos}

    data = wrap_env(Late(late=("a_1",), timetable={"a_1": {2: "join"}})).rollout(5)
    assert data[ALIVE][:, 1].tolist() == [False, False, True, True, True]
    assert data[ACTION_MASK][2:, 1].tolist() == [[False, False, True]] * 3


def test_an_agent_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gave an observation of 'c', in step 1 .*expected agents of its possible_ag"):
        wrap_env(Unlike(stranger=True)).rollout(2)


# ---------------------------------------------------------------------- Gymnasium


def test_gymnasium_agents_see_act_and_leave() -> None:
    env = wrap_env(Fruit())
    env.set_seed(0)
    data = env.rollout(9)
    assert env.group_map == {"agent_0": ["agent_0"], "agent_1": ["agent_1"]}
    assert data[OBSERVATION][0, 1].tolist() == [0, 1, 1, 1, 1], "a category is one-hot, entries in alphabetical order"
    assert (data[REWARD][:3] == 2).all() and data[ACTION_MASK][1, 1].tolist() == [True, False, False, False]
    assert data[ALIVE][:, 1].tolist() == [True] * 3 + [False] * 2
    assert data[TRUNCATED].squeeze(-1).tolist() == [False] * 4 + [True] and not data[TERMINATED].any()
    assert render_frame(env).shape == (8, 8, 3)
    env.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reset": [1, 2]}, r"Fruit.reset returned '\[1, 2\]'; expected a tuple of 2"),
        ({"step": ([], [], False, {})}, r"Fruit.step returned .*expected a tuple of 5"),
        ({"step": ([1], 1.0, False, False, {})}, r"Fruit gave the observations '\[1\]'; expected a sequence of 2"),
        ({"step": ([1, 2], [1, 2, 3], False, False, {})}, r"Fruit gave the rewards '\[1, 2, 3\]'"),
        ({"step": ([1, 2], [1, 2], [False], False, {})}, r"Fruit gave the terminated '\[False\]'"),
    ],
)
def test_what_a_gymnasium_environment_returns_wrong(given: dict[str, Any], message: str) -> None:
    game = Fruit()
    for name, value in given.items():
        setattr(game, name, lambda *args, _value=value, **kwargs: _value)
    with pytest.raises(ValueError, match=message):
        wrap_env(game).rollout(2)


@pytest.mark.parametrize(
    ("name", "limit", "length"),
    [("lbforaging/Foraging-8x8-2p-3f-v3", "max_episode_steps", 50), ("rware/rware-tiny-2ag-v2", "max_steps", 500)],
)
def test_limits_of_the_gymnasium_families_are_truncations_and_they_are_drawn(
    name: str, limit: str, length: int
) -> None:
    pytest.importorskip(name.partition("/")[0])
    assert make_env(name).base_env._env.env.spec.max_episode_steps == length
    env = make_env(name, **{limit: 4}, seed=0)
    data = env.rollout(9)
    assert data[TRUNCATED].squeeze(-1).tolist() == [False] * 3 + [True] and not data[TERMINATED].any()
    picture = render_frame(env)
    assert picture.dtype == np.uint8 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 3


# ---------------------------------------------------------------------- SMACv2, MeltingPot


@pytest.mark.parametrize("continuing", [False, True])
@pytest.mark.parametrize("wins", [False, True])
def test_smac_units_die_and_share_the_reward(monkeypatch: pytest.MonkeyPatch, continuing: bool, wins: bool) -> None:
    env = MultiAgentEnv(smac(monkeypatch, continuing_episode=continuing, wins=wins))
    data = env.rollout(9)
    assert data.shape == (6,) and data[ALIVE].int().sum(0).tolist() == [6, 2, 6]
    assert torch.equal(data[REWARD].squeeze(-1), 0.5 * torch.arange(1.0, 7).unsqueeze(-1).expand(6, 3))
    assert (data[TRUNCATED][-1].item(), data[TERMINATED][-1].item()) == (continuing, not continuing)
    assert data["state"].shape == (6, 20) and data["next", "info", "dead_allies"].eq(1).all()


def test_meltingpot_players_see_their_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    env = MultiAgentEnv(meltingpot(monkeypatch))
    data = env.rollout(9)
    assert render_frame(env).shape == (144, 192, 3)
    assert data[OBSERVATION][:, :, 0, 0, 0].tolist() == [[10 * step, 10 * step + 1] for step in range(6)]
    assert data[REWARD].squeeze(-1).tolist() == [[step, -step] for step in range(1, 7)]
    assert data[TERMINATED][-1] and not data[TRUNCATED].any()
    limited = MultiAgentEnv(meltingpot(monkeypatch, max_steps=4)).rollout(9)
    assert limited.shape == (4,) and limited[TRUNCATED][-1] and not limited[TERMINATED].any()
    everything = MultiAgentEnv(meltingpot(monkeypatch), images="none")
    assert everything.layout.observation_shape == (88 * 88 * 3 + 2,)


def test_an_environment_without_seeds_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    env = wrap_env(smac(monkeypatch))
    with pytest.warns(UserWarning, match="SMACv2Wrapper cannot be seeded, so its episodes do not repeat"):
        assert env.set_seed(3) != 3
    assert env.reset()["episode"] == 0


# ---------------------------------------------------------------------- what is none of these


def test_a_merged_environment_is_returned_as_it_is() -> None:
    env = wrap_env(MockEnv())
    assert wrap_env(env) is env
    with pytest.raises(ValueError, match="a TorchRL environment has a group_map itself"):
        wrap_env(MockEnv(), group_map={})


def without_agents() -> ParallelEnv:
    game = Population()
    del game.possible_agents
    return game


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        (Population, TypeError, "got the class Population, which has to be called; expected a grouped TorchRL"),
        (simple_tag_v3.parallel_env, TypeError, "got a function, which has to be called"),
        ("mpe2/simple_tag_v3", TypeError, "got a str; expected"),
        (simple_tag_v3.env(), ValueError, "AEC environment act in turns; wrap its parallel_env"),
        (without_agents(), ValueError, "has no possible_agents: .* must list all agents"),
        (gymnasium.make("CartPole-v1"), ValueError, "has the observation_space Box.*expected a Tuple space"),
    ],
)
def test_what_cannot_be_wrapped(env: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrap_env(env)
