"""The panels of :func:`~matwm_rl.evaluation.plot_open_loop`: an entry, the reward, teammates' actions, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from matwm_rl import keys
from matwm_rl.envs import AgentLayout
from matwm_rl.evaluation.figures import COLORS, widen_constant
from matwm_rl.evaluation.open_loop import still_running

REAL, IMAGINED, TRIVIAL = "black", COLORS[1], "0.45"
MAX_TEAMMATES = 6
"""Of more teammates than that, the mean and the range are drawn."""


@dataclass(frozen=True)
class Scene:
    """What is drawn, of all agents: T = C + H steps, the first C of them given."""

    layout: AgentLayout
    real: Tensor
    """``[T+1, N, *O]``"""
    decoded: Tensor
    """Reconstructions of the real observations, ``[T+1, N, *O]``."""
    window: TensorDictBase
    result: TensorDictBase
    errors: TensorDictBase
    num_windows: int

    @property
    def context(self) -> int:
        """C, the number of given steps."""
        return len(self.window) - self.result.shape[1]

    def alive(self, agent: int) -> Tensor:
        """Return in which of the T+1 observations the agent is alive."""
        first = torch.ones_like(self.window.get(keys.AGENT_DONE)[..., 0], dtype=torch.bool)
        before = self.window.get(keys.ALIVE, first)[:, agent]
        after = self.window.get(keys.NEXT_ALIVE, first)[:, agent]
        return torch.cat([before, after[-1:]])


def draw_entry(axis: Any, scene: Scene, agent: int, dim: int, name: str) -> None:
    """Draw an entry of an agent's observation: real, reconstructed, and imagined."""
    context, alive = scene.context, scene.alive(agent)
    real = scene.real[:, agent, dim].masked_fill(~alive, torch.nan)
    decoded = scene.decoded[: context + 1, agent, dim]
    imagined = scene.result["imagined", *keys.NEXT_OBSERVATION][:, :, agent, dim]
    # Every future starts from the reconstruction of the last real observation.
    imagined = torch.cat([decoded[-1].expand(len(imagined), 1), imagined], 1)
    imagined = imagined.masked_fill(~alive[context:], torch.nan)
    steps = range(context, context + imagined.shape[1])
    _time_axis(axis, scene)
    _draw_futures(axis, steps, imagined)
    axis.plot(range(context + 1), decoded.tolist(), ":", color=IMAGINED, label="reconstructed")
    axis.plot(real.tolist(), color=REAL, linewidth=1.5, label="real")
    constant = widen_constant(axis, real[alive].numpy())
    axis.set_title(f"{name} (constant)" if constant else name, fontsize=9)
    _mark_death(axis, alive)


def draw_reward(axis: Any, scene: Scene, agent: int) -> None:
    """Draw an agent's reward, real and imagined."""
    imagined = scene.result["imagined", *keys.REWARD][:, :, agent, 0]
    running = still_running(scene.result["real"])[0, :, agent]
    imagined = imagined.masked_fill(~running, torch.nan)
    steps = range(scene.context + 1, len(scene.window) + 1)
    _time_axis(axis, scene)
    _draw_futures(axis, steps, imagined)
    alive = scene.alive(agent)[:-1]
    real = scene.window.get(keys.REWARD)[:, agent, 0].masked_fill(~alive, torch.nan)
    axis.plot(range(1, len(real) + 1), real.tolist(), color=REAL, linewidth=1.5, label="real")
    constant = widen_constant(axis, real[alive].numpy())
    axis.set_title("reward (constant)" if constant else "reward", fontsize=9)
    _mark_death(axis, scene.alive(agent))


def _draw_futures(axis: Any, steps: range, imagined: Tensor) -> None:
    """Draw imagined futures ``[num_samples, len(steps)]``, and their mean."""
    for index, sample in enumerate(imagined):
        axis.plot(steps, sample.tolist(), color=IMAGINED, alpha=0.4, linewidth=0.8, label=None if index else "imagined")
    axis.plot(steps, imagined.mean(0).tolist(), color=IMAGINED, linewidth=2, label="imagined, mean")


def draw_teammates(axis: Any, scene: Scene, agent: int) -> None:
    """Draw the predicted probability, a mean over the futures, of the action that each teammate took.

    Continuous actions have densities in place of probabilities. What is drawn is the predicted density of the action
    divided by the density of a uniform guess, as a geometric mean over the numbers of the action.
    """
    logits = scene.result["imagined", *keys.TEAMMATE_LOGITS][:, :, agent]
    others = [index for index in range(scene.layout.num_agents) if index != agent]
    if logits.shape[2] == 0:
        axis.set_title("no teammate predictor" if others else "no teammates", fontsize=9)
        axis.set_axis_off()
        return
    real = scene.result["real"]
    actions, discrete = scene.layout.actions, scene.layout.actions.has_probs
    counts = [scene.layout.action_counts[other] for other in others]
    action = real[keys.TEAMMATE_ACTION][:, :, agent].expand(*logits.shape[:3], *actions.action_shape)
    probability = (-actions.negative_log_likelihood(logits, action)).exp().mean(0)
    if not discrete:
        probability = 2 * probability.pow(1 / torch.tensor(counts))
    there = still_running(real)[0, :, agent].unsqueeze(-1).expand_as(probability)
    if (alive := real.get(keys.TEAMMATE_ALIVE, None)) is not None:
        there = there & alive[0, :, agent]
    probability = probability.masked_fill(~there, torch.nan)
    steps = range(scene.context, scene.context + len(probability))
    if len(others) > MAX_TEAMMATES:
        low, high = probability.nan_to_num(torch.inf).amin(-1), probability.nan_to_num(-torch.inf).amax(-1)
        axis.fill_between(steps, low, high, where=there.any(-1), color=COLORS[0], alpha=0.2, linewidth=0)
        label = f"mean of {len(others)}, and range"
        axis.plot(steps, probability.nanmean(-1).tolist(), color=COLORS[0], linewidth=1.5, label=label)
    else:
        for place, other in enumerate(others):
            color, name = COLORS[place % len(COLORS)], scene.layout.agent_names[other]
            # A line through one point is invisible.
            look = {"color": color, "marker": "o" if there[:, place].sum() == 1 else None, "markersize": 3.5}
            axis.plot(steps, probability[:, place].tolist(), linewidth=1.5, label=name, **look)
    if discrete:
        # A teammate is guessed among the actions that it has; those of equal numbers share a line.
        for style, count in zip(("--", ":", "-.") * len(counts), sorted(set(counts)), strict=False):
            whose = [place for place, own in enumerate(counts) if own == count]
            color = COLORS[whose[0] % len(COLORS)] if len(whose) == 1 and len(others) > 1 else TRIVIAL
            axis.axhline(1 / count, color=color, linestyle=style, linewidth=1, label=f"guess among {count}")
        axis.set_ylim(0, 1.45)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    else:
        axis.axhline(1, color=TRIVIAL, linestyle="--", linewidth=1, label="uniform guess")
        axis.set_ylim(0, 1.45 * max(1.0, *probability.nan_to_num(0.0).flatten().tolist()))
    axis.set_title("teammates' actions", fontsize=9)
    axis.set_ylabel("predicted probability" if discrete else "density relative to uniform", fontsize=7)
    axis.legend(fontsize=6.5, frameon=False, loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.5)
    _time_axis(axis, scene)


def draw_errors(axis: Any, scene: Scene, agent: int, quantity: str, trivial: str) -> None:
    """Draw the error at every step ahead, and that of the trivial predictor."""
    horizon = scene.result.shape[1]
    largest = 0.0
    for source, label, color, style in (("model", "model", IMAGINED, "-"), ("trivial", trivial, TRIVIAL, "--")):
        error = scene.errors[source, quantity][:, agent].sqrt()
        marker = "o" if horizon == 1 else None
        axis.plot(range(1, horizon + 1), error.tolist(), style, color=color, linewidth=1.5, label=label, marker=marker)
        largest = max(largest, *error.nan_to_num(0.0).tolist())
    # No zoom into the rounding errors of what never changes.
    axis.set_ylim(0, 1.35 * largest if largest > 1e-6 else 1.0)
    axis.set_xlim(min(1, horizon - 1), horizon)
    axis.legend(fontsize=7, frameon=False, loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.5)
    axis.set_title(f"error of {quantity}s", fontsize=9)
    axis.set_ylabel(f"RMS of {scene.num_windows} window{'s' * (scene.num_windows > 1)}", fontsize=7)
    axis.set_xlabel("steps ahead", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if not scene.errors["count"][:, agent].any():
        axis.text(0.5, 0.5, "not alive", transform=axis.transAxes, ha="center", fontsize=7, color=TRIVIAL)


def legend_of(part: Any, axis: Any) -> None:
    """Explain above an agent's panels the lines that several of them have."""
    handles, labels = axis.get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=7, frameon=False)


def _time_axis(axis: Any, scene: Scene) -> None:
    """Show all steps, and in grey those that the model was given."""
    axis.axvspan(0, scene.context, color="0.93", linewidth=0)
    axis.set_xlim(0, len(scene.window))
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _mark_death(axis: Any, alive: Tensor) -> None:
    if not alive.all() and alive[0]:
        step = int(alive.long().argmin())
        axis.axvline(step, color=TRIVIAL, linestyle=":", linewidth=1)
        side = "right" if step > len(alive) / 2 else "left"
        where = axis.get_xaxis_transform()
        axis.text(step, 0.02, " not alive ", transform=where, ha=side, fontsize=7, color=TRIVIAL)
