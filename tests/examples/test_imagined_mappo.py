"""The example runs from end to end, and the same again."""

from __future__ import annotations

import subprocess
import sys

from tests.examples.helpers import EXAMPLES, LINES, numbers


def run(arguments: str) -> list[float]:
    """Real returns of random agents, and of the policy, in a process of its own: the example sets up the whole one."""
    path = EXAMPLES / "imagined_mappo.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < LINES
    script = f"import runpy; runpy.run_path({str(path)!r})['main']({arguments})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    random, trained = (line for line in done.stdout.splitlines() if "mean return" in line)
    assert random.startswith("random agents") and trained.startswith("agents trained in dreams")
    return numbers(random) + numbers(trained)


def test_runs_from_end_to_end() -> None:
    sizes = "rounds=((200, 3, 2), (50, 2, 2)), horizon=3, episodes=2"
    returns = run(sizes)
    assert returns == run(sizes)
    # Agents cannot be nearer to landmarks than at no distance, and are rewarded for nothing else.
    assert max(returns) < 0 and returns[0] != returns[1]
