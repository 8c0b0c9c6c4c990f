"""Settings: dataclasses that refuse what they cannot mean, and their form as plain Python values, to be stored."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from matwm_rl.arguments import (
    Range,
    check_kinds,
    read_choice,
    read_device,
    read_int,
    read_number,
    read_switch,
    read_text,
)

T = TypeVar("T")

_RANGE, _DEVICE = "range", "device"


def setting(
    default: Any = MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    is_device: bool = False,
) -> Any:
    """Declare an entry of :class:`Settings`: its default, and what is allowed beside its type.

    Args:
        default: of the entry; without, it must be given.
        minimum: smallest allowed number.
        maximum: largest allowed number.
        above: the number must be greater than this.
        below: the number must be less than this.
        is_device: whether the text must name a device of PyTorch.

    Examples:
        >>> setting(0.9, minimum=0, maximum=1).default
        0.9
    """
    return field(default=default, metadata={_RANGE: Range(minimum, maximum, above, below), _DEVICE: is_device})


class Settings:
    """Base of all dataclasses of settings: a wrong entry is refused when it is given, and when it is assigned.

    Types are those of the annotations: ``int``, ``float``, ``bool``, ``str``, enumerations (also by value), lists,
    mappings, other settings, and any of these or ``None``; other annotations are not checked. Ranges stand beside the
    defaults, see :func:`setting`. NaN and infinity are in no range, and a text is never empty. Numbers of NumPy are
    stored as Python's. Entries that depend on one another are checked by :meth:`check`.

    Raises:
        TypeError: if there is no entry of a name that is given, or a value is of another type.
        ValueError: if a value is out of range, or entries contradict one another.
        AttributeError: if there is no entry of a name that is assigned.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(kw_only=True)
        ... class RateConfig(Settings):
        ...     rate: float = setting(0.1, above=0)
        ...     warm: bool = False
        >>> RateConfig(rate=-0.1)
        Traceback (most recent call last):
        ValueError: RateConfig.rate must be a positive number, got -0.1
        >>> RateConfig(warm="no")
        Traceback (most recent call last):
        TypeError: RateConfig.warm must be True or False, got 'no'
        >>> RateConfig().rat = 0.2
        Traceback (most recent call last):
        AttributeError: RateConfig has no entry 'rat'; near ones are rate; the entries there are rate, warm
    """

    def __new__(cls, *args: Any, **entries: Any) -> Any:
        """List the known entries when an unknown one is given."""
        for name in entries:
            if name not in _entries(cls):
                raise TypeError(_unknown(cls, name))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            if name not in _entries(type(self)):
                raise AttributeError(_unknown(type(self), name))
            hint, allowed = _entries(type(self))[name]
            value = _read(f"{type(self).__name__}.{name}", value, hint, allowed)
        super().__setattr__(name, value)

    def check(self) -> None:
        """Check entries that depend on one another; override it where there are such.

        It is called after construction, and again where settings are used, because entries can be assigned in between.

        Raises:
            ValueError: if they contradict one another.
        """


def _read_entries(cls: Any) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Annotation and allowed values of every entry."""
    hints = get_type_hints(cls)
    return {entry.name: (hints[entry.name], entry.metadata) for entry in fields(cls)}


_entries: Callable[[Any], dict[str, tuple[Any, Mapping[str, Any]]]] = cache(_read_entries)


def unknown_entry(name: str, known: Sequence[str], owner: str = "there") -> str:
    """Say that there is no entry of a name, and which there are.

    Args:
        name: of the entry, in full: ``learner.gamma``.
        known: names of all entries.
        owner: what lacks it, if it has a name.

    Examples:
        >>> unknown_entry("learner.gama", ["learner.gamma", "seed"])
        "there is no entry 'learner.gama'; near ones are learner.gamma; the entries there are learner.gamma"
    """
    folder, _, last = name.rpartition(".")
    # Entries of the same last name in another place, then entries that are spelt alike.
    near = [other for other in known if other.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, known, n=3)
    beside = [other for other in known if other.rpartition(".")[0] == folder] or known
    return (
        f"{owner} {'is' if owner == 'there' else 'has'} no entry {name!r}; "
        + (f"near ones are {', '.join(dict.fromkeys(near))}; " if near else "")
        + f"the entries there are {', '.join(beside)}"
    )


def entry_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the full names of all entries of settings, such as ``learner.gamma``.

    Args:
        config: the settings.
        prefix: before every name.

    Examples:
        >>> from matwm_rl.data import ReplayConfig
        >>> list(entry_names(ReplayConfig()))[:2]
        ['capacity', 'sequences']
    """
    for entry in fields(config):
        name, value = prefix + entry.name, getattr(config, entry.name)
        yield name
        if is_dataclass(value):
            yield from entry_names(value, f"{name}.")


def _unknown(cls: type[Settings], name: str) -> str:
    return unknown_entry(name, list(_entries(cls)), cls.__name__)


def _read(name: str, value: Any, hint: Any, allowed: Mapping[str, Any]) -> Any:
    """Return a value as an annotation has it, or refuse it."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        if value is None and len(kinds) < len(get_args(hint)):
            return None
        return _read(name, value, kinds[0], allowed) if len(kinds) == 1 else value
    if get_origin(hint) is list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a list, got {value!r}")
        (kind,) = get_args(hint)
        return [_read(f"{name}[{place}]", entry, kind, allowed) for place, entry in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(entry, str) for entry in value):
            raise TypeError(f"{name} must be a mapping whose names are text, got {value!r}")
        return dict(value)
    bounds = allowed.get(_RANGE, Range())
    if hint is bool:
        return read_switch(name, value)
    if hint is int:
        return read_int(name, value, bounds)
    if hint is float:
        return read_number(name, value, bounds)
    if hint is str:
        text = read_text(name, value)
        if allowed.get(_DEVICE):
            read_device(name, text)
        return text
    if isinstance(hint, type) and issubclass(hint, Enum):
        return read_choice(name, value, hint)
    if isinstance(hint, type) and issubclass(hint, Settings):
        check_kinds(hint, **{name: value})
    return value


def to_plain(value: Any) -> Any:
    """Turn a configuration into dicts, lists, numbers and text.

    Args:
        value: a dataclass, also nested; each becomes a dict with the name of its class under ``"kind"``.

    Examples:
        >>> from matwm_rl.modules import GaussianLatentConfig
        >>> to_plain(GaussianLatentConfig(num_dims=8))
        {'kind': 'GaussianLatentConfig', 'num_dims': 8}
    """
    if is_dataclass(value) and not isinstance(value, type):
        entries = {entry.name: to_plain(getattr(value, entry.name)) for entry in fields(value)}
        return {"kind": type(value).__name__, **entries}
    if isinstance(value, Enum):
        return value.value
    return [to_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def from_plain(kind: type[T], stored: Mapping[str, Any]) -> T:
    """Build a configuration from what :func:`to_plain` returned.

    Args:
        kind: its class, or a base class of it. A subclass of yours must have been imported.
        stored: the plain values.

    Raises:
        ValueError: if there is no such class, or it has no such entries.

    Examples:
        >>> from matwm_rl.modules import LatentConfig
        >>> from_plain(LatentConfig, {"kind": "GaussianLatentConfig", "num_dims": 8})
        GaussianLatentConfig(num_dims=8)
    """
    known = {cls.__name__: cls for cls in _with_subclasses(kind)}
    name = stored.get("kind")
    if name not in known:
        raise ValueError(f"unknown kind of {kind.__name__}: {name!r}; known are {sorted(known)}. Import your own first")
    cls = known[name]
    names = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
    if different := names.symmetric_difference(set(stored) - {"kind"}):
        raise ValueError(
            f"{name} has the entries {sorted(names)}; stored and present entries differ in {sorted(different)}"
        )
    hints = get_type_hints(cls)
    return cls(**{entry: _build(hints[entry], stored[entry]) for entry in names})


def _build(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return from_plain(hint, value)
    return hint(value) if isinstance(hint, type) and issubclass(hint, Enum) else value


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    subclass: type
    for subclass in kind.__subclasses__():
        yield from _with_subclasses(subclass)
