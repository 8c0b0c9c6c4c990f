"""Games that are played as one batch give what TorchRL's wrapper of each gives, bit by bit."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from matwm_rl.envs import MultiAgentEnv, SerialMultiAgentEnv, factory, make_env
from matwm_rl.envs.families import wrap_pettingzoo
from matwm_rl.envs.families.game_batch import GameBatch
from matwm_rl.envs.registry import unwrap
from tests.training.helpers import assert_same

NAMES = {
    "mpe2/simple_tag_v3": {"max_cycles": 7},
    "mpe2/simple_speaker_listener_v4": {"max_cycles": 7},
    "mpe2/simple_world_comm_v3": {"max_cycles": 7},
    "lbforaging/Foraging-5x5-2p-1f-v3": {"max_episode_steps": 7},
}


class Game:
    """Two agents that act in every step; what it returns can be changed."""

    possible_agents = ["a_0", "a_1"]
    render_mode = None

    def __init__(self) -> None:
        from gymnasium import spaces

        self.agents = list(self.possible_agents)
        self.observation_space = lambda agent: spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = lambda agent: spaces.Discrete(3)
        self.observations = {agent: np.zeros(2, np.float32) for agent in self.agents}
        self.terminations = dict.fromkeys(self.agents, False)

    def reset(self, seed=None, options=None):
        return self.observations, {agent: {} for agent in self.agents}

    def step(self, actions):
        no = dict.fromkeys(self.agents, False)
        return self.observations, dict.fromkeys(self.agents, 0.0), self.terminations, no, {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_what_single_environments_are(name: str) -> None:
    batch = make_env(name, seed=3, num_envs=3, **NAMES[name])
    single = SerialMultiAgentEnv(3, partial(make_env, name, **NAMES[name]))
    assert isinstance(batch, MultiAgentEnv) and isinstance(unwrap(batch), GameBatch)
    check_env_specs(batch)
    for env in (batch, single):
        env.set_seed(3)
    rollouts = []
    for env in (batch, single):
        torch.manual_seed(0)
        first = env.rollout(10, break_when_any_done=False)
        only_second = torch.tensor([[False], [True], [False]])
        between = env.reset(first[:, -1]["next"].exclude("reward").set("_reset", only_second))
        rollouts.append((first, between, env.rollout(10, auto_reset=False, tensordict=between)))
    for ours, theirs in zip(*rollouts, strict=True):
        assert_same(
            ours.exclude("_reset").flatten_keys(".").to_dict(), theirs.exclude("_reset").flatten_keys(".").to_dict()
        )


def test_in_processes_there_is_one_environment_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, MultiAgentEnv]] = []
    monkeypatch.setattr(factory, "ParallelMultiAgentEnv", lambda num_envs, make: asked.append((num_envs, make())))
    make_env("mpe2/simple_spread_v3", num_envs=2, parallel=True)
    assert [(num_envs, env.batch_size) for num_envs, env in asked] == [(2, ())]


def test_each_game_of_a_batch_can_be_drawn() -> None:
    env = make_env("mpe2/simple_spread_v3", seed=0, num_envs=2)
    env.reset()
    first, second = (env.render_frame(index) for index in (0, 1))
    assert first.shape == second.shape and (first != second).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": {"a_0": np.zeros(2, np.float32)}}, r"agents \['a_1'\] observe nothing"),
        ({"terminations": {"a_0": True, "a_1": False}}, "the lives of all agents end together"),
    ],
)
def test_games_whose_agents_do_not_act_in_step_are_refused(change: dict, message: str) -> None:
    game = Game()
    env = GameBatch(lambda: wrap_pettingzoo(game), num_envs=2)
    env.rollout(3)
    vars(game).update(change)
    with pytest.raises(ValueError, match=message):
        env.rollout(3)
