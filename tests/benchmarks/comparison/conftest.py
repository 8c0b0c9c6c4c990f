"""A grid of stubs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sample_efficiency as grid

from tests.benchmarks.comparison.stubs import DONE, MOCK, Stub, carry_out_here


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The methods of the grid, to be changed; it has two environments."""
    methods: dict[str, Any] = {"stub": Stub(), "part": Stub(only=("first",))}
    monkeypatch.setattr(grid, "METHODS", methods)
    monkeypatch.setattr(grid, "ENVIRONMENTS", {"first": MOCK, "second": MOCK})
    monkeypatch.setattr(grid, "carry_out_apart", carry_out_here)
    # It sets what holds for the whole process.
    monkeypatch.setattr(grid, "prepare_process", lambda **_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    DONE.clear()
    yield methods
