"""Curves and tables of the stored runs of sample_efficiency.py.

python benchmarks/sample_efficiency_report.py            # draws curves.png and world_model.png, prints the tables
python benchmarks/sample_efficiency_report.py --write    # also puts them into README.md and benchmarks/README.md
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from methods import ROOT, configuration, of_every_run
from protocol import ENVIRONMENTS
from sample_efficiency import RESULTS, Run, differences, stored_runs
from sample_efficiency_figures import draw_curves, draw_world_model
from sample_efficiency_results import Results, measures
from sample_efficiency_tables import (
    STEPS,
    ablations_table,
    aggregate_table,
    first_run_table,
    methods_table,
    open_loop_table,
    seconds_table,
    targets_seeds,
    targets_table,
    thousands,
)

from matwm_rl.training.files import write_text

SHORT, LONG = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
"""Documents with sections between markers, see :func:`insert`."""
FIRST_RUN = ROOT / "benchmarks" / "results" / "simple_tag_cpu_seed0.json"
"""What the README's first command had in the end."""

# -- sections --------------------------------------------------------------------------------------------------------


def other_settings(results: Results) -> list[str]:
    """Which runs are of other settings than the present ones, and of which: ``what differs (its runs)``."""
    runs: dict[str, list[str]] = {}
    for stored in results.runs:
        run = Run(stored["environment"], stored["method"], stored["seed"])
        for different in run.other_settings(stored["settings"]):
            runs.setdefault(different, []).append(str(run))
    return [f"{different} ({', '.join(names)})" for different, names in runs.items()]


NOTHING = "No runs{of} are stored yet: `python benchmarks/sample_efficiency.py` makes them."


def first_run_section(results: Results, run: Mapping[str, Any]) -> str:
    """What the README's first command had in the end, beside the stored runs."""
    text = (
        "Mean return of the pursuers in mpe2's simple_tag, trained by the first command above "
        f"([summary]({_relative(FIRST_RUN, SHORT)})): `cpu` preset, seed {run['seed']}, {run['env_steps']:,} env steps "
        f"and {run['updates']:,} updates in {run['wall_seconds'] / 60:.0f} minutes on one core, one run; "
        f"{run['evaluation_episodes']} episodes of every match, actions sampled. The other columns are of the "
        "comparison below."
    )
    different = _different_text(differences(of_every_run(run["config"]), configuration()))
    return "\n\n".join(filter(None, (text, first_run_table(results, run["evaluation"]), different)))


def short_section(results: Results, pictures: Mapping[str, str]) -> str:
    """Curves and targets, once there is something of MATWM to show."""
    if not any(run["method"] == "matwm" for run in results.runs):
        return NOTHING.format(of=" of MATWM")
    return _curves_and_targets(results, pictures)


def _curves_and_targets(results: Results, pictures: Mapping[str, str]) -> str:
    parts = [_picture(pictures, "curves", "Returns of all methods over env steps")]
    parts += [_targets_text(results), targets_table(results), _other_settings_text(results)]
    return "\n\n".join(filter(None, parts))


def _other_settings_text(results: Results) -> str:
    return _different_text(other_settings(results))


def _different_text(different: Sequence[str]) -> str:
    return f"**Made with other settings than the present ones**: {'; '.join(different)}." if different else ""


def long_section(results: Results, pictures: Mapping[str, str]) -> str:
    """Everything."""
    if not results.runs:
        return NOTHING.format(of="")
    environments = results.common_environments(STEPS)
    parts = [
        "`python benchmarks/sample_efficiency.py` runs what is not stored yet ([results](results/sample_efficiency)), "
        "`python benchmarks/sample_efficiency_report.py --write` makes this section and the README's.",
        _curves_and_targets(results, pictures),
        f"**All methods**, {' and '.join(map(thousands, STEPS))} env steps; random agents and scripts do not learn. "
        "IQL's sampled actions explore as they do in training at that time.",
        *chain.from_iterable((f"{name}:", methods_table(results, name)) for name in ENVIRONMENTS),
        "**One score**: in every environment random agents have 0 and the script has 1 (of cross-play, the mean over "
        "its matches). Interquartile mean over all environments and seeds, with the 95% interval of a bootstrap "
        "stratified by environment (scipy; of three seeds it is too narrow). Environments that all methods have "
        f"played: {', '.join(environments) or 'none yet'}.",
        aggregate_table(results),
        "**Ablations**: the return without a part less that with all of them, seed by seed, median (min to max) after "
        f"{thousands(10_000)} env steps. What is negative was lost, but for the evader, where lower is better.",
        ablations_table(results),
        "**Open loop**: error of MATWM's world model / of the trivial predictor (last observation, mean reward, action "
        "frequencies) on fresh episodes of its own policy with sampled actions, 1, 5 and 10 steps ahead, over "
        "training; medians. `python benchmarks/world_model_quality.py runs/NAME/policy.pt` measures one stored policy.",
        open_loop_table(results),
        _picture(pictures, "world_model", "Open-loop errors of the world model over those of trivial predictors"),
        "**Seconds of a core** that a run took, evaluations included; medians of the runs where they were measured.",
        seconds_table(results),
    ]
    return "\n\n".join(filter(None, parts))


def _targets_text(results: Results) -> str:
    seeds = targets_seeds(results)
    names = " and ".join(name for name in ENVIRONMENTS if measures(name)[0].kind == "sampled")
    return (
        f"Median (min to max) over {seeds}. In the cross-play of {names} actions are sampled, since whoever "
        "always does the same is easily foreseen; elsewhere they are greedy. The other way stands beside, with the "
        "standard error of one run over its evaluation's episodes; of model-free methods the better way counts. What "
        "was seen elsewhere was greedy, and of the best settings for each environment. Contact is ranked on the "
        "policy's own episodes, from what really followed; beside it, from a next latent drawn from the model, and on "
        "episodes of random and scripted agents. The settings of MATWM were chosen on these seeds and episodes."
    )


def _picture(pictures: Mapping[str, str], name: str, text: str) -> str:
    return f"![{text}]({pictures[name]})" if name in pictures else ""


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw what there is to draw; ``{name: picture}``."""
    drawn = {"curves": draw_curves(results, folder / "curves.png")}
    drawn["world_model"] = draw_world_model(results, folder / "world_model.png")
    return {name: folder / f"{name}.png" for name, figure in drawn.items() if figure is not None}


def links(pictures: Mapping[str, Path], document: Path) -> dict[str, str]:
    """Pictures as a document refers to them."""
    return {name: _relative(path, document) for name, path in pictures.items()}


def _relative(path: Path, document: Path) -> str:
    return Path(os.path.relpath(path, document.parent)).as_posix()


def insert(text: str, section: str, name: str = "sample-efficiency") -> str:
    """Replace what a document has between the lines ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Raises:
        ValueError: if it does not have each of them once, in their order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in rest or end in before + after:
        raise ValueError(f"the document should have a line {begin} and after it a line {end}, once each")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def updated(document: Path, results: Results, pictures: Mapping[str, Path]) -> str:
    """A document's text with its sections as they should be now."""
    text, linked = document.read_text(encoding="utf-8"), links(pictures, document)
    if document == LONG:
        return insert(text, long_section(results, linked))
    first_run = json.loads(FIRST_RUN.read_text(encoding="utf-8"))
    return insert(insert(text, short_section(results, linked)), first_run_section(results, first_run), "first-run")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished runs")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into the documents")
    arguments = parser.parse_args(argv)
    results = Results(stored_runs(arguments.results))
    pictures = draw(results, arguments.results)
    print(long_section(results, links(pictures, LONG)))
    if arguments.write:
        for document in (SHORT, LONG):
            write_text(document, updated(document, results, pictures))


if __name__ == "__main__":
    main()
