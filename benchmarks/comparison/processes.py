"""Processes that end with their parent, and folders that are locked by one process at a time.

If the parent is killed outright (SIGKILL), they keep running; then the lock keeps others out.

A ``ProcessPoolExecutor`` does not serve: if one of its processes is killed, because memory ran out for one, all jobs of
the pool fail with ``BrokenProcessPool``, and what the processes have started themselves goes on.

No script of its own: sample_efficiency.py runs its grid with them.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event

LAST_LINES = 40
"""Lines of a failed process's errors that are shown."""


def run_apart(command: Sequence[str], stop: Event) -> str:
    """Run a command in a process group of its own, and kill the whole group in the end.

    Args:
        command: what to run.
        stop: ends it when set.

    Returns:
        its standard output.

    Raises:
        RuntimeError: if it failed or was killed; has the return code or signal, and the last lines of its errors.
    """
    # Files, because a pipe that is read only at the end would fill up.
    with TemporaryFile("w+", errors="replace") as output, TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            while process.poll() is None and not stop.wait(0.2):
                pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        for file in (output, errors):
            file.seek(0)
        if code:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"return code {code}"
            raise RuntimeError("\n".join([how, *errors.read().splitlines()[-LAST_LINES:]]))
        return output.read()


@contextmanager
def exit_when_terminated() -> Iterator[None]:
    """Raise ``SystemExit`` on SIGTERM and SIGHUP, so that processes in sessions of their own are ended too."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    # nohup ignores SIGHUP.
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder against training by other processes.

    Raises:
        RuntimeError: if another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not in the folder, whose holder may clear it.
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process trains in {folder}: wait until it has ended, or end it") from None
        # The training script inherits the lock, in case it outlives this process.
        os.set_inheritable(lock.fileno(), True)
        yield
