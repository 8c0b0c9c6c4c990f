"""The time that a run still takes, by a clock that the test sets."""

from __future__ import annotations

import pytest

from matwm_rl.runs.time_left import NEWEST, TimeLeft


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def collect(left: TimeLeft, clock: Clock, steps: range, seconds: float) -> None:
    """Batches that take so many seconds each."""
    for env_steps in steps:
        clock.seconds += seconds
        left.measure(env_steps)


def test_it_follows_the_newest_batches(clock: Clock) -> None:
    left = TimeLeft(10_000, clock=clock)
    assert str(left) == "time left unknown yet"
    collect(left, clock, range(10, 110, 10), 1.0)
    assert str(left) == "0:16:30 left"  # 9,900 steps, ten in a second
    collect(left, clock, range(110, 110 + 10 * NEWEST, 10), 2.0)
    steps_left = 10_000 - (100 + 10 * NEWEST)
    assert str(left) == f"0:{2 * steps_left // 10 // 60}:{2 * steps_left // 10 % 60:02d} left"


def test_evaluations_are_no_part_of_the_speed_and_those_to_come_are_added(clock: Clock) -> None:
    left = TimeLeft(100, clock=clock)
    collect(left, clock, range(10, 30, 10), 1.0)
    with left.pause():
        clock.seconds += 1000.0
    collect(left, clock, range(30, 60, 10), 1.0)
    assert str(left) == "0:00:05 left"
    left.later, left.final = 20.0, 30.0
    assert str(left) == "0:00:55 left"


def test_a_limit_that_ends_the_run_is_what_is_left(clock: Clock) -> None:
    left = TimeLeft(1000, max_seconds=60.0, clock=clock)
    clock.seconds = 15.0
    assert str(left) == "at most 0:00:45 left"
    collect(left, clock, range(10, 30, 10), 1.0)
    assert str(left) == "0:00:43 left by max_minutes"
    collect(left, clock, range(800, 1000, 190), 1.0)
    assert str(left) == "0:00:00 left"


def test_the_steps_end_early_enough_for_what_comes_after_them(clock: Clock) -> None:
    left = TimeLeft(1000, max_seconds=60.0, clock=clock)
    left.final = 20.0
    clock.seconds = 39.0
    assert not left.is_up
    clock.seconds = 41.0
    assert left.is_up
    # However long that takes, half of the time is for learning.
    left.final = 1000.0
    clock.seconds = 29.0
    assert not left.is_up
    clock.seconds = 31.0
    assert left.is_up
    assert not TimeLeft(1000, clock=clock).is_up
