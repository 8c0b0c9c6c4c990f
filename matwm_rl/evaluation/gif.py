"""Animated pictures of played episodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp

from matwm_rl import keys
from matwm_rl.arguments import check_ints
from matwm_rl.envs import render_frame
from matwm_rl.files import import_optional, new_file

Frame = NDArray[np.uint8]
LAST_FRAME = 5
"""How many times longer than the others the last frame of an episode is shown."""


# TorchRL's VideoRecorder does not serve: it gives frames to a logger, which needs torchcodec or moviepy to write them,
# and takes them from the environment's own renderer alone, which machines without a display lack.
@torch.no_grad()
def record_gif(
    env: EnvBase,
    policy: TensorDictModuleBase,
    path: str | Path,
    *,
    episodes: int = 2,
    max_steps: int = 200,
    fps: int = 10,
    draw: Callable[[TensorDictBase], Frame] | None = None,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> list[list[float]]:
    """Play episodes and save them as a GIF.

    Args:
        env: one environment, made with ``num_envs=1``, with the policy's primer if it has one.
        policy: writes ``("agents", "action")``.
        path: the picture, for example ``episodes.gif``.
        episodes: number of episodes.
        max_steps: longer episodes are cut off here.
        fps: frames per second; GIF rounds durations to hundredths of a second.
        draw: returns the picture ``[H, W, 3]`` of a step's tensordict; by default the environment renders itself.
            :class:`DrawTag` draws simple_tag on machines that cannot render.
        exploration: sample actions (default) or take the most probable (``ExplorationType.DETERMINISTIC``).

    Returns:
        each agent's return in every episode, up to ``max_steps``.

    Raises:
        ValueError: if there are several environments, or a number is below 1.
        RuntimeError: if the environment cannot be rendered here; nothing is written then.
        NotImplementedError: if the environment can never be rendered; nothing is written then.
        ImportError: if Pillow is not installed.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import DrawTag, TagScript
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> path = Path(tempfile.mkdtemp()) / "tag.gif"
        >>> returns = record_gif(env, TagScript(env.layout), path, episodes=1, max_steps=5, draw=DrawTag(env.layout))
        >>> path.exists(), len(returns[0])
        (True, 4)
    """
    check_ints(1, episodes=episodes, max_steps=max_steps)
    check_ints(1, maximum=100, fps=fps)
    if env.batch_size.numel() != 1:
        raise ValueError(f"record_gif plays one environment, got a batch of {tuple(env.batch_size)}: use num_envs=1")
    image = import_optional("PIL.Image")
    if draw is None:
        # Fail before any episode is played if the environment cannot render.
        env.reset()
        render_frame(env)
    frames: list[Any] = []
    durations: list[int] = []
    returns = []
    milliseconds = round(1000 / fps)
    with set_exploration_type(exploration):
        for _ in range(episodes):
            pictures, agent_returns = _play(env, policy, max_steps, draw or (lambda _: render_frame(env)))
            frames += [image.fromarray(picture) for picture in pictures]
            # The last picture is shown longer, so that the end of the episode is visible.
            durations += [milliseconds] * (len(pictures) - 1) + [LAST_FRAME * milliseconds]
            returns.append(agent_returns)
    with new_file(path) as partial:
        frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return returns


def _play(
    env: EnvBase, policy: TensorDictModuleBase, max_steps: int, draw: Callable[[TensorDictBase], Frame]
) -> tuple[list[Frame], list[float]]:
    """Play one episode; return a picture of every state, the last included, and each agent's return."""
    tensordict = env.reset()
    frames, total = [draw(tensordict)], torch.zeros(())
    for _ in range(max_steps):
        step = env.step(policy(tensordict))
        total = total + step.get(keys.REWARD).flatten().cpu()
        tensordict = step_mdp(step)
        frames.append(draw(tensordict))
        if bool(step.get(keys.DONE).all()):
            break
    return frames, total.tolist()
