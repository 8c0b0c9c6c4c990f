"""The script that loads corrupted files sees what must not happen, and does not see it."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import corrupt_files
import pytest
from corrupt_files import BAD, KINDS, OUTPUT, Kind, Loaded, load, outcome
from corruptions import Case, flip, pickle_in_place


def test_no_corrupted_file_is_accepted() -> None:
    result = corrupt_files.run(23, seed=1)
    assert result["bad"] == [] and sum(result["totals"].values()) == 23
    assert result["totals"]["refused"] >= 20


def test_the_stored_figures_are_of_a_thousand_files_and_clean() -> None:
    result = json.loads(OUTPUT.read_text())
    assert result["files"] >= 1000 and not result["bad"]
    assert not any(result["totals"][name] for name in BAD)


@pytest.fixture(scope="module")
def target() -> Loaded:
    return Loaded(1)


def test_what_must_not_happen_is_seen(tmp_path: Path, target: Loaded) -> None:
    folder, marker = tmp_path / "run", tmp_path / "marker"
    folder.mkdir()
    target.save(folder)
    policy = KINDS["policy"]
    expected = load(policy, folder, target)
    assert outcome(policy, folder, marker, target, expected)[0] == "loaded as saved"
    case = Case(folder, folder, "policy.pt", marker, random.Random(0))
    flip(case)
    assert outcome(policy, folder, marker, target, expected)[0] == "refused"

    def found(read) -> str:
        return outcome(Kind("policy.pt", read), folder, marker, target, expected)[0]

    def refuse(folder: Path, target: Loaded) -> None:
        target.learner.updates += 1
        raise ValueError(folder)

    assert found(lambda folder, _: {"a": 1}) == "loaded as something else"
    assert found(lambda folder, _: (folder / "new").write_text("")) == "changed files"
    assert found(lambda folder, _: [][0]) == "unclear error"
    assert found(refuse) == "changed what it was loaded into"
    pickle_in_place(case)
    assert found(lambda folder, _: pickle.loads((folder / "policy.pt").read_bytes())) == "ran code"
