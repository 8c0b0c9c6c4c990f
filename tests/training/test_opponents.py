from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from matwm_rl.envs import make_env
from matwm_rl.training.evaluation import evaluate
from matwm_rl.training.opponents import CrossPlay, RandomActions, TagScript

MPE, VMAS = "mpe2/simple_tag_v3", "vmas/simple_tag"


class Constant(TensorDictModuleBase):
    def __init__(self, action: int) -> None:
        super().__init__()
        self.in_keys, self.out_keys, self.action = [("agents", "action_mask")], [("agents", "action")], action

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict["agents", "action_mask"].shape[:-1]
        return tensordict.set(("agents", "action"), torch.full(shape, self.action))


def tag_observation(evader: tuple[float, float], pursuers: list[tuple[float, float]]) -> TensorDict:
    """What simple_tag shows of agents at these places: velocity, position, two landmarks, the others."""
    positions = torch.tensor([*pursuers, evader])
    rows = []
    for agent, position in enumerate(positions):
        others = [positions[other] - position for other in range(4) if other != agent]
        rows.append(torch.cat([torch.full((2,), 9.0), position, torch.full((4,), 9.0), *others, torch.zeros(2)])[:16])
    return TensorDict({"agents": {"observation": torch.stack(rows)}})


def pursuers_mean(name: str, policy: TensorDictModuleBase, *, episodes: int, num_envs: int) -> float:
    env = make_env(name, seed=0, num_envs=num_envs)
    return evaluate(env, policy, episodes=episodes).per_group()["adversary"]


def test_random_actions_are_uniform_among_the_legal() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool).expand(3000, 2, 4)
    action = RandomActions()(TensorDict({"agents": {"action_mask": mask}}, [3000]))["agents", "action"]
    assert action.dtype == torch.int64
    counts = torch.stack([torch.bincount(action[:, agent], minlength=4) for agent in range(2)])
    assert counts[1].tolist() == [0, 0, 3000, 0]
    assert counts[0, 1] == 0 and (counts[0, [0, 2, 3]] - 1000).abs().max() < 110  # four standard deviations


@pytest.mark.parametrize(
    ("name", "moves"), [(MPE, {"-x": 1, "+x": 2, "-y": 3, "+y": 4}), (VMAS, {"-x": 3, "+x": 6, "-y": 1, "+y": 2})]
)
@pytest.mark.parametrize(
    ("evader", "pursuers", "expected"),
    [
        # All three are to its right, the nearest most along x: it flees to the left, they come.
        ((0.0, 0.0), [(0.5, 0.1), (0.6, 0.7), (0.9, -0.2)], ["-x", "-y", "-x", "-x"]),
        # The nearest is below: it flees upwards.
        ((0.0, 0.0), [(-0.8, 0.1), (0.1, -0.3), (0.1, 0.9)], ["+x", "+y", "-y", "+y"]),
        # Out of the arena to the right it turns back, pursuers or not.
        ((0.95, 0.3), [(0.5, 0.3), (0.0, 0.0), (0.9, -0.9)], ["+x", "+x", "+y", "-x"]),
    ],
)
def test_the_script_steps_along_the_larger_axis(
    name: str,
    moves: dict[str, int],
    evader: tuple[float, float],
    pursuers: list[tuple[float, float]],
    expected: list[str],
) -> None:
    action = TagScript(make_env(name).layout)(tag_observation(evader, pursuers))["agents", "action"]
    assert action.tolist() == [moves[move] for move in expected]


@pytest.mark.parametrize("name", [MPE, VMAS])
def test_actions_move_as_the_script_believes(name: str) -> None:
    env = make_env(name, seed=0, num_envs=16)
    script = TagScript(env.layout)
    for axis in range(2):
        for sign, action in zip((-1, 1), script.steps[axis].tolist(), strict=True):
            velocity = env.rollout(4, Constant(action))["next", "agents", "observation"][:, -1, :, :2]
            # Means: those that bump into others go elsewhere.
            assert sign * velocity[..., axis].mean() > 0.4
            assert velocity[..., 1 - axis].mean().abs() < 0.1


def test_scripted_pursuers_and_evader_reach_the_known_returns_in_mpe2() -> None:
    layout = make_env(MPE).layout
    script, random = TagScript(layout), RandomActions()
    kwargs = {"episodes": 60, "num_envs": 4}
    # Measured over many more episodes: 45.8, 4.5, 14.5 and 1.6.
    chasing = pursuers_mean(MPE, CrossPlay(script, random, layout, ["adversary"]), **kwargs)
    nobody = pursuers_mean(MPE, random, **kwargs)
    both = pursuers_mean(MPE, script, **kwargs)
    fleeing = pursuers_mean(MPE, CrossPlay(script, random, layout, ["agent"]), **kwargs)
    assert 25 < chasing < 70
    assert nobody < 12
    assert 6 < both < chasing - 10
    assert fleeing < nobody


def test_scripted_pursuers_beat_random_ones_in_vmas() -> None:
    layout = make_env(VMAS).layout
    script, random = TagScript(layout), RandomActions()
    chasing = pursuers_mean(VMAS, CrossPlay(script, random, layout, ["adversary"]), episodes=32, num_envs=32)
    nobody = pursuers_mean(VMAS, random, episodes=32, num_envs=32)
    fleeing = pursuers_mean(VMAS, script, episodes=32, num_envs=32)
    assert chasing > 5 * nobody + 10
    assert fleeing < chasing


@pytest.mark.parametrize(("name", "message"), [("mock", "'prey': 1"), ("mpe2/simple_spread_v3", "one evader")])
def test_the_script_plays_tag_only(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TagScript(make_env(name).layout)


def test_the_script_plays_one_evader_only() -> None:
    with pytest.raises(ValueError, match="one evader"):
        TagScript(make_env(MPE, num_good=2).layout)


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
