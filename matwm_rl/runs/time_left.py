"""How long a run still takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matwm_rl.evaluation.progress import clock_text

NEWEST = 200
"""Number of the newest batches whose time tells that of those to come."""


class TimeLeft:
    """Time that a run still takes, by the time of its newest batches, of its evaluations, and by its limit.

    Args:
        total_steps: env steps of the run.
        max_seconds: when the run ends at the latest; ``None``: no limit.
        clock: returns the time in seconds.

    Attributes:
        later: seconds of the evaluations between here and the last step.
        final: seconds between the last step and the end of the run: the final evaluation, the pictures.

    Examples:
        >>> now = iter([0.0, 1.0, 2.0, 3.0])
        >>> left = TimeLeft(100, clock=lambda: next(now))
        >>> left.measure(10), left.measure(20), str(left)
        (None, None, '0:00:08 left')
    """

    def __init__(
        self, total_steps: int, *, max_seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.later = self.final = 0.0
        self._total, self._limit, self._clock = total_steps, max_seconds, clock
        self._began, self._paused = clock(), 0.0
        self._batches: deque[tuple[float, int]] = deque(maxlen=NEWEST)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began

    @property
    def is_up(self) -> bool:
        """Whether the steps have to end for the run to end within its limit; at least half of it is for them."""
        return self._limit is not None and self.elapsed >= self._limit - min(self.final, self._limit / 2)

    def measure(self, env_steps: int) -> None:
        """Take the time of a batch that ended after so many env steps of the run."""
        self._batches.append((self._clock() - self._paused, env_steps))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out of the time of batches what happens in the block."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def __str__(self) -> str:
        limit = None if self._limit is None else self._limit - self.elapsed
        if len(self._batches) < 2:
            return "time left unknown yet" if limit is None else f"at most {clock_text(limit)} left"
        (first, steps_before), (last, steps) = self._batches[0], self._batches[-1]
        needed = (self._total - steps) * (last - first) / (steps - steps_before) + self.later + self.final
        if limit is not None and limit < needed:
            return f"{clock_text(limit)} left by max_minutes"
        return f"{clock_text(needed)} left"
