"""TorchRL's loggers by name: one run is one run, also when it is resumed, and nobody's random state changes.

TensorBoard's is tested with the log of a run. W&B and MLflow have stand-ins for their packages here: what is TorchRL's,
and ours, is real.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torchrl.record.loggers import mlflow as torchrl_mlflow
from torchrl.record.loggers import wandb as torchrl_wandb

from matwm_rl.evaluation import RunLog
from matwm_rl.evaluation.loggers import make_logger


def log_and_resume(run_dir: Path, logger: str) -> None:
    """Log up to step 30, and go on from step 20."""
    for resume_from, steps in ((None, (10, 20, 30)), (20, (30, 40))):
        with RunLog(run_dir, total_steps=40, resume_from=resume_from, progress=False, logger=logger) as log:
            for step in steps:
                log.log({"loss": step + (resume_from or 0), "evaluation/prey": 1.0}, step)


def test_csv_repeats_no_row(tmp_path: Path) -> None:
    log_and_resume(tmp_path, "csv")
    assert (tmp_path / "csv/scalars/loss.csv").read_text() == "10,10.0\n20,20.0\n30,50.0\n40,60.0\n"
    assert (tmp_path / "csv/scalars/evaluation/prey.csv").read_text() == "10,1.0\n20,1.0\n30,1.0\n40,1.0\n"


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    finished: list[str] = []

    def init(**given: Any) -> SimpleNamespace:
        run_id = given["id"] or "a1b2c3"
        started.append({**given, "id": run_id})
        (Path(given["dir"]) / "wandb" / f"offline-run-{len(started)}-{run_id}").mkdir(parents=True)
        config = SimpleNamespace(update=lambda *_, **__: None)
        actions = {"define_metric": lambda *_, **__: None, "finish": lambda: finished.append(run_id)}
        return SimpleNamespace(id=run_id, config=config, log=rows.append, **actions)

    package = ModuleType("wandb")
    package.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(torchrl_wandb, "_has_wandb", True)
    log_and_resume(tmp_path / "my-run", "wandb")
    assert [(run["name"], run["id"]) for run in started] == [("my-run", "a1b2c3")] * 2
    assert rows[0] == {"loss": 10, "step": 10, "evaluation/prey": 1.0, "evaluation/step": 10}, "one row for every step"
    assert len(rows) == 5 and finished == ["a1b2c3"] * 2


@pytest.mark.parametrize("server", [None, "http://localhost:5000"])
def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str | None) -> None:
    calls: list[tuple[str, Any]] = []

    def start_run(experiment_id: str) -> SimpleNamespace:
        given = os.environ.pop("MLFLOW_RUN_ID", None)
        calls.append(("start_run", given))
        return SimpleNamespace(info=SimpleNamespace(run_id=given or f"{random.random()}"))

    package = ModuleType("mlflow")
    for name in ("set_tracking_uri", "create_experiment", "set_tag", "set_experiment", "log_metrics", "end_run"):
        setattr(package, name, lambda *args, name=name, **kwargs: calls.append((name, args or kwargs)))
    package.get_experiment_by_name = lambda name: None  # type: ignore[attr-defined]
    package.start_run = start_run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setattr(torchrl_mlflow, "_has_mlflow", True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if server is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    before = random.getstate()
    log_and_resume(tmp_path / "my-run", "mlflow")
    assert random.getstate() == before, "a name for a run costs the training no random number"

    folder = tmp_path / "my-run" / "mlflow"
    uri = f"sqlite:///{folder / 'mlflow.db'}" if server is None else server
    assert [args for name, args in calls if name == "set_tracking_uri"] == [(uri,)] * 2
    assert ("set_tag", ("mlflow.runName", "my-run")) in calls
    first, second = (args for name, args in calls if name == "start_run")
    assert first is None and second == (folder / "run_id").read_text()
    assert len([name for name, _ in calls if name == "log_metrics"]) == 5
    assert len([name for name, _ in calls if name == "end_run"]) == 2, "each process ends what it has begun"


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"logger={package} needs .*: pip install {package}"):
        RunLog(tmp_path / "run", total_steps=1, progress=False, logger=package)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="logger must be 'tensorboard', 'csv', 'wandb' or 'mlflow', got 'tqdm'"):
        make_logger("tqdm", tmp_path)
