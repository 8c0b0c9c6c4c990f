from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium.spaces
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType

from matwm_rl.envs import MultiAgentEnv, make_env
from matwm_rl.envs.families import wrap_pettingzoo
from matwm_rl.evaluation import mpe, registry
from matwm_rl.evaluation.opponents import RandomActions
from matwm_rl.evaluation.registry import (
    Evaluation,
    evaluate_matches,
    find_evaluation,
    observation_names,
    register_evaluation,
)
from matwm_rl.evaluation.returns import Matches, Returns
from matwm_rl.torchrl_internals import simulator
from tests.envs.population import Population

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads((ROOT / "benchmarks/results/sample_efficiency/summary.json").read_text())


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


@pytest.mark.parametrize(
    "name", ["mpe2/simple_tag_v3", "mpe2/simple_spread_v3", "mpe2/simple_speaker_listener_v4", "vmas/simple_tag"]
)
def test_observations_of_the_documented_environments_have_names(name: str) -> None:
    env = make_env(name, seed=0)
    names = observation_names(name, env)
    assert [len(names[agent]) for agent in env.layout.agent_names] == env.layout.observation_sizes
    agents = env.rollout(6)["agents", "observation"].reshape(
        -1, env.layout.num_agents, max(env.layout.observation_sizes)
    )
    values = {
        agent: dict(zip(own, agents[..., index, :].unbind(-1), strict=False))
        for index, (agent, own) in enumerate((agent, names[agent]) for agent in env.layout.agent_names)
    }
    # What one sees of another is the difference of what both say of themselves.
    for agent, other in ((a, b) for a in values for b in values if a != b and f"{b} x" in values[a]):
        for axis in "xy":
            seen = values[other][f"own position {axis}"] - values[agent][f"own position {axis}"]
            torch.testing.assert_close(values[agent][f"{other} {axis}"], seen, atol=1e-5, rtol=0.0)
            if f"{other} velocity {axis}" in values[agent]:
                assert torch.equal(values[agent][f"{other} velocity {axis}"], values[other][f"own velocity {axis}"])
    assert all(f"{other} x" in values[agent] for agent in values for other in values if agent != other) or (
        "listener" in name
    )


@pytest.mark.parametrize("name", ["mpe2/simple_adversary_v3", "mpe2/simple_push_v3"])
def test_what_competing_agents_see_of_each_other_and_of_landmarks_fits_together(name: str) -> None:
    env = make_env(name, seed=0)
    names = observation_names(name, env)
    assert [len(names[agent]) for agent in env.layout.agent_names] == env.layout.observation_sizes
    observed = env.rollout(6)["agents", "observation"].unbind(-2)
    values = {
        agent: dict(zip(names[agent], seen.unbind(-1), strict=False))
        for agent, seen in zip(env.layout.agent_names, observed, strict=True)
    }
    for agent, other in ((a, b) for a in values for b in values if a != b):
        for axis in "xy":
            offsets = [values[agent][f"{what} {axis}"] for what in ("landmark 1", "landmark 2")]
            seen = [values[other][f"{what} {axis}"] for what in ("landmark 1", "landmark 2")]
            for ours, theirs in zip(offsets, seen, strict=True):
                torch.testing.assert_close(ours - theirs, values[agent][f"{other} {axis}"], atol=1e-5, rtol=0.0)
    seen = values["agent_0"]
    (goal,) = [i for i in (1, 2) if all(seen[f"goal {axis}"].equal(seen[f"landmark {i} {axis}"]) for axis in "xy")]
    if "push" in name:
        color = ["green", "blue"][goal - 1]
        assert (seen[f"own {color}"] == 0.75).all() and (seen[f"landmark {goal}'s {color}"] > 0.8).all()
        assert (seen["own velocity x"][1:] != 0).any()


def test_options_that_change_the_observation_leave_it_without_names() -> None:
    name = "mpe2/simple_spread_v3"
    assert observation_names(name, make_env(name, num_agent_neighbors=1)) == {}
    assert len(observation_names(name, make_env(name, N=4))["agent_3"]) == 2 + 2 + 8 + 6 + 6


def test_observations_of_several_entries_are_named_by_them() -> None:
    class Described(Population):
        def observation_space(self, agent: str) -> gymnasium.spaces.Dict:
            shapes = {"place": (2,), "grid": (2, 2), "energy": (1,)}
            boxes = {name: gymnasium.spaces.Box(-1, 99, shape, np.float32) for name, shape in shapes.items()}
            return gymnasium.spaces.Dict(boxes)

        def _observe(self, agent: str) -> Any:
            return {name: box.high * 0 + self.time for name, box in self.observation_space(agent).items()}

    env = MultiAgentEnv(wrap_pettingzoo(Described()))
    names = ["energy", "grid 0, 0", "grid 0, 1", "grid 1, 0", "grid 1, 1", "place 0", "place 1"]
    for wrapped in (env, TransformedEnv(env, StepCounter())):
        assert observation_names("mine", wrapped) == {"a_0": names, "a_1": names}
    register_evaluation("mine", Evaluation(observation_names=lambda layout: {"a": list("abcdefg")}))
    assert observation_names("mine", env) == {"a": list("abcdefg")}


def stored_returns(environment: str, match: str, method: str) -> dict[str, float]:
    """Median returns of the longest stored runs, with sampled and with greedy actions."""
    figures = STORED[environment][method]["figures"]
    last = figures[max(figures, key=int)]
    return {mode: last[f"{match}/{mode}"][0] for mode in ("sampled", "greedy")}


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("mpe2/simple_tag_v3", "simple_tag"),
        ("mpe2/simple_spread_v3", "simple_spread"),
        ("mpe2/simple_speaker_listener_v4", "simple_speaker_listener"),
        ("vmas/simple_tag", "vmas_simple_tag"),
    ],
)
def test_reference_lines_are_those_of_the_stored_comparison(name: str, environment: str) -> None:
    references = find_evaluation(name).references
    assert references
    for match, lines in references.items():
        stored = "return" if match == "self_play" else match
        for method in ("random", "scripted"):
            assert lines[method] == round(stored_returns(environment, stored, method)["sampled"], 1)
        model_free = [stored_returns(environment, stored, method) for method in ("mappo", "ippo", "iql", "isac")]
        found = [value for both in model_free for value in both.values()]
        best = min if match == "prey_vs_chasing_adversaries" else max  # there, the pursuers' return is to be low
        assert lines["model-free, 25k"] == round(best(found), 1)


def test_simple_spread_is_drawn_with_everybody_and_all_landmarks_in_place() -> None:
    name = "mpe2/simple_spread_v3"
    env = make_env(name, seed=0)
    draw = find_evaluation(name).draw
    assert draw is not None
    picture = draw(env.layout)
    assert picture is not None
    frame = picture(env.reset())
    world = simulator(env.base_env).unwrapped.world
    pixels = [
        tuple(frame[round((1.4 - y) * 320 / 2.8), round((x + 1.4) * 320 / 2.8)])
        for x, y in (entity.state.p_pos for entity in (*world.landmarks, *world.agents))
    ]
    assert pixels == [mpe.DARK] * 3 + [mpe.BLUE] * 3
    assert draw(make_env(name, num_agent_neighbors=1).layout) is None
