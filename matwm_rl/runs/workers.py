"""Runs of a sweep in parallel processes of Hydra's launchers: how they are named in the output, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

from matwm_rl.files import LOCK, import_optional, lock_folder

SECONDS_BETWEEN_LOOKS = 0.1


def parallel_run() -> str:
    """Return the name of this run's folder if other runs may go on at the same time; else an empty string.

    So it is in a sweep with any of Hydra's launchers but its own, which carries out one run after the other.
    """
    hydra = import_optional("hydra.core.hydra_config").HydraConfig
    if not hydra.initialized() or hydra.get().mode != import_optional("hydra.types").RunMode.MULTIRUN:
        return ""
    config = hydra.get()
    return "" if config.launcher["_target_"].endswith("BasicLauncher") else Path(config.runtime.output_dir).name


def is_orphan() -> bool:
    """Return whether this is a worker of a sweep whose main process is gone: killed, it cannot tell its workers.

    Ray ends such workers by itself; they are no processes of :mod:`multiprocessing`.
    """
    parent = multiprocessing.parent_process()
    return parent is not None and parent.pid != os.getppid() and bool(parallel_run())


def end_if_orphan(exit_code: int = 0) -> None:
    """End this process if its main process is gone: it would wait for ever to give its result to it."""
    if is_orphan():
        os._exit(exit_code)


def wait_for_other_runs(run_dir: Path, exit_code: int) -> None:
    """Let the other runs of the sweep end first, if this one is a worker's that a signal has stopped.

    joblib kills all workers when a signal has ended one of them. After Ctrl-C, the others may still be saving their
    checkpoints. A run holds a lock on its folder until it has ended.
    """
    if multiprocessing.parent_process() is None or not parallel_run():
        return
    others = [path.parent for path in run_dir.parent.glob(f"*/{LOCK}") if path.parent.name != run_dir.name]
    while any(map(_is_locked, others)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    end_if_orphan(exit_code)


def _is_locked(folder: Path) -> bool:
    try:
        with lock_folder(folder):
            return False
    except RuntimeError:
        return True
