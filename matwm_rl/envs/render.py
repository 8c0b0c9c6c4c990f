"""Pictures of an environment's present state, for videos."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.libs.pettingzoo import PettingZooWrapper
from torchrl.envs.libs.vmas import VmasWrapper


def render_frame(env: EnvBase, env_index: int = 0) -> NDArray[np.uint8]:
    """Draws an environment's present state as an RGB image ``[H, W, 3]`` uint8.

    Args:
        env: a PettingZoo or VMAS environment, wrapped by any number of transforms.
        env_index: which environment of a batch to draw; only VMAS has several.

    Raises:
        RuntimeError: if the environment was made without ``render_mode="rgb_array"`` (PettingZoo), or there is no
            screen to draw on (VMAS).
        NotImplementedError: if the wrapped environment is neither of PettingZoo nor of VMAS.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0, render_mode="rgb_array")
        >>> _ = env.reset()
        >>> render_frame(env).shape
        (700, 700, 3)
    """
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if isinstance(env, PettingZooWrapper):
        return _render_pettingzoo(env._env)
    if isinstance(env, VmasWrapper):
        _check_screen()
        return np.asarray(env._env.render(mode="rgb_array", env_index=env_index), dtype=np.uint8)
    raise NotImplementedError(
        f"only PettingZoo and VMAS environments can be drawn, got {type(env).__name__}. Of a batched environment, draw "
        "one that make_env made with num_envs=1."
    )


def _render_pettingzoo(env: Any) -> NDArray[np.uint8]:
    if env.render_mode != "rgb_array":
        raise RuntimeError(
            f'the environment was made with render_mode={env.render_mode!r}; make it with render_mode="rgb_array".'
        )
    return np.asarray(env.render(), dtype=np.uint8)


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
