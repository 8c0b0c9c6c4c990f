"""Animated pictures of played episodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type, step_mdp

from matwm_rl import keys
from matwm_rl.arguments import check_ints
from matwm_rl.envs import AgentLayout, render_frame
from matwm_rl.evaluation.returns import Returns
from matwm_rl.files import import_optional, new_file
from matwm_rl.functional import keep_random_state

Frame = NDArray[np.uint8]
LAST_FRAME = 5
"""How many times longer than the others the last frame of an episode is shown."""
SIDE = 320
"""Pixels. Larger pictures are reduced to this longer side; small ones are enlarged by a whole number up to it."""
MAX_FRAMES = 100
"""Of longer episodes only every second step is shown, or every third, and so on."""
MAX_COLORS = 64
LINE, TEXT_WIDTH = 15, 240
"""Height of a line of text and least width of all, in pixels."""
TEXT, EVENT, PAPER = (40, 40, 40), (190, 60, 0), (255, 255, 255)


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

    Below each picture stand the episode, the step, each group's mean return so far, and what happened in the step:
    large rewards, who is out, and how the episode ended. Rewards and penalties are large from half of the greatest of
    these episodes on. Rewards that differ at every step, such as distances, are not shown as events.

    Files are small: pictures have at most 320 pixels a side and 64 colours, and of an episode of more than 100 steps
    every second, third, ... step is shown.

    torch's global random state is what it was before.

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
    import_optional("PIL.Image")
    if draw is None:
        # Fail before any episode is played if the environment cannot render.
        env.reset()
        render_frame(env)
    with keep_random_state(env.device), set_exploration_type(exploration):
        played = [_play(env, policy, max_steps, draw or (lambda _: render_frame(env))) for _ in range(episodes)]
    frames, durations = _all_frames(played, env.layout, round(1000 / fps))
    with new_file(path) as partial:
        frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return [torch.stack(episode.rewards).sum(0).tolist() for episode in played]


@dataclass
class Episode:
    """An episode of T steps: a picture of every state, the last included, rewards, and who was alive."""

    pictures: list[Frame]
    rewards: list[Tensor] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)
    end: str = ""


def _play(
    env: EnvBase, policy: TensorDictModuleBase, max_steps: int, draw: Callable[[TensorDictBase], Frame]
) -> Episode:
    tensordict = env.reset()
    # Reduced at once: hundreds of large pictures are a gigabyte.
    episode = Episode([fitted(draw(tensordict))], alive=[_alive(tensordict)], end=f"cut off after {max_steps} steps")
    for _ in range(max_steps):
        step = env.step(policy(tensordict))
        episode.rewards.append(step.get(keys.REWARD).flatten().cpu())
        tensordict = step_mdp(step)
        episode.pictures.append(fitted(draw(tensordict)))
        episode.alive.append(_alive(tensordict))
        if bool(step.get(keys.DONE).all()):
            episode.end = "terminated" if bool(step.get(keys.TERMINATED).all()) else "time limit"
            break
    return episode


def _alive(tensordict: TensorDictBase) -> Tensor:
    agents = tensordict.get(keys.ACTION_MASK).shape[-2]
    return tensordict.get(keys.ALIVE, torch.ones(agents, dtype=torch.bool)).reshape(agents).cpu()


def _all_frames(played: list[Episode], layout: AgentLayout, milliseconds: int) -> tuple[list[Any], list[int]]:
    """Return all frames with their texts, in colours that all share, and how many milliseconds each is shown."""
    rewards = torch.stack([reward for episode in played for reward in episode.rewards])
    large = large_from(rewards), large_from(-rewards)
    frames: list[Any] = []
    durations: list[int] = []
    for number, episode in enumerate(played):
        length = len(episode.rewards)
        every = -(-length // MAX_FRAMES)
        shown = sorted({*range(0, length, every), length})
        texts = [f"episode {number + 1} of {len(played)}"] if len(played) > 1 else []
        for before, step in zip([-1, *shown[:-1]], shown, strict=True):
            happened = [event for t in range(before + 1, step + 1) for event in events(episode, t, large, layout)]
            lines = [" · ".join([*texts, f"step {step}"]), _returns(episode.rewards[:step], layout)]
            frames.append(captioned(episode.pictures[step], lines, ", ".join(dict.fromkeys(happened))))
            durations.append(milliseconds)
        # The last picture is shown longer, so that the end of the episode is visible.
        durations[-1] = LAST_FRAME * milliseconds
    return _few_colors(frames), durations


def large_from(rewards: Tensor) -> float:
    """Return from where on a positive reward is an event."""
    of_step = rewards.amax(-1)  # agents often share a reward
    least = float(of_step.amax()) / 2
    found = of_step[of_step >= least] if least > 0 else of_step[:0]
    sizes = {f"{reward:.2g}" for reward in found.tolist()}
    return least if found.numel() and len(sizes) <= max(3, len(found) // 5) else math.inf


def _returns(rewards: list[Tensor], layout: AgentLayout) -> str:
    """Return the text of each group's mean return so far."""
    total = sum(rewards, torch.zeros(layout.num_agents))
    means = Returns(total.unsqueeze(0), layout).per_group()
    return f"return: {', '.join(f'{group} {mean:.1f}' for group, mean in means.items())}"


def events(episode: Episode, step: int, large: tuple[float, float], layout: AgentLayout) -> list[str]:
    """Return what happened in the step that led to state ``step``: large rewards, deaths, the end."""
    if step == 0:
        return []
    events = []
    of_groups = episode.rewards[step - 1].split([len(names) for names in layout.group_map.values()])
    for group, own in zip(layout.group_map, of_groups, strict=True):
        highest, lowest = float(own.max()), float(own.min())
        if highest >= large[0]:
            events.append(f"{group} {highest:+.3g}")
        if -lowest >= large[1]:
            events.append(f"{group} {lowest:+.3g}")
    died = (episode.alive[step - 1] & ~episode.alive[step]).tolist()
    events += [f"{name} is out" for name, out in zip(layout.agent_names, died, strict=True) if out]
    return [*events, f"end: {episode.end}"] if step == len(episode.rewards) else events


def fitted(picture: Frame) -> Frame:
    """Return the picture in the size in which it is shown; see :data:`SIDE`."""
    image_module = import_optional("PIL.Image")
    image = image_module.fromarray(picture).convert("RGB")
    longer = max(image.size)
    if longer > SIDE:
        image = image.resize([max(1, round(side * SIDE / longer)) for side in image.size], image_module.Resampling.BOX)
    elif longer <= SIDE // 2:
        scale = SIDE // longer
        image = image.resize([side * scale for side in image.size], image_module.Resampling.NEAREST)
    return np.asarray(image)


def captioned(picture: Frame, lines: list[str], event: str) -> Any:
    """Return the picture with lines of text below."""
    image_module, font_module = import_optional("PIL.Image"), import_optional("PIL.ImageFont")
    image = image_module.fromarray(picture)
    width, height = max(image.width, TEXT_WIDTH), image.height + LINE * (len(lines) + 1) + 4
    canvas = image_module.new("RGB", (width, height), PAPER)
    canvas.paste(image, ((width - image.width) // 2, 0))
    pen = import_optional("PIL.ImageDraw").Draw(canvas)
    font = font_module.load_default(size=12)
    for place, (text, color) in enumerate([*((line, TEXT) for line in lines), (event, EVENT)]):
        while text and pen.textlength(text, font=font) > width - 8:
            text = text.rstrip("…")[:-1] + "…"
        pen.text((4, image.height + 2 + LINE * place), text, fill=color, font=font)
    return canvas


def mix(color: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Return a colour with a share of the paper's in it."""
    return tuple(round((1 - share) * part + share * paper) for part, paper in zip(color, PAPER, strict=True))


def _few_colors(frames: list[Any]) -> list[Any]:
    """Return the frames in colours that all have in common, so that the file holds only what changes."""
    image_module = import_optional("PIL.Image")
    sample = frames[:: -(-len(frames) // 20)]
    width, height = sample[0].size
    together = image_module.new("RGB", (width, height * len(sample)))
    for place, frame in enumerate(sample):
        together.paste(frame, (0, height * place))
    # Smooth letters have shades between their colour and the paper's.
    own = [mix(color, share / 4) for color in (TEXT, EVENT) for share in range(4)] + [PAPER]
    # An octree keeps colours of few pixels, such as those of small agents, which the median cut joins.
    quantized = together.quantize(MAX_COLORS - len(own), method=image_module.Quantize.FASTOCTREE).getpalette()
    found = [tuple(quantized[place : place + 3]) for place in range(0, len(quantized), 3)]
    # Pillow looks colours up roughly: one that is so near to white would be taken for it.
    found = [color for color in found if max(abs(a - b) for a, b in zip(color, PAPER, strict=True)) > 9]
    palette = image_module.new("P", (1, 1))
    palette.putpalette([part for color in (*own, *found) for part in color])
    return [frame.quantize(palette=palette, dither=image_module.Dither.NONE) for frame in frames]
