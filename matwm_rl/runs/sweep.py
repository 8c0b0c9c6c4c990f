"""What a sweep leaves: a table over its runs and seeds, and learning curves over seeds."""

from __future__ import annotations

import csv
import io
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from matwm_rl.evaluation import find_evaluation, plot_learning_curves
from matwm_rl.evaluation.run_log import SUMMARY_FILE
from matwm_rl.files import LOCK, import_optional, write_text
from matwm_rl.runs.workers import end_if_orphan, parallel_run

COLUMNS = ("run", "env", "seed", "env_steps", "updates", "minutes")
JOBLIB = "hydra_joblib_launcher"
ALL_SEEDS = "all seeds"
"""The setting of runs that differ in nothing but the seed."""


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep that has ended."""

    folder: Path
    summary: dict[str, Any]

    @property
    def setting(self) -> str:
        """What it has in common with the runs of other seeds."""
        parts = [part for part in self.folder.name.split(",") if not part.startswith("seed=")]
        return ",".join(parts) or ALL_SEEDS

    @property
    def row(self) -> dict[str, Any]:
        """Its line of the table."""
        summary = self.summary
        named = {name: summary[name] for name in ("env", "seed", "env_steps", "updates")}
        return {"run": self.folder.name, **named, "minutes": summary["wall_seconds"] / 60, **summary["evaluation"]}


def summarize_sweep(folder: str | Path, *, pictures: bool = True) -> str:
    """Write ``summary.md``, ``summary.csv`` and learning curves over seeds for the runs of a sweep that have ended.

    Runs that differ in nothing but the seed belong together. The table has a line for every run, and one with the
    median and the range over seeds. The picture is ``learning_curves.png``, or ``learning_curves-SETTING.png`` for each
    setting that the folders' names tell.

    Args:
        folder: of the sweep, with the folders of its runs.
        pictures: draw the learning curves.

    Returns:
        the table, as in ``summary.md``.

    Raises:
        FileNotFoundError: if no run there has ended.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for seed in (0, 1):
        ...     summary = {"env": "mock", "seed": seed, "env_steps": 60, "updates": 3, "wall_seconds": 30.0}
        ...     summary["evaluation"] = {"prey": 2.0 + seed}
        ...     (folder / f"seed={seed}").mkdir()
        ...     _ = (folder / f"seed={seed}" / "summary.json").write_text(json.dumps(summary))
        >>> print(summarize_sweep(folder, pictures=False).splitlines()[-1].split("|")[-2])
         2.5 (2.0 to 3.0)
    """
    folder = Path(folder)
    table, settings = _write_table(folder)
    for setting in settings if pictures else ():
        _draw(folder, setting, settings[setting])
    return table


def _write_table(folder: Path) -> tuple[str, dict[str, list[SweepRun]]]:
    """Write the tables; return the one that is shown, and the runs of each setting."""
    runs = list(_ended(folder))
    if not runs:
        raise FileNotFoundError(f"no run in {folder} has ended: expected folders with a {SUMMARY_FILE}")
    settings: dict[str, list[SweepRun]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    columns = list(dict.fromkeys([*COLUMNS, *(name for run in runs for name in run.row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.row for run in runs)
    write_text(folder / "summary.csv", text.getvalue())
    lines = [_line(columns), _line(["---"] * len(columns))]
    for setting, members in settings.items():
        lines += [_line([_text(run.row.get(name, "")) for name in columns]) for run in members]
        if len(members) > 1:
            lines.append(_line([_over_seeds(setting, name, members) for name in columns]))
    table = "\n".join(lines)
    several = "; below the runs of a setting, the median (and the range) over its seeds" if len(runs) > 1 else ""
    text_above = f"Mean returns of the final evaluation{several}."
    write_text(folder / "summary.md", f"# {folder.resolve().name}\n\n{text_above}\n\n{table}\n")
    return table, settings


def _draw(folder: Path, setting: str, members: Sequence[SweepRun]) -> None:
    name = "learning_curves" if setting == ALL_SEEDS else f"learning_curves-{setting}"
    references = find_evaluation(members[0].summary["env"]).references
    plot_learning_curves([run.folder for run in members], folder / f"{name}.png", references=references)


def make_callback() -> Any:
    """Return a callback for Hydra that summarizes a sweep after every run, and says at once which run has failed."""

    class SummarizeSweep(import_optional("hydra.experimental.callback").Callback):  # type: ignore[misc]
        def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
            if JOBLIB in config.hydra.launcher["_target_"]:
                _let_workers_end()

        def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
            if config.hydra.mode != import_optional("hydra.types").RunMode.MULTIRUN:
                return
            folder, run_dir = _folder(config), Path(config.hydra.runtime.output_dir)
            (folder / "multirun.yaml").unlink(missing_ok=True)  # every summary.json has the settings of its run
            _tell_failure(run_dir, job_return)
            # Now, and not when all have ended: Hydra calls nothing then if one of them has failed. And here, where the
            # run has registered its environment's evaluation, not in the main process.
            with _one_process_at_a_time(folder):
                _, settings = _write_table(folder) if list(_ended(folder)) else ("", {})
                for setting, members in settings.items():
                    if run_dir.name in [run.folder.name for run in members]:
                        _draw(folder, setting, members)
            end_if_orphan()

        def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
            if JOBLIB in config.hydra.launcher["_target_"] and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.default_int_handler)
            folder = _folder(config)
            if not list(_ended(folder)):
                return  # as with --help
            print(f"\n{_write_table(folder)[0]}\n")
            print(f"sweep in {folder}: summary.md, summary.csv, learning curves")

    return SummarizeSweep()


def _tell_failure(run_dir: Path, job_return: Any) -> None:
    try:
        _ = job_return.return_value
    except Exception as error:  # whatever the run raised
        print(f"the run in {run_dir} has failed; the others go on", file=sys.stderr)
        traceback.print_exception(error)
        if parallel_run():
            # On its way to the main process, an error loses its traceback; one that cannot be pickled ends all runs.
            job_return.return_value = RuntimeError(f"run {run_dir.name}: {type(error).__name__}: {error}")


def _let_workers_end() -> None:
    """Let the main process of a sweep ignore the first Ctrl-C.

    On a terminal all processes get the signal. The main process would kill the others before they have saved their
    checkpoints; it ends with them.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("the runs save their checkpoints and end; Ctrl-C again ends them at once", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, first)


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other processes that summarize this sweep, so that the last one to write has seen the runs of all."""
    with import_optional("filelock").FileLock(folder / LOCK):
        yield


def _folder(config: Any) -> Path:
    return Path(config.hydra.sweep.dir)


def _ended(folder: Path) -> Iterator[SweepRun]:
    for path in sorted(folder.glob(f"*/{SUMMARY_FILE}"), key=_by_number):
        yield SweepRun(path.parent, json.loads(path.read_text(encoding="utf-8")))


def _by_number(path: Path) -> list[tuple[float, str]]:
    """Sort ``seed=10`` after ``seed=9``."""
    values = [part.rpartition("=")[2] for part in path.parent.name.split(",")]
    return [(float(value), "") if value.isdecimal() else (0.0, value) for value in values]


def _over_seeds(setting: str, name: str, members: Sequence[SweepRun]) -> str:
    if name == "run":
        return f"**{setting}**"
    if name == "seed":
        return f"{len(members)} seeds"
    values = [run.row[name] for run in members if name in run.row]
    if not values or isinstance(values[0], str):
        return ""
    kind = type(values[0])  # keep integers as integers
    low, middle, high = (_text(kind(value)) for value in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _text(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
