"""Importing the package of a family."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_package(package: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: if it is not installed; the message names the extra of this library that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this environment needs the package {package.partition('.')[0]!r}: "
            f'pip install "matwm_rl[{extra}]" ({error})'
        ) from error
