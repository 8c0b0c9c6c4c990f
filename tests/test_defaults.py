"""No default value of a setting stands in two files; and how many settings there are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matwm_rl import presets

ROOT = Path(__file__).resolve().parents[1]

NUM_SETTINGS = 78
"""Of the preset ``paper``, as the documentation quotes it; an encoder or a latent space of another kind has others."""

NOT_GIVEN = {
    "num_envs": "one environment, without a batch dimension",
    "device": "where PyTorch puts tensors",
    "seed": "no seed",
}
"""Arguments of many functions whose default says that nothing was asked for."""

OTHER_MEANING = {
    ("evaluation/gif.py", "record_gif", "episodes"): "to record, not to judge a policy by",
    ("evaluation/open_loop_figure.py", "plot_open_loop", "context_length"): "what the figure shows",
    ("evaluation/open_loop_figure.py", "plot_open_loop", "horizon"): "what the figure shows",
    ("evaluation/open_loop_figure.py", "plot_open_loop", "num_dims"): "of the observation, that the figure shows",
    ("modules/encoders/cnn.py", "CNNEncoder", "depth"): "of convolutions, by the size of images; no setting",
    ("modules/encoders/cnn.py", "CNNDecoder", "depth"): "of convolutions, by the size of images; no setting",
    ("modules/encoders/mlp.py", "MLPEncoder", "fourier_features"): "left out; the paper has none",
    ("modules/transformer.py", "Transformer", "dropout"): "left out; the settings are given by the builder",
    ("modules/world_model.py", "WorldModel", "reencode"): "left out; the settings are given by the builder",
    ("modules/world_model.py", "prefill", "horizon"): "no room for further steps",
    ("modules/world_model.py", "start_from", "horizon"): "no room for further steps",
    ("envs/imagination_model.py", "start_from", "horizon"): "no room for further steps",
    ("modules/imagination.py", "Imagination", "precision"): "that of the weights; the learner gives its own",
    ("training/process.py", "prepare_process", "matmul_precision"): "PyTorch's own: nothing is changed",
}
"""Parameters that share the name of a setting and are another thing, or leave out what the settings turn on."""

SEVERAL = {
    "depth": "of another network each",
    "fourier_features": "of encoder and reward head",
    "num_dims": "of another latent space each",
    "num_envs": "to collect from, and to evaluate in",
    "reward": "the head, and the weight of its loss",
}
"""Names of settings in several dataclasses."""


class Setting(NamedTuple):
    file: str
    owner: str
    name: str
    default: ast.expr | None


def trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def settings(root: Path) -> list[Setting]:
    """Fields of all dataclasses of settings."""
    return [
        Setting(file, node.name, field.target.id, field.value)
        for file, tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Weights"))
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    ]


def with_owner(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions with their names; constructors with those of their classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield (owner if child.name == "__init__" else child.name), child
        yield from with_owner(child, child.name if isinstance(child, ast.ClassDef) else owner)


def parameters(root: Path) -> list[Setting]:
    """Parameters of all functions that have a default."""
    found = []
    for file, tree in trees(root):
        for owner, function in with_owner(tree):
            given = function.args
            positional = [*given.posonlyargs, *given.args]
            pairs = [*zip(reversed(positional), reversed(given.defaults), strict=False)]
            pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
            found += [Setting(file, owner, argument.arg, default) for argument, default in pairs if default is not None]
    return found


def is_literal(default: ast.expr | None) -> bool:
    """Return whether a value is written down; None is none, nor is a reference to where it stands."""
    try:
        return default is not None and ast.literal_eval(default) is not None
    except ValueError:
        return False


def repeated_defaults(root: Path) -> list[Setting]:
    """Parameters in other files with the name of a setting and a default of their own."""
    places: dict[str, set[str]] = {}
    for setting in settings(root):
        places.setdefault(setting.name, set()).add(setting.file)
    return [
        parameter
        for parameter in parameters(root)
        if is_literal(parameter.default) and places.get(parameter.name, set()) - {parameter.file}
    ]


def repeated_settings(root: Path) -> set[str]:
    owners: dict[str, list[str]] = {}
    for setting in settings(root):
        if setting.default is not None:
            owners.setdefault(setting.name, []).append(setting.owner)
    return {name for name, found in owners.items() if len(found) > 1}


def leaves(config: Any, prefix: str = "") -> Iterator[str]:
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def test_no_default_of_a_setting_stands_in_another_file() -> None:
    repeated = [found for found in repeated_defaults(ROOT / "matwm_rl") if found.name not in NOT_GIVEN]
    unknown = [found[:3] for found in repeated if found[:3] not in OTHER_MEANING]
    assert not unknown, "refer to the dataclass (`= ReplayConfig.capacity`) or ask for the value, without a default"
    assert {found[:3] for found in repeated} == set(OTHER_MEANING), "an exception is no longer one"


def test_no_setting_is_defined_twice() -> None:
    assert repeated_settings(ROOT / "matwm_rl") == set(SEVERAL)


def test_the_number_of_settings_is_the_documented_one() -> None:
    names = list(leaves(presets.paper()))
    print(f"{len(names)} settings: {', '.join(names)}")
    assert len(names) == len(set(names)) == NUM_SETTINGS


def test_the_checks_find_what_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "class OneConfig:\n    size: int = 3\n    rate: float = 0.1\n    room: int | None = None\n"
        "def here(size=3): pass\n",
        encoding="utf-8",
    )
    (tmp_path / "two.py").write_text(
        "class TwoConfig:\n    rate: float = 0.1\n"
        "def by_reference(size=OneConfig.size, *, rate): pass\n"
        "def not_given(size=None): pass\n"
        "class Part:\n    def __init__(self, other, size=3, *, room=5): pass\n",
        encoding="utf-8",
    )
    found = [setting[:3] for setting in repeated_defaults(tmp_path)]
    assert found == [("two.py", "Part", "size"), ("two.py", "Part", "room")]
    assert repeated_settings(tmp_path) == {"rate"}
