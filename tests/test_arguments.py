"""Numbers, switches and names that are refused, and the messages that say what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from matwm_rl.arguments import (
    Range,
    check_ints,
    check_kinds,
    check_numbers,
    check_switches,
    read_choice,
    read_device,
    read_index,
    read_int,
    read_number,
    read_switch,
    read_text,
)
from matwm_rl.modules import Interpolation


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-7, ValueError), (2**70, ValueError), (1.0, TypeError), (True, TypeError), ("3", TypeError)],
)
def test_no_number_of_things(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="depth must be a positive integer, got "):
        check_ints(1, depth=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 10**400])
def test_no_weight(value: Any) -> None:
    with pytest.raises(ValueError, match="coeff must be a number of at least 0"):
        check_numbers(minimum=0, coeff=value)


@pytest.mark.parametrize("value", ["0.1", None, True, 1j, torch.tensor(0.1)])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="coeff must be a number of at least 0, got "):
        check_numbers(minimum=0, coeff=value)


def test_numbers_of_numpy_become_pythons() -> None:
    values = [
        read_int("n", np.int64(3), Range()),
        read_number("x", np.float32(0.5), Range()),
        read_number("x", 1, Range()),
    ]
    assert [(type(value), value) for value in values] == [(int, 3), (float, 0.5), (float, 1.0)]
    assert read_switch("x", np.True_) is True


@pytest.mark.parametrize("value", ["no", "False", 0, None])
def test_truthy_values_are_no_switches(value: Any) -> None:
    with pytest.raises(TypeError, match="parallel must be True or False, got "):
        check_switches(parallel=value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: read_choice("mode", "mean", Interpolation), ValueError, "mode must be 'raw' or 'symlog', got 'mean'"),
        (lambda: read_text("env", "  "), ValueError, "env must be a text that is not empty, got '  '"),
        (lambda: read_text("env", 3), TypeError, "env must be a text, got 3"),
        (lambda: read_device("device", "gpu:0"), ValueError, "device must be a device of PyTorch such as .* 'gpu:0'"),
        (lambda: read_device("device", 3), TypeError, "device must be a device of PyTorch or its name, got 3"),
        (lambda: read_index("groups", []), ValueError, "groups must have an index for each agent, got"),
        (lambda: read_index("groups", [0, -1]), ValueError, r"groups\[1\] must be an integer of at least 0, got -1"),
        (lambda: read_index("groups", "01"), TypeError, "groups must be a sequence"),
        (lambda: check_kinds(torch.nn.Module, actor=[1] * 99), TypeError, "actor must be a Module, got a list"),
    ],
)
def test_what_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_what_is_allowed_passes() -> None:
    check_ints(0, maximum=3, depth=3)
    check_numbers(above=0, maximum=1, decay=1)
    assert read_choice("mode", "raw", Interpolation) is Interpolation.raw
    assert read_device("device", "cuda:1") == torch.device("cuda", 1)
    assert read_index("groups", range(3), num_agents=3) == [0, 1, 2]
