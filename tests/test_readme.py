"""The README's training loop runs as it is printed, only shorter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_own_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    short = code.replace("10_000", "300").replace("1_000", "200").replace("episodes=20", "episodes=2")
    assert short != code
    exec(compile(short, "README.md", "exec"), {})
    assert "agent" in capsys.readouterr().out
