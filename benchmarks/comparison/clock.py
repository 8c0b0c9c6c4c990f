"""CPU seconds of a training, without the time that its evaluations take.

No script of its own: methods.py trains model-free methods by a :class:`Clock`, and starts MATWM's training script as
``python clock.py SCRIPT ARGUMENTS``, which writes the seconds of every kept policy into the folder of the run.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from matwm_rl.evaluation import Matches, find_evaluation, register_evaluation
from matwm_rl.files import write_text

SECONDS_FILE = "core_seconds.json"
"""In the folder of a run: seconds of the first, second, ... kept policy, as a list."""


class Clock:
    """Counts CPU seconds of this process from now on, apart from pauses."""

    def __init__(self) -> None:
        self._left_out = process_time()

    @property
    def seconds(self) -> float:
        return process_time() - self._left_out

    @contextmanager
    def pause(self) -> Iterator[None]:
        began = process_time()
        try:
            yield
        finally:
            self._left_out += process_time() - began


def note_seconds(env_name: str, run_dir: Path) -> None:
    """Have every evaluation in an environment note for which kept policy it is, and the seconds up to its beginning.

    Time begins after the first evaluation, that of untrained agents. A policy is kept once it has been evaluated.
    """
    evaluation = find_evaluation(env_name)
    clock = Clock()
    by_kept: dict[int, float] = {}

    def play(env: EnvBase, policy: TensorDictModuleBase, **how: Any) -> Matches:
        nonlocal clock
        first = not by_kept
        by_kept[len([*(run_dir / "policies").glob("*.pt")])] = clock.seconds
        write_text(run_dir / SECONDS_FILE, json.dumps([by_kept[index] for index in sorted(by_kept)]) + "\n")
        with clock.pause():
            matches = evaluation.play(env, policy, **how)
        if first:
            clock = Clock()
        return matches

    register_evaluation(env_name, replace(evaluation, play=play))


def noted_seconds(run_dir: Path, count: int) -> list[float] | list[None]:
    """Return the seconds of a run's ``count`` kept policies, each ``None`` if they were not noted."""
    path = run_dir / SECONDS_FILE
    seconds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return seconds if len(seconds) == count else [None] * count


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    given = dict(override.split("=", 1) for override in sys.argv[1:])
    note_seconds(given["env"], Path(given["run_dir"]))
    # As the interpreter would start it: its own folder comes first among those from which it imports.
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
