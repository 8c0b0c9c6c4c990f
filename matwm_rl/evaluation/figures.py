"""Learning curves of a run, or of several that differ in their seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matwm_rl.evaluation.run_log import EVALUATION, read_metrics
from matwm_rl.files import import_optional

FIRST_TRAINING_PANELS = ("entropy", "imagined_reward", "value", "kl", "loss_")
"""Order of the panels of training metrics, by the beginning of their names; all others follow by name."""
UNITS = {"entropy": "nats", "kl": "nats", "loss_teammate": "nats", "imagined_reward": "per step"}
"""Units of training metrics; all others have none, or that of the environment's rewards."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of Okabe and Ito, which colour-blind readers can tell apart."""
WIDTH = 9.2
"""Inches. On a page that is 800 to 900 pixels wide, texts of 8 points can still be read."""
ROUNDING = 1e-12
"""Differences that are smaller are none."""

Points = list[tuple[int, float]]


def plot_learning_curves(
    run_dirs: str | Path | Sequence[str | Path],
    path: str | Path,
    *,
    references: Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
) -> Any:
    """Draw every metric over env steps: evaluation returns first, then the metrics of training.

    Returns named ``evaluation/<match>/<group>`` share one panel per match; each other metric has a panel of its own.
    Of several runs, which should differ in their seeds only, a line shows the median and a band the range from the
    lowest to the highest, over the steps that all of them have reached. A metric that was logged once is a mark.

    Args:
        run_dirs: folder of a run, or its ``metrics.csv``; or several.
        path: file of the picture, for example ``curves.png``.
        references: horizontal lines for evaluation panels, as ``{match: {label: value}}``; matches that the run did not
            play are skipped. Metrics without a match, ``evaluation/<group>``, belong to the match ``"evaluation"``.
        title: title above all panels; by default the name of the run's folder, or of the folder of all runs.

    Returns:
        the matplotlib figure.

    Raises:
        FileNotFoundError: if a run has no metrics file.
        ValueError: if there is no run, or nothing has been logged to one.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.evaluation import RunLog
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     with RunLog(run_dir, total_steps=20, progress=False, logger=None) as log:
        ...         log.log({"evaluation/agent": 1.0, "loss_reward": 0.5}, env_steps=10)
        ...     figure = plot_learning_curves(run_dir, Path(run_dir) / "curves.png", title="a run")
        >>> [axis.get_title() for axis in figure.axes]
        ['evaluation', 'loss: reward']
    """
    folders = [Path(run_dirs)] if isinstance(run_dirs, str | Path) else [Path(run_dir) for run_dir in run_dirs]
    if not folders:
        raise ValueError("run_dirs names no run; expected the folder of a run, or several")
    runs = [read_metrics(folder) for folder in folders]
    if empty := [str(folder) for folder, metrics in zip(folders, runs, strict=True) if not metrics]:
        raise ValueError(f"no metrics have been logged to {', '.join(empty)} yet")
    names = list(dict.fromkeys(name for metrics in runs for name in metrics))
    curves = {name: _curve([metrics[name] for metrics in runs if name in metrics]) for name in names}
    last = max(step for metrics in runs for points in metrics.values() for step, _ in points)
    panels = _panels(names)
    matches = _matches(names)
    figure = _draw(panels, curves, matches, references or {}, max(last, 1))
    title = title or _common_name(folders)
    several = f": median of {len(runs)} runs, and from the lowest to the highest" if len(runs) > 1 else ""
    figure.suptitle(f"{title}{several}", fontsize=11)
    figure.savefig(path, dpi=120)
    return figure


@dataclass(frozen=True)
class _Curve:
    """A metric over steps; of several runs the median and the range."""

    steps: NDArray[np.float64]
    lowest: NDArray[np.float64]
    median: NDArray[np.float64]
    highest: NDArray[np.float64]
    connected: bool = True


def _curve(runs: Sequence[Points]) -> _Curve:
    """Join a metric's points ``(env steps, value)`` of every run."""
    finite = [{step: value for step, value in sorted(points) if math.isfinite(value)} for points in runs]
    finite = [points for points in finite if points]
    first, last = max(map(min, finite), default=0), min(map(max, finite), default=-1)
    # Runs that end by the clock end at different steps, and are only compared where all of them have been.
    steps = np.array(sorted({step for points in finite for step in points if first <= step <= last}), dtype=float)
    if not len(steps):
        # No step in common, as of runs that were each evaluated once, after unequal times: the points themselves.
        points = sorted((step, value) for points in finite for step, value in points.items())
        single, values = np.array(points, dtype=float).reshape(-1, 2).T
        return _Curve(single, values, values, values, connected=False)
    values = np.stack([np.interp(steps, list(points), list(points.values())) for points in finite])
    return _Curve(steps, values.min(0), np.median(values, 0), values.max(0))


def _draw(
    panels: Mapping[str, Mapping[str, str]],
    curves: Mapping[str, _Curve],
    matches: Sequence[str],
    references: Mapping[str, Mapping[str, float]],
    last: int,
) -> Any:
    """Draw large panels of returns above small ones of training metrics."""
    wide, small = min(2, len(matches)), 4
    rows = [math.ceil(len(matches) / wide) if matches else 0, math.ceil((len(panels) - len(matches)) / small)]
    heights = [2.4 * rows[0], 1.55 * rows[1]]
    figure = new_figure(WIDTH, sum(heights) + 0.4)
    parts = figure.subfigures(len(kept := [h for h in heights if h]), 1, height_ratios=kept, squeeze=False).flat
    parts = iter(parts)
    for titles, columns in ((matches, wide), ([name for name in panels if name not in matches], small)):
        if not titles:
            continue
        part = next(parts)
        for index, name in enumerate(titles):
            axis = part.add_subplot(math.ceil(len(titles) / columns), columns, index + 1)
            plain(axis)
            returns = name in matches
            for order, (label, metric) in enumerate(panels[name].items()):
                _draw_curve(axis, curves[metric], label, COLORS[order % len(COLORS)], marked=returns)
            for order, (label, value) in enumerate(references.get(name, {}).items() if returns else ()):
                style = ("--", ":", "-.")[order % 3]
                axis.axhline(value, color="0.4", linestyle=style, linewidth=1, label=f"{label} ({value:g})")
            _finish(axis, name, [curves[metric] for metric in panels[name].values()], returns=returns)
            axis.set_xlim(0, 1.02 * last)
    return figure


def _draw_curve(axis: Any, curve: _Curve, label: str, color: str, *, marked: bool) -> None:
    if (curve.lowest < curve.highest).any():
        if len(curve.steps) > 1:
            axis.fill_between(curve.steps, curve.lowest, curve.highest, color=color, alpha=0.2, linewidth=0)
        else:
            axis.vlines(curve.steps, curve.lowest, curve.highest, color=color, alpha=0.4, linewidth=3)
    # A line through one point is invisible.
    marker = "o" if marked or len(curve.steps) == 1 or not curve.connected else None
    style = "-" if curve.connected else "none"
    look = {"linestyle": style, "marker": marker, "markersize": 3.5, "linewidth": 1.5}
    axis.plot(curve.steps, curve.median, color=color, label=label, **look)


def _finish(axis: Any, name: str, curves: Sequence[_Curve], *, returns: bool) -> None:
    """Write titles, labels and a legend, and choose the scale."""
    axis.set_title(readable(name), fontsize=10 if returns else 8)
    axis.set_xlabel("env steps", fontsize=8 if returns else 7)
    axis.xaxis.set_major_formatter(import_optional("matplotlib.ticker").EngFormatter(sep=""))
    axis.xaxis.get_major_locator().set_params(nbins=6 if returns else 4)
    values = np.concatenate([[*curve.lowest, *curve.highest] for curve in curves])
    if not len(values):
        axis.text(0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", fontsize=8)
        return
    if returns:
        axis.set_ylabel("mean return of an agent", fontsize=8)
        _legend_above(axis)
        return
    axis.tick_params(labelsize=6.5)
    axis.set_ylabel(UNITS.get(name, ""), fontsize=7)
    if _spans_magnitudes(values):
        axis.set_yscale("log")
    else:
        widen_constant(axis, values)


def _legend_above(axis: Any) -> None:
    """Add a legend above the curves, where it hides none of them."""
    columns = 2
    rows = math.ceil(len(axis.get_legend_handles_labels()[0]) / columns)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.12 * (rows + 0.5) * (top - bottom))
    axis.legend(loc="upper center", ncols=columns, fontsize=7, frameon=False, columnspacing=1.0, handlelength=1.5)


def _spans_magnitudes(values: NDArray[np.float64]) -> bool:
    """Return whether a linear axis would show only the first, large values of a curve."""
    return bool(values.min() > 0 and values.max() > 30 * values.min())


def widen_constant(axis: Any, values: NDArray[np.float64]) -> bool:
    """Keep an axis from magnifying the rounding errors of what never changes; return whether that was so."""
    low, high = float(values.min()), float(values.max())
    largest = max(abs(low), abs(high))
    if high - low > max(1e-5 * largest, ROUNDING):
        return False
    margin = largest if largest > ROUNDING else 1.0
    bottom, top = axis.get_ylim()
    axis.set_ylim(min(bottom, low - margin), max(top, high + margin))
    return True


def _common_name(folders: Sequence[Path]) -> str:
    """Return the name of a run's folder, or of the folder that all runs have in common."""
    resolved = [(folder if folder.is_dir() else folder.parent).resolve() for folder in folders]
    return Path(os.path.commonpath(resolved)).name


def panel_grid(num_panels: int, *, columns: int = 4, width: float = 3.4, height: float = 2.5) -> tuple[Any, list[Any]]:
    """Return a matplotlib figure with ``num_panels`` equal panels in rows, and its axes in reading order."""
    columns = min(columns, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = new_figure(width * columns, height * rows + 0.4)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(num_panels)]
    for axis in axes:
        plain(axis)
    return figure, axes


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure; sizes are in inches."""
    # Figures of pyplot would need a screen, and change the user's backend and open figures.
    return import_optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def plain(axis: Any) -> None:
    """Style an axis as in all pictures of this package."""
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.yaxis.get_offset_text().set_fontsize(6.5)


def readable(name: str) -> str:
    """Return a metric's name as a title: ``loss_reward`` becomes ``loss: reward``."""
    return name.replace("loss_", "loss: ").replace("_", " ")


def _panels(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return each panel's lines, ``{title: {label: metric}}``, in drawing order."""
    panels: dict[str, dict[str, str]] = {match: {} for match in _matches(names)}
    for name in names:
        if name.startswith(EVALUATION):
            panels[_match(name)][name.rpartition("/")[2]] = name

    def order(name: str) -> tuple[int, str]:
        return next((i for i, start in enumerate(FIRST_TRAINING_PANELS) if name.startswith(start)), 99), name

    for name in sorted((name for name in names if not name.startswith(EVALUATION)), key=order):
        panels[name] = {name: name}
    return panels


def _matches(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(_match(name) for name in names if name.startswith(EVALUATION)))


def _match(name: str) -> str:
    """Return the match of ``evaluation/<match>/<group>``, or ``"evaluation"`` for ``evaluation/<group>``."""
    return name.removeprefix(EVALUATION).rpartition("/")[0] or EVALUATION.rstrip("/")
