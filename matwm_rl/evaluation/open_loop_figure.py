"""A picture that compares imagined futures with real episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from matwm_rl import keys
from matwm_rl.arguments import check_ints
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import AgentLayout
from matwm_rl.evaluation.figures import COLORS, new_figure, plain
from matwm_rl.evaluation.open_loop import as_float, episode_windows, open_loop, open_loop_errors
from matwm_rl.evaluation.open_loop_panels import Scene, draw_entry, draw_errors, draw_reward, draw_teammates, legend_of
from matwm_rl.functional import agents_first, keep_random_state, segment_ids
from matwm_rl.modules import WorldModel

COLUMNS = 4
MAX_DEFAULT_AGENTS = 3
"""Of so many groups the first agent is drawn, unless the user says which."""
MAX_FRAMES = 10


def plot_open_loop(
    world_model: WorldModel,
    rollout: TensorDictBase,
    path: str | Path,
    *,
    layout: AgentLayout,
    agents: Sequence[int | str] | None = None,
    observation_names: Mapping[str, Sequence[str]] | None = None,
    context_length: int = 8,
    horizon: int = 10,
    num_samples: int = 6,
    num_dims: int = 4,
) -> Any:
    """Draw real episodes of some agents, and futures that the model imagines from each agent's real actions.

    Each agent has a part of its own. Its first panels show the entries of its vector observation that vary most; or
    images: real, reconstructed and imagined ones. The last four show the reward; the predicted probability of the
    action that each teammate then took, and that of a uniform guess; and how the errors of observations and rewards
    grow with the horizon, beside trivial predictors (:func:`open_loop_errors`).

    Images of one channel are grey, of three have colours. Of stacked frames, which move up by a frame in every step,
    the newest is drawn; channels that do not move are planes, each in a colour of its own.

    Args:
        world_model: the shared world model.
        rollout: one plain rollout ``[T]`` of one or several episodes. Of all windows that fit into an episode, the one
            is drawn in which the agents live longest; errors are means over all of them.
        path: file of the picture, for example ``imagination.png``.
        layout: layout of the environment, for names.
        agents: names or indices of the agents to draw; by default the first agent of each group, of three groups at
            most.
        observation_names: names of the entries of vector observations, ``{agent or group: names}``; those that
            :func:`~matwm_rl.evaluation.observation_names` finds, or the user's own.
        context_length: largest number of real steps before the first imagined one.
        horizon: largest number of imagined steps. Both are smaller where no episode is so long: the context takes at
            most half of the longest one.
        num_samples: number of imagined futures.
        num_dims: number of entries to draw of a vector observation.

    Returns:
        the matplotlib figure.

    Raises:
        ValueError: if the rollout is not ``[T]``, an agent does not exist, or there are names of something else than
            the agents' observations.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> rollout = env.rollout(12, break_when_any_done=False)
        >>> names = {"prey": ["step", "index", "last action"]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "imagination.png"
        ...     figure = plot_open_loop(
        ...         world_model, rollout, path, layout=env.layout, agents=["prey_0"], observation_names=names
        ...     )
        >>> [axis.get_title() for axis in figure.axes][:3]
        ['step', 'last action', 'index (constant)']
    """
    if rollout.ndim != 1 or not len(rollout):
        raise ValueError(f"plot_open_loop draws one rollout [T], got a batch of {tuple(rollout.shape)}")
    check_ints(0, context_length=context_length)
    check_ints(1, horizon=horizon, num_samples=num_samples, num_dims=num_dims)
    shown = _indices(agents, layout)
    names = _names_by_agent(observation_names or {}, layout)
    longest = int(segment_ids(rollout.get(keys.DONE).reshape(1, -1))[0].bincount().max())
    context_length = min(context_length, longest // 2)
    horizon = min(horizon, longest - context_length)
    scene = _imagine(world_model, rollout, layout, shown, context_length, horizon, num_samples)
    rows = [1 + _dim_rows(layout, agent, num_dims) for agent in shown]
    figure = new_figure(10.5, sum(2.0 * count + 0.6 for count in rows))
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=[2.0 * count + 0.6 for count in rows]).flat
    given = f"{context_length} real step{'s' * (context_length != 1)} given{'' if layout.is_image else ' (grey)'}"
    for part, agent in zip(parts, shown, strict=True):
        draw = _image_panels if layout.is_image else _vector_panels
        panels = draw(part, scene, agent, num_dims, names[agent])
        draw_reward(panels[0], scene, agent)
        if layout.is_image:
            legend_of(part, panels[0])
        draw_teammates(panels[1], scene, agent)
        draw_errors(panels[2], scene, agent, "observation", "last observation")
        draw_errors(panels[3], scene, agent, "reward", "best constant")
        title = f"{layout.agent_names[agent]}: {given}, {horizon} imagined from its real actions"
        part.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    return figure


def _indices(agents: Sequence[int | str] | None, layout: AgentLayout) -> list[int]:
    if agents is None:
        first = {group: index for index, group in reversed(list(enumerate(layout.group_index)))}
        return sorted(first.values())[:MAX_DEFAULT_AGENTS]
    if isinstance(agents, str) or not agents:
        raise ValueError(f"agents must be a list of names or indices of {layout.agent_names}, got {agents!r}")
    found = []
    for agent in agents:
        if isinstance(agent, str):
            if layout.agent_names.count(agent) != 1:
                raise ValueError(f"there is not one agent called {agent!r}; the agents are {layout.agent_names}")
            found.append(layout.agent_names.index(agent))
        else:
            check_ints(0, maximum=layout.num_agents - 1, agents=agent)
            found.append(agent)
    return found


def _names_by_agent(names: Mapping[str, Sequence[str]], layout: AgentLayout) -> list[Sequence[str]]:
    """Return the names of the entries of every agent's observation, none where nothing is known."""
    if unknown := names.keys() - {*layout.agent_names, *layout.group_map}:
        raise ValueError(
            f"observation_names has the entries {sorted(unknown)}, expected agents or groups of {layout.group_map}"
        )
    found: list[Sequence[str]] = []
    groups = list(layout.group_map)
    for agent, group, size in zip(layout.agent_names, layout.group_index, layout.observation_sizes, strict=True):
        own = names.get(agent, names.get(groups[group]))
        if own is not None and len(own) != size:
            raise ValueError(f"observation_names has {len(own)} names for {agent}, which observes {size} numbers")
        found.append(own or ())
    return found


@torch.no_grad()
def _imagine(
    world_model: WorldModel,
    rollout: TensorDictBase,
    layout: AgentLayout,
    shown: Sequence[int],
    context_length: int,
    horizon: int,
    num_samples: int,
) -> Scene:
    """Imagine from the window in which the agents to be drawn live longest, and measure errors on all windows."""
    windows = episode_windows(rollout, context_length + horizon)
    every = torch.ones_like(windows.get(keys.ACTION_MASK)[..., 0], dtype=torch.bool)
    lives = windows.get(keys.ALIVE, every)[..., shown].sum((1, 2))
    with keep_random_state(rollout.device):  # a run goes on in the same way whether it is drawn or not
        # The batch is the same window, once for every sample.
        window = add_agent_entries(windows[int(lives.argmax())]).expand(num_samples, context_length + horizon)
        result = open_loop(world_model, window, context_length=context_length, horizon=horizon)
        errors = open_loop_errors(world_model, windows, context_length=context_length, horizon=horizon)
        real = torch.cat([window[0][keys.OBSERVATION], window[0][keys.NEXT_OBSERVATION][-1:]])
        latent = world_model.encode(agents_first(real, world_model.observation_dims))
        decoded = world_model.decode(latent).movedim(0, 1)
    return Scene(layout, as_float(real).cpu(), decoded.cpu(), window[0].cpu(), result.cpu(), errors.cpu(), len(windows))


def _dim_rows(layout: AgentLayout, agent: int, num_dims: int) -> int:
    """Return the number of rows of panels that an agent's observation takes."""
    return 2 if layout.is_image else -(-min(num_dims, layout.observation_sizes[agent]) // COLUMNS)


def _axes(part: Any, rows: int) -> list[Any]:
    """Return the axes of all rows."""
    grid = part.add_gridspec(rows, COLUMNS)
    axes = [part.add_subplot(grid[row, column]) for row in range(rows) for column in range(COLUMNS)]
    for axis in axes:
        plain(axis)
        axis.tick_params(labelsize=7)
    return axes


def _vector_panels(part: Any, scene: Scene, agent: int, num_dims: int, names: Sequence[str]) -> list[Any]:
    """Draw entries of the observation, those that vary most first; return the axes of the other panels."""
    real = scene.real[scene.alive(agent), agent, : scene.layout.observation_sizes[agent]]
    spread = real.std(0, correction=0)
    order = spread.argsort(descending=True, stable=True)[:num_dims].tolist()
    changing = [dim for dim in order if spread[dim] > 1e-6 * real[:, dim].abs().max()]
    shown = [*sorted(changing), *sorted(set(order) - set(changing))]
    *axes, reward, teammates, observation_error, reward_error = _axes(
        part, 1 + _dim_rows(scene.layout, agent, num_dims)
    )
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, dim in zip(axes, shown, strict=False):
        draw_entry(axis, scene, agent, dim, names[dim] if names else f"observation {dim}")
    legend_of(part, axes[0])
    return [reward, teammates, observation_error, reward_error]


def _image_panels(part: Any, scene: Scene, agent: int, num_dims: int, names: Sequence[str]) -> list[Any]:
    """Draw rows of frames over the steps; return the axes of the other panels."""
    context, length = scene.context, len(scene.window)
    # Two of the given steps, then steps at equal distances over the horizon.
    given = list(range(max(context - 1, 0), context + 1))
    ahead = np.linspace(context, length, min(length - context, MAX_FRAMES - len(given)) + 1).round().astype(int)[1:]
    steps = [*given, *ahead.tolist()]
    imagined = scene.result["imagined", *keys.NEXT_OBSERVATION][:2, :, agent]
    real, decoded = scene.real[:, agent], scene.decoded[:, agent]
    rows = {"real": real[steps], "reconstructed": decoded[steps]}
    for index, future in enumerate(imagined):
        frames = [torch.ones_like(real[0]) if step <= context else future[step - context - 1] for step in steps]
        rows[f"imagined {index + 1}"] = torch.stack(frames)
    pictures = {name: paint(frames, real) for name, frames in rows.items()}
    for name in rows.keys() - {"real", "reconstructed"}:
        pictures[name][: len(given)] = 0.93  # of these, nothing was imagined
    framed = [pad(frames.clamp(0, 1), (1, 1, 1, 1), value=0.5) for frames in pictures.values()]
    mosaic = torch.cat([torch.cat(list(frames), -1) for frames in framed], -2)
    *above, reward, teammates, observation_error, reward_error = _axes(part, 3)
    for axis in above:
        axis.remove()
    axis = part.add_subplot(reward.get_gridspec()[:2, :])
    axis.imshow(mosaic.permute(1, 2, 0).numpy(), interpolation="nearest")
    size = framed[0].shape[-1]
    labels = [f"step {step}{' (given)' if step <= context else ''}" for step in steps]
    axis.set_xticks([size * (place + 0.5) for place in range(len(steps))], labels)
    axis.set_yticks([size * (place + 0.5) for place in range(len(framed))], list(pictures))
    axis.tick_params(length=0, labelsize=7)
    return [reward, teammates, observation_error, reward_error]


def paint(frames: Tensor, real: Tensor) -> Tensor:
    """Turn images ``[F, C, S, S]`` into colours ``[F, 3, S, S]``; ``real [T, C, S, S]`` tells what the channels are."""
    channels = frames.shape[1]
    for width in (3, 1):
        # In stacked frames, a step moves every frame up by one.
        if channels > width and channels % width == 0 and torch.equal(real[1:, :-width], real[:-1, width:]):
            frames, channels = frames[:, -width:], width
            break
    if channels in (1, 3):
        return frames.expand(-1, 3, -1, -1).clone()
    hues = [[int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)] for color in COLORS]
    colors = torch.tensor([hues[channel % len(hues)] for channel in range(channels)], dtype=frames.dtype)
    return (frames.unsqueeze(2) * colors.view(1, channels, 3, 1, 1)).amax(1)
