from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from matwm_rl.envs import make_env
from matwm_rl.evaluation import opponents
from matwm_rl.evaluation.opponents import CrossPlay, RandomActions, against_random
from matwm_rl.evaluation.returns import Returns
from matwm_rl.evaluation.simple_tag import TagScript
from tests.evaluation.helpers import Constant

MPE = "mpe2/simple_tag_v3"


def test_random_actions_are_uniform_among_the_legal() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool).expand(3000, 2, 4)
    action = RandomActions()(TensorDict({"agents": {"action_mask": mask}}, [3000]))["agents", "action"]
    assert action.dtype == torch.int64
    counts = torch.stack([torch.bincount(action[:, agent], minlength=4) for agent in range(2)])
    assert counts[1].tolist() == [0, 0, 3000, 0]
    assert counts[0, 1] == 0 and (counts[0, [0, 2, 3]] - 1000).abs().max() < 110  # four standard deviations


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(["hunter"], [1, 1, 2]), (["prey"], [2, 2, 1]), (["prey", "hunter"], [1, 1, 1]), ([], [2, 2, 2])],
)
def test_cross_play_takes_the_actions_of_the_right_agents(groups: list[str], expected: list[int]) -> None:
    env = make_env("mock")
    policy = CrossPlay(Constant(1), Constant(2), env.layout, groups)
    state = env.reset()
    assert policy(state)["agents", "action"].tolist() == expected
    batch = torch.stack([state, state])
    assert policy(batch)["agents", "action"].tolist() == [expected, expected]


def test_cross_play_of_an_unknown_group() -> None:
    with pytest.raises(ValueError, match=r"unknown groups \['wolf'\].*\['hunter', 'prey'\]"):
        CrossPlay(Constant(1), Constant(2), make_env("mock").layout, ["prey", "wolf"])


def test_missing_entries_are_named() -> None:
    env = make_env(MPE)
    state = env.reset()
    with pytest.raises(KeyError, match="RandomActions reads .*'action_mask'.* is missing"):
        RandomActions()(state.exclude(("agents", "action_mask")))
    with pytest.raises(KeyError, match="TagScript reads .*'observation'.* is missing"):
        TagScript(env.layout)(state.exclude(("agents", "observation")))


def test_they_take_tensors_by_keyword() -> None:
    env = make_env("mpe2/simple_tag_v3", num_envs=2, seed=0)
    step, script = env.reset(), TagScript(env.layout)
    for policy in (script, CrossPlay(script, script, env.layout, ["agent"])):
        action = policy(agents_observation=step["agents", "observation"])
        assert torch.equal(action, script(step.clone())["agents", "action"])
    action = RandomActions()(agents_action_mask=step["agents", "action_mask"])
    assert step["agents", "action_mask"].gather(-1, action.unsqueeze(-1)).all()


def test_every_group_plays_against_random_others_and_is_judged_by_its_own_return(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env, trained, greedy = make_env("mock"), Constant(1), ExplorationType.DETERMINISTIC
    played: list[CrossPlay] = []

    def evaluate(env: EnvBase, policy: CrossPlay, *, episodes: int, exploration: ExplorationType) -> Returns:
        assert (episodes, exploration) == (3, greedy)
        played.append(policy)
        return Returns(torch.tensor([[1.0, 3.0, 10.0]]) * len(played), env.layout)

    monkeypatch.setattr(opponents, "evaluate", evaluate)
    matches = against_random(env, trained, episodes=3, exploration=greedy)
    assert matches.judged == {"hunter_vs_random": "hunter", "prey_vs_random": "prey"}
    assert matches.summary() == {"hunter_vs_random": 2.0, "prey_vs_random": 20.0}
    assert [policy.acts.tolist() for policy in played] == [[True, True, False], [False, False, True]]
    assert all(policy.policy is trained and isinstance(policy.opponents, RandomActions) for policy in played)


def test_a_single_group_has_no_opponents() -> None:
    with pytest.raises(ValueError, match=r"got the single group \['agent'\]"):
        against_random(make_env("mpe2/simple_spread_v3"), Constant(1), episodes=1)
