"""A picture that compares imagined futures with a real episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from matwm_rl import keys
from matwm_rl.arguments import check_ints
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import AgentLayout
from matwm_rl.evaluation.figures import COLORS, new_figure, panel_grid, plain
from matwm_rl.evaluation.open_loop import as_float, open_loop
from matwm_rl.functional import agents_first
from matwm_rl.modules import WorldModel

REAL, IMAGINED = "black", COLORS[1]


def plot_open_loop(
    world_model: WorldModel,
    episode: TensorDictBase,
    path: str | Path,
    *,
    layout: AgentLayout,
    agent: int = 0,
    context_length: int = 8,
    horizon: int = 10,
    num_samples: int = 6,
    num_dims: int = 6,
) -> Any:
    """Draw a real episode of one agent, and futures that the model imagines from the agent's real actions.

    For vector observations, the panels show the entries that vary most over time; for images, strips of frames. The
    last two panels show the reward, and the predicted probability of the action that each teammate then took (dashed:
    a uniform guess).

    Args:
        world_model: the shared world model.
        episode: one plain rollout ``[T]`` with T >= context_length + horizon, ideally within one episode.
        path: file of the picture, for example ``imagination.png``.
        layout: layout of the environment, for names.
        agent: index of the focal agent.
        context_length: number of real steps before the first imagined one.
        horizon: number of imagined steps.
        num_samples: number of imagined futures.
        num_dims: number of entries to draw of a vector observation.

    Returns:
        the matplotlib figure.

    Raises:
        ValueError: if the episode is not ``[T]`` or too short, or the agent does not exist.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> episode = env.rollout(6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "imagination.png"
        ...     _ = plot_open_loop(world_model, episode, path, layout=env.layout, context_length=2, horizon=4)
        ...     path.exists()
        True
    """
    if episode.ndim != 1:
        raise ValueError(f"plot_open_loop draws one rollout [T], got a batch of {tuple(episode.shape)}")
    check_ints(0, maximum=layout.num_agents - 1, agent=agent)
    check_ints(0, context_length=context_length)
    check_ints(1, horizon=horizon, num_samples=num_samples, num_dims=num_dims)
    if len(episode) < context_length + horizon:
        raise ValueError(
            f"got an episode of {len(episode)} steps, expected context_length + horizon = {context_length} + {horizon}"
        )
    # The batch is the same window, once for every sample.
    window = add_agent_entries(episode[: context_length + horizon]).expand(num_samples, context_length + horizon)
    result = open_loop(world_model, window, context_length=context_length, horizon=horizon)
    real = as_float(torch.cat([window[0][keys.OBSERVATION], window[0][keys.NEXT_OBSERVATION][-1:]]))[:, agent]
    imagined = result["imagined", *keys.NEXT_OBSERVATION][:, :, agent].cpu()
    decoded = _decoded_context(world_model, window[0, : context_length + 1], agent)
    others = [name for index, name in enumerate(layout.agent_names) if index != agent]
    draw = _image_figure if layout.is_image else _vector_figure
    figure, reward_axis, teammate_axis = draw(real.cpu(), imagined, decoded, context_length, num_dims, layout, agent)
    _draw_reward(reward_axis, window[0], result, agent, context_length)
    _draw_teammates(teammate_axis, result, agent, context_length, others)
    figure.suptitle(
        f"{layout.agent_names[agent]}: {context_length} real steps, then {horizon} imagined steps that follow its real "
        "actions",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)
    return figure


@torch.no_grad()
def _decoded_context(world_model: WorldModel, context: TensorDictBase, agent: int) -> Tensor:
    """Return the reconstructions ``[C+1, *O]`` of the real observations, which show what the latents lose."""
    observation = agents_first(context.get(keys.OBSERVATION), world_model.observation_dims)
    return world_model.decode(world_model.encode(observation))[agent].cpu()


def _vector_figure(
    real: Tensor, imagined: Tensor, decoded: Tensor, context_length: int, num_dims: int, layout: AgentLayout, agent: int
) -> tuple[Any, Any, Any]:
    used = layout.observation_sizes[agent]
    shown = real[:, :used].std(0).argsort(descending=True)[:num_dims].sort().values.tolist()
    figure, axes = panel_grid(len(shown) + 2, columns=4, width=3.6, height=2.6)
    steps = range(context_length, context_length + imagined.shape[1] + 1)
    for axis, dim in zip(axes, shown, strict=False):
        axis.axvspan(0, context_length, color="0.93", linewidth=0)
        for index, sample in enumerate(imagined[..., dim]):
            # Every future starts from the reconstruction of the last real observation.
            values = [decoded[-1, dim].item(), *sample.tolist()]
            axis.plot(steps, values, color=IMAGINED, alpha=0.55, linewidth=1, label=None if index else "imagined")
        axis.plot(range(context_length + 1), decoded[:, dim].tolist(), ":", color=IMAGINED, label="reconstructed")
        axis.plot(real[:, dim].tolist(), color=REAL, linewidth=1.8, label="real")
        axis.set_title(f"observation {dim}", fontsize=10)
        _label_steps(axis)
    axes[0].legend(fontsize=7, frameon=False)
    return figure, axes[-2], axes[-1]


def _image_figure(
    real: Tensor, imagined: Tensor, decoded: Tensor, context_length: int, num_dims: int, layout: AgentLayout, agent: int
) -> tuple[Any, Any, Any]:
    """Draw strips of at most ten frames: the real ones, and up to three imagined futures.

    Images of three channels have colours; of others the last channel is drawn, which is the newest of stacked frames.
    """
    horizon, futures = imagined.shape[1], imagined[:3]
    # The last real frame, then frames at equal distances over the horizon.
    ahead = torch.linspace(0, horizon, min(horizon + 1, 10)).round().long().tolist()
    strips = [real[[context_length + k for k in ahead]]]
    strips += [torch.stack([decoded[-1] if k == 0 else future[k - 1] for k in ahead]) for future in futures]
    height = 1.15 * len(strips)
    figure = new_figure(11.5, height + 2.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[height, 2.0])
    pictures = figure.add_subplot(grid[0, :])
    strips = [strip if strip.shape[1] == 3 else strip[:, -1:].expand(-1, 3, -1, -1) for strip in strips]
    framed = [pad(strip.clamp(0, 1), (1, 1, 1, 1), value=0.5) for strip in strips]
    rows = torch.cat([torch.cat(list(strip), -1) for strip in framed], -2)
    pictures.imshow(rows.permute(1, 2, 0).numpy(), interpolation="nearest")
    size = framed[0].shape[-1]
    labels = [f"step {context_length + k}{'' if k else ' (given)'}" for k in ahead]
    pictures.set_xticks([size * (i + 0.5) for i in range(len(ahead))], labels)
    names = ["real", *(f"imagined {i + 1}" for i in range(len(futures)))]
    pictures.set_yticks([size * (i + 0.5) for i in range(len(strips))], names)
    pictures.tick_params(length=0, labelsize=8)
    below = [figure.add_subplot(grid[1, column]) for column in range(2)]
    for axis in below:
        plain(axis)
    return figure, below[0], below[1]


def _draw_reward(axis: Any, window: TensorDictBase, result: TensorDictBase, agent: int, context_length: int) -> None:
    imagined = result["imagined", *keys.REWARD][:, :, agent, 0].cpu()
    steps = list(range(context_length + 1, context_length + 1 + imagined.shape[1]))
    axis.axvspan(0, context_length, color="0.93", linewidth=0)
    for sample in imagined:
        axis.plot(steps, sample.tolist(), color=IMAGINED, alpha=0.35, linewidth=0.9)
    axis.plot(steps, imagined.mean(0).tolist(), color=IMAGINED, linewidth=2, label="imagined, mean")
    real = window.get(keys.REWARD)[:, agent, 0].tolist()
    axis.plot(range(1, len(real) + 1), real, color=REAL, linewidth=1.8, label="real")
    axis.set_title("reward", fontsize=10)
    _label_steps(axis)
    axis.legend(fontsize=7, frameon=False)


def _draw_teammates(axis: Any, result: TensorDictBase, agent: int, context_length: int, names: list[str]) -> None:
    """Draw the predicted probability, a mean over the futures, of the action that each teammate took."""
    logits = result["imagined", *keys.TEAMMATE_LOGITS][:, :, agent]
    if logits.shape[2] == 0:
        axis.set_title("no teammate predictor", fontsize=10)
        return
    action = result["real", *keys.TEAMMATE_ACTION][:, :, agent].unsqueeze(-1)
    probability = logits.softmax(-1).gather(-1, action).squeeze(-1).mean(0).cpu()
    steps = range(context_length, context_length + probability.shape[0])
    for index, name in enumerate(names):
        axis.plot(steps, probability[:, index].tolist(), color=COLORS[index % len(COLORS)], linewidth=1.5, label=name)
    axis.axhline(1 / logits.shape[-1], color="0.4", linestyle="--", linewidth=1, label="uniform guess")
    axis.set_ylim(0, 1)
    axis.set_title("predicted probability of teammates' actions", fontsize=10)
    _label_steps(axis)
    axis.legend(fontsize=7, frameon=False)


def _label_steps(axis: Any) -> None:
    axis.set_xlabel("step", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
