"""Running an example in the tests' own process, which has imported everything already."""

from __future__ import annotations

import re
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 71
"""More than any of the short examples may have: a reader takes one in at a glance."""


def run_example(name: str, capsys: pytest.CaptureFixture[str], **sizes: Any) -> list[str]:
    """Call ``main`` of an example, with smaller sizes than its own, for the lines that it prints."""
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < LINES
    # What it would set is the whole process's, and there are other tests in this one.
    with patch("matwm_rl.training.prepare_process"):
        runpy.run_path(str(path))["main"](**sizes)
    # TorchRL logs to the same stream.
    return [line for line in capsys.readouterr().out.splitlines() if "[torchrl]" not in line]


def run_script(name: str, *words: str, pictures: bool = False) -> None:
    """Run a script as on the command line, from the folder of the tests; pictures take half the time of a tiny run."""
    script = str(EXAMPLES / f"{name}.py")
    # What it would set is the whole process's, and there are other tests in this one.
    changed = [
        patch("matwm_rl.training.prepare_process"),
        patch("matwm_rl.runs.pictures.PICTURED_STEPS", 40),
        patch.object(sys, "argv", [script, *words]),
        patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
        patch.dict(sys.modules),
        patch.dict("os.environ", HYDRA_FULL_ERROR="1"),
    ]
    if not pictures:
        changed.append(patch("matwm_rl.runs.training_run.draw_pictures"))
    with ExitStack() as stack:
        for change in changed:
            stack.enter_context(change)
        sys.modules.pop("simple_tag", None)
        runpy.run_path(script, run_name="__main__")


def numbers(line: str) -> list[float]:
    """What stands behind the colon of a printed line."""
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line.partition(":")[2])]
