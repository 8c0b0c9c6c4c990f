from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import check_env_specs

from matwm_rl.envs import MockEnv

FIRST_LEGAL = {0: (1, 1), 1: (0, 0), 2: (0, 0), 3: (0, 1), 4: (1, 0), 5: (0, 0)}
"""For each step the first legal action of hunters and of the prey: not t % 4, not t % 3."""


def act(env: MockEnv, hunters: list[int], prey: int) -> TensorDict:
    """One unbatched step with the given actions."""
    actions = TensorDict(
        {
            "hunter": TensorDict({"action": torch.tensor(hunters)}, batch_size=[2]),
            "prey": TensorDict({"action": torch.tensor([prey])}, batch_size=[1]),
        }
    )
    return env.step(actions)["next"]


def play(env: MockEnv, steps: int) -> list[TensorDict]:
    """Steps with the first legal actions, from the environment's present state at step 0."""
    env.reset()
    return [act(env, [FIRST_LEGAL[t][0]] * 2, FIRST_LEGAL[t][1]) for t in range(steps)]


@pytest.mark.parametrize("batch_size", [[], [2]])
def test_specs(batch_size: list[int]) -> None:
    check_env_specs(MockEnv(batch_size=batch_size))


def test_observation_encodes_step_agent_action_and_episode() -> None:
    env = MockEnv()
    env.reset()
    act(env, [3, 2], 1)
    after_two = act(env, [0, 2], 2)
    assert after_two["hunter", "observation"].tolist() == [[2, 0, 0, 0, 1], [2, 1, 2, 0, 1]]
    assert after_two["prey", "observation"].tolist() == [[2, 2, 2]]
    assert env.reset()["hunter", "observation"].tolist() == [[0, 0, -1, 1, 1], [0, 1, -1, 1, 1]]


def test_rewards_are_action_times_rank() -> None:
    env = MockEnv()
    env.reset()
    after = act(env, [3, 2], 1)
    assert after["hunter", "reward"].tolist() == [[3.0], [4.0]]
    assert after["prey", "reward"].tolist() == [[3.0]]


def test_legal_actions_rotate() -> None:
    env = MockEnv()
    assert env.reset()["hunter", "action_mask"].tolist() == [[False, True, True, True]] * 2
    after_one = act(env, [1, 1], 1)
    assert after_one["hunter", "action_mask"].tolist() == [[True, False, True, True]] * 2
    assert after_one["prey", "action_mask"].tolist() == [[True, False, True]]


def test_illegal_action_is_refused() -> None:
    env = MockEnv()
    env.reset()
    with pytest.raises(ValueError, match="hunter took the actions .* illegal"):
        act(env, [0, 1], 1)


def test_hunter_dies_and_the_episode_goes_on() -> None:
    steps = play(MockEnv(death_step=3), 4)
    assert [step["hunter", "mask"].tolist() for step in steps] == [[True, True]] * 2 + [[True, False]] * 2
    death, after = steps[2], steps[3]
    assert death["hunter", "terminated"].tolist() == [[False], [True]]
    assert death["hunter", "truncated"].tolist() == [[False], [False]]
    assert after["hunter", "truncated"].tolist() == [[False], [True]], "the wrapper's spurious truncation"
    assert not death["done"] and not after["done"]
    assert death["hunter", "observation"][1].tolist() == [0.0] * 5
    # the last reward of a life: the action 0 at t = 2 earns nothing, so look at a life that ends at t = 1
    env = MockEnv(death_step=1)
    env.reset()
    assert act(env, [3, 2], 1)["hunter", "reward"].tolist() == [[3.0], [4.0]]
    assert act(env, [3, 2], 2)["hunter", "reward"].tolist() == [[3.0], [0.0]]


def test_alternate_endings() -> None:
    env = MockEnv(episode_length=6, death_step=None)
    first, second = play(env, 6)[-1], play(env, 6)[-1]
    assert first["done"] and first["truncated"] and not first["terminated"]
    assert second["done"] and second["terminated"] and not second["truncated"]
    assert first["prey", "truncated"].all() and second["prey", "terminated"].all()
    assert not first["prey", "mask"].any()


def test_batch_resets_one_environment() -> None:
    env = MockEnv(batch_size=[2], death_step=None)
    data = env.reset()
    data = env.step(env.rand_action(data))["next"]
    data = env.reset(data.set("_reset", torch.tensor([[True], [False]])))
    assert data["prey", "observation"][:, 0, 0].tolist() == [0.0, 1.0]
    assert data["hunter", "observation"][:, 0, 3].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"episode_length": 0}, "episode_length must be"),
        ({"death_step": 0}, "death_step must be"),
        ({"ending": "stop"}, "'stop'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MockEnv(**kwargs)  # type: ignore[arg-type]
