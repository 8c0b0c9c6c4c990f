"""What groups and agents may be called, TorchRL's ActionMask around the environment, and renderers that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchrl.envs import ActionMask, EnvBase, TransformedEnv, check_env_specs

from matwm_rl.envs import MockEnv, MultiAgentEnv, make_env, render_frame
from matwm_rl.envs.families import wrap_pettingzoo
from matwm_rl.evaluation import RandomActions, RunLog, evaluate_matches, read_metrics, record_gif
from matwm_rl.keys import ACTION, ACTION_MASK
from tests.envs.helpers import assert_legal
from tests.envs.population import Population, population


@pytest.mark.parametrize(
    "names",
    [
        ("a,0", "b"),
        ("a.0", "b.1"),
        ("a/0", "b/1"),
        ("a 0", "b 1"),
        ('"a"_0', "'b'_1"),
        ("ä_0", "日本_1"),
        ("agents_0",),
    ],
)
def test_odd_names_work_to_the_log(names: tuple[str, ...], tmp_path: Path) -> None:
    matches = evaluate_matches("mine", population(names=names), RandomActions(), episodes=1)
    assert list(matches.per_agent()["self_play"]) == list(names)
    with RunLog(tmp_path, total_steps=1, progress=False, logger=None) as log:
        log.log(matches.metrics(), 1)
        log.write_summary({"evaluation": matches.per_agent()})
    assert {name: value for name, ((_, value),) in read_metrics(tmp_path).items()} == pytest.approx(matches.metrics())


@pytest.mark.parametrize(
    ("group_map", "message"),
    [
        ({"agents": ["a_0"], "b": ["a_1"]}, "beside others"),
        ({"next": ["a_0"], "b": ["a_1"]}, r"must not be called \['next'\]"),
        ({"history": ["a_0", "a_1"]}, r"must not be called \['history'\]"),
        ({"done": ["a_0", "a_1"]}, r"must not be called \['done'\]"),
        ({"a\nb": ["a_0", "a_1"]}, "names in one line"),
        ({"a": ["a_0", "a\r1"]}, "names in one line"),
        ({"": ["a_0", "a_1"]}, "names in one line"),
        ({"a": ["a_0", "a_0"]}, "the same name"),
        ({"a": ["a_0", "a_1"], "b": []}, "group 'b' has no agents"),
    ],
)
def test_names_that_cannot_be_are_refused_at_once(group_map: dict[str, list[str]], message: str) -> None:
    env = MockEnv()
    env.group_map = group_map
    with pytest.raises(ValueError, match=message):
        MultiAgentEnv(env)


def test_groups_that_only_end_apart_are_refused_at_once() -> None:
    env = MockEnv()
    done = env.full_done_spec.clone()
    for name in ("done", "terminated", "truncated"):
        del done[name]
    env.done_spec = done
    with pytest.raises(ValueError, match="expected an environment with a 'done' at the root"):
        MultiAgentEnv(env)


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: TransformedEnv(make_env("mock"), mask),
        lambda mask: make_env("mock").append_transform(mask),
        lambda mask: TransformedEnv(make_env("mock", num_envs=2), mask),
        lambda mask: TransformedEnv(make_env("mpe2/simple_tag_v3", num_envs=2), mask),
        lambda mask: TransformedEnv(TransformedEnv(make_env("mock")), mask),
    ],
    ids=["around", "appended", "batch", "serial", "twice"],
)
def test_an_action_mask_around_the_environment_changes_nothing(make: Callable[[ActionMask], EnvBase]) -> None:
    env = make(ActionMask(ACTION, ACTION_MASK))
    assert_legal(env.rollout(13, break_when_any_done=False))
    check_env_specs(env)
    env.close()


class Undrawn(Population):
    render_mode = "rgb_array"


class Unmoded(Population):
    @property
    def render_mode(self) -> str:
        raise AttributeError("render_mode")


class Failing(Undrawn):
    def render(self) -> None:
        raise OSError("no display")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Undrawn, RuntimeError, "drew nothing"),
        (Unmoded, RuntimeError, "render_mode=None"),
        (Failing, OSError, "no dis"),
    ],
)
def test_renderers_that_fail_say_so(
    kind: type[Population], error: type[Exception], message: str, tmp_path: Path
) -> None:
    env = MultiAgentEnv(wrap_pettingzoo(kind()))
    env.reset()
    with pytest.raises(error, match=message):
        render_frame(env)
    with pytest.raises(error, match=message):
        record_gif(env, RandomActions(), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_what_never_ends_is_recorded_up_to_its_limit(tmp_path: Path) -> None:
    env: Any = population(length=10**9)
    returns = record_gif(
        env, RandomActions(), tmp_path / "a.gif", episodes=1, max_steps=4, draw=lambda _: np.zeros((8, 8, 3), np.uint8)
    )
    assert returns == [[4.0, 8.0]]
