"""A sample of the generated wrong inputs: all are refused clearly, and what is right is not refused."""

from __future__ import annotations

from typing import Any

import bad_inputs
import pytest
import torch
from bad_inputs import Input, judge
from targets import BATCHES, TARGETS


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_wrong_inputs_are_refused_clearly() -> None:
    counts, found = bad_inputs.run(400, seed_value=1)
    assert not [(verdict, tried.kind, tried.entry, tried.given, message) for verdict, tried, message in found]
    assert {"setting", "misspelt entry", "argument", "batch: type", "batch: wider", "environment"} <= set(counts)


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_what_the_targets_are_given_else_is_right() -> None:
    """Otherwise an input could be refused for another reason than the one that is tried."""
    for batch in BATCHES():
        batch.reader(batch.make())
    for target in TARGETS:
        if "RunLog" not in str(target.call) and target.right:
            target.make()


def wrong() -> None:
    raise ValueError("size must be a positive integer, got 0")


def torchs() -> Any:
    return torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize(("call", "verdict"), [(wrong, "unclear"), (torchs, "unclear"), (list, "accepted")])
def test_inputs_are_judged(call: Any, verdict: str) -> None:
    """An error that is not raised by the package is unclear, whatever it says."""
    assert judge(Input("argument", "size", "0", call))[0] == verdict
