"""MaMuJoCo: robots whose joints are shared out among agents."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from matwm_rl.envs import MultiAgentEnv, make_env
from matwm_rl.envs.families import mamujoco
from matwm_rl.envs.families.mamujoco import PARTITIONS
from matwm_rl.envs.registry import unwrap
from matwm_rl.evaluation import RandomActions, record_gif
from matwm_rl.keys import DONE, OBSERVATION, TERMINATED, TRUNCATED
from matwm_rl.torchrl_internals import simulator

robotics = pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed")

HALF = "mamujoco/HalfCheetah-2x3"


def numbers(name: str) -> list[int]:
    return sorted(make_env(f"mamujoco/{name}").action_counts)


@pytest.mark.parametrize("robot", PARTITIONS)
def test_every_partition_shares_out_all_joints(robot: str) -> None:
    sizes = [numbers(f"{robot}-{partition}") for partition in PARTITIONS[robot]]
    assert len({sum(own) for own in sizes}) == 1
    for partition, own in zip(PARTITIONS[robot], sizes, strict=True):
        expected = {"9|8": [8, 9], "1p1": [6, 6], "3p": [1, 3, 3]}.get(partition)
        agents, joints = (int(part[0]) for part in partition.split("x")) if expected is None else (0, 0)
        assert own == (expected or [joints] * agents)


def test_robots_of_segments_leave_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from gymnasium_robotics.envs import multiagent_mujoco

    assets = Path(multiagent_mujoco.__file__).parent / "assets"
    before = sorted(assets.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("os.remove", lambda path: pytest.fail(f"{path} is another process's too"))
        assert numbers("ManySegmentSwimmer-3x2") == [2, 2, 2]
        assert numbers("ManySegmentAnt-2x1") == [4, 4]
    assert sorted(assets.iterdir()) == before


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("HalfCheeta-2x3", "near ones: HalfCheetah-2x3, .*a name is ROBOT-PARTITION, one of: Ant-2x4, .*Walker2d-2x3"),
        ("HalfCheetah", "near ones: HalfCheetah-6x1, HalfCheetah-2x3.*a name is ROBOT-PARTITION"),
        ("HalfCheetah-3x2", "near ones: HalfCheetah-"),
        ("ManySegmentAnt-2", "near ones: ManySegmentAnt-NxM"),
        ("ManySegmentSwimmer-0x2", "near ones: ManySegmentSwimmer-NxM"),
        ("", "a name is ROBOT-PARTITION"),
    ],
)
def test_names(task: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"unknown environment 'mamujoco/{task}'; .*{message}"):
        make_env(f"mamujoco/{task}")


@pytest.mark.parametrize("name", ["HalfCheetah-2x3", "CoupledHalfCheetah-1p1", "ManySegmentSwimmer-2x1"])
def test_arguments(name: str) -> None:
    assert make_env(f"mamujoco/{name}", max_episode_steps=3).rollout(9).shape == (3,)
    with pytest.raises(
        TypeError, match="no argument 'max_episode_step'; near ones: max_episode_steps; it takes agent_ob"
    ):
        make_env(f"mamujoco/{name}", max_episode_step=3)
    with pytest.raises(TypeError, match="no argument 'ctrl_cost'"):
        make_env(f"mamujoco/{name}", ctrl_cost=3)


def test_arguments_of_mamujoco_and_of_the_robot() -> None:
    assert [make_env(HALF, agent_obsk=depth).layout.observation_shape for depth in (0, 1, 2)] == [(11,), (12,), (13,)]
    free, dear = (make_env(HALF, seed=0, ctrl_cost_weight=weight) for weight in (0.0, 1.0))
    action = torch.ones(2, 3)
    rewards = [
        env.step(env.reset().set(("agents", "action"), action))["next", "agents", "reward"] for env in (free, dear)
    ]
    assert (rewards[0] - rewards[1]).flatten().tolist() == pytest.approx([6, 6], abs=1e-4)


def test_a_partition_of_your_own() -> None:
    parts, edges, shared = robotics.mamujoco_v1.get_parts_and_edges("HalfCheetah", "6x1")
    own = {"partition": [(parts[0][0],), tuple(part[0] for part in parts[1:])], "edges": edges, "globals": shared}
    env = make_env("mamujoco/HalfCheetah-thigh", agent_factorization=own)
    assert env.action_counts == [1, 5]


# ---------------------------------------------------------------------- ends


def test_time_limits_are_truncations() -> None:
    env = make_env(HALF, seed=0)
    game, steps, over = simulator(unwrap(env)), 0, False
    game.reset()
    while not over:  # by the game alone, which is faster
        _, _, terminated, truncated, _ = game.step({agent: np.zeros(3, np.float32) for agent in game.agents})
        steps, over = steps + 1, any(truncated.values())
        assert not any(terminated.values())
    assert steps == 1000
    short = make_env(HALF, max_episode_steps=4).rollout(9)
    assert short[TRUNCATED].flatten().tolist() == [False, False, False, True] and not short[TERMINATED].any()


def test_falls_are_terminations() -> None:
    batch = make_env("mamujoco/Walker2d-2x3", seed=0, num_envs=2)
    data = batch.rollout(60, break_when_any_done=False)
    ends = data[DONE].squeeze(-1)
    assert data[TERMINATED].any() and not data[TRUNCATED].any()
    assert not torch.equal(ends[0], ends[1]), "each falls by itself"
    first = data[OBSERVATION][0, 1:][ends[0, :-1]]
    assert (first[..., -3:].abs() < 0.1).all(), "after a fall an episode begins"


# ---------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def drawable() -> MultiAgentEnv:
    env = make_env(HALF, seed=0)
    env.reset()
    try:
        env.render_frame()
    except Exception as error:  # whatever OpenGL and its drivers raise
        pytest.skip(f"MuJoCo cannot draw on this machine ({error})")
    return env


def test_pictures(drawable: MultiAgentEnv, tmp_path: Path) -> None:
    first = drawable.render_frame()
    assert first.shape == (480, 480, 3) and first.dtype == np.uint8 and np.ptp(first) > 100
    batch = make_env("mamujoco/Swimmer-2x1", seed=0, num_envs=2)
    batch.reset()
    other = [batch.render_frame(index) for index in (0, 1)]
    assert (other[0] != other[1]).any()
    assert (drawable.render_frame() == first).all(), "others that are drawn change nothing"
    batch.close()
    assert (drawable.render_frame() == first).all(), "nor others that are closed"
    record_gif(drawable, RandomActions(drawable.layout.actions), tmp_path / "a.gif", episodes=1, max_steps=3)
    assert (drawable.render_frame() != first).any()


def test_pictures_without_anything_to_draw_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "mujoco.egl", None)
    env = make_env(HALF)
    with pytest.raises(RuntimeError, match=r"neither EGL nor a screen \(DISPLAY is unset\). Install EGL"):
        record_gif(env, RandomActions(env.layout.actions), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
    env.rollout(3)


def test_a_screen_is_left_to_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco.egl", None)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    mamujoco._choose_screen()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    mamujoco._choose_screen()
