"""Compare docs/presets.md with the presets: where `vectors` departs from `paper`, and which settings the paper has."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import is_dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

from matwm_rl import presets
from matwm_rl.settings import entry_names

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "presets.md").read_text(encoding="utf-8")
SORTS = {"size", "learning rate", "speed", "run", "method"}


def as_written(value: Any) -> str:
    """A value as on the command line; a part by its kind."""
    if is_dataclass(value):
        return type(value).__name__
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value.value if isinstance(value, Enum) else value)


def entries(config: presets.TrainConfig) -> dict[str, str]:
    return {name: as_written(attrgetter(name)(config)) for name in entry_names(config)}


def departures() -> dict[str, tuple[str, str]]:
    """All entries that differ, with both values; a dash where a preset has no such entry."""
    paper, vectors = entries(presets.paper()), entries(presets.vectors())
    both = {name: (paper.get(name, "–"), vectors.get(name, "–")) for name in paper | vectors}
    return {name: (one, other) for name, (one, other) in both.items() if one != other}


def table(heading: str) -> list[list[str]]:
    """Rows of a section's table, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]


def test_the_table_holds_every_departure_with_both_values_and_nothing_else() -> None:
    rows = table("Where `vectors` departs from `paper`")
    written = {name.strip("`"): (one.strip("`"), other.strip("`")) for name, one, other, _, _ in rows}
    assert written == departures()
    assert len(rows) == len(written), "an entry has two rows"
    assert all(re.fullmatch("`[a-z_.]+`", name) and why for name, _, _, _, why in rows)


def test_the_departures_are_counted() -> None:
    counts = Counter(sort for _, _, _, sort, _ in table("Where `vectors` departs from `paper`"))
    assert set(counts) == SORTS
    others = counts.total() - counts["size"] - counts["learning rate"]
    assert f"`vectors` departs from `paper` in {counts.total()} entries." in PAGE
    assert (
        f"Besides sizes and learning rates, {others} are left: "
        f"{counts['method']} of the method, {counts['speed']} of speed, {counts['run']} of a run."
    ) in PAGE


def test_every_setting_of_paper_has_its_source() -> None:
    config = presets.paper()
    settings = [name for name in entry_names(config) if not is_dataclass(attrgetter(name)(config))]
    rows = table("Which settings the paper has")
    listed = [re.findall("`([^`]+)`", names) for _, _, names in rows]
    assert sorted(sum(listed, [])) == sorted(settings)
    assert [int(number) for _, number, _ in rows] == [len(names) for names in listed]
    assert f"`paper()` has {len(settings)} settings;" in PAGE
