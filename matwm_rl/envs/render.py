"""Pictures of an environment's present state, for videos."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchrl.envs import EnvBase
from torchrl.envs.libs.meltingpot import MeltingpotWrapper
from torchrl.envs.libs.pettingzoo import PettingZooWrapper
from torchrl.envs.libs.vmas import VmasWrapper

from matwm_rl.envs.registry import register_renderer, renderers, unwrap
from matwm_rl.torchrl_internals import simulator


def render_frame(env: EnvBase, env_index: int = 0) -> NDArray[np.uint8]:
    """Draw an environment's present state as an RGB image ``[H, W, 3]`` uint8.

    Args:
        env: an environment of PettingZoo, of VMAS, or of a class with a renderer of its own
            (:func:`~matwm_rl.envs.register_renderer`), wrapped by any number of transforms.
        env_index: which environment of a batch to draw; of the library's renderers only VMAS's has several.

    Raises:
        RuntimeError: if the environment was made with a ``render_mode`` other than ``"rgb_array"`` or draws nothing
            (PettingZoo), or there is no screen to draw on (VMAS).
        NotImplementedError: if no renderer is registered for the class of the wrapped environment.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> _ = env.reset()
        >>> render_frame(env).shape
        (700, 700, 3)
    """
    env = unwrap(env)
    render = renderers.find(env)
    if render is None:
        raise NotImplementedError(
            f"there is no renderer for {type(env).__name__}; registered: {', '.join(renderers.names())}. Register one "
            "with matwm_rl.envs.register_renderer, or a function that draws what is observed with "
            "matwm_rl.evaluation.register_evaluation(..., Evaluation(draw=...)). Of a batched environment, draw one "
            "that make_env made with num_envs=1."
        )
    return render(env, env_index)


def _render_pettingzoo(env: EnvBase, env_index: int) -> NDArray[np.uint8]:
    return render_game(simulator(env))


def render_game(raw: Any) -> NDArray[np.uint8]:
    """Draw a game of PettingZoo."""
    mode = getattr(raw, "render_mode", None)
    if mode != "rgb_array":
        raise RuntimeError(
            f"the environment was made with render_mode={mode!r}; make it with "
            'render_mode="rgb_array", as make_env(..., render_mode="rgb_array") does if its constructor takes that.'
        )
    picture = raw.render()
    if picture is None:
        raise RuntimeError(f"the environment {raw} drew nothing: its render() returned None.")
    return np.asarray(picture, dtype=np.uint8)


def _render_vmas(env: EnvBase, env_index: int) -> NDArray[np.uint8]:
    _check_screen()
    return np.asarray(simulator(env).render(mode="rgb_array", env_index=env_index), dtype=np.uint8)


def _render_meltingpot(env: EnvBase, env_index: int) -> NDArray[np.uint8]:
    return np.asarray(env.get_rgb_image(), dtype=np.uint8)


def _check_screen() -> None:
    # VMAS draws without a screen through EGL and otherwise opens a window, where it fails with errors of its own.
    try:
        importlib.import_module("pyglet.libs.egl.egl")
    except ImportError as error:
        if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
            raise RuntimeError(
                "VMAS draws with OpenGL, and there is neither EGL nor a screen (DISPLAY is unset). Install EGL "
                "(Debian: libegl1) or run under a virtual screen: xvfb-run -a python ..."
            ) from error


register_renderer(PettingZooWrapper, _render_pettingzoo)
register_renderer(VmasWrapper, _render_vmas)
register_renderer(MeltingpotWrapper, _render_meltingpot)
