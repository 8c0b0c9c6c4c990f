"""Runs of a sweep in several processes end together; a real sweep in two processes: tests/examples/test_train.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from matwm_rl.files import lock_folder
from matwm_rl.runs import sweep, training_run, workers
from tests.examples.helpers import run_script


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """This process as a worker of a sweep, with its main process as parent; the pid of the parent can be set."""
    parent = SimpleNamespace(pid=os.getppid())
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(workers, "parallel_run", lambda: "seed=0")
    return parent


def hold(folder: Path, ready: Callable[[], None], seconds: float) -> None:
    with lock_folder(folder):
        ready()
        time.sleep(seconds)


def test_a_stopped_run_waits_until_the_others_have_ended(tmp_path: Path, worker: SimpleNamespace) -> None:
    mine, other, ended = (tmp_path / f"seed={seed}" for seed in (0, 1, 2))
    for folder in (mine, ended):
        with lock_folder(folder):
            pass
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    process = context.Process(target=hold, args=(other, locked.set, 0.5))
    process.start()
    assert locked.wait(20)
    began = time.monotonic()
    workers.wait_for_other_runs(mine, 130)
    waited = time.monotonic() - began
    process.join(20)
    assert waited >= 0.3 and process.exitcode == 0


def test_a_run_that_is_alone_waits_for_nobody(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "seed=1"):
        workers.wait_for_other_runs(tmp_path / "seed=0", 130)
    assert not workers.parallel_run() and not workers.is_orphan()


def test_a_worker_without_its_main_process_saves_and_exits(
    tmp_path: Path, worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not workers.is_orphan()
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(training_run, "parallel_run", lambda: "seed=0")
    worker.pid += 1
    with pytest.raises(SystemExit) as end:
        run_script("train", "preset=tiny", "num_threads=1", f"run_dir={tmp_path}/run")
    assert end.value.code == 128 + signal.SIGTERM and codes == [end.value.code]
    assert "[seed=0] stopped by SIGTERM after 10 of 60 steps" in capsys.readouterr().out
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_main_process_leaves_the_first_ctrl_c_to_its_workers(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        sweep._let_workers_end()
        signal.raise_signal(signal.SIGINT)
        assert "save their checkpoints" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=sweep._let_workers_end)  # where Python handles no signals
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
