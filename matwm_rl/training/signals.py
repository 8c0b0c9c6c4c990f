"""Signals: stop a loop between two updates, and raise an error when a worker process has died."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any


class StopRequest:
    """Whether the process was asked to stop; true from the first signal on.

    Attributes:
        exit_code: what shells expect of a process that a signal has ended: 128 plus the number of the signal.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self._signal is not None

    def __str__(self) -> str:
        return "nothing" if self._signal is None else self._signal.name

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, 0 if there was none."""
        return 0 if self._signal is None else 128 + self._signal.value

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal: the first one is remembered, the second interrupts at once.

        Raises:
            KeyboardInterrupt: at the second signal.
        """
        if self:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Let a loop end by itself when the process gets SIGINT (Ctrl-C) or SIGTERM; the second signal interrupts at once.

    A loop that looks at the request between two updates can save everything before it ends. In a thread that is not
    the main one, where Python handles no signals, the request stays false. The handlers of before are back at the end.

    Yields:
        the request, false until a signal arrives.

    Examples:
        >>> with stop_on_signal() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(bool(stop), stop, stop.exit_code)
        True SIGTERM 143
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _unwatch(before: Mapping[signal.Signals, Any]) -> None:
    """Restore the handlers that the signals had before."""
    if before:
        signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _WorkerDied(BaseException):
    """Raised by a signal's handler. No ``Exception``: TorchRL, which waits for a worker, logs those and waits on."""


def _check(processes: Sequence[BaseProcess], watches: bool, number: int, frame: FrameType | None) -> None:
    """Raise an error if a process has died; the handler of signals."""
    for process in processes:
        if process.exitcode:
            if watches:
                # Python ignores what is raised while a finalizer runs: raise it again.
                signal.alarm(1)
            raise _WorkerDied(_describe_end(process.name, process.pid, process.exitcode))


@contextmanager
def fail_with_workers(workers: Sequence[Any] | None = None) -> Iterator[None]:
    """Raise an error that names the worker when a worker dies, instead of waiting for it for ever.

    TorchRL's collectors in other processes wait without a limit for the answer of a worker, which never comes if the
    operating system has killed it. Enter this when the workers have been started. A worker that ends without an error
    is no reason to stop. When the block ends by an exception, Ctrl-C among them, the workers still running are
    killed, so that nothing is left behind and nothing waits for them. On Windows, which does not signal the end of a
    process, and in other threads than the main one, nothing is watched; nor are processes that a fork server started.

    Ray notices the death of an actor by itself: what waits for it fails. But where weights were being sent to it, the
    error is of a broken connection. It is replaced by one that names the actor.

    Args:
        workers: the processes, such as ``collector.procs``; or Ray actors, such as ``collector.remote_collectors``. By
            default all children of this process that run now.

    Raises:
        RuntimeError: names the worker and what ended it.

    Examples:
        >>> worker = multiprocessing.get_context("fork").Process(target=signal.pause, name="worker 3", daemon=True)
        >>> worker.start()
        >>> with fail_with_workers():
        ...     worker.kill()
        ...     signal.pause()
        Traceback (most recent call last):
        RuntimeError: the process 'worker 3' (pid ...) was ended by SIGKILL...
    """
    workers = multiprocessing.active_children() if workers is None else list(workers)
    processes = [worker for worker in workers if isinstance(worker, BaseProcess)]
    actors = [worker for worker in workers if not isinstance(worker, BaseProcess)]

    watches = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread() and not actors
    check = partial(_check, processes, watches)
    before = {number: signal.signal(number, check) for number in (signal.SIGCHLD, signal.SIGALRM)} if watches else {}
    try:
        # One of those given may have died before.
        check(0, None)
        yield
    except BaseException as error:
        _unwatch(before)
        death = str(error) if isinstance(error, _WorkerDied) else _death_of_actor(actors, error)
        for process in processes:
            process.kill()
        _kill_actors(actors)
        if death is not None:
            raise RuntimeError(death) from error
        raise
    finally:
        _unwatch(before)


def _death_of_actor(actors: Sequence[Any], error: BaseException) -> str | None:
    """Return what Ray says about a dead actor, if the error may come from its death; else ``None``."""
    if not actors:
        return None
    import ray

    if isinstance(error, ray.exceptions.RayActorError):
        return _describe_actor(error)
    # A broken connection is a RuntimeError. Others say what is wrong.
    if isinstance(error, RuntimeError) and ray.is_initialized():
        answers = [actor.__ray_ready__.remote() for actor in actors]
        # One that is at work answers later.
        for answer in ray.wait(answers, num_returns=len(answers), timeout=10)[0]:
            try:
                ray.get(answer)
            except ray.exceptions.RayActorError as death:
                return _describe_actor(death)
    return None


def _kill_actors(actors: Sequence[Any]) -> None:
    if actors:
        import ray

        for actor in actors if ray.is_initialized() else ():
            ray.kill(actor)


def _describe_actor(death: Exception) -> str:
    return f"a worker on the Ray cluster has died: resume from the last checkpoint. {' '.join(str(death).split())}"


def _describe_end(name: str, pid: int | None, code: int) -> str:
    how = f"ended with exit code {code}"
    if code < 0:
        killed = -code == getattr(signal, "SIGKILL", None)
        how = (
            "was ended by SIGKILL (the system may have run out of memory)" if killed else f"was ended by signal {-code}"
        )
    return f"the process {name!r} (pid {pid}) {how}: its part of the data is lost; resume from the last checkpoint"
