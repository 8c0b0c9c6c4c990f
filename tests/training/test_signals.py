from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from matwm_rl.training.signals import fail_with_workers, stop_on_signal

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop and str(stop) == number.name and stop.exit_code == 128 + number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_thread_can_use_it_too() -> None:
    stopped: list[bool] = []

    def loop() -> None:
        with stop_on_signal() as stop, fail_with_workers():
            stopped.append(bool(stop))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert stopped == [False]


def sleeper() -> multiprocessing.Process:
    process = FORK.Process(target=time.sleep, args=(60,), name="collector 1")
    process.start()
    return process


def test_a_dead_worker_is_an_error_that_names_it() -> None:
    worker, other = sleeper(), sleeper()
    receiving, _sending = FORK.Pipe(duplex=False)
    killer = threading.Timer(0.2, worker.kill)
    began = time.monotonic()
    with (
        pytest.raises(RuntimeError, match=rf"'collector 1' \(pid {worker.pid}\) was ended by SIGKILL"),
        fail_with_workers(),
    ):
        killer.start()
        receiving.recv()  # never answered
    assert time.monotonic() - began < 30
    # The others are not left behind.
    other.join(5)
    assert other.exitcode == -signal.SIGKILL


class Slow:
    def __del__(self) -> None:
        # Python ignores what is raised here.
        time.sleep(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["handled", "finalizer"])
def test_an_error_that_is_swallowed_is_raised_all_the_same(where: str) -> None:
    """TorchRL logs what is raised while it waits for a worker to take new weights, and waits for the next worker."""
    worker = sleeper()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="was ended by SIGKILL"), fail_with_workers():
        threading.Timer(0.1, worker.kill).start()
        try:
            if where == "handled":
                time.sleep(1)
            else:
                Slow()
        except Exception:
            pass
        time.sleep(30)
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.alarm(0) == 0


def test_a_worker_that_fails_by_itself_is_an_error() -> None:
    worker = FORK.Process(target=os._exit, args=(3,))
    with pytest.raises(RuntimeError, match="exit code 3"):
        worker.start()
        with fail_with_workers():
            time.sleep(5)


def test_a_worker_that_ends_is_none() -> None:
    worker = FORK.Process(target=time.sleep, args=(0.1,))
    worker.start()
    with fail_with_workers():
        worker.join()
    assert worker.exitcode == 0
