"""The log of a run: scalars in ``metrics.csv`` and one of TorchRL's loggers, progress on the screen, a summary."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.record.loggers import Logger

from matwm_rl.arguments import check_ints, check_switches
from matwm_rl.evaluation.loggers import LoggerName, make_logger, read_logger
from matwm_rl.evaluation.progress import Progress, Tell, make_progress
from matwm_rl.files import import_optional, remove_partial, write_text

METRICS_FILE = "metrics.csv"
SUMMARY_FILE = "summary.json"
EVALUATION = "evaluation/"
"""Prefix of the names of evaluation returns: ``evaluation/<match>/<group>`` or ``evaluation/<group>``."""
COLUMNS = ("env_steps", "name", "value")

Scalar = float | Tensor


class RunLog:
    """Log of a run: scalars to ``metrics.csv`` and one of TorchRL's loggers, progress to the screen.

    ``run_dir/metrics.csv`` is one tidy table with the columns ``env_steps, name, value``. It opens in a spreadsheet;
    ``pandas.read_csv(path).pivot(index="env_steps", columns="name", values="value")`` makes it wide. TorchRL's
    ``CSVLogger`` writes one file without header per scalar instead, and repeats rows after resuming.

    Args:
        run_dir: folder of the run; created if it does not exist.
        total_steps: env steps of the whole run.
        resume_from: env steps at which an interrupted run resumes. Rows beyond them are dropped, because the resumed
            run logs these steps again. ``None`` starts a new run.
        progress: show how far the run is: as a bar on a terminal (needs ``tqdm``), as a line every half minute where
            the output is a file.
        logger: name of one of TorchRL's loggers, which writes into ``run_dir`` too, see :func:`make_logger`; ``None``:
            none.
        loggers: further TorchRL loggers, for example one that is shared by several runs.
        shown: names of the metrics that are shown with the progress.
        time_left: returns a text about the time that the run still takes, such as ``"0:02:10 left"``.
        name: of the run, where several print to the same screen: it begins every line, and there is no bar.

    Attributes:
        evaluated: env steps whose evaluation is in the table already, when a run resumes.

    Raises:
        FileExistsError: if a new run is started in a folder that holds the metrics of another.
        ImportError: if a package is missing; the message says how to install it.

    Examples:
        >>> import tempfile
        >>> run_dir = tempfile.mkdtemp()
        >>> with RunLog(run_dir, total_steps=100, progress=False, logger=None) as log:
        ...     log.accumulate({"loss_reward": torch.tensor(1.0)})
        ...     log.accumulate({"loss_reward": torch.tensor(2.0)})
        ...     log.advance(10)
        ...     log.write(env_steps=10)
        >>> read_metrics(run_dir)
        {'loss_reward': [(10, 1.5)]}
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        resume_from: int | None = None,
        progress: bool,
        logger: LoggerName | str | None = LoggerName.tensorboard,
        loggers: Sequence[Logger] = (),
        shown: Sequence[str] = ("loss_reward", "kl", "entropy", "imagined_reward"),
        time_left: Callable[[], str] = lambda: "time left unknown",
        name: str = "",
    ) -> None:
        check_ints(1, total_steps=total_steps)
        check_switches(progress=progress)
        if resume_from is not None:
            check_ints(0, resume_from=resume_from)
        # Imported before anything is written, so that a missing package leaves no files behind.
        if progress:
            import_optional("tqdm")
        if logger is not None:
            logger = read_logger(logger)
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        remove_partial(self.run_dir)
        self._metrics_path = self.run_dir / METRICS_FILE
        self._start_metrics(resume_from)
        self.loggers: list[Logger] = [*loggers]
        self._own = None if logger is None else make_logger(logger, self.run_dir, resume_from=resume_from)
        if self._own is not None:
            self.loggers.append(self._own)
        self._shown = tuple(shown)
        self._progress = (
            make_progress(total_steps, resume_from or 0, time_left, alone=not name) if progress else Progress(time_left)
        )
        self._progress.name = name
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def _start_metrics(self, resume_from: int | None) -> None:
        rows: list[tuple[int, str, float]] = []
        self.evaluated: set[int] = set()
        if self._metrics_path.exists():
            if resume_from is None:
                raise FileExistsError(
                    f"{self._metrics_path} belongs to an earlier run: choose another run_dir, or resume that run"
                )
            rows = [row for row in _read_rows(self._metrics_path) if row[0] <= resume_from]
        self.evaluated = {row[0] for row in rows if row[1].startswith(EVALUATION)}
        lines = [",".join(COLUMNS), *(_line(*row) for row in rows)]
        write_text(self._metrics_path, "\n".join(lines) + "\n")

    def accumulate(self, metrics: Mapping[str, Scalar] | TensorDictBase) -> None:
        """Add one update's metrics to the averages that :meth:`write` will write.

        Values stay on their device, so that logging does not wait for a GPU.

        Args:
            metrics: value of every metric, by name; the mean is taken of a tensor with several elements.
        """
        for name, value in metrics.items():
            value = value.detach().float().mean() if isinstance(value, Tensor) else torch.tensor(float(value))
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def write(self, env_steps: int) -> None:
        """Write the means of the metrics accumulated since the last call, and reset them.

        Args:
            env_steps: env steps so far.

        Raises:
            FloatingPointError: if a loss is not finite. On a GPU the optimizers have skipped such updates, so the
                weights are good, but what made it will make more.
        """
        if not self._sums:
            return
        # One transfer for all metrics, because every transfer waits for the GPU.
        device = max((total.device for total in self._sums.values()), key=lambda device: device.type != "cpu")
        totals = torch.stack([total.to(device) for total in self._sums.values()]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, totals, strict=True)}
        self._sums, self._counts = {}, {}
        self.log(means, env_steps)
        if bad := {name: mean for name, mean in means.items() if name.startswith("loss_") and not math.isfinite(mean)}:
            raise FloatingPointError(
                f"losses up to env step {env_steps} are not finite: {bad}; go on from the last good checkpoint, with "
                "smaller learning rates, or look into the data and your own parts"
            )

    def log(self, metrics: Mapping[str, Scalar] | TensorDictBase, env_steps: int) -> None:
        """Write metrics at once, without averaging; names of an evaluation begin with ``evaluation/``.

        Args:
            metrics: value of every metric, by name; the mean is taken of a tensor with several elements.
            env_steps: env steps so far.

        Raises:
            ValueError: if a name contains a line break.
        """
        values = {
            name: float(value.float().mean() if isinstance(value, Tensor) else value) for name, value in metrics.items()
        }
        lines = [_line(env_steps, name, value) for name, value in values.items()]
        with self._metrics_path.open("a", encoding="utf-8", newline="") as file:
            file.write("".join(f"{line}\n" for line in lines))
        for logger in self.loggers:
            logger.log_metrics(values, step=env_steps)
        self._progress.figures |= {name: f"{values[name]:.3g}" for name in self._shown if name in values}

    def advance(self, num_steps: int, phase: str = "training") -> None:
        """Show that the run has advanced.

        Args:
            num_steps: new env steps.
            phase: what the run is doing.
        """
        self._progress.phase = phase
        self._progress.advance(num_steps)

    @contextmanager
    def task(self, name: str, unit: str) -> Iterator[Tell]:
        """Show how far something is that takes time and no env steps of the run, such as an evaluation.

        Args:
            name: what it is.
            unit: what is counted, in the singular.

        Yields:
            a function to call as ``tell(done, total, detail)``, where ``detail`` is a text.

        Examples:
            >>> import tempfile
            >>> with RunLog(tempfile.mkdtemp(), total_steps=20, progress=False, logger=None) as log:
            ...     with log.task("evaluation", "episode") as tell:
            ...         tell(1, 10, "of the first match")
        """
        with self._progress.task(name, unit) as tell:
            yield tell

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._progress.note(text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``run_dir/summary.json``, atomically replacing an older one.

        Args:
            summary: values by name, which may be nested. Tensors and NumPy numbers are converted, and numbers that are
                not finite become ``null``.

        Raises:
            TypeError: if a value is not a number, text, list or mapping.
        """
        write_text(self.run_dir / SUMMARY_FILE, json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n")

    def close(self) -> None:
        """Flush all loggers and close the bar; the loggers given to the constructor stay open."""
        for logger in self.loggers:
            logger.flush()
        if self._own is not None:
            self._own.close()
        self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read the metrics of a run.

    Args:
        run_dir: folder of a run, or its ``metrics.csv``.

    Returns:
        the values of every metric, as ``(env_steps, value)`` in the order in which they were written.

    Raises:
        FileNotFoundError: if the run has no metrics file.
        ValueError: if the file is not a table of metrics.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     with RunLog(run_dir, total_steps=20, progress=False, logger=None) as log:
        ...         log.log({"kl": 2.5}, env_steps=10)
        ...         log.log({"kl": 1.5}, env_steps=20)
        ...     read_metrics(run_dir)
        {'kl': [(10, 2.5), (20, 1.5)]}
    """
    path = Path(run_dir)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no metrics at {path}: expected the folder of a run, or its {METRICS_FILE}")
    metrics: dict[str, list[tuple[int, float]]] = {}
    for env_steps, name, value in _read_rows(path):
        metrics.setdefault(name, []).append((env_steps, value))
    return metrics


def _line(env_steps: int, name: str, value: float) -> str:
    if name.splitlines() != [name]:
        raise ValueError(f"the name of a metric must be one line, got {name!r}")
    if "," in name or '"' in name:
        name = '"' + name.replace('"', '""') + '"'
    return f"{env_steps},{name},{value:.7g}"


def _read_rows(path: Path) -> list[tuple[int, str, float]]:
    # The last line of a run that was killed while writing is incomplete, and its number may lack digits.
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    header, *rows = list(csv.reader(whole.splitlines())) or [[]]
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} should begin with the columns {','.join(COLUMNS)}, found {','.join(header)!r}")
    return [(int(env_steps), name, float(value)) for env_steps, name, value in rows]


def _plain(value: Any) -> Any:
    """Return a JSON value: numbers become Python's, and those that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
