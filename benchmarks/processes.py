"""Processes that end with whoever began them, and a folder that one of them works in at a time.

Where the beginner is killed outright (SIGKILL), they go on; then the lock keeps others out.

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
"""Of what a failed process wrote, to be shown."""


def run_apart(command: Sequence[str], stop: Event) -> str:
    """Run a command in a process group of its own, of which nothing is left in the end.

    Args:
        command: what to run.
        stop: ends it when set.

    Returns:
        what it printed.

    Raises:
        RuntimeError: if it failed or was killed; tells how, and what it wrote last.
    """
    # Files, because nobody reads before the end, and a pipe fills up.
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
    """End in order on SIGTERM and SIGHUP too: what runs apart, in sessions of its own, would go on."""

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
    """Keep all others from training in a folder.

    Raises:
        RuntimeError: if another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which whoever holds it may clear.
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process trains in {folder}: wait until it has ended, or end it") from None
        # By the training script too, should it outlive this process.
        os.set_inheritable(lock.fileno(), True)
        yield
