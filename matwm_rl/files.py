"""Atomic writes of files and folders, and imports of optional packages."""

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
"""Prefix of the names of files and folders that are being written or deleted."""
LOCK = ".lock"
"""Name of the file that a process holds while it writes into a folder."""


def import_optional(name: str, *, extra: str = "train") -> ModuleType:
    """Import a module of an optional package.

    Args:
        name: of the module.
        extra: of this library, which installs the package.

    Raises:
        ImportError: if the package is not installed; the message says how to install it.

    Examples:
        >>> import_optional("json").__name__
        'json'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'this needs the package {name.partition(".")[0]!r}: pip install "matwm_rl[{extra}]" ({error})'
        ) from error


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Write or replace a file atomically: if the block is interrupted, the old file stays.

    Args:
        path: the file; its folder must exist.

    Yields:
        a temporary path to write to; it is renamed to ``path`` when the block ends without an error.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        _sync(partial)
        partial.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """Write or replace a text file atomically, see :func:`new_file`."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Create a folder atomically: it appears under its name when the block ends without an error.

    Args:
        path: the folder, which must not exist; its parent must.

    Yields:
        a temporary folder to write into.

    Raises:
        FileExistsError: if the folder exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} already exists")
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        # Only their owner can read temporary folders. The umask can be read only by setting it.
        umask = os.umask(0o022)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(path: str | Path) -> None:
    """Rename a folder, then delete it, so that no reader finds it half-deleted under its name."""
    path = Path(path)
    _remove(path.rename(path.with_name(PARTIAL + path.name)))


def remove_partial(folder: str | Path) -> None:
    """Clear away what interrupted writes and deletions have left in a folder, and in the folders in it.

    Call it when nothing else writes there: at the start of a run.
    """
    folder = Path(folder)
    inner = [path for path in folder.glob("*") if path.is_dir() and not path.is_symlink()]
    for path in (path for parent in (folder, *inner) for path in parent.glob(f"{PARTIAL}*")):
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a file or a folder; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock_folder(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing into a folder for as long as the block lasts.

    The lock is the operating system's, on the file ``.lock``: it is gone when the process is, however it ends.

    Args:
        path: the folder, which is made if it does not exist.

    Raises:
        RuntimeError: if another process has locked it.
        ImportError: if the package ``filelock`` is not installed.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with lock_folder(folder), lock_folder(folder):
        ...     pass
        Traceback (most recent call last):
        RuntimeError: another process writes into...
    """
    filelock = import_optional("filelock")
    Path(path).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(Path(path) / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise RuntimeError(
            f"another process writes into {path}: wait until it has ended, or choose another run_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sync(file: Path) -> None:
    # The rename may reach the disk before the data: after a power cut, the file under the new name would be empty.
    descriptor = os.open(file, os.O_RDWR)  # Windows flushes no file that is open for reading
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
