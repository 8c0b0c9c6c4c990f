"""Runs have processes of their own, which end with the grid; a folder is locked by one process at a time."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sample_efficiency as grid
from processes import exit_when_terminated

from tests.benchmarks.comparison.stubs import free, table, wait_for

SMALL_GRID = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(grid.__file__).parent)!r})
import sample_efficiency as grid
from matwm_rl.evaluation import RandomActions
from protocol import Environment

class Stub:
    only = num_seeds = None
    def steps(self, environment):
        return environment.total_steps
    def checkpoints(self, environment):
        return [5]
    def settings(self, environment):
        return {{}}
    def train(self, environment, seed, folder, on_checkpoint):
        if seed == 1:
            raise RuntimeError("the stub fails")
        if seed > 1:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], close_fds=False)
            folder.mkdir()
            if seed == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(120)
        on_checkpoint(5, RandomActions())

grid.SCRIPT = Path(__file__)
grid.METHODS = {{"stub": Stub()}}
grid.ENVIRONMENTS = {{"mock": Environment("mock", episodes=2, num_envs=2)}}
grid.main()
"""
"""Seed 0 is carried out, 1 fails, 2 is killed while it trains, others train for long."""


def start_apart(folder: Path, *seeds: int, jobs: int) -> subprocess.Popen[str]:
    """Start :data:`SMALL_GRID`, in which runs have processes of their own."""
    script = folder / "small_grid.py"
    script.write_text(SMALL_GRID, encoding="utf-8")
    command = [sys.executable, str(script), f"--results={folder}", f"--scratch={folder}", f"--jobs={jobs}"]
    command += ["--seeds", *map(str, seeds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trained(folder: Path) -> list[Path]:
    return [path for path in folder.glob("mock-stub-*") if path.is_dir()]


@pytest.mark.slow
def test_a_killed_run_loses_no_other_and_leaves_no_training(tmp_path: Path) -> None:
    process = start_apart(tmp_path, 0, 1, 2, jobs=2)
    out, errors = process.communicate()
    assert process.returncode == 1, out + errors
    assert "2 of 3 runs failed" in errors
    assert re.search(r"^mock-stub-0: \d+ s$", out, re.MULTILINE)
    assert re.search(r"^mock-stub-1 failed\nreturn code 1\nTraceback", out, re.MULTILINE)
    assert "\nRuntimeError: the stub fails\n" in out
    assert re.search(r"^mock-stub-2 failed\nkilled by SIGKILL$", out, re.MULTILINE)
    assert [(row["seed"], row["env_steps"]) for row in table(tmp_path)] == [("0", "5")] * 4
    (folder,) = trained(tmp_path)
    wait_for(lambda: free(folder), seconds=10)


@pytest.mark.slow
def test_nothing_goes_on_when_the_grid_is_terminated(tmp_path: Path) -> None:
    process = start_apart(tmp_path, 3, 4, jobs=1)
    try:
        wait_for(lambda: trained(tmp_path) or process.poll() is not None)
        (folder,) = trained(tmp_path)
        assert not free(folder)
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    wait_for(lambda: free(folder), seconds=10)
    assert trained(tmp_path) == [folder]


def test_a_terminal_that_closes_ends_the_grid_unless_that_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left, exit_when_terminated():
            assert callable(signal.getsignal(signal.SIGHUP))  # else what follows would end the tests
            signal.raise_signal(signal.SIGHUP)
        assert left.value.code == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with exit_when_terminated():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
