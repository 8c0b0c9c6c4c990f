"""Pictures of report.py: learning curves of all methods, and open-loop errors of MATWM's world model.

No script of its own: the report draws them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import colormaps
from matplotlib.ticker import FuncFormatter, NullLocator
from methods import METHODS, ModelFree
from protocol import ENVIRONMENTS
from results import Measure, Results, baselines, measures
from world_model_quality import HORIZONS, QUANTITIES

from matwm_rl.evaluation.figures import COLORS, panel_grid

OURS = {"color": COLORS[1], "linewidth": 2.4, "marker": "o", "markersize": 4.5, "zorder": 4}
BAND, FAINT_BAND = 0.25, 0.08
"""Opacity of the range over seeds, of MATWM and of all others."""
NOTE_HEIGHT = 0.09
"""Height of a line of text, as a share of the panel's height."""
REFERENCES = {"random": ":", "scripted": "--", "best model-free, 100K": "-."}
TITLES = {"observation": "observations", "reward": "rewards", "teammate": "teammates' actions"}
DPI = 130


def label(method: str) -> str:
    """Return a method's name in pictures and tables."""
    if method in REFERENCES:
        return method
    if isinstance(METHODS[method], ModelFree):
        return method.replace("_", ", ").upper()
    return method.replace("matwm_no_", "MATWM without ").replace("_", " ") if "_" in method else method.upper()


def digest(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of the runs, which is stored in every picture drawn from them."""
    return sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()


def draw_curves(results: Results, path: Path) -> Any | None:
    """Draw one panel per environment and measure, and one of the score over all environments.

    Returns:
        the matplotlib figure, or ``None`` if there is nothing to draw.
    """
    panels = [measure for environment in ENVIRONMENTS for measure in measures(environment)]
    # Environments with three panels come first, so that each fills a row.
    panels.sort(key=lambda measure: -len(measures(measure.environment)))
    panels = [measure for measure in panels if any(results.steps(measure.environment, name) for name in methods())]
    if not panels:
        return None
    steps = _common_steps(results)
    together = results.common_environments(steps) if steps else []
    figure, axes = panel_grid(len(panels) + bool(together), columns=3, width=3.7, height=2.6)
    for axis, measure in zip(axes, panels, strict=False):
        _draw_measure(axis, measure, results)
    if together:
        _draw_aggregate(axes[-1], results, together, steps)
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [label(name) for name in (*methods(), *REFERENCES) if label(name) in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=len(order), frameon=False)
    _save(figure, path, results)
    return figure


def _common_steps(results: Results) -> list[int]:
    """Return the env steps after which MATWM has figures in every environment that it was run in."""
    by_environment = [found for name in ENVIRONMENTS if (found := {*results.steps(name, "matwm")})]
    return sorted(set.intersection(*by_environment)) if by_environment else []


def methods() -> list[str]:
    """Return the methods that have curves."""
    return ["matwm", *baselines()]


def _look(method: str) -> dict[str, Any]:
    if method == "matwm":
        return OURS
    index, colors = baselines().index(method), [color for color in COLORS if color != OURS["color"]]
    # Markers too, for readers who cannot tell the colours apart.
    shape = {"marker": "s^vDP"[index % 5], "markersize": 3.5}
    return {"color": colors[index % len(colors)], "linewidth": 1.2, "zorder": 3, **shape}


def _draw_measure(axis: Any, measure: Measure, results: Results) -> None:
    seen: list[float] = []
    for method in reversed(methods()):
        steps = results.steps(measure.environment, method)
        by_step = {step: [*values.values()] for step in steps if (values := results.measured(measure, method, step))}
        points = {step: (median(values), min(values), max(values)) for step, values in by_step.items()}
        if points:
            _draw_line(axis, method, points)
        seen += [value for values in by_step.values() for value in values]
    for reference, style in REFERENCES.items():
        if reference in METHODS:
            values = results.measured(measure, reference, 0)
            value = median(values.values()) if values else None
        else:
            value = results.best_long(measure)
        if value is not None and seen:
            _draw_reference(axis, reference, style, value, min(seen), max(seen))
    axis.set_title(f"{measure.environment}\n{measure.title}", fontsize=9.5)
    whose = "pursuers' mean return" if "simple_tag" in measure.environment else "mean return"
    _label(axis, "return (lower is better)" if measure.lower_is_better else whose)


def _draw_line(axis: Any, method: str, points: Mapping[int, tuple[float, float | None, float | None]]) -> None:
    """Draw ``{env steps: (middle, low, high)}`` as line and band."""
    look = _look(method)
    axis.plot([*points], [middle for middle, _, _ in points.values()], label=label(method), **look)
    band = {step: (low, high) for step, (_, low, high) in points.items() if low is not None}
    if band:
        opacity = BAND if method == "matwm" else FAINT_BAND
        lows, highs = zip(*band.values(), strict=True)
        axis.fill_between(
            [*band], lows, highs, color=look["color"], alpha=opacity, linewidth=0, zorder=look["zorder"] - 2
        )


def _draw_reference(axis: Any, name: str, style: str, value: float, low: float, high: float) -> None:
    """Draw a horizontal line, or a note at the edge if the line would flatten the curves."""
    room = 1.5 * max(high - low, 1e-6)
    if low - room <= value <= high + room:
        axis.axhline(value, color="0.35", linestyle=style, linewidth=1.2, label=label(name), zorder=2)
        return
    above = value > high
    text = f"{label(name)} {value:.4g} {'↑' if above else '↓'}"
    place = {"y": 0.98 if above else 0.02, "va": "top" if above else "bottom"}
    # Make room for the note, so that it covers no curve.
    bottom, top = axis.get_ylim()
    line = NOTE_HEIGHT * (top - bottom)
    axis.set_ylim(bottom if above else bottom - line, top + line if above else top)
    axis.text(0.02, s=text, ha="left", transform=axis.transAxes, fontsize=8, color="0.35", **place)


def _draw_aggregate(axis: Any, results: Results, environments: Sequence[str], steps: Sequence[int]) -> None:
    for method in reversed(methods()):
        aggregates = {step: results.aggregate(environments, method, step) for step in steps}
        found = {step: aggregate for step, aggregate in aggregates.items() if aggregate is not None}
        if found:
            _draw_line(axis, method, found)
    axis.axhline(0.0, color="0.35", linestyle=REFERENCES["random"], linewidth=1.2, zorder=2)
    names = f"{len(environments)} environments together" if len(environments) > 1 else environments[0]
    axis.set_title(f"{names}\ninterquartile mean, 95% interval", fontsize=9.5)
    _label(axis, "score (1: model-free, 100K)")


def _label(axis: Any, name: str) -> None:
    axis.set_ylabel(name, fontsize=9)
    axis.set_xlabel("env steps", fontsize=9)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}K" if value else "0"))


def draw_world_model(results: Results, path: Path) -> Any | None:
    """Draw open-loop error over the trivial predictor's against the horizon, one line per stage of training.

    Returns:
        the matplotlib figure, or ``None`` if there is nothing to draw.
    """
    panels = {
        (environment, quantity): lines
        for environment in ENVIRONMENTS
        for quantity in QUANTITIES
        if (lines := _ratios(results, environment, quantity))
    }
    if not panels:
        return None
    stages = sorted({step for lines in panels.values() for step in lines})
    shades = colormaps["viridis_r"]
    colors = {step: shades(0.1 + 0.9 * index / max(1, len(stages) - 1)) for index, step in enumerate(stages)}
    figure, axes = panel_grid(len(panels), columns=len(QUANTITIES), width=3.7, height=2.1)
    for axis, ((environment, quantity), lines) in zip(axes, panels.items(), strict=True):
        axis.axhline(1.0, color="0.35", linestyle="--", linewidth=1.2, label="trivial predictor")
        for step, points in lines.items():
            middles = [median(values) for values in points.values()]
            name = f"after {step // 1000}K steps"
            axis.plot([*points], middles, color=colors[step], marker="o", markersize=4, linewidth=1.8, label=name)
        last = lines[max(lines)]
        bounds = [min(values) for values in last.values()], [max(values) for values in last.values()]
        axis.fill_between([*last], *bounds, color=colors[max(lines)], alpha=BAND, linewidth=0)
        axis.set_title(f"{environment}\n{TITLES[quantity]}", fontsize=9.5)
        axis.set_xlabel("steps ahead", fontsize=9)
        axis.set_xticks(HORIZONS)
        axis.set_ylabel("model / trivial", fontsize=9)
        _ratio_scale(axis)
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save(figure, path, results)
    return figure


def _ratios(results: Results, environment: str, quantity: str) -> dict[int, dict[int, list[float]]]:
    """Return ``{env steps: {steps ahead: each seed's error of the model over that of the trivial predictor}}``.

    There are none of teammates' continuous actions: the error is a negative log-density, which may be below 0.
    """
    lines: dict[int, dict[int, list[float]]] = {}
    if quantity == "teammate" and ENVIRONMENTS[environment].is_continuous:
        return lines
    for step in results.steps(environment, "matwm"):
        for horizon in HORIZONS:
            name = f"open_loop/{quantity}/{horizon}"
            model = results.get(environment, "matwm", step, name)
            trivial = results.get(environment, "matwm", step, f"{name}/trivial")
            if ratios := [model[seed] / trivial[seed] for seed in model if trivial.get(seed)]:
                lines.setdefault(step, {})[horizon] = ratios
    return lines


def _ratio_scale(axis: Any) -> None:
    """Make the axis logarithmic, since half and double are equally far from 1, with ticks as plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    low, high = min(low, 0.79), max(high, 1.26)
    coarse, fine = (0.01, 0.1, 1, 10, 100), (0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2)
    middling = (*coarse, 0.02, 0.05, 0.2, 0.5, 2, 5, 20, 50)
    # The coarsest ticks of which the axis shows more than three.
    ticks = next(t for t in (coarse, middling, fine) if t is fine or sum(low <= tick <= high for tick in t) > 3)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(low, high)


def _save(figure: Any, path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Description": digest(results.runs)})
