"""The family ``"mamujoco"``: robots of MuJoCo whose joints are divided among agents."""

from __future__ import annotations

import atexit
import importlib
import os
import re
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import ReferenceType, ref

import torch
from torchrl.envs import EnvBase, MarlGroupMapType

from matwm_rl.envs.families.game_batch import GameBatch
from matwm_rl.envs.families.named import construct, unknown_environment
from matwm_rl.envs.families.packages import import_package
from matwm_rl.envs.families.pettingzoo import wrap_pettingzoo
from matwm_rl.envs.game_check import GameWrapper
from matwm_rl.envs.registry import register_family

PARTITIONS = {
    "Ant": ("2x4", "2x4d", "4x2"),
    "CoupledHalfCheetah": ("1p1",),
    "HalfCheetah": ("2x3", "6x1"),
    "Hopper": ("3x1",),
    "Humanoid": ("9|8",),
    "HumanoidStandup": ("9|8",),
    "Pusher": ("3p",),
    "Reacher": ("2x1",),
    "Swimmer": ("2x1",),
    "Walker2d": ("2x3",),
}
"""The robots that have a partition, and the ways in which their joints are divided."""
SEGMENTED = {"ManySegmentAnt": "many_segment_ant", "ManySegmentSwimmer": "many_segment_swimmer"}
"""Robots of any number of agents and of segments for each, ``NxM``, and the modules that generate them."""
MODULE = "gymnasium_robotics.envs.multiagent_mujoco"


class _Drawable(GameWrapper):
    """A robot that can be drawn without a screen.

    Unlike MaMuJoCo's class, it has a ``render_mode``, which tells that it can be drawn.

    Args:
        game: the parallel environment.
        render_mode: that it was made with.
    """

    def __init__(self, game: Any, render_mode: str | None) -> None:
        super().__init__(game)
        self.render_mode = render_mode
        self._is_drawn = False

    def render(self) -> Any:
        """Draw the robot.

        Raises:
            RuntimeError: if there is nothing to draw on.
        """
        _choose_screen()
        viewer = self.game.single_agent_env.unwrapped.mujoco_renderer.viewer
        if viewer is not None:
            viewer.make_context_current()  # another robot may have been drawn since
        picture = self.game.render()
        if not self._is_drawn:
            self._is_drawn = True
            # Registered after EGL's exit handler, so that it runs before: the viewer must close while EGL is still up.
            atexit.register(_close, ref(self))
        return picture


def _close(robot: ReferenceType[_Drawable]) -> None:
    if (left := robot()) is not None:
        left.close()


def make_mamujoco(
    task: str,
    *,
    num_envs: int,
    device: torch.device | str | None,
    group_map: dict[str, list[str]] | MarlGroupMapType | None = None,
    **kwargs: Any,
) -> EnvBase:
    """Make a robot of MaMuJoCo, with continuous actions.

    Args:
        task: ``ROBOT-PARTITION``, for example ``HalfCheetah-2x3``. With ``agent_factorization``, a partition of your
            own, the second part is its name, which is not read.
        num_envs: always 1.
        device: of the tensors given and received.
        group_map: see :func:`wrap_pettingzoo`.
        kwargs: MaMuJoCo's, such as ``agent_obsk``; those of the robot in Gymnasium, such as ``ctrl_cost_weight``; and
            ``max_episode_steps``.

    Raises:
        ValueError: if there is no such robot, or it has no such partition.
        TypeError: if there is no argument of a name.
    """
    import_package("gymnasium_robotics", extra="mamujoco")
    robot, _, partition = task.partition("-")
    known = [f"{robot}-{partition}" for robot, partitions in PARTITIONS.items() for partition in partitions]
    is_segmented = robot in SEGMENTED and re.fullmatch(r"[1-9]\d*x[1-9]\d*", partition)
    is_own = robot in PARTITIONS and kwargs.get("agent_factorization") is not None
    if not (task in known or is_segmented or is_own):
        known += [f"{robot}-NxM" for robot in SEGMENTED]
        raise unknown_environment(f"mamujoco/{task}", task, known, "a name is ROBOT-PARTITION, one of")
    game = construct(f"mamujoco/{task}", partial(_make, robot, partition), kwargs)
    return wrap_pettingzoo(game, group_map=group_map, device=device)


def make_mamujoco_batch(task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> EnvBase:
    """Make ``num_envs`` robots that step as one batch; see :func:`make_mamujoco`."""
    return GameBatch(partial(make_mamujoco, task, num_envs=1, device=device, **kwargs), num_envs)


def _make(
    robot: str,
    partition: str,
    *,
    agent_obsk: int | None = 1,
    agent_factorization: dict[str, Any] | None = None,
    local_categories: list[list[str]] | None = None,
    global_categories: tuple[str, ...] | None = None,
    max_episode_steps: int | None = None,
    render_mode: str | None = "rgb_array",
    **kwargs: Any,
) -> _Drawable:
    """Make the robot, and divide its joints among the agents.

    MaMuJoCo can make the robot itself. It then writes the file of a segmented robot into its own package, where other
    processes overwrite and remove it, and it drops the arguments of the coupled robot.
    """
    gymnasium = importlib.import_module("gymnasium")
    make = partial(gymnasium.make, max_episode_steps=max_episode_steps, render_mode=render_mode)
    if robot == "CoupledHalfCheetah":
        coupled = importlib.import_module(MODULE).CoupledHalfCheetahEnv(render_mode, **kwargs)
        limit = 1000 if max_episode_steps is None else max_episode_steps
        body = gymnasium.wrappers.TimeLimit(coupled, limit)
    elif robot in SEGMENTED:
        agents, segments = map(int, partition.split("x"))
        with TemporaryDirectory() as folder:
            file = str(Path(folder, "robot.xml"))
            importlib.import_module(f"{MODULE}.{SEGMENTED[robot]}").gen_asset(agents * segments, file)
            body = make(f"{robot.removeprefix('ManySegment')}-v5", xml_file=file, **kwargs)
    else:
        body = make(f"{robot}-v5", **kwargs)
    # Without shadows and smooth edges, a processor draws eight times as fast.
    quality = body.unwrapped.model.vis.quality
    quality.shadowsize = quality.offsamples = 0
    game = importlib.import_module(f"{MODULE}.mujoco_multi").parallel_env(
        robot,
        partition,
        agent_obsk,
        agent_factorization,
        local_categories,
        global_categories,
        gym_env=body,
    )
    return _Drawable(game, render_mode)


def _choose_screen() -> None:
    """Let Gymnasium draw by EGL if there is no screen. It would otherwise fail with an unclear error."""
    if "MUJOCO_GL" in os.environ or os.environ.get("DISPLAY") or not sys.platform.startswith("linux"):
        return
    try:
        importlib.import_module("mujoco.egl").GLContext(1, 1).free()
    except Exception as error:  # of PyOpenGL, or of the driver
        raise RuntimeError(
            "MuJoCo draws with OpenGL, and there is neither EGL nor a screen (DISPLAY is unset). Install EGL (Debian: "
            "libegl1) or run under a virtual screen: xvfb-run -a python ..."
        ) from error
    os.environ["MUJOCO_GL"] = "egl"


register_family("mamujoco", make_mamujoco, make_batch=make_mamujoco_batch)
