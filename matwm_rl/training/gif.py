"""Animated pictures of real episodes."""

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
from matwm_rl.envs import AgentLayout, render_frame
from matwm_rl.training.files import import_optional, new_file

Frame = NDArray[np.uint8]
LAST_FRAME = 5
"""How many times longer the last frame of an episode stays."""


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
        env: one environment, made with ``num_envs=1``, with the policy's primer if it has one. PettingZoo environments
            need ``make_env(..., render_mode="rgb_array")``.
        policy: writes ``("agents", "action")``.
        path: the picture, for example ``episodes.gif``.
        episodes: number of episodes.
        max_steps: an episode that is longer is cut off.
        fps: frames per second; GIF counts in hundredths of a second.
        draw: makes the picture ``[H, W, 3]`` of a step's tensordict; by default the environment renders itself. For
            simple_tag on a machine that cannot render, see :class:`DrawTag`.
        exploration: sample actions (default) or take the likeliest (``ExplorationType.DETERMINISTIC``).

    Returns:
        for every episode the return of each agent, cut off where the picture is.

    Raises:
        ValueError: if there are several environments, or a number is below 1.
        RuntimeError: if the environment cannot be rendered here (``NotImplementedError`` if never); nothing is written.
        ImportError: if Pillow is not installed.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.training.opponents import TagScript
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> path = Path(tempfile.mkdtemp()) / "tag.gif"
        >>> returns = record_gif(env, TagScript(env.layout), path, episodes=1, max_steps=5, draw=DrawTag(env.layout))
        >>> path.exists(), len(returns[0])
        (True, 4)
    """
    for name, value in (("episodes", episodes), ("max_steps", max_steps), ("fps", fps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if env.batch_size.numel() != 1:
        raise ValueError(f"record_gif plays one environment, got a batch of {tuple(env.batch_size)}: use num_envs=1")
    image = import_optional("PIL.Image")
    if draw is None:
        # A picture of the first state, before anything is played, tells whether there will be any.
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
            # The last picture stays a while, so that the cut to the next episode is seen.
            durations += [milliseconds] * (len(pictures) - 1) + [LAST_FRAME * milliseconds]
            returns.append(agent_returns)
    with new_file(path) as partial:
        frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return returns


def _play(
    env: EnvBase, policy: TensorDictModuleBase, max_steps: int, draw: Callable[[TensorDictBase], Frame]
) -> tuple[list[Frame], list[float]]:
    """One episode: a picture of every state, the last included, and the return of each agent."""
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


class DrawTag:
    """Pictures of simple_tag (mpe2 and VMAS) from what its agents observe, with Pillow: no renderer needed.

    Pursuers are orange, evaders green, obstacles grey; the frame marks coordinates from -1 to 1.

    Args:
        layout: of the environment.
        size: side of the picture in pixels.
        arena: half width of what is shown; agents may leave it.

    Raises:
        ValueError: if the layout is not that of simple_tag.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> DrawTag(env.layout, size=64)(env.reset()).shape
        (64, 64, 3)
    """

    def __init__(self, layout: AgentLayout, *, size: int = 320, arena: float = 1.4) -> None:
        groups = {name: len(agents) for name, agents in layout.group_map.items()}
        if list(groups) != ["adversary", "agent"]:
            raise ValueError(f"DrawTag draws simple_tag, got the groups {groups}")
        self.num_pursuers = groups["adversary"]
        # An observation is: velocity 2, position 2, obstacles 2 each, other agents 2 each, evaders' velocities 2 each.
        # The last evader sees the velocities of the other evaders alone.
        others = 2 * (layout.num_agents - 1) + 2 * (groups["agent"] - 1)
        self.num_obstacles = (layout.observation_sizes[-1] - 4 - others) // 2
        self.size, self.arena = size, arena

    def __call__(self, tensordict: TensorDictBase) -> Frame:
        """Draw the first environment of a step's tensordict."""
        image = import_optional("PIL.Image").new("RGB", (self.size, self.size), "white")
        pen = import_optional("PIL.ImageDraw").Draw(image)
        observation = tensordict.get(keys.OBSERVATION)
        observation = observation.reshape(-1, *observation.shape[-2:])[0].cpu()
        positions = observation[:, 2:4]
        obstacles = observation[0, 4 : 4 + 2 * self.num_obstacles].view(-1, 2) + positions[0]
        low, high = ((side + self.arena) * self.size / (2 * self.arena) for side in (-1, 1))
        pen.rectangle([low, low, high, high], outline=(200, 200, 200))
        for position in obstacles:
            self._disc(pen, position.tolist(), 0.2, (170, 170, 170))
        for index, position in enumerate(positions):
            if index < self.num_pursuers:
                self._disc(pen, position.tolist(), 0.075, (213, 94, 0))
            else:
                self._disc(pen, position.tolist(), 0.05, (0, 158, 115))
        return np.asarray(image, dtype=np.uint8)

    def _disc(self, pen: Any, position: list[float], radius: float, color: tuple[int, int, int]) -> None:
        scale = self.size / (2 * self.arena)
        x, y = (position[0] + self.arena) * scale, (self.arena - position[1]) * scale
        pen.ellipse([x - radius * scale, y - radius * scale, x + radius * scale, y + radius * scale], fill=color)
