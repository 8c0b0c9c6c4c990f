"""Files that are never half-written, and optional packages with a helpful error."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PARTIAL = ".partial-"
"""What the name of a file or folder begins with while it is being written or deleted."""


def import_optional(name: str) -> ModuleType:
    """Import a module of the extra ``matwm_rl[train]``.

    Raises:
        ImportError: if it is not installed; the message says how to install it.

    Examples:
        >>> import_optional("json").__name__
        'json'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'this needs the package {name.partition(".")[0]!r}: pip install "matwm_rl[train]" ({error})'
        ) from error


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write or replace a file as a whole: a reader sees the old one or the new one, whatever interrupts this.

    Args:
        path: the file; its folder must exist.

    Yields:
        the path to write to; it becomes ``path`` when the block ends without an error.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        _sync(partial)
        partial.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """Write or replace a text file as a whole, see :func:`new_file`."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder as a whole: it appears under its name when the block ends without an error, and not before.

    Args:
        path: the folder; must not exist, its parent must.

    Yields:
        the folder to write into.

    Raises:
        FileExistsError: if the folder exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        # Temporary folders are readable by their owner alone; the umask can be read only by setting it.
        umask = os.umask(0o022)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(path: str | Path) -> None:
    """Delete a folder that gives up its name first, so that nobody reads it half-deleted."""
    path = Path(path)
    shutil.rmtree(path.rename(path.with_name(PARTIAL + path.name)), ignore_errors=True)


def _sync(file: Path) -> None:
    # Renaming may reach the disk before the data does: after a power cut the new name would hold an empty file.
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
