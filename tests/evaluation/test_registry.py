from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from matwm_rl.envs import make_env
from matwm_rl.evaluation import registry
from matwm_rl.evaluation.opponents import RandomActions
from matwm_rl.evaluation.registry import Evaluation, evaluate_matches, find_evaluation, register_evaluation
from matwm_rl.evaluation.returns import Matches, Returns


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(registry, "_REGISTERED", registry._REGISTERED.copy())


def test_the_newest_pattern_that_matches_wins() -> None:
    first, second, third = (Evaluation(references={"match": {"random": value}}) for value in (1.0, 2.0, 3.0))
    register_evaluation("mine/*", first)
    register_evaluation("mine/hunt_v?", second)
    assert find_evaluation("mine/hunt_v1") is second
    assert find_evaluation("mine/hunt_v10") is first
    register_evaluation("*hunt*", third)
    assert find_evaluation("mine/hunt_v1") is third
    assert find_evaluation("mine/gather") is first
    assert find_evaluation("Mine/Hunt") == find_evaluation("mine") == Evaluation()


def test_a_user_replaces_an_evaluation_of_the_library() -> None:
    mine = Evaluation()
    register_evaluation("mpe2/simple_tag_v3", mine)
    assert find_evaluation("mpe2/simple_tag_v3") is mine
    assert find_evaluation("vmas/simple_tag") is not mine


def test_the_registered_matches_are_played_as_asked() -> None:
    env, policy = make_env("mock", seed=0), RandomActions()
    expected = Matches({"hunt": Returns(torch.zeros(1, 3), env.layout)})
    asked: list[Any] = []

    def play(env: EnvBase, policy: TensorDictModuleBase, *, episodes: int, exploration: ExplorationType) -> Matches:
        asked.append((env, policy, episodes, exploration))
        return expected

    register_evaluation("mock", Evaluation(play))
    deterministic = ExplorationType.DETERMINISTIC
    assert evaluate_matches("mock", env, policy, episodes=3, exploration=deterministic) is expected
    assert asked == [(env, policy, 3, deterministic)]
