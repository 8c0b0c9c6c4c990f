"""Two versions take turns, each with its own scripts; the rows compare them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import versions
from rows import Row
from versions import NOT_SLOWER, loop_rows, over_baseline, paper_rows, run_paper_parts, run_preset_loop

LOOP = """
import json, os, sys
import package
print("something else first")
print(json.dumps({"updates": 1, "package": os.path.dirname(package.__file__), "arguments": sys.argv[1:]}))
"""
PAPER = """
import json, sys
import package
def preset_against_baseline(threads):
    raise AssertionError("the loop is measured apart")
def main(arguments):
    if OLD:
        assert preset_against_baseline(1) == []
    with open(arguments[arguments.index("--output") + 1], "w") as file:
        json.dump({"rows": [{"case": "one", "value": 1.0, "note": " ".join(arguments)}]}, file)
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def make_version(folder: Path, *, old: bool) -> Path:
    """A checkout whose scripts say how they were called."""
    scripts = folder / "benchmarks" if old else folder / "benchmarks" / "speed"
    scripts.mkdir(parents=True)
    (folder / "package.py").touch()
    (scripts / "preset_loop.py").write_text(LOOP)
    (scripts / "throughput.py").write_text(f"OLD = {old}\n{PAPER}")
    return folder


@pytest.mark.parametrize("old", [False, True])
def test_each_version_runs_its_own_loop(tmp_path: Path, old: bool) -> None:
    version = make_version(tmp_path, old=old)
    result = run_preset_loop(version, seconds=0.5, threads=2, overrides=["seed=3"])
    configuration = [str(version / "examples" / "conf")] if old else []
    assert result["arguments"] == [*configuration, "--seconds", "0.5", "--threads", "2", "seed=3"]


@pytest.mark.parametrize("old", [False, True])
def test_each_version_measures_its_own_paper_parts(tmp_path: Path, old: bool) -> None:
    (row,) = run_paper_parts(make_version(tmp_path, old=old), threads=1)
    assert row["note"].startswith("--output" if old else "--parts paper --output")
    assert row["note"].endswith("--threads 1")


@pytest.mark.slow
def test_the_loop_of_this_version_runs() -> None:
    small = [
        "init_random_steps=100",
        "world_model_warmup=1",
        "num_envs=2",
        "world_model.hidden_size=16",
        "replay.sequences=4",
        "replay.starts_per_agent=2",
    ]
    result = run_preset_loop(versions.ROOT, seconds=0.2, threads=1, overrides=small)
    assert result["updates"] > 0
    assert result["updates"] % 4 == 0
    assert result["seconds"] >= 0.2
    assert 0 < result["environment"] + result["collecting"] + result["replay"] < result["seconds"]


def test_the_package_of_another_version_is_refused(tmp_path: Path) -> None:
    version = make_version(tmp_path / "version", old=False)
    (version / "benchmarks" / "speed" / "preset_loop.py").write_text("""print('{"package": "/elsewhere"}')""")
    with pytest.raises(RuntimeError, match=f"measured the package of /elsewhere instead of {version}"):
        run_preset_loop(version, seconds=0.1, threads=1)


def test_a_failing_loop_says_why(tmp_path: Path) -> None:
    version = make_version(tmp_path / "version", old=False)
    (version / "benchmarks" / "speed" / "preset_loop.py").write_text("raise SystemExit('the reason')")
    with pytest.raises(RuntimeError, match=f"failed in {version}:\nthe reason"):
        run_preset_loop(version, seconds=0.1, threads=1)


def test_a_version_without_scripts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"expected preset_loop.py in benchmarks/speed or benchmarks of {tmp_path}"):
        run_preset_loop(tmp_path, seconds=0.1, threads=1)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_baseline_is_a_folder_or_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "file").write_text("old")
    for command in ("init -q", "add file", "-c user.name=n -c user.email=e commit -q -m m"):
        subprocess.run(["git", *command.split()], cwd=repository, check=True)
    (repository / "file").write_text("new")
    with versions.versions(str(repository)) as folders:
        assert folders == {"now": versions.ROOT, "baseline": repository}
    with versions.versions(None) as folders:
        assert folders == {"now": versions.ROOT}
    (tmp_path / "folder").mkdir()
    versions.check_out("HEAD", tmp_path / "folder", repository)
    assert (tmp_path / "folder" / "file").read_text() == "old"
    unknown = "0" * 40
    with pytest.raises(ValueError, match=f"cannot check out {unknown}: .*{unknown}"):
        versions.check_out(unknown, tmp_path / "folder", repository)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="git is not installed"), versions.versions("HEAD"):
        pass


def test_versions_take_turns_in_the_loop() -> None:
    calls: list[str] = []

    def loop(name: str, updates: int) -> dict[str, Any]:
        calls.append(name)
        return {"updates": updates, "seconds": 10.0, "environment": 1.0, "collecting": 0.5, "replay": 0.25}

    loops = {"now": lambda: loop("now", 30), "baseline": lambda: loop("baseline", 12)}
    speed, ratio, outside, environment = loop_rows(loops, rounds=2)
    assert calls == ["now", "baseline"] * 2
    assert (speed.value, ratio.value, outside.value, environment.value) == (3.0, 2.5, 7.5, 10.0)
    assert (ratio.target, outside.target) == (NOT_SLOWER, 10.0)
    assert [row.value for row in loop_rows({"now": loops["now"]}, rounds=1)] == [3.0, 7.5, 10.0]


def test_versions_take_turns_in_the_paper_parts() -> None:
    def run(name: str, values: list[float]) -> Any:
        def parts() -> list[dict[str, Any]]:
            calls.append(name)
            row = Row(case="update", value=values.pop(0), unit="s", better="lower", seconds=1.0, spread=(0.5, 2.0))
            ratio, more = Row(case="flatness", value=1.0, unit="ratio"), Row(case=f"in {name}", value=1.0, unit="s")
            # As they come from a file.
            return json.loads(json.dumps([part.as_dict() for part in (row, ratio, more)]))

        return parts

    calls: list[str] = []
    rows = paper_rows({"now": run("now", [9.0, 2.0, 1.0]), "baseline": run("baseline", [4.0, 3.0, 7.0])}, rounds=3)
    assert calls == ["now", "baseline"] * 3
    assert [(row.case, row.value) for row in rows] == [
        ("update", 2.0),
        ("update, speed over the baseline", 2.0),
        ("flatness", 1.0),
        ("in now", 1.0),
    ]
    assert rows[0] == Row(case="update", value=2.0, unit="s", better="lower", seconds=1.0, spread=(0.5, 2.0))


@pytest.mark.parametrize(("better", "value", "met"), [("lower", 2.2, False), ("higher", 2.2, True)])
def test_faster_is_above_one_whatever_the_unit(better: str, value: float, met: bool) -> None:
    ratio = over_baseline(Row(case="case", value=value, unit="u", better=better), 2.0)
    assert ratio.value == pytest.approx(2.0 / 2.2 if better == "lower" else 1.1)
    assert ratio.met is met
    assert ratio.note == "baseline: 2 u"
