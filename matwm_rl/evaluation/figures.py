"""Learning curves of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matwm_rl.evaluation.run_log import EVALUATION, read_metrics
from matwm_rl.files import import_optional

FIRST_TRAINING_PANELS = ("entropy", "imagined_reward", "value", "kl", "loss_")
"""Order of the panels of training metrics, by the beginning of their names; all others follow by name."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of Okabe and Ito, which colour-blind readers can tell apart."""


def plot_learning_curves(
    run_dirs: str | Path | Sequence[str | Path],
    path: str | Path,
    *,
    references: Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
) -> Any:
    """Draw every metric of a run over env steps: evaluation returns first, then the metrics of training.

    Returns named ``evaluation/<match>/<group>`` share one panel per match; each other metric has a panel of its own.

    Args:
        run_dirs: folder of a run, or its ``metrics.csv``; or those of several, each of which has a line of its own.
        path: file of the picture, for example ``curves.png``.
        references: horizontal lines for evaluation panels, as ``{match: {label: value}}``; matches that the run did not
            play are skipped. Metrics without a match, ``evaluation/<group>``, belong to the match ``"evaluation"``.
        title: title above all panels; by default the name of the run's folder.

    Returns:
        the matplotlib figure.

    Raises:
        FileNotFoundError: if the run has no metrics file.
        ValueError: if nothing has been logged.
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
    folders = [Path(run_dirs)] if isinstance(run_dirs, str | Path) else [*map(Path, run_dirs)]
    metrics: dict[str, list[tuple[int, float]]] = {}
    for folder in folders:
        for name, points in read_metrics(folder).items():
            # A gap in the line between one run and the next.
            metrics[name] = [*metrics[name], (points[0][0], math.nan), *points] if name in metrics else points
    if not metrics:
        raise ValueError(f"no metrics have been logged to {folders[0]} yet")
    references = references or {}
    panels = _panels(metrics)
    matches = _matches(metrics)
    figure, axes = panel_grid(len(panels))
    figure.suptitle(title or _run_name(folders[0]), fontsize=13)
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for index, (label, points) in enumerate(lines.items()):
            steps, values = zip(*points, strict=True)
            color, marker = COLORS[index % len(COLORS)], "o" if name in matches else None
            axis.plot(steps, values, color=color, label=label, marker=marker, markersize=3, linewidth=1.5)
        for index, (label, value) in enumerate(references.get(name, {}).items()):
            style = ("--", ":", "-.")[index % 3]
            axis.axhline(value, color="0.4", linestyle=style, linewidth=1, label=f"{label} ({value:g})")
        axis.set_title(readable(name), fontsize=10)
        axis.set_xlabel("env steps", fontsize=9)
        if name in matches:
            axis.set_ylabel("mean return", fontsize=9)
            _legend_above(axis)
        elif _spans_magnitudes([value for points in lines.values() for _, value in points]):
            axis.set_yscale("log")
    figure.savefig(path, dpi=120)
    return figure


def _legend_above(axis: Any) -> None:
    """Add a legend above the curves, where it hides none of them."""
    columns = 2
    rows = math.ceil(len(axis.get_legend_handles_labels()[0]) / columns)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.12 * (rows + 0.5) * (top - bottom))
    axis.legend(loc="upper center", ncols=columns, fontsize=7, frameon=False, columnspacing=1.0, handlelength=1.5)


def _spans_magnitudes(values: list[float]) -> bool:
    """Return whether a linear axis would show only the first, large values of a curve."""
    return min(values) > 0 and max(values) > 30 * min(values)


def _run_name(run_dir: Path) -> str:
    return (run_dir if run_dir.is_dir() else run_dir.parent).resolve().name


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


def readable(name: str) -> str:
    """Return a metric's name as a title: ``loss_reward`` becomes ``loss: reward``."""
    return name.replace("loss_", "loss: ").replace("_", " ")


def _panels(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each panel's lines, ``{title: {label: points}}``, in drawing order."""
    panels: dict[str, dict[str, Any]] = {match: {} for match in _matches(metrics)}
    for name, points in metrics.items():
        if name.startswith(EVALUATION):
            panels[_match(name)][name.rpartition("/")[2]] = points

    def order(name: str) -> tuple[int, str]:
        return next((i for i, start in enumerate(FIRST_TRAINING_PANELS) if name.startswith(start)), 99), name

    for name in sorted((name for name in metrics if not name.startswith(EVALUATION)), key=order):
        panels[name] = {name: metrics[name]}
    return panels


def _matches(metrics: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(_match(name) for name in metrics if name.startswith(EVALUATION)))


def _match(name: str) -> str:
    """Return the match of ``evaluation/<match>/<group>``, or ``"evaluation"`` for ``evaluation/<group>``."""
    return name.removeprefix(EVALUATION).rpartition("/")[0] or EVALUATION.rstrip("/")
