"""What a run shows while it goes on: a bar on a terminal, lines in a file, or notes alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from matwm_rl.files import import_optional

SECONDS_BETWEEN_LINES = 30.0
"""Least time between two lines of progress in a file. Results are written at once."""

Tell = Callable[[int, int, str], None]
"""Called as ``tell(done, total, detail)`` by a task that takes time, such as an evaluation."""


class Progress:
    """Progress of a run, which shows nothing; its subclasses do.

    Attributes:
        phase: what the run is doing: ``"random actions"``, ``"training"``.
        figures: the newest metrics, as text by name.
        time_left: text about the time that the run still takes.
        name: begins every line, where several runs print to the same screen.
    """

    def __init__(self, time_left: Callable[[], str]) -> None:
        self.phase = "training"
        self.figures: dict[str, str] = {}
        self.time_left = time_left
        self.name = ""

    def advance(self, num_steps: int) -> None:
        """Count env steps."""

    def note(self, text: str) -> None:
        """Print a line."""
        print(f"[{self.name}] {text}" if self.name else text, flush=True)

    @contextmanager
    def task(self, name: str, unit: str) -> Iterator[Tell]:
        """Show the progress of work that takes no env steps."""
        yield lambda done, total, detail: None

    def close(self) -> None:
        """Show nothing more."""


class Lines(Progress):
    """Lines of text, for files and pipes: when half a minute has passed, and notes at once."""

    def __init__(self, total: int, initial: int, time_left: Callable[[], str]) -> None:
        super().__init__(time_left)
        self._total, self._steps = total, initial
        self._began = self._last = time.monotonic()

    def advance(self, num_steps: int) -> None:
        """Print a line if it is time to."""
        self._steps += num_steps
        share = self._steps / self._total
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        self._say(
            lambda: (
                f"{self._steps:,} of {self._total:,} steps ({share:.0%}), {self.phase}, {self._elapsed()} elapsed, "
                f"{self.time_left()}{figures and ': '}{figures}"
            )
        )

    @contextmanager
    def task(self, name: str, unit: str) -> Iterator[Tell]:
        """Print lines while the task goes on, if it takes so long."""
        yield lambda done, total, detail: self._say(
            lambda: f"{name}: {done:,} of {total:,} {unit}s{detail and ', '}{detail}, {self._elapsed()} elapsed"
        )

    def _say(self, text: Callable[[], str]) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.note(text())

    def _elapsed(self) -> str:
        return clock_text(time.monotonic() - self._began)


class Bar(Progress):
    """A bar of tqdm, and a second one below it as long as a task goes on."""

    def __init__(self, total: int, initial: int, time_left: Callable[[], str]) -> None:
        super().__init__(time_left)
        tqdm = import_optional("tqdm").tqdm

        class RunBar(tqdm):  # type: ignore[misc, valid-type]
            @property
            def format_dict(self) -> dict[str, Any]:
                # tqdm's own estimate follows the speed of the last steps: it knows of no phase, evaluation or limit.
                return {**super().format_dict, "time_left": time_left()}

        self._tqdm = tqdm
        self._bar = RunBar(
            total=total,
            initial=initial,
            dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}, {time_left}{postfix}]",
        )

    def advance(self, num_steps: int) -> None:
        """Advance the bar."""
        self._bar.set_description(self.phase, refresh=False)
        self._bar.set_postfix(self.figures, refresh=False)
        self._bar.update(num_steps)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text)

    @contextmanager
    def task(self, name: str, unit: str) -> Iterator[Tell]:
        """Show a second bar, which disappears when the task is done."""
        shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + unit + "s [{elapsed}{postfix}]"
        bar: Any = None

        def tell(done: int, total: int, detail: str) -> None:
            nonlocal bar
            if bar is None:
                # miniters=0: the bar is also redrawn while no episode ends.
                kwargs = {"leave": False, "miniters": 0, "dynamic_ncols": True, "bar_format": shape}
                bar = self._tqdm(desc=name, total=total, postfix=detail, **kwargs)
            bar.total = total
            bar.set_postfix_str(detail, refresh=False)
            bar.update(done - bar.n)

        try:
            yield tell
        finally:
            if bar is not None:
                bar.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def make_progress(total: int, initial: int, time_left: Callable[[], str], *, alone: bool = True) -> Progress:
    """Return a progress bar if this run alone prints to a terminal; else lines of text."""
    return (Bar if alone and has_screen() else Lines)(total, initial, time_left)


def has_screen() -> bool:
    """Return whether the standard error is a terminal of some size; tqdm shows nothing on one of no lines."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except (OSError, ValueError):  # no file, or one that is closed
        return False


def clock_text(seconds: float) -> str:
    """Return a time as ``h:mm:ss``."""
    return str(timedelta(seconds=max(0, round(seconds))))
