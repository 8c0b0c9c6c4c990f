"""Configurations as plain Python values, to be stored beside what was built from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


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
