"""The grid runs what is not finished, keeps what is, and loses nothing when a run fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import pytest
import sample_efficiency as grid
import torch
from methods import Matwm
from processes import held
from protocol import Environment
from sample_efficiency import Run

from matwm_rl.envs import make_env
from matwm_rl.evaluation import RandomActions
from matwm_rl.modules import WorldModelPolicy
from matwm_rl.training import load_policy
from tests.benchmarks.comparison.stubs import SPREAD, TINY, Stub, start, table

# -- the grid ----------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_written_and_not_run_again(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    all_runs = ["first-stub-0", "second-stub-0", "first-part-0", "first-stub-1", "second-stub-1", "first-part-1"]
    assert start(tmp_path, "--seeds", "0", "1") == all_runs
    assert sorted(path.stem for path in (tmp_path / "runs").iterdir()) == sorted(all_runs)
    stored = json.loads((tmp_path / "runs" / "second-stub-1.json").read_text())
    assert stored["settings"].pop("protocol")["env"] == "mock"
    assert {name: stored[name] for name in ("environment", "method", "seed", "settings")} == {
        "environment": "second",
        "method": "stub",
        "seed": 1,
        "settings": {"setting": 0.5, "nested": {"sizes": [1, 2]}},
    }
    metrics = {f"return/{kind}{se}" for kind in ("greedy", "sampled") for se in ("", "/se")}
    assert {steps: set(found) for steps, found in stored["figures"].items()} == {"10": metrics, "20": metrics}
    rows = table(tmp_path)
    assert len(rows) == len(all_runs) * 2 * len(metrics)
    found = {(r["environment"], r["method"], r["seed"], r["env_steps"], r["metric"]): float(r["value"]) for r in rows}
    assert found["second", "stub", "1", "20", "return/greedy"] == stored["figures"]["20"]["return/greedy"]

    capsys.readouterr()
    assert start(tmp_path, "--seeds", "0", "1") == []
    assert capsys.readouterr().out.count(" finished\n") == len(all_runs)
    # One lost run is made again, the others are left alone.
    (tmp_path / "runs" / "first-stub-1.json").unlink()
    assert start(tmp_path, "--seeds", "0", "1") == ["first-stub-1"]
    assert start(tmp_path, "--seeds", "2", "--methods", "stub") == ["first-stub-2", "second-stub-2"]


def test_named_methods_run_where_they_are_asked_to(tmp_path: Path, stubs: dict[str, Any]) -> None:
    assert start(tmp_path, "--seeds", "0", "--environments", "second") == ["second-stub-0"]
    assert start(tmp_path, "--seeds", "0", "--environments", "second", "--methods", "part") == ["second-part-0"]


def test_changed_settings_are_told_and_run_again_only_if_asked(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--seeds", "0", "--environments", "first", "--methods", "stub")
    start(tmp_path, *asked)
    stubs["stub"] = Stub(setting=0.7)
    capsys.readouterr()
    assert start(tmp_path, *asked) == []
    said = "finished with other settings (--replace runs it again): setting: 0.5, now 0.7"
    assert said in capsys.readouterr().out
    assert start(tmp_path, *asked, "--replace", "--list") == []
    assert json.loads((tmp_path / "runs" / "first-stub-0.json").read_text())["settings"]["setting"] == 0.5
    assert start(tmp_path, *asked, "--replace") == ["first-stub-0"]
    assert json.loads((tmp_path / "runs" / "first-stub-0.json").read_text())["settings"]["setting"] == 0.7
    assert start(tmp_path, *asked, "--replace") == []


def test_runs_of_other_lengths_are_stored_apart(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--seeds", "0", "--environments", "first", "--methods", "stub", "--steps", "10")
    assert start(tmp_path, *asked) == ["first-stub-0"]
    run = json.loads((tmp_path / "runs" / "first-stub-0.json").read_text())
    assert list(run) == ["environment", "method", "seed", "core_seconds", "made_with", "settings", "figures"]
    assert [*run["figures"]] == ["10"]
    assert run["settings"]["protocol"]["total_steps"] == 10
    capsys.readouterr()
    assert start(tmp_path, *asked) == []
    assert capsys.readouterr().out.startswith(f"{'first-stub-0':48s} finished\n")
    for refused, because in (
        ("9", "--steps must reach the first evaluation, after 10 env steps; got 9"),
        ("20", "name a"),
    ):
        with pytest.raises(SystemExit):
            grid.main(["--steps", refused])
        assert because in capsys.readouterr().err


def test_the_process_of_a_run_is_told_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def noted(command: list[str], stop: Event) -> str:
        commands.append(command)
        return "done"

    monkeypatch.setattr(grid, "run_apart", noted)
    for run in (Run("simple_tag", "iql", 1), Run("simple_tag", "iql", 1, 10_000)):
        assert grid.carry_out_apart(run, Path("results"), Path("scratch"), Event()) == "done"
    assert commands[1] == [*commands[0], "--steps", "10000"]


@pytest.mark.parametrize("method", ["matwm", "matwm_no_recency", "iql", "iql_100k"])
def test_a_length_shortens_all_methods(method: str) -> None:
    short = Run("simple_tag", method, 0, 5_000)
    spec = grid.METHODS[method]
    assert (spec.steps(short.spec), spec.checkpoints(short.spec)) == (5_000, [5_000])
    assert Run("simple_tag", method, 0).spec is grid.ENVIRONMENTS["simple_tag"]


def test_a_failing_run_loses_no_other(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stubs["stub"] = Stub(fails=0)
    with pytest.raises(SystemExit, match="2 of 6 runs failed"):
        start(tmp_path, "--seeds", "0", "1")
    said = capsys.readouterr()
    assert "first-stub-0 failed\nthe stub fails" in said.out
    assert {(row["method"], row["seed"]) for row in table(tmp_path)} == {("stub", "1"), ("part", "0"), ("part", "1")}
    # Started again, it does what is missing, and no more.
    stubs["stub"] = Stub()
    assert start(tmp_path, "--seeds", "0", "1") == ["first-stub-0", "second-stub-0"]
    assert len(table(tmp_path)) == 6 * 2 * 4


def test_a_run_without_all_its_checkpoints_is_not_stored(
    tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Short(Stub):
        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Callable[..., None]) -> None:
            on_checkpoint(10, RandomActions())

    stubs["stub"] = Short()
    with pytest.raises(SystemExit, match="2 of 3 runs failed"):
        start(tmp_path, "--seeds", "0")
    assert "expected figures of first-stub-0 after [20] env steps too, got those after [10]" in capsys.readouterr().out
    assert [path.stem for path in (tmp_path / "runs").iterdir()] == ["first-part-0"]


@pytest.mark.parametrize("name", grid.ENVIRONMENTS)
def test_methods_are_evaluated_where_the_tables_look(name: str) -> None:
    environment = grid.ENVIRONMENTS[name]
    expected = {method: spec.checkpoints(environment) for method, spec in grid.METHODS.items()}
    assert expected["matwm"] == expected["isac"] == [5_000, 10_000, 15_000, 20_000, 25_000]
    assert expected["isac_100k"] == [25_000, 50_000, 75_000, 100_000]
    assert expected["matwm_no_recency"] == [5_000, 10_000]
    assert expected["random"] == [0]
    assert expected["scripted"] == ([0] if environment.script else [])


def test_listing_runs_nothing(tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, "--list", "--seeds", "3") == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.count("to do") == 3


def test_no_jobs_are_refused(tmp_path: Path, stubs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start(tmp_path, "--jobs", "0")
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


# -- tables ------------------------------------------------------------------------------------------------------------


def stored(method: str, seed: int, value: float) -> dict[str, Any]:
    figures = {"10": {"return/greedy": value, "return/greedy/se": 9.0}, "5": {"return/greedy": -value}}
    run = {"environment": "first", "method": method, "seed": seed}
    return {**run, "core_seconds": 1, "settings": {"of": method}, "figures": figures}


def test_a_summary_has_medians_and_ranges_over_seeds(tmp_path: Path, stubs: dict[str, Any]) -> None:
    values = [4.0, 1.0, 2.5, 8.0]
    runs = [stored("stub", seed, value) for seed, value in enumerate(values, 10)]
    runs += [stored("part", 0, 3.0)]
    folder = tmp_path / "runs"
    folder.mkdir()
    unknown = {**stored("stub", 0, 1.0), "method": "no longer there"}
    for index, run in enumerate([*reversed(runs), unknown]):
        (folder / f"{index}.json").write_text(json.dumps(run))
    assert grid.stored_runs(tmp_path) == runs
    grid.write_tables(tmp_path)
    assert len(table(tmp_path)) == 5 * 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["first"]
    assert summary["first"]["stub"] == {
        "seeds": [10, 11, 12, 13],
        "settings": {"of": "stub"},
        "figures": {
            "5": {"return/greedy": [-median(values), -8.0, -1.0]},
            "10": {"return/greedy": [median(values), 1.0, 8.0]},
        },
    }
    assert summary["first"]["part"]["figures"]["10"]["return/greedy"] == [3.0, 3.0, 3.0]
    # Former seeds are in no median with others.
    former = stored("stub", 1, 99.0)
    (folder / "former.json").write_text(json.dumps(former))
    assert grid.stored_runs(tmp_path) == [former, *runs]
    assert grid.summarise(grid.stored_runs(tmp_path)) == summary


def test_the_stored_tables_are_those_of_the_stored_runs(tmp_path: Path) -> None:
    shutil.copytree(grid.RESULTS / "runs", tmp_path / "runs")
    # Every start of benchmarks/comparison/sample_efficiency.py does the same to the stored ones.
    grid.write_tables(tmp_path)
    for name in ("results.csv", "summary.json"):
        assert (grid.RESULTS / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_stored_runs_have_all_their_checkpoints() -> None:
    for run in grid.stored_runs(grid.RESULTS):
        expected = grid.METHODS[run["method"]].checkpoints(grid.ENVIRONMENTS[run["environment"]])
        assert [*map(int, run["figures"])] == expected, (run["environment"], run["method"], run["seed"])


@pytest.mark.parametrize("method", grid.METHODS)
def test_settings_survive_being_stored(method: str) -> None:
    run = Run("simple_spread", method, 0)
    settings = json.loads(json.dumps(run.settings()))
    assert run.other_settings(settings) == []
    assert run.other_settings({**settings, "new": {"one": 1}}) == ["new.one: 1, now None"]


# -- one run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["matwm", "iql", "random"])
def test_runs_judged_by_another_protocol_are_told(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("simple_tag", method, 0)
    stored = json.loads(json.dumps(run.settings()))
    shorter = replace(grid.ENVIRONMENTS["simple_tag"], episodes=10)
    monkeypatch.setitem(grid.ENVIRONMENTS, "simple_tag", shorter)
    assert run.other_settings(stored) == ["protocol.episodes: 100, now 10"]


def test_a_run_tells_what_it_was_made_with_and_what_it_took(
    tmp_path: Path, stubs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Training(Stub):
        """Is trained, and killed before its evaluation if it fails."""

        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Any) -> None:
            folder.mkdir(exist_ok=True)
            (folder / "summary.json").touch()
            super().train(environment, seed, folder, on_checkpoint)

    def run() -> dict[str, Any]:
        grid.carry_out(Run("first", "stub", 0), tmp_path, tmp_path / "scratch")
        return json.loads((tmp_path / "runs" / "first-stub-0.json").read_text())

    commit = grid._commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", commit)
    stubs["stub"] = Training(fails=0)
    monkeypatch.setattr(grid, "_commit", lambda: "earlier")
    with pytest.raises(RuntimeError, match="the stub fails"):
        run()
    stubs["stub"] = Training()
    monkeypatch.setattr(grid, "_commit", lambda: "later")
    reused = run()
    assert reused["made_with"] == {"commit": "earlier", "torch": torch.__version__, "device": "cpu"}
    # Of a training that an earlier attempt began, the seconds are not known.
    assert reused["core_seconds"] is None
    (folder,) = (path for path in (tmp_path / "scratch").iterdir() if path.is_dir())
    shutil.rmtree(folder)
    anew = run()
    assert (anew["made_with"]["commit"], anew["core_seconds"]) == ("later", 0)
    # A training that somebody else has put there.
    folder.with_name(f"{folder.name}.made_with.json").unlink()
    assert run()["made_with"] is None


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path, stubs: dict[str, Any]) -> None:
    folders = []

    class Noting(Stub):
        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Any) -> None:
            folders.append(folder)
            super().train(environment, seed, folder, on_checkpoint)

    def run(seed: int) -> None:
        grid.carry_out(Run("first", "stub", seed), tmp_path, tmp_path / "scratch")

    stubs["stub"] = Noting()
    run(0)
    with held(folders[0]):
        with pytest.raises(RuntimeError, match=f"another process trains in {folders[0]}: wait"):
            run(0)
        run(1)
    run(0)
    assert [folder.name[:12] for folder in folders] == ["first-stub-0", "first-stub-1", "first-stub-0"]


def test_other_settings_train_in_another_folder(tmp_path: Path, stubs: dict[str, Any]) -> None:
    folders = []

    @dataclass
    class Noting(Stub):
        def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Any) -> None:
            folders.append(folder.name)
            super().train(environment, seed, folder, on_checkpoint)

    for setting in (0.5, 0.7, 0.5):
        stubs["stub"] = Noting(setting)
        grid.carry_out(Run("first", "stub", 0), tmp_path, tmp_path / "scratch")
    first, second, third = folders
    assert first == third != second
    assert all(name.startswith("first-stub-0-") for name in folders)


def test_matwm_is_trained_evaluated_and_its_world_model_measured(
    tmp_path: Path, stubs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "ENVIRONMENTS", {"spread": SPREAD})
    monkeypatch.setattr(grid, "QUALITY_EPISODES", 10)
    stubs["matwm"] = Matwm(TINY)
    grid.carry_out(Run("spread", "matwm", 1), tmp_path, tmp_path / "scratch")
    run = json.loads((tmp_path / "runs" / "spread-matwm-1.json").read_text())
    assert list(run["figures"]) == ["60"]
    metrics = run["figures"]["60"]
    assert {"return/greedy", "return/sampled", "open_loop/teammate/10", "open_loop/reward/1/trivial"} <= set(metrics)
    assert -100 < metrics["return/greedy"] < 0
    # Of the training, without the evaluations before and after, and without the start of its process.
    assert 0 < metrics["core_seconds"] < run["core_seconds"]
    assert run["settings"]["world_model"]["latent"] == {"kind": "GaussianLatentConfig", "num_dims": 8}
    assert "seed" not in run["settings"]
    # What was stored is what the policy of that time does.
    (folder,) = (path for path in (tmp_path / "scratch").iterdir() if path.is_dir())
    policy = load_policy(folder / "policies" / "00000060.pt", layout=make_env(SPREAD.env).layout)
    assert isinstance(policy, WorldModelPolicy)
    torch.manual_seed(9)
    again = grid.evaluate_policy(SPREAD, policy)
    assert run["figures"]["60"]["return/sampled"] == pytest.approx(again["return/sampled"], rel=1e-4)
