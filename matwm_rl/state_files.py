"""Files of tensors and plain Python values that may come from strangers: written whole, read without running code.

Such a file is what ``torch.save`` writes, a zip archive, with a SHA-256 of everything before it in the archive's
comment; ``torch.load(path, weights_only=True)`` and any zip tool still read it. The zip format's own CRC-32 would not
do: torch does not verify it, it leaves the headers out, and 32 bits do not tell a file from one made to replace it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from matwm_rl.files import new_file

_LABEL = b"sha256:"
_COMMENT_SIZE = len(_LABEL) + 2 * hashlib.sha256().digest_size


def write_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write or replace a file of tensors and plain values, as a whole: if this is interrupted, the old file stays.

    Args:
        path: the file; its folder must exist.
        state: dicts, lists and tuples of tensors, numbers, text and ``None``.

    Raises:
        TypeError: if the state holds anything else.
        OSError: if it cannot be written, because the disk is full for one.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_state(f"{folder}/state.pt", {"weight": torch.ones(2), "steps": 3})
        ...     read_state(f"{folder}/state.pt")
        {'weight': tensor([1., 1.]), 'steps': 3}
    """
    check_plain(state, str(path))
    try:
        with new_file(path) as partial:
            # A file object: where the disk is full, its error says so, and torch's own does not.
            with partial.open("wb") as file:
                torch.save(state, file)
            with partial.open("r+b") as file:
                # The last two bytes of an archive are the length of its comment, which torch leaves empty.
                file.seek(-2, os.SEEK_END)
                file.write(struct.pack("<H", _COMMENT_SIZE))
                file.write(_LABEL + _hash(file, file.tell()).encode())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"cannot write {path}: {cause.strerror}") from None
        raise


def read_state(path: str | Path, *, map_location: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read what :func:`write_state` wrote. No code of the file is run, no link followed, nothing written.

    Args:
        path: the file.
        map_location: where its tensors go.
        mmap: leave the tensors in the file until they are read, which needs no memory. The file must stay until then;
            writing to such a tensor does not change it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a link or no file, is damaged, or holds anything but tensors and plain values.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "state.pt"
        ...     write_state(path, {"weight": torch.ones(2)})
        ...     _ = path.write_bytes(path.read_bytes()[:-10])
        ...     read_state(path)
        Traceback (most recent call last):
        ValueError: .../state.pt is incomplete or damaged...
    """
    stored = stored_checksum(path)
    with Path(path).open("rb") as file:
        if _hash(file, os.fstat(file.fileno()).st_size - _COMMENT_SIZE) != stored:
            raise ValueError(f"{path} is damaged: its content has changed since it was written. Use another copy")
    try:
        # A path as text: with mmap torch takes nothing else.
        state = torch.load(str(path), map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # whatever it is: the file is as it was written, and not one of ours
        raise ValueError(f"{path} cannot be read as tensors and plain values: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dict, found a {type(state).__name__}")
    try:
        check_plain(state, str(path))
    except TypeError as error:
        raise ValueError(str(error)) from None
    return state


def stored_checksum(path: str | Path) -> str:
    """Return the checksum of its content that a file of :func:`write_state` has at its end, without verifying it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a link or no file, or has no checksum.
    """
    path = Path(path)
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
        raise ValueError(f"{path} is {kind}, and links are not followed: give the path of the file itself")
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _COMMENT_SIZE))
        comment = file.read()
    if len(comment) < _COMMENT_SIZE or not comment.startswith(_LABEL):
        found = "is incomplete or damaged" if (old := _version(path)) is None else f"has version {old}"
        raise ValueError(f"{path} {found}: it does not end with a checksum, as this release's files do")
    return comment[len(_LABEL) :].decode("ascii", errors="replace")


def check_entries(given: Any, names: Sequence[str], *, source: str) -> None:
    """Check that a part of a stored state is a dict with certain entries, and no others.

    Raises:
        ValueError: if it is not; names the entries.

    Examples:
        >>> check_entries({"a": 1}, ["a", "b"], source="state.pt")
        Traceback (most recent call last):
        ValueError: state.pt does not fit: b is missing...
    """
    if not isinstance(given, dict):
        raise ValueError(f"{source} does not fit: expected a dict of {list(names)}, found a {type(given).__name__}")
    problems = [f"{name} is missing" for name in names if name not in given]
    problems += [f"{name} is unknown here" for name in given if name not in names]
    refuse(problems, source)


def check_same(given: Any, expected: Mapping[str, Any], *, source: str, name: str = "") -> None:
    """Compare two nested states before one is loaded where the other is from.

    Args:
        given: the state to load.
        expected: the state that is there.
        source: what the message calls the given one.
        name: of the two, if they are a part of a state.

    Raises:
        ValueError: if an entry is missing, is unknown, or has another shape or type; lists the first few.

    Examples:
        >>> check_same({"w": torch.zeros(3)}, {"w": torch.zeros(2)}, source="weights.pt")
        Traceback (most recent call last):
        ValueError: weights.pt does not fit: w has shape (3,), expected (2,)...
    """
    theirs, ours = dict(leaves(given, name)), dict(leaves(expected, name))
    problems = [f"{entry} is missing" for entry in ours if entry not in theirs]
    problems += [f"{entry} is unknown here" for entry in theirs if entry not in ours]
    for entry in ours:
        if entry in theirs and (difference := _difference(theirs[entry], ours[entry])):
            problems.append(f"{entry} {difference}")
    refuse(problems, source)


def refuse(problems: Sequence[str], source: str) -> None:
    """Raise an error if a stored state has problems.

    Args:
        problems: what is wrong, each with the name of its entry; the message has the first five.
        source: what the message calls the state.

    Raises:
        ValueError: if there is a problem.
    """
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{source} does not fit: {'; '.join(problems[:5])}{more}. "
            "Build the environment and the networks with the configuration that it was saved with"
        )


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of all that is no dict in a nested state; an empty dict is a value."""
    if isinstance(state, dict) and state:
        for key, value in state.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, state


def check_plain(state: Any, what: str) -> None:
    """Check that a state is what :func:`read_state` will accept: dicts, lists and tuples of tensors and plain values.

    Args:
        state: of a file.
        what: begins the message.

    Raises:
        TypeError: names the first entry that is something else.

    Examples:
        >>> check_plain({"steps": 3, "device": torch.device("cpu")}, "state.pt")
        Traceback (most recent call last):
        TypeError: state.pt may hold tensors, numbers and text in dicts and lists, got a device: device
    """
    for name, value in leaves(state):
        if not _is_plain(value):
            kind = type(value).__name__
            raise TypeError(f"{what} may hold tensors, numbers and text in dicts and lists, got a {kind}: {name}")
    if not _is_plain(state):
        raise TypeError(f"{what} may have text or whole numbers as keys of its dicts, and no others")


def _version(path: Path) -> Any:
    """Return the version of a file that has no checksum, as those of earlier releases; ``None`` if it tells none."""
    try:
        return torch.load(path, weights_only=True)["version"]
    except Exception:  # it may hold anything
        return None


def _difference(given: Any, expected: Any) -> str | None:
    if type(given) is not type(expected) and not isinstance(expected, Tensor | dict):
        return f"is a {type(given).__name__}, expected a {type(expected).__name__}"
    if not isinstance(expected, Tensor):
        return None
    if not isinstance(given, Tensor):
        return f"is a {type(given).__name__}, expected a tensor"
    if given.shape != expected.shape:
        return f"has shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
    return f"has type {given.dtype}, expected {expected.dtype}" if given.dtype != expected.dtype else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        # An OrderedDict is what torch's state dicts are.
        return type(value) in (dict, OrderedDict) and all(
            type(key) in (str, int) and _is_plain(entry) for key, entry in value.items()
        )
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple, torch.Size) and all(map(_is_plain, value))
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return value is None or type(value) in (str, int, float, bool)


def _hash(file: IO[bytes], size: int) -> str:
    """Return the SHA-256 of the first bytes of a file, which is left behind them."""
    file.seek(0)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while size > 0 and (count := file.readinto(buffer[: min(size, len(buffer))])):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        size -= count
    return digest.hexdigest()
