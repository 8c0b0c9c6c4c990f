"""TorchRL's loggers by name, in the folder of a run, also when the run is resumed."""

from __future__ import annotations

import importlib
import os
import random
from enum import StrEnum
from pathlib import Path

from torchrl.record.loggers import Logger, MLFlowLogger, get_logger

from matwm_rl.arguments import check_ints, read_choice
from matwm_rl.files import import_optional, write_text


class LoggerName(StrEnum):
    """Where scalars go besides ``metrics.csv``; the names are those of ``torchrl.record.loggers.get_logger``."""

    tensorboard = "tensorboard"
    csv = "csv"
    wandb = "wandb"
    mlflow = "mlflow"


def read_logger(name: LoggerName | str) -> LoggerName:
    """Return a logger's name, after making sure that its package is there.

    Raises:
        ValueError: if there is no such logger.
        ImportError: if its package is not installed; the message says how to install it.

    Examples:
        >>> read_logger("tensorbord")
        Traceback (most recent call last):
        ValueError: logger must be 'tensorboard', 'csv', 'wandb' or 'mlflow', got 'tensorbord'
    """
    logger = read_choice("logger", name, LoggerName)
    match logger:
        case LoggerName.tensorboard:
            import_optional("tensorboard")
        case LoggerName.wandb | LoggerName.mlflow:
            try:
                importlib.import_module(logger)
            except ImportError as error:
                message = f"logger={logger} needs the package {logger.value!r}: pip install {logger} ({error})"
                raise ImportError(message) from error
    return logger


def make_logger(name: LoggerName | str, run_dir: str | Path, *, resume_from: int | None = None) -> Logger:
    """Make one of TorchRL's loggers for a run.

    It writes to ``run_dir/NAME``, and is called like the run's folder. What it takes from the environment is its own
    affair: W&B's ``WANDB_MODE=offline`` and ``WANDB_PROJECT``, MLflow's ``MLFLOW_TRACKING_URI``, without which MLflow
    writes to ``run_dir/mlflow/mlflow.db``.

    Args:
        name: which one.
        run_dir: folder of the run, which must exist.
        resume_from: env steps at which the run resumes; ``None``: it is new. TensorBoard and CSV lose what was logged
            after them. W&B and MLflow go on with the same run and show these steps twice.

    Raises:
        ValueError: if there is no such logger.
        ImportError: if its package is not installed; the message says how to install it.

    Examples:
        >>> import tempfile
        >>> run_dir = tempfile.mkdtemp()
        >>> make_logger("csv", run_dir).log_scalar("kl", 0.5, step=10)
        >>> (Path(run_dir) / "csv" / "scalars" / "kl.csv").read_text().strip()
        '10,0.5'
    """
    logger, run_dir = read_logger(name), Path(run_dir).absolute()
    if resume_from is not None:
        check_ints(0, resume_from=resume_from)
    state = random.getstate()  # from which MLflow draws names for its runs
    try:
        return _make(logger, run_dir, resume_from)
    finally:
        random.setstate(state)


def _make(name: LoggerName, run_dir: Path, resume_from: int | None) -> Logger:
    match name:
        case LoggerName.tensorboard:
            logger = get_logger(name, str(run_dir), name)
            if resume_from is not None:
                _drop_events(logger, resume_from)
            return logger
        case LoggerName.csv:
            if resume_from is not None:
                _drop_rows(run_dir / name, resume_from)
            return get_logger(name, str(run_dir), name)
        case LoggerName.wandb:
            # W&B names its folders after its runs: wandb/run-DATE-ID, wandb/offline-run-DATE-ID.
            runs = [] if resume_from is None else sorted((run_dir / name).glob("*run-*-*"), key=os.path.getmtime)
            same = {"id": runs[-1].name.rpartition("-")[2]} if runs else {}
            return get_logger(name, str(run_dir), run_dir.name, wandb_kwargs=same)
        case LoggerName.mlflow:
            return _mlflow_logger(run_dir, resumes=resume_from is not None)


def _drop_events(logger: Logger, resume_from: int) -> None:
    """Have TensorBoard discard later steps of the interrupted run; TorchRL's logger has no argument for it."""
    event_pb2 = import_optional("tensorboard.compat.proto.event_pb2")
    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    logger.experiment.file_writer.add_event(event_pb2.Event(session_log=session), step=resume_from + 1)


def _drop_rows(folder: Path, resume_from: int) -> None:
    """Drop later rows ``step,value`` of the interrupted run; TorchRL's logger appends to its files."""
    for file in (folder / "scalars").rglob("*.csv"):
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(file, "".join(row for row in rows if row[-1] == "\n" and int(row.split(",")[0]) <= resume_from))


def _mlflow_logger(run_dir: Path, *, resumes: bool) -> Logger:
    # Not by get_logger, which gives MLflow a folder to write to: from 3.10 on, MLflow refuses folders.
    mlflow = importlib.import_module("mlflow")
    folder = run_dir / "mlflow"
    folder.mkdir(exist_ok=True)
    run_id = folder / "run_id"
    if resumes and run_id.exists():
        os.environ["MLFLOW_RUN_ID"] = run_id.read_text(encoding="utf-8")  # TorchRL's logger has no argument for it
    server = os.environ.get("MLFLOW_TRACKING_URI")
    logger: Logger = _MLflowLogger(
        "matwm_rl",
        server or f"sqlite:///{folder / 'mlflow.db'}",
        artifact_location=None if server else (folder / "artifacts").as_uri(),
    )
    mlflow.set_tag("mlflow.runName", run_dir.name)
    write_text(run_id, logger.experiment.info.run_id)
    return logger


class _MLflowLogger(MLFlowLogger):
    """TorchRL's logger does not end the run."""

    def shutdown(self, timeout: float | None = None) -> None:
        if self.is_alive:
            super().shutdown(timeout)
            importlib.import_module("mlflow").end_run()
