"""Imports run downwards only, nothing optional is needed to import the package, and files are of a size to be read.

Read top down, every room may import from the levels below its own, and from no other room::

    examples  benchmarks
    runs
    presets
    training  evaluation
    modules  objectives  envs  data
    box_actions
    action_space
    action_distribution  state_files
    checks  files  finite  keys  loss_functions  settings
    arguments  functional  processes
    torchrl_internals

so a loss, above all, never knows which network it trains. ``matwm_rl/__init__.py`` gathers the public names: it may
import any room of the package, and only ``examples`` and ``benchmarks`` may import from it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "matwm_rl"
LEVELS = (
    ("examples", "benchmarks"),
    (f"{PACKAGE}.runs",),
    (f"{PACKAGE}.presets",),
    (f"{PACKAGE}.training", f"{PACKAGE}.evaluation"),
    (f"{PACKAGE}.modules", f"{PACKAGE}.objectives", f"{PACKAGE}.envs", f"{PACKAGE}.data"),
    (f"{PACKAGE}.box_actions",),
    (f"{PACKAGE}.action_space",),
    (f"{PACKAGE}.action_distribution", f"{PACKAGE}.state_files"),
    tuple(f"{PACKAGE}.{name}" for name in ("checks", "files", "finite", "keys", "loss_functions", "settings")),
    (f"{PACKAGE}.arguments", f"{PACKAGE}.functional", f"{PACKAGE}.processes"),
    (f"{PACKAGE}.torchrl_internals",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The public face stands between the scripts that use it and the rooms that it gathers.
LEVEL_OF[PACKAGE] = 0.5
OURS = ("examples", "benchmarks", "tests", PACKAGE)
# Import names, torch.utils.tensorboard because it imports tensorboard at once.
OPTIONAL = (
    *("PIL", "gymnasium", "gymnasium_robotics", "hydra", "imageio", "lbforaging", "magent2", "matplotlib", "mlflow"),
    *("mpe2", "mujoco", "omegaconf", "onnx", "onnxruntime", "onnxscript", "pettingzoo", "pygame", "ray", "rware"),
    *("tensorboard", "torch.utils.tensorboard", "tqdm", "vmas", "wandb"),
)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the room that a module of ours lies in: ``matwm_rl.envs.factory`` lies in ``matwm_rl.envs``."""
    return ".".join(module.split(".")[: 2 if module.startswith(PACKAGE) else 1])


def is_within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def imported_modules(node: ast.AST, path: Path, root: Path) -> Iterator[str]:
    """Yield what one import statement imports, as absolute dotted names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            folder = module_name(path.parent / "__init__.py", root).split(".")
            kept = folder[: len(folder) - node.level + 1]
            base = ".".join([*kept, base] if base else kept)
        for alias in node.names:
            # `from matwm_rl import keys` imports a room; `from matwm_rl import WorldModel` the public face.
            submodule = f"{base}.{alias.name}"
            place = root / submodule.replace(".", "/")
            yield submodule if place.is_dir() or place.with_suffix(".py").is_file() else base


def sources(root: Path) -> list[Path]:
    return sorted(path for top in ("examples", "benchmarks", PACKAGE) for path in (root / top).rglob("*.py"))


def upward_imports(root: Path) -> list[str]:
    """List every import that leaves its room in any direction but down, wherever in the file it stands."""
    found = []
    for path in sources(root):
        room = room_of(module_name(path, root))
        where = path.relative_to(root)
        if room not in LEVEL_OF:
            found.append(f"{where}: {room} is on no level; put it on one in {Path(__file__).name}")
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in imported_modules(node, path, root):
                # The room of `tests` or of an unknown module has no level, and nothing may import it.
                target_room = room_of(target)
                if is_within(target, OURS) and target_room != room and LEVEL_OF.get(target_room, -1) <= LEVEL_OF[room]:
                    found.append(f"{where}:{node.lineno}: {room} imports {target}")
    return found


def import_time_nodes(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run on import: all but those in functions and under ``if TYPE_CHECKING``."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from import_time_nodes(node.orelse)
            continue
        yield node
        for block in ("body", "orelse", "finalbody"):
            yield from import_time_nodes(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from import_time_nodes(handler.body)


def optional_imports(root: Path) -> list[str]:
    """List the optional packages that the package imports outside functions."""
    return [
        f"{path.relative_to(root)}:{node.lineno}: {target}"
        for path in sources(root)
        if path.relative_to(root).parts[0] == PACKAGE
        for node in import_time_nodes(ast.parse(path.read_text(encoding="utf-8")).body)
        for target in imported_modules(node, path, root)
        if is_within(target, OPTIONAL)
    ]


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def clean_tree(tmp_path: Path) -> Path:
    """Return a small tree in which every import is as it should be."""
    write(
        tmp_path,
        f"{PACKAGE}/__init__.py",
        "from matwm_rl.training.learner import Learner\nfrom . import keys, presets\n",
    )
    write(tmp_path, f"{PACKAGE}/keys.py", "import torch\n")
    write(tmp_path, f"{PACKAGE}/functional.py", "import torch\n")
    write(tmp_path, f"{PACKAGE}/loss_functions.py", "from matwm_rl.functional import agents_first\n")
    write(tmp_path, f"{PACKAGE}/modules/__init__.py", "from .latent import Latent\n")
    write(tmp_path, f"{PACKAGE}/presets.py", "from matwm_rl.training.learner import Learner\nfrom . import modules\n")
    write(tmp_path, f"{PACKAGE}/modules/latent.py", "from matwm_rl.loss_functions import kl\nfrom .. import keys\n")
    write(tmp_path, f"{PACKAGE}/objectives/actor.py", "from matwm_rl import functional, keys\n")
    write(tmp_path, f"{PACKAGE}/envs/factory.py", "def make():\n    import mpe2\n")
    write(tmp_path, f"{PACKAGE}/training/learner.py", "import matwm_rl.modules\nfrom ..objectives import actor\n")
    write(tmp_path, f"{PACKAGE}/evaluation/returns.py", "from matwm_rl.envs import make\nfrom .. import files\n")
    write(tmp_path, f"{PACKAGE}/files.py", "import os\n")
    write(tmp_path, "examples/simple_tag.py", "import hydra\nfrom matwm_rl import Learner, envs\n")
    return tmp_path


def test_the_checkers_pass_a_clean_tree(clean_tree: Path) -> None:
    assert upward_imports(clean_tree) == []
    assert optional_imports(clean_tree) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("matwm_rl/objectives/critic.py", "from matwm_rl.modules.latent import L", "imports matwm_rl.modules.latent"),
        ("matwm_rl/objectives/critic.py", "from matwm_rl import modules", "imports matwm_rl.modules"),
        ("matwm_rl/objectives/critic.py", "from ..modules import Latent", "imports matwm_rl.modules"),
        ("matwm_rl/objectives/critic.py", "from .. import modules", "imports matwm_rl.modules"),
        ("matwm_rl/objectives/critic.py", "def f():\n    import matwm_rl.envs", "imports matwm_rl.envs"),
        ("matwm_rl/objectives/__init__.py", "from ..data import sampler", "imports matwm_rl.data"),
        ("matwm_rl/envs/model.py", "if TYPE_CHECKING:\n    from matwm_rl.modules import W", "imports matwm_rl.modules"),
        ("matwm_rl/data/sampler.py", "from matwm_rl.training.learner import L", "imports matwm_rl.training.learner"),
        ("matwm_rl/functional.py", "from matwm_rl.data import sampler", "imports matwm_rl.data"),
        ("matwm_rl/evaluation/run.py", "from matwm_rl.training import Learner", "imports matwm_rl.training"),
        ("matwm_rl/training/run.py", "from ..evaluation import evaluate", "imports matwm_rl.evaluation"),
        ("matwm_rl/files.py", "from matwm_rl import evaluation", "imports matwm_rl.evaluation"),
        ("matwm_rl/training/run.py", "from matwm_rl import Learner", "imports matwm_rl"),
        ("matwm_rl/training/run.py", "from matwm_rl import presets", "imports matwm_rl.presets"),
        ("matwm_rl/evaluation/run.py", "from ..presets import paper", "imports matwm_rl.presets"),
        ("matwm_rl/settings.py", "from matwm_rl.action_space import A", "imports matwm_rl.action_space"),
        ("matwm_rl/files.py", "from matwm_rl import loss_functions", "imports matwm_rl.loss_functions"),
        ("matwm_rl/functional.py", "from matwm_rl import loss_functions", "imports matwm_rl.loss_functions"),
        ("matwm_rl/training/run.py", "from examples.simple_tag import main", "imports examples.simple_tag"),
        ("matwm_rl/training/run.py", "import tests.conftest", "imports tests.conftest"),
        ("benchmarks/speed.py", "import examples.simple_tag", "imports examples.simple_tag"),
        ("matwm_rl/helpers.py", "import torch", "matwm_rl.helpers is on no level"),
    ],
)
def test_an_upward_import_is_caught(clean_tree: Path, name: str, text: str, message: str) -> None:
    write(clean_tree, name, text)
    (found,) = upward_imports(clean_tree)
    assert found.startswith(name)
    assert found.split(": ", 1)[1].partition(";")[0].endswith(message)


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("import hydra.core", "hydra.core"),
        ("from tqdm.auto import tqdm", "tqdm.auto"),
        ("from torch.utils.tensorboard import SummaryWriter", "torch.utils.tensorboard"),
        ("try:\n    import vmas\nexcept ImportError:\n    vmas = None", "vmas"),
        ("try:\n    import torch\nexcept ImportError:\n    import PIL", "PIL"),
        ("class A:\n    import mpe2", "mpe2"),
        ("if TYPE_CHECKING:\n    import mpe2\nelse:\n    import pettingzoo", "pettingzoo"),
    ],
)
def test_an_optional_import_is_caught(clean_tree: Path, text: str, package: str) -> None:
    write(clean_tree, f"{PACKAGE}/envs/factory.py", text)
    (found,) = optional_imports(clean_tree)
    assert found.endswith(f": {package}")


def test_imports_run_downwards_only() -> None:
    assert {room_of(module_name(path, ROOT)) for path in sources(ROOT)} == set(LEVEL_OF), "a room has no source"
    assert upward_imports(ROOT) == []


def test_optional_packages_are_imported_in_functions_only() -> None:
    assert optional_imports(ROOT) == []


def test_every_module_imports_without_the_extras() -> None:
    modules = [module_name(path, ROOT) for path in sources(ROOT) if path.relative_to(ROOT).parts[0] == PACKAGE]
    # None in sys.modules makes Python answer `import name` as if the package were not installed.
    hidden = [name for name in OPTIONAL if "." not in name]
    script = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({hidden!r}))\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# -- files of a size to be read --------------------------------------------------------------------------------------

MOST_LINES = 350


def docstring_lines(source: str) -> int:
    """Count the lines of all docstrings, those of constants included."""
    return sum(
        node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


def is_too_long(source: str) -> bool:
    lines = len(source.splitlines())
    return lines > MOST_LINES and docstring_lines(source) <= lines / 2


def test_no_file_is_too_long_unless_most_of_it_is_documentation() -> None:
    paths = [*sources(ROOT), *(ROOT / "tests").rglob("*.py")]
    long = [path for path in paths if is_too_long(path.read_text(encoding="utf-8"))]
    assert not long, f"more than {MOST_LINES} lines, and less than half of them documentation"


def test_long_files_are_found() -> None:
    code = "x = 1\n" * (MOST_LINES + 1)
    assert is_too_long(code) and not is_too_long(code[:-6])
    assert not is_too_long('"""\n' + "words\n" * (MOST_LINES + 1) + '"""\n' + code)
    assert is_too_long("# a comment is no documentation\n" * MOST_LINES + code)
