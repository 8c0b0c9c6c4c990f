"""Errors that name what there is instead: environments, and arguments of their constructors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, isclass, signature
from typing import Any

SHOWN = 60
"""An error lists at most this many names."""


def unknown_environment(name: str, task: str, known: Sequence[str], kind: str = "environments") -> ValueError:
    """Return the error that names near environments, and all if they are not too many.

    Args:
        name: as the user gave it.
        task: the part of the name that is not among ``known``.
        known: the names that exist.
        kind: what the error calls them.

    Examples:
        >>> unknown_environment("vmas/simple_tga", "simple_tga", ["balance", "simple_tag"], "scenarios")
        ValueError("unknown environment 'vmas/simple_tga'; near ones: simple_tag; scenarios: balance, simple_tag.")
    """
    near = difflib.get_close_matches(task, known, n=5)
    listed = ", ".join(known) if len(known) <= SHOWN else f"{', '.join(known[:3])} and {len(known) - 3} more"
    return ValueError(
        f"unknown environment {name!r}; " + (f"near ones: {', '.join(near)}; " if near else "") + f"{kind}: {listed}."
    )


def construct(name: str, constructor: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a constructor; if it does not know an argument, say whose it is and which ones it knows.

    Args:
        name: of the environment.
        constructor: a class or a function, which may hand the arguments on.
        kwargs: its arguments.

    Raises:
        TypeError: if there is no such argument; all other errors are the constructor's own.

    Examples:
        >>> construct("mine", lambda size=3: size, {"sise": 4})
        Traceback (most recent call last):
        TypeError: the environment 'mine' has no argument 'sise'; near ones: size; it takes size...
    """
    try:
        return constructor(**kwargs)
    except TypeError as error:
        found = re.search(r"(\S+)\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[2] not in kwargs:
            raise
        takes = _parameters(constructor, error, found[1])
        raise unknown_argument(name, found[2], takes) from error


def unknown_argument(name: str, argument: str, takes: Sequence[str] = ()) -> TypeError:
    """Return the error of an argument that an environment's constructor does not have.

    Examples:
        >>> unknown_argument("mine", "sise", ["size"])
        TypeError("the environment 'mine' has no argument 'sise'; near ones: size; it takes size")
    """
    near = difflib.get_close_matches(argument, takes, n=3)
    return TypeError(
        f"the environment {name!r} has no argument {argument!r}"
        + (f"; near ones: {', '.join(near)}" if near else "")
        + (f"; it takes {', '.join(takes)}" if takes else "")
    )


def _parameters(constructor: Callable[..., Any], error: TypeError, refusing: str) -> list[str]:
    """Return the argument names of the function that refused an argument: the constructor, or one that it calls.

    Python's message has the name of that function only. The function itself is looked up where it was called, which is
    the last frame of the traceback.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    visible = [] if trace is None else [*trace.tb_frame.f_locals.values(), *trace.tb_frame.f_globals.values()]
    owner = refusing.removesuffix(".__init__")
    callee = next((value for value in visible if getattr(value, "__qualname__", None) == owner), constructor)
    try:
        # Of a class its __init__: a metaclass with a __call__ of its own, such as TorchRL's, would hide the signature.
        parameters = list(signature(callee.__init__ if isclass(callee) else callee).parameters.values())
    except (TypeError, ValueError):
        return []
    kinds = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in parameters[isclass(callee) :] if each.kind in kinds]
