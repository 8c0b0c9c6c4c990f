"""The example runs from end to end, and what it learns in dreams helps in the real environment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(arguments: str = "") -> list[float]:
    """Real returns of random agents, and of the policy, in a process of its own: the example sets up the whole one."""
    script = f"import runpy; runpy.run_path('examples/imagined_mappo.py')['main']({arguments})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = re.search(r"real return: random agents (-\d+\.\d), trained in dreams (-\d+\.\d)\n", done.stdout)
    assert printed, done.stdout
    return [float(value) for value in printed.groups()]


def test_runs_from_end_to_end() -> None:
    sizes = "rounds=((200, 3, 2), (50, 2, 2)), starts=4, horizon=3, episodes=2"
    assert run(sizes) == run(sizes)
