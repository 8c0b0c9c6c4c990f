"""Every public name is documented: what it is, its parameters, what it raises, and an example that runs.

The examples are run by ``python -m pytest --doctest-modules matwm_rl``; here is seen that there are any.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import pytest
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Transform

import matwm_rl
from matwm_rl import keys

PACKAGE = Path(matwm_rl.__file__).parent
ROOMS = ["matwm_rl", *(f"matwm_rl.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.py")))]
HELPERS = [
    f"matwm_rl.{name}"
    for name in (
        *("action_distribution", "action_space", "arguments", "box_actions", "checks", "finite", "functional"),
        *("loss_functions", "presets", "settings"),
    )
]
"""Modules without ``__all__``, whose own classes and functions without an underscore others may use."""
CONSTANT = (str, int, float, tuple, list, dict)


def public_names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    own = {name: value for name, value in own.items() if not isinstance(value, TypeVar)}
    return [name for name in own if not name.startswith("_")]


def needs_an_example(value: Any) -> bool:
    """Not what has no behaviour: the members of an enumeration and the entries of a named tuple say what they are."""
    return not (inspect.isclass(value) and (issubclass(value, Enum) or hasattr(value, "_fields")))


def public_objects() -> dict[str, Any]:
    """Every public class and function once, by the room that it is from: the package itself only gathers them."""
    named = {}
    for module in map(importlib.import_module, [*ROOMS, *HELPERS]):
        for name in public_names(module):
            value = getattr(module, name)
            if module is not matwm_rl and not isinstance(value, CONSTANT):
                named[f"{module.__name__}.{name}"] = value
    return named


def public_constants() -> list[tuple[str, str]]:
    rooms = map(importlib.import_module, ROOMS)
    return [
        (room.__name__, name) for room in rooms for name in room.__all__ if isinstance(getattr(room, name), CONSTANT)
    ]


OBJECTS = public_objects()
every_name = pytest.mark.parametrize("name", OBJECTS)


# -- the checks, each of which lists what is wrong with one object -----------------------------------------------------


def own_docstring(value: Any) -> str:
    """Its own, not that of a base class, and not the signature that dataclasses put in its place."""
    doc = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    return "" if doc.startswith(f"{value.__name__}(") else inspect.cleandoc(doc)


def documented(doc: str) -> set[str]:
    """Names listed under ``Args:``, ``Keyword Args:`` and ``Attributes:``."""
    sections = re.findall(r"^(?:Args|Keyword Args|Attributes):\n((?:(?:    .*)?\n)*)", doc + "\n", flags=re.MULTILINE)
    return set(re.findall(r"^    \**(\w+)(?: \([^)]*\))?:", "".join(sections), flags=re.MULTILINE))


def parameters(value: Any) -> list[str]:
    """Of a function, or of a class's constructor if that is ours: other libraries document their own."""
    if not inspect.isclass(value):
        return list(inspect.signature(value).parameters)
    constructor = value.__init__
    # Dataclasses have theirs made for them; a protocol's belongs to `typing`; a named tuple has none.
    module = getattr(constructor, "__module__", "")
    ours = module.startswith("matwm_rl") and not getattr(value, "_is_protocol", False)
    return list(inspect.signature(constructor).parameters)[1:] if ours else []


def undocumented_parameters(value: Any) -> list[str]:
    known = documented(own_docstring(value))
    return [name for name in parameters(value) if name not in known]


def examples(value: Any) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(own_docstring(value))


def has_keys(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, (TensorDictModuleBase, Transform))


def raised(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and isinstance(inner.exc.func, ast.Name):
            yield inner.exc.func.id


def undocumented_errors(value: Any) -> list[str]:
    """Errors that are raised in so many words, and named neither by the docstring nor by those of its methods."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))
    (node,) = ast.parse(source).body
    methods = (FunctionType, classmethod, staticmethod, property)
    members = [item for item in vars(value).values() if isinstance(item, methods)] if inspect.isclass(value) else []
    doc = "\n".join([own_docstring(value), *(inspect.getdoc(member) or "" for member in members)])
    # A method that subclasses have to override says so by raising this; that is no error of the caller's.
    return sorted({name for name in raised(node) if f"{name}:" not in doc and f"``{name}``" not in doc} - ABSTRACT)


ABSTRACT = {"NotImplementedError"}


def imported_publicly(path: Path) -> list[str]:
    """Names without an underscore that a room's ``__init__.py`` imports from the package."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    imports = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matwm_rl")
    ]
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    return [name for name in names if not name.startswith("_")]


def constants_with_a_docstring(source: str) -> set[str]:
    """Names assigned at the top level whose assignment is followed by a string, or preceded by a comment."""
    lines, body = source.splitlines(), ast.parse(source).body
    found = set()
    for node, after in zip(body, [*body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        followed = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if followed or lines[node.lineno - 2].startswith("#"):
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


# -- the package passes them -------------------------------------------------------------------------------------------


@every_name
def test_has_a_docstring(name: str) -> None:
    assert own_docstring(OBJECTS[name]), f"{name} needs a docstring"


@pytest.mark.parametrize("name", [name for name, value in OBJECTS.items() if needs_an_example(value)])
def test_has_an_example(name: str) -> None:
    found = examples(OBJECTS[name])
    assert found, f"the docstring of {name} needs an example: `Examples:` and lines that begin with >>>"
    assert any(example.want or example.exc_msg for example in found) or name in NOTHING_TO_SHOW, (
        f"the example of {name} expects nothing, so that it shows and tests nothing"
    )


NOTHING_TO_SHOW = {"matwm_rl.objectives.WorldModelLoss", "matwm_rl.training.prepare_process"}
"""The one ends with a backward pass; the other changes the process and gives nothing back."""


@every_name
def test_documents_its_parameters(name: str) -> None:
    missing = undocumented_parameters(OBJECTS[name])
    assert not missing, f"{name} does not document {missing} under `Args:` or `Attributes:`"


@every_name
def test_documents_its_errors(name: str) -> None:
    missing = undocumented_errors(OBJECTS[name])
    assert not missing, f"{name} raises {missing}; its docstring should say when under `Raises:`"


@pytest.mark.parametrize("room", ROOMS)
def test_all_is_sorted_and_complete(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__all__ == sorted(module.__all__, key=sort_key)
    assert module.__file__ is not None
    assert sorted(module.__all__) == sorted(imported_publicly(Path(module.__file__)))


def sort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff sorts ``__all__`` (RUF022)."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


def test_the_rooms_are_the_folders() -> None:
    rooms = ("", ".data", ".envs", ".evaluation", ".modules", ".objectives", ".runs", ".training")
    assert ROOMS == [f"matwm_rl{room}" for room in rooms]


def test_the_package_gathers_names_of_its_rooms() -> None:
    rooms = {name for room in ROOMS[1:] for name in importlib.import_module(room).__all__}
    assert set(matwm_rl.__all__) <= rooms | {"presets"}


@pytest.mark.parametrize(("room", "name"), public_constants())
def test_constants_are_described(room: str, name: str) -> None:
    folder = PACKAGE.joinpath(*room.split(".")[1:])
    described = {found for path in folder.glob("*.py") for found in constants_with_a_docstring(path.read_text("utf-8"))}
    assert name in described, f'{room}.{name} needs a line of """...""" below it'


def test_every_key_is_described() -> None:
    named = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, tuple)}
    described = set(re.findall(r"^``(\(.*?\))``", keys.__doc__ or "", flags=re.MULTILINE))
    assert described == {str(key).replace("'", '"') for key in named.values()}
    assert len(described) == len(named)


@pytest.mark.parametrize("name", [name for name, value in OBJECTS.items() if has_keys(value)])
def test_modules_tell_their_keys(name: str) -> None:
    doc = own_docstring(OBJECTS[name])
    assert re.search(r"^Keys (read|stored)", doc, flags=re.MULTILINE), f"{name} should say what it reads, `Keys read:`"
    assert re.search(r"written|Keys of a sample", doc), f"{name} should say what it writes, `Keys written:`"


# -- and each of them can fail -----------------------------------------------------------------------------------------


def bare(size: int, depth: int) -> None:
    raise ValueError("no docstring")


def half(size: int, depth: int) -> int:
    """Half documented.

    Args:
        size: of it.

    Examples:
        >>> half(1, 2)
        1
    """
    if depth < 1:
        raise ValueError(depth)
    return size


class Inherits(matwm_rl.WorldModelConfig):
    pass


class Whole:
    """All there is to say.

    Args:
        size: of it.

    Keyword Args:
        depth (int, optional): of it.

    Raises:
        ValueError: if there is none.

    Examples:
        >>> Whole(1, depth=2).size
        1
    """

    def __init__(self, size: int, *, depth: int) -> None:
        if depth < 1:
            raise ValueError(depth)
        self.size = size

    def required(self) -> None:
        raise NotImplementedError()


# As if they were of the package: constructors of others' are not looked at.
Whole.__init__.__module__ = Inherits.__init__.__module__ = "matwm_rl.somewhere"


def test_the_checks_find_what_is_missing() -> None:
    assert not own_docstring(bare) and not own_docstring(Inherits)
    assert not examples(bare) and not examples(Inherits) and examples(half) and examples(Whole)
    assert undocumented_parameters(bare) == ["size", "depth"]
    assert undocumented_parameters(half) == ["depth"]
    assert undocumented_parameters(Inherits) == [field.name for field in fields(Inherits)]
    assert undocumented_parameters(Whole) == []
    assert undocumented_errors(bare) == undocumented_errors(half) == ["ValueError"]
    assert undocumented_errors(Whole) == []
    assert constants_with_a_docstring('A = 1\nB = 2\n"""Two."""\n\n# Three.\nC: int = 3\nD = 4\n') == {"B", "C"}


def test_the_check_of_imports_finds_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "__init__.py"
    path.write_text("from matwm_rl.envs.mock import MockEnv, _private\nfrom torch import Tensor\n", encoding="utf-8")
    assert imported_publicly(path) == ["MockEnv"]
