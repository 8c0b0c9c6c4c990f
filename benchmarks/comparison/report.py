"""Curves and tables of the stored runs of sample_efficiency.py.

python benchmarks/comparison/report.py            # draws curves.png and world_model.png, prints the tables
python benchmarks/comparison/report.py --write    # also puts them into the documents of BLOCKS
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from figures import draw_curves, draw_world_model, label
from methods import LONG_STEPS, METHODS, PRESET, ROOT, Reference, configuration, differences, of_every_run
from protocol import ENVIRONMENTS, FORMER_SEEDS
from results import Results, measures
from sample_efficiency import RESULTS, Run, stored_runs
from tables import (
    STEPS,
    ablations_table,
    aggregate_table,
    first_run_table,
    methods_table,
    minutes_table,
    open_loop_table,
    seconds_table,
    targets_seeds,
    targets_table,
    thousands,
)

from matwm_rl.files import write_text

FIRST_RUN = ROOT / "benchmarks" / "results" / "simple_tag_seed0.json"
"""Summary of a run of the README's first command."""


@dataclass(frozen=True)
class Place:
    """Where a section is written.

    Attributes:
        document: whose folder links are relative to.
        pictures: drawn pictures by name.
    """

    document: Path
    pictures: Mapping[str, Path]

    def link(self, path: Path) -> str:
        """Return a path as the document refers to it."""
        return Path(os.path.relpath(path, self.document.parent)).as_posix()

    def picture(self, name: str, text: str) -> str:
        """Return the Markdown of a picture; empty if it was not drawn."""
        return f"![{text}]({self.link(self.pictures[name])})" if name in self.pictures else ""


# -- sections --------------------------------------------------------------------------------------------------------


def other_settings(results: Results) -> list[str]:
    """Return which settings of stored runs differ from the present ones: ``what differs (its runs)``.

    Without the evaluation seed of former runs, which :func:`former_runs` tells.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for stored in results.runs:
        run = Run(stored["environment"], stored["method"], stored["seed"])
        different = [
            text
            for text in run.other_settings(stored["settings"])
            if not (run.seed in FORMER_SEEDS and text.startswith("protocol.evaluation_seed"))
        ]
        if different:
            runs.setdefault("; ".join(different), []).append(stored)
    return [f"{different} ({_names(stored)})" for different, stored in runs.items()]


def on_gpus(results: Results) -> str:
    """Return a sentence that names the runs that were trained on a GPU; empty without any."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for stored in results.runs:
        device = (stored.get("made_with") or {}).get("device", "cpu")
        if device != "cpu":
            runs.setdefault(device, []).append(stored)
    shown = ". ".join(f"**Trained on {device}**: {_names(stored)}" for device, stored in runs.items())
    return f"{shown}. All other runs were trained on one core of a CPU." if runs else ""


def _names(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return ``simple_tag-matwm 0 1 2, simple_tag-iql 0``: the runs with their seeds."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(f"{run['environment']}-{run['method']}", []).append(str(run["seed"]))
    return ", ".join(f"{name} {' '.join(numbers)}" for name, numbers in seeds.items())


def former_runs(results: Results) -> str:
    """Return a sentence that names the environments that show the seeds and episodes on which settings were chosen."""
    shown = []
    for name in results.environments:
        learnt = {run["method"]: run["seed"] in FORMER_SEEDS for run in results.runs if run["environment"] == name}
        learnt = {method: former for method, former in learnt.items() if not isinstance(METHODS[method], Reference)}
        methods = [label(method) for method, former in learnt.items() if former]
        if methods:
            shown.append(name if len(methods) == len(learnt) else f"{name} ({', '.join(methods)})")
    seeds = ", ".join(map(str, FORMER_SEEDS))
    return (
        f"Settings were chosen on the seeds {seeds} and their episodes, and these are still what is shown of "
        f"{', '.join(shown)}."
        if shown
        else "All seeds and episodes are others than those on which settings were chosen."
    )


NOTHING = "No runs{of} are stored yet: `python benchmarks/comparison/sample_efficiency.py` makes them."


def first_run_section(results: Results, place: Place) -> str:
    """Return the final returns of the README's first command, with those of the stored runs."""
    run = json.loads(FIRST_RUN.read_text(encoding="utf-8"))
    text = (
        "Mean return of the pursuers in mpe2's simple_tag after the README's first command "
        f"([summary]({place.link(FIRST_RUN)})): one run, seed {run['seed']}, {run['env_steps']:,} env steps "
        f"and {run['updates']:,} updates in {run['wall_seconds'] / 60:.0f} minutes on one core. Means over "
        f"{run['evaluation_episodes']} episodes of every match, with sampled actions. The other columns come from the "
        "sample-efficiency comparison."
    )
    shown = {"progress": True}  # what is learnt does not depend on it
    different = _different_text(differences(of_every_run(run["config"] | shown), configuration(PRESET)))
    return "\n\n".join(filter(None, (text, first_run_table(results, run["evaluation"]), different)))


def short_section(results: Results, place: Place) -> str:
    """Return the curves and the targets, once there are runs of MATWM."""
    if not any(run["method"] == "matwm" for run in results.runs):
        return NOTHING.format(of=" of MATWM")
    return _curves_and_targets(results, place)


def _curves_and_targets(results: Results, place: Place) -> str:
    parts = [place.picture("curves", "Returns of all methods over env steps")]
    parts += [_targets_text(results), targets_table(results), on_gpus(results)]
    parts.append(_different_text(other_settings(results)))
    return "\n\n".join(filter(None, parts))


def _different_text(different: Sequence[str]) -> str:
    return f"**Made with other settings than the present ones**: {'; '.join(different)}." if different else ""


def long_section(results: Results, place: Place) -> str:
    """Return all curves and tables."""
    if not results.runs:
        return NOTHING.format(of="")
    environments = results.common_environments(STEPS)
    parts = [
        "`python benchmarks/comparison/sample_efficiency.py` carries out the runs that are not stored yet "
        f"([results]({place.link(RESULTS)})), `python benchmarks/comparison/report.py --write` generates this section.",
        _curves_and_targets(results, place),
        f"**All methods** after {' and '.join(map(thousands, STEPS))} env steps. Random agents and scripts do not "
        "learn. IQL's sampled actions include its exploration at that time of training. Figures after "
        f"{thousands(LONG_STEPS)} env steps are of one seed of the two model-free methods that were best before.",
        *chain.from_iterable((f"{name}:", methods_table(results, name)) for name in results.environments),
        "**One score**: in every environment, 0 is the return of random agents and 1 that of the best model-free "
        f"method after {thousands(LONG_STEPS)} env steps (for cross-play, the mean over its matches). An environment "
        "has no score as long as there is no such run, or none that is better than random agents. Interquartile mean "
        "over all environments and seeds, with a 95% bootstrap interval, stratified by environment (with three seeds "
        "it is too narrow). Environments in which MATWM and all model-free methods have scores: "
        f"{', '.join(environments) or 'none yet'}.",
        aggregate_table(results),
        "**By the clock**: minutes of training on one core, evaluations left out, until a return or a score is "
        "reached; medians over seeds. Between checkpoints, returns are interpolated linearly, before the first one "
        "from those of random agents. “Not in” is followed by the minutes of the whole training. Times are not stored "
        "of older runs.",
        minutes_table(results),
        "**Ablations**: the return without a part minus the return with all parts, seed by seed; median (min to max) "
        f"after {thousands(10_000)} env steps. Negative means that the part helps, except for the evader, where lower "
        "is better.",
        ablations_table(results),
        "**Open loop**: error of MATWM's world model / error of a trivial predictor (last observation, mean reward, "
        "action frequencies), 1, 5 and 10 steps ahead, on fresh episodes of the run's own policy with sampled actions; "
        "medians over seeds. `python benchmarks/comparison/world_model_quality.py runs/NAME/policy.pt` measures one "
        "stored policy.",
        open_loop_table(results),
        place.picture("world_model", "Open-loop errors of the world model over those of trivial predictors"),
        "**CPU seconds** of a run on one core, evaluations included; medians of the runs in which they were measured.",
        seconds_table(results),
    ]
    return "\n\n".join(filter(None, parts))


def _targets_text(results: Results) -> str:
    # Those with continuous actions are named once there are runs.
    known = [name for name, spec in ENVIRONMENTS.items() if not spec.is_continuous or name in results.environments]
    names = ", ".join(name for name in known if measures(name)[0].kind == "sampled")
    return (
        f"Median (min to max) over {targets_seeds(results)}. In the cross-play of {names}, actions are sampled, "
        "because deterministic policies are easy to exploit; in the other environments they are greedy. The next "
        "column has the other action mode, and the standard error of one run over its evaluation episodes (s.e.). For "
        "model-free methods the better mode counts. The figures of tuned BenchMARL 1.5.2 algorithms are greedy, with "
        "the best settings found for each environment, on one or two seeds. Contact is ranked by predicted rewards on "
        "the policy's own episodes, given the true next latent; the next column has the same for next latents sampled "
        f"from the model and for episodes of random and scripted agents. {former_runs(results)}"
    )


# -- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A part of a document that this script writes.

    Attributes:
        document: that has the block between the lines ``<!-- MARKER:begin -->`` and ``<!-- MARKER:end -->``.
        marker: name of the block in the document.
        section: returns the text.
    """

    document: Path
    marker: str
    section: Callable[[Results, Place], str]


BLOCKS = (
    Block(ROOT / "docs" / "results.md", "first-run", first_run_section),
    Block(ROOT / "docs" / "results.md", "sample-efficiency", short_section),
    Block(ROOT / "benchmarks" / "README.md", "sample-efficiency", long_section),
)
"""All generated blocks; the last one is printed."""


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw the pictures that have data; return ``{name: picture}``."""
    drawn = {"curves": draw_curves(results, folder / "curves.png")}
    drawn["world_model"] = draw_world_model(results, folder / "world_model.png")
    return {name: folder / f"{name}.png" for name, figure in drawn.items() if figure is not None}


def insert(text: str, section: str, marker: str) -> str:
    """Replace the text between the lines ``<!-- MARKER:begin -->`` and ``<!-- MARKER:end -->`` of a document.

    Raises:
        ValueError: unless the document has each of them once, in this order.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in rest or end in before + after:
        raise ValueError(f"the document should have a line {begin} and after it a line {end}, once each")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def updated(results: Results, pictures: Mapping[str, Path]) -> dict[Path, str]:
    """Return the text of every document with its blocks up to date."""
    texts: dict[Path, str] = {}
    for block in BLOCKS:
        text = texts.get(block.document) or block.document.read_text(encoding="utf-8")
        section = block.section(results, Place(block.document, pictures))
        texts[block.document] = insert(text, section, block.marker)
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished runs")
    parser.add_argument("--write", action="store_true", help="put the tables into the documents")
    arguments = parser.parse_args(argv)
    results = Results(stored_runs(arguments.results))
    pictures = draw(results, arguments.results)
    print(BLOCKS[-1].section(results, Place(BLOCKS[-1].document, pictures)))
    if arguments.write:
        for document, text in updated(results, pictures).items():
            write_text(document, text)


if __name__ == "__main__":
    main()
