"""What README prints is what runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_own_loop_is_the_example() -> None:
    """The example itself runs in tests/examples."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code == (ROOT / "examples" / "custom_loop.py").read_text(encoding="utf-8")
