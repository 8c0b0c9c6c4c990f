"""Checks of the numbers, switches and names that constructors, functions and settings are given.

Every message says what was given, and what is allowed. Values of another type raise a ``TypeError``, values out of
range a ``ValueError``. A ``bool`` is no number, and NaN and infinity lie in no range; numbers of NumPy are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

Choice = TypeVar("Choice", bound=Enum)


class Range(NamedTuple):
    """Bounds of a number; ``None`` where there is none.

    Examples:
        >>> Range(above=0).describe("number"), Range(minimum=0, maximum=1).describe("number")
        ('a positive number', 'a number from 0 to 1')
        >>> Range(minimum=1).describe("integer"), Range(minimum=0, below=1).describe("number")
        ('a positive integer', 'a number of at least 0 and below 1')
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether a number lies in the range; NaN and infinity lie in none."""
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def describe(self, noun: str) -> str:
        """Say what is allowed: an ``"integer"`` or a ``"number"`` of the range."""
        minimum, maximum, above, below = self
        no_upper = maximum is None and below is None
        article = "an" if noun[0] in "aeiou" else "a"
        if no_upper and (above == 0 or (noun == "integer" and minimum == 1)):
            return f"a positive {noun}"
        if minimum is not None and maximum is not None:
            return f"{article} {noun} from {minimum} to {maximum}"
        bounds = (("of at least", minimum), ("above", above), ("at most", maximum), ("below", below))
        said = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        return f"{article} {noun} {said}".rstrip()


def check_ints(minimum: int, /, *, maximum: int | None = None, **values: Any) -> None:
    """Check that arguments are whole numbers in a range.

    Args:
        minimum: smallest allowed value.
        maximum: largest allowed value.
        **values: by the names of the arguments.

    Raises:
        TypeError: if one is no whole number.
        ValueError: if one is out of range.

    Examples:
        >>> check_ints(1, horizon=15, episodes=0)
        Traceback (most recent call last):
        ValueError: episodes must be a positive integer, got 0
    """
    for name, value in values.items():
        read_int(name, value, Range(minimum, maximum))


def check_numbers(
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    **values: Any,
) -> None:
    """Check that arguments are numbers in a range.

    Args:
        minimum: smallest allowed value.
        maximum: largest allowed value.
        above: the value must be greater than this.
        below: the value must be less than this.
        **values: by the names of the arguments.

    Raises:
        TypeError: if one is no number.
        ValueError: if one is out of range, NaN or infinite.

    Examples:
        >>> check_numbers(minimum=0, maximum=1, gamma=0.99, lmbda=float("nan"))
        Traceback (most recent call last):
        ValueError: lmbda must be a number from 0 to 1, got nan
    """
    for name, value in values.items():
        read_number(name, value, Range(minimum, maximum, above, below))


def check_switches(**values: Any) -> None:
    """Check that arguments are ``True`` or ``False``: any text would count as true.

    Args:
        **values: by the names of the arguments.

    Raises:
        TypeError: if one is neither.

    Examples:
        >>> check_switches(parallel="no")
        Traceback (most recent call last):
        TypeError: parallel must be True or False, got 'no'
    """
    for name, value in values.items():
        read_switch(name, value)


def check_kinds(kind: Any, /, **values: Any) -> None:
    """Check that arguments are instances of a class.

    Args:
        kind: the class, or several.
        **values: by the names of the arguments.

    Raises:
        TypeError: if one is another object.

    Examples:
        >>> check_kinds(torch.nn.Module, actor=3)
        Traceback (most recent call last):
        TypeError: actor must be a Module, got 3
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            given = value if isinstance(value, type) else _short(value)
            raise TypeError(f"{name} must be a {' or a '.join(each.__name__ for each in kinds)}, got {given}")


def read_index(name: str, value: Any, num_agents: int | None = None) -> list[int]:
    """Return a list with one index, 0 or more, for every agent.

    Args:
        name: of the argument, for the message.
        value: given: a sequence, such as a list or a range.
        num_agents: N; by default as many as are given.

    Raises:
        TypeError: if it is no sequence of whole numbers.
        ValueError: if it is empty or of another length, or an index is negative.

    Examples:
        >>> read_index("group_index", [0, 0], num_agents=3)
        Traceback (most recent call last):
        ValueError: group_index must have an index for each of 3 agents, got [0, 0]
    """
    agents = "each agent" if num_agents is None else f"each of {num_agents} agents"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence with an index for {agents}, got {_short(value)}")
    if not value or num_agents not in (None, len(value)):
        raise ValueError(f"{name} must have an index for {agents}, got {_short(value)}")
    return [read_int(f"{name}[{agent}]", index, Range(0)) for agent, index in enumerate(value)]


def read_int(name: str, value: Any, bounds: Range) -> int:
    """Return a whole number in a range, as a Python ``int``.

    Args:
        name: of the argument, for the message.
        value: given.
        bounds: the range.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is out of range.

    Examples:
        >>> read_int("depth", -7, Range(minimum=0))
        Traceback (most recent call last):
        ValueError: depth must be an integer of at least 0, got -7
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {bounds.describe('integer')}, got {_short(value)}")
    number = int(value)
    if not -(2**63) <= number < 2**63 or not bounds.holds(number):
        raise ValueError(f"{name} must be {bounds.describe('integer')}, got {value}")
    return number


def read_number(name: str, value: Any, bounds: Range) -> float:
    """Return a number in a range, as a Python ``float``.

    Args:
        name: of the argument, for the message.
        value: given.
        bounds: the range.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range, NaN or infinite.

    Examples:
        >>> read_number("width", float("inf"), Range(above=0))
        Traceback (most recent call last):
        ValueError: width must be a positive number, and finite, got inf
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {bounds.describe('number')}, got {_short(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not bounds.holds(number):
        finite = ", and finite" if math.isinf(number) else ""
        raise ValueError(f"{name} must be {bounds.describe('number')}{finite}, got {value}")
    return number


def read_switch(name: str, value: Any) -> bool:
    """Return ``True`` or ``False``.

    Args:
        name: of the argument, for the message.
        value: given.

    Raises:
        TypeError: if it is neither.

    Examples:
        >>> read_switch("reencode", np.True_)
        True
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {_short(value)}")
    return bool(value)


def read_choice(name: str, value: Any, choices: type[Choice]) -> Choice:
    """Return a member of an enumeration, which may be given by its value.

    Args:
        name: of the argument, for the message.
        value: given.
        choices: the enumeration.

    Raises:
        ValueError: if it has no such member.

    Examples:
        >>> from matwm_rl.modules import Interpolation
        >>> read_choice("interpolation", "linear", Interpolation)
        Traceback (most recent call last):
        ValueError: interpolation must be 'raw' or 'symlog', got 'linear'
    """
    try:
        return choices(value)
    except ValueError:
        *others, last = (repr(choice.value) for choice in choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {_short(value)}") from None


def read_text(name: str, value: Any) -> str:
    """Return a text that is not empty.

    Args:
        name: of the argument, for the message.
        value: given.

    Raises:
        TypeError: if it is no text.
        ValueError: if it is empty.

    Examples:
        >>> read_text("env", "")
        Traceback (most recent call last):
        ValueError: env must be a text that is not empty, got ''
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {_short(value)}")
    if not value.strip() or "\0" in value:
        raise ValueError(f"{name} must be a text that is not empty, got {value!r}")
    return value


def read_device(name: str, value: Any) -> torch.device:
    """Return a device of PyTorch.

    Args:
        name: of the argument, for the message.
        value: the device or its name.

    Raises:
        TypeError: if it is neither a device nor a text.
        ValueError: if PyTorch knows no such device.

    Examples:
        >>> read_device("device", "gpu")
        Traceback (most recent call last):
        ValueError: device must be a device of PyTorch such as 'cpu', 'cuda' or 'cuda:1', got 'gpu'
    """
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name} must be a device of PyTorch or its name, got {_short(value)}")
    try:
        return torch.device(value)
    except RuntimeError:
        allowed = "a device of PyTorch such as 'cpu', 'cuda' or 'cuda:1'"
        raise ValueError(f"{name} must be {allowed}, got {value!r}") from None


def _short(value: Any) -> str:
    """Show a value in one line, with its type where the value does not tell."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"a {type(value).__name__}"
