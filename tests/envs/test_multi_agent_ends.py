"""Ends of episodes and of lives: time limits, terminations, deaths."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs.libs.vmas import VmasEnv

from matwm_rl.envs import MockEnv, MultiAgentEnv, make_env
from matwm_rl.keys import (
    ACTION,
    ACTION_MASK,
    ALIVE,
    DONE,
    NEXT_ALIVE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
)
from tests.envs.helpers import DEADLY, KAZ, assert_legal, first_legal_policy


def test_vmas_time_limit_truncates() -> None:
    env = make_env("vmas/simple_tag", num_envs=2, max_steps=3)
    rollout = env.rollout(7, break_when_any_done=False)
    expected = [False, False, True, False, False, True, False]
    for key, values in ((DONE, expected), (TRUNCATED, expected), (TERMINATED, [False] * 7)):
        assert rollout[key][..., 0].tolist() == [values] * 2


def test_vmas_scenario_end_terminates(monkeypatch: pytest.MonkeyPatch) -> None:
    base = VmasEnv("simple_tag", num_envs=3, continuous_actions=False, max_steps=3)
    steps = base._env

    def done() -> Tensor:
        """Environment 0 ends at step 2, environment 1 in the very step of the limit, environment 2 never."""
        return torch.stack([steps.steps[0] >= 2, steps.steps[1] >= 3, torch.tensor(False)])

    monkeypatch.setattr(base._env.scenario, "done", done)
    rollout = MultiAgentEnv(base).rollout(3, break_when_any_done=False)
    assert rollout[TERMINATED][..., 0].tolist() == [[False, True, False], [False, False, True], [False] * 3]
    assert rollout[TRUNCATED][..., 0].tolist() == [[False] * 3, [False] * 3, [False, False, True]]


@pytest.mark.parametrize("make", [make_env, partial(make_env, num_envs=2)])
def test_mock_life_death_and_endings(make: object) -> None:
    rollout = make("mock", death_step=3).rollout(12, break_when_any_done=False)  # type: ignore[operator]
    for episode in rollout.unsqueeze(0).reshape(-1, 12).unbind(0):
        done = [False] * 5 + [True]
        assert episode[DONE].flatten().tolist() == done * 2
        assert episode[TRUNCATED].flatten().tolist() == done + [False] * 6, "hunter_1, long dead, met no time limit"
        assert episode[TERMINATED].flatten().tolist() == [False] * 6 + done
        hunter_1 = [True] * 3 + [False] * 3
        assert episode[ALIVE][:, 1].tolist() == hunter_1 * 2
        assert episode[NEXT_ALIVE][:, 1].tolist() == [True, True, False, False, False, False] * 2
        assert episode[NEXT_ALIVE][:, [0, 2]].all(), "who ends with the episode does not die"
        assert_legal(episode)


def test_mock_values() -> None:
    env = MultiAgentEnv(MockEnv(death_step=3))
    data = env.rollout(6, policy=first_legal_policy(), auto_cast_to_device=False)
    actions = [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert data[ACTION].tolist() == actions
    assert data[REWARD][..., 0].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0], [0, 0, 3], [1, 0, 0], [0, 0, 0]]
    assert data[ACTION_MASK][1].tolist() == [[True, False, True, True]] * 2 + [[True, False, True, False]]
    assert data[ACTION_MASK][4].tolist() == [
        [False, True, True, True],
        [True, False, False, False],
        [True, False, True, False],
    ], "the dead have one legal action"
    assert data[NEXT_OBSERVATION][5].tolist() == [[6, 0, 0, 0, 1], [0] * 5, [6, 2, 0, 0, 0]]
    assert data[NEXT_OBSERVATION][1].tolist() == [[2, 0, 0, 0, 1], [2, 1, 0, 0, 1], [2, 2, 0, 0, 0]]


def test_death_in_the_step_of_the_time_limit() -> None:
    data = MultiAgentEnv(MockEnv(death_step=4, episode_length=4, ending="truncate")).rollout(10)
    assert data[TRUNCATED][-1] and not data[TERMINATED][-1]
    assert data[NEXT_ALIVE][-1].tolist() == [True, False, True]
    assert not data[NEXT_OBSERVATION][-1, 1].any()


class DeadAreTruncated(MockEnv):
    """Says of the long dead only that they are truncated, and of all who end by termination that they are both."""

    def _ends(self) -> tuple[Tensor, Tensor]:
        terminated, truncated = super()._ends()
        long_dead = terminated & truncated
        over = self._steps >= self.episode_length
        return terminated & ~long_dead, truncated | (terminated & over)


def test_only_a_living_agent_that_does_not_die_is_truncated() -> None:
    data = MultiAgentEnv(DeadAreTruncated(death_step=3, ending="terminate")).rollout(10)
    assert data.shape == (6,)
    assert data[TERMINATED][-1] and not data[TRUNCATED].any()
    data = MultiAgentEnv(DeadAreTruncated(death_step=3, ending="truncate")).rollout(10)
    assert data[TRUNCATED][-1] and not data[TERMINATED].any()


class Forgetful(MockEnv):
    """Returns nonsense for what is not reset, which TorchRL allows: it keeps what it had."""

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        output = super()._reset(tensordict, **kwargs)
        if tensordict is not None and "_reset" in tensordict.keys():
            others = ~tensordict["_reset"].squeeze(-1)
            for group in self.group_map:
                for key in ("mask", "action_mask"):
                    output[group, key][others] = True
        return output


def test_partial_reset_of_a_batch_keeps_the_others_alive_and_legal() -> None:
    env = MultiAgentEnv(Forgetful(batch_size=[2], death_step=1, episode_length=3, ending="terminate"))
    data = env.reset()
    for _ in range(2):
        data = env.step(env.rand_action(data))["next"]
        assert data[ALIVE].tolist() == [[True, False, True]] * 2
    data = env.reset(data.set("_reset", torch.tensor([[True], [False]])))
    assert data[ALIVE].tolist() == [[True] * 3, [True, False, True]]
    assert data[OBSERVATION][:, 0, 0].tolist() == [0.0, 2.0]
    legal = [[True, True, False, True], [True, False, False, False], [True, True, False, False]]
    assert env.transform.legal_actions[1].tolist() == data[ACTION_MASK][1].tolist() == legal
    data = env.step(env.rand_action(data))["next"]
    assert data["done"].tolist() == [[False], [True]]
    assert data[ALIVE].tolist() == [[True, False, True]] * 2


def test_knights_die_and_the_episode_goes_on() -> None:
    env = make_env(KAZ, seed=1, **DEADLY)
    torch.manual_seed(0)
    data = env.rollout(400, break_when_any_done=False)
    alive, next_alive = data[ALIVE], data[NEXT_ALIVE]
    deaths = alive & ~next_alive
    assert deaths.any(), "nobody died; this test needs another seed"
    assert not data[DONE].squeeze(-1)[deaths.any(-1)].any()
    assert not data[OBSERVATION][~alive].any() and not data[NEXT_OBSERVATION][~next_alive].any()
    assert not data[REWARD][~alive].any()
    assert (data[ACTION_MASK][~alive].sum(-1) == 1).all()
    assert_legal(data)
    within = ~data[DONE].squeeze(-1)[:-1]
    assert torch.equal(next_alive[:-1][within], alive[1:][within])
    assert alive[1:][~within].all(), "all live again after a reset"
    assert not (~alive[:-1] & alive[1:])[within].any(), "nobody rises from the dead"
    assert data[TERMINATED].any() and not data[TRUNCATED].any()


def test_a_time_limit_truncates_although_somebody_died() -> None:
    env = make_env(KAZ, seed=1, max_cycles=120, **DEADLY)
    torch.manual_seed(0)
    data = env.rollout(480, break_when_any_done=False)
    ends = data[DONE].squeeze(-1)
    assert torch.equal(data[TRUNCATED] | data[TERMINATED], data[DONE])
    assert not (data[TRUNCATED] & data[TERMINATED]).any()
    assert (~data[NEXT_ALIVE][ends & data[TRUNCATED].squeeze(-1)]).any(), "no death before a limit; change the seed"
