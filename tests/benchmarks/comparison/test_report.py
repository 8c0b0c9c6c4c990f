"""The documents say what the report says of the stored runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import median

import figures
import pytest
import report
import results as results_module
import tables
from methods import METHODS, PRESET, Reference, configuration
from PIL import Image
from protocol import SEEDS
from results import Results, measures
from sample_efficiency import RESULTS, stored_runs

from matwm_rl.evaluation import find_evaluation
from tests.benchmarks.comparison.stored_grid import (
    CHASED,
    FLEEING_EVADER,
    RANDOM_EVADER,
    REFERENCES,
    full_grid,
    parsed,
    score,
    stored,
    write,
)


def marker(which: str, name: str = "sample-efficiency") -> str:
    return f"<!-- {name}:{which} -->"


BEGIN, END = marker("begin"), marker("end")
NOWHERE = report.Place(Path("README.md"), {})
"""A document without pictures."""


def test_the_command_draws_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_module, "RESAMPLES", 100)
    runs = [run for run in full_grid() if run["environment"] in ("simple_tag", "simple_spread", "simple_push")]
    folder = write(runs, tmp_path / "docs" / "results")
    short_path, long_path = tmp_path / "README.md", tmp_path / "docs" / "README.md"
    first = f"{marker('begin', 'first-run')}former text{marker('end', 'first-run')}"
    text = f"{first}\n\n{BEGIN}\nformer text\n{END}\n\nafter\n"
    evaluation = dict.fromkeys((RANDOM_EVADER.match, FLEEING_EVADER.match, CHASED.match), 12.34)
    first_run = {"seed": 3, "env_steps": 1234, "updates": 5678, "wall_seconds": 601.0, "evaluation_episodes": 70}
    first_run |= {"evaluation": evaluation, "config": {**configuration(PRESET), "run_dir": "runs/today", "seed": 3}}
    monkeypatch.setattr(report, "FIRST_RUN", tmp_path / "first_run.json")
    report.FIRST_RUN.write_text(json.dumps(first_run))
    blocks = (
        report.Block(short_path, "first-run", report.first_run_section),
        report.Block(short_path, "sample-efficiency", report.short_section),
        report.Block(long_path, "sample-efficiency", report.long_section),
    )
    monkeypatch.setattr(report, "BLOCKS", blocks)
    for path in (short_path, long_path):
        path.write_text(text)
    report.main(["--results", str(folder)])
    printed = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"runs", "curves.png", "world_model.png"}
    assert [path.read_text() for path in (short_path, long_path)] == [text, text]

    report.main(["--results", str(folder), "--write"])
    short, long = short_path.read_text(), long_path.read_text()
    assert long == f"{first}\n\n{BEGIN}\n\n{printed.rstrip()}\n\n{END}\n\nafter\n"
    assert "one run, seed 3, 1,234 env steps and 5,678 updates in 10 minutes on one core. Means over 70 ep" in short
    table = parsed(short[short.index("| match") : short.index(marker("end", "first-run"))].strip())
    low, high = REFERENCES[CHASED.match]
    theirs = sorted(low + score("isac", 25_000, seed) * (high - low) for seed in SEEDS)
    assert table[f"{CHASED.title} (lower is better)"] == {
        "match": f"{CHASED.title} (lower is better)",
        "random agents": f"{low}",
        "**MATWM**": "**12.3**",
        "best model-free, 25K": f"{theirs[1]:.1f} ({theirs[0]:.1f} to {theirs[2]:.1f}) ISAC, sampled",
        "scripted": f"{high}",
    }
    first_run["config"]["num_envs"] = 7
    report.FIRST_RUN.write_text(json.dumps(first_run))
    text = report.first_run_section(Results(stored_runs(folder)), NOWHERE)
    assert text.endswith("\n\n**Made with other settings than the present ones**: num_envs: 7, now 4.")
    assert "](results/curves.png)" in long
    assert "](results/world_model.png)" in long
    assert "](docs/results/curves.png)" in short
    assert tables.targets_table(Results(stored_runs(folder))) in short
    assert "Open loop" not in short
    assert "former text" not in short + long.removeprefix(first)
    # Written again, it is the same.
    assert report.insert(long, printed.rstrip(), "sample-efficiency") == long


@pytest.mark.parametrize(
    "text",
    ["none", f"{BEGIN} alone", f"{END} {BEGIN}", f"{BEGIN} {END}" * 2],
)
def test_a_document_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="should have a line <!-- sample-efficiency:begin --> and after it"):
        report.insert(text, "section", "sample-efficiency")


def test_without_runs_the_section_says_so() -> None:
    assert report.long_section(Results([]), NOWHERE).startswith("No runs are stored yet: `python benchmarks/")
    without = [run for run in full_grid() if run["method"] != "matwm"]
    assert report.short_section(Results(without), NOWHERE).startswith(
        "No runs of MATWM are stored yet: `python benchmarks/"
    )
    assert "MAPPO" in report.long_section(Results(without), NOWHERE)


def test_the_documents_are_what_the_command_would_write() -> None:
    results = Results(stored_runs(RESULTS))
    drawn = {name: path for name in ("curves", "world_model") if (path := RESULTS / f"{name}.png").exists()}
    # python benchmarks/comparison/report.py --write mends what follows.
    for document, text in report.updated(results, drawn).items():
        assert document.read_text(encoding="utf-8") == text
    for path in drawn.values():
        with Image.open(path) as picture:
            assert picture.text["Description"] == figures.digest(results.runs)
    learnt = [run for run in results.runs if not isinstance(METHODS[run["method"]], Reference)]
    assert ("curves" in drawn) == bool(learnt)


def test_learning_curves_have_the_stored_references() -> None:
    results = Results(stored_runs(RESULTS))
    drawn = find_evaluation("mpe2/simple_tag_v3").references
    assert set(drawn) == {measure.match for measure in measures("simple_tag")}
    for measure in measures("simple_tag"):
        best = results.best_baseline(measure, 25_000)
        assert best is not None
        method, way = best
        found = {
            "random": results.measured(measure, "random", 0),
            "scripted": results.measured(measure, "scripted", 0),
            "model-free, 25k": results.measured(way, method, 25_000),
        }
        assert drawn[measure.match] == {name: round(median(values.values()), 1) for name, values in found.items()}


def test_what_is_missing_is_a_dash_whatever_is_missing() -> None:
    runs = full_grid()
    generator = random.Random(0)
    for share in (0.02, 0.3, 0.7):
        some = [run for run in runs if generator.random() < share]
        section = report.long_section(Results(some), report.Place(Path("README.md"), {"curves": Path("curves.png")}))
        assert "–" in section
        assert "![Returns of all methods over env steps](curves.png)" in section
        assert "world_model.png" not in section


def test_the_targets_text_tells_the_number_of_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "RESAMPLES", 100)
    for seeds in (3, 4):
        results = Results(full_grid(tuple(range(10, 10 + seeds))))
        for section in (report.long_section, report.short_section):
            assert f"Median (min to max) over {seeds} seeds. In the cross-play" in section(results, NOWHERE)


def test_continuous_environments_are_named_once_there_are_runs() -> None:
    runs = [run for run in full_grid() if run["environment"] in ("simple_tag", "balance")]
    assert "_continuous" not in report.long_section(Results(runs), NOWHERE)
    runs += full_grid(environments=["simple_tag_continuous"])
    text = report.long_section(Results(runs), NOWHERE)
    assert "simple_push, simple_tag_continuous, actions are sampled" in text
    assert "\n\nsimple_tag_continuous:\n\n" in text


def test_runs_of_other_settings_are_named() -> None:
    runs = [run for run in full_grid() if run["environment"] == "simple_tag" and run["method"] in ("matwm", "iql")]
    assert report.other_settings(Results(runs)) == []
    text = "Made with other settings than the present ones"
    assert text not in report.long_section(Results(runs), NOWHERE) + report.short_section(Results(runs), NOWHERE)
    for run in runs:
        if (run["environment"], run["method"]) == ("simple_tag", "iql") and run["seed"] != 11:
            run["settings"] = {**run["settings"], "gamma": 0.5}
    different = "gamma: 0.5, now 0.95 (simple_tag-iql 10 12)"
    assert report.other_settings(Results(runs)) == [different]
    for section in (report.long_section, report.short_section):
        assert f"**{text}**: {different}." in section(Results(runs), NOWHERE)


def test_runs_that_were_trained_on_a_gpu_are_named() -> None:
    runs = [run for run in full_grid() if run["environment"] == "wheel"]
    assert report.on_gpus(Results(runs)) == ""
    for run in runs:
        if run["method"] == "matwm":
            run["made_with"] = {"commit": "1", "torch": "2", "device": "NVIDIA H200"}
    text = "**Trained on NVIDIA H200**: wheel-matwm 10 11 12. All other runs were trained on one core of a CPU."
    assert report.on_gpus(Results(runs)) == text
    assert text in report.short_section(Results(runs), NOWHERE)


def test_environments_that_show_former_seeds_are_named() -> None:
    runs = full_grid()
    assert report.former_runs(Results(runs)).startswith("All seeds and episodes are others than")
    for run in runs:
        former = run["environment"] == "wheel" or run["method"] == "matwm_no_recency"
        if former and run["method"] != "random":
            run["seed"] -= 10
            run["settings"] = json.loads(json.dumps(run["settings"]))
            run["settings"]["protocol"]["evaluation_seed"] = 1_000_003
    text = report.former_runs(Results(runs))
    part = "(MATWM without recency)"
    assert text.endswith(f"still what is shown of simple_tag {part}, simple_spread {part}, wheel.")
    # That the episodes are others is said once, not of every run.
    assert report.other_settings(Results(runs)) == []
    for run in runs:
        run["settings"]["protocol"]["evaluation_seed"] = 1_000_003
    assert "wheel-matwm" not in str(report.other_settings(Results(runs)))
    assert "wheel-random 10" in str(report.other_settings(Results(runs)))


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    runs = [stored("simple_tag", "random", 0, {0: {RANDOM_EVADER.metric: 4.5}})]
    for results in (Results([]), Results(runs)):
        assert report.draw(results, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
    model_free = Results([stored("simple_tag", "iql", 0, {5_000: {RANDOM_EVADER.metric: 5.0}})])
    assert set(report.draw(model_free, tmp_path)) == {"curves"}
