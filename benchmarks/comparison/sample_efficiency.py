"""MATWM against model-free methods at equal environment steps.

    python benchmarks/comparison/sample_efficiency.py --jobs 2    # everything that is not finished yet
    python benchmarks/comparison/sample_efficiency.py --methods matwm ippo --environments simple_tag --seeds 0 1 2
    python benchmarks/comparison/sample_efficiency.py --methods matwm --device cuda --jobs 16   # MATWM learns on a GPU
    python benchmarks/comparison/sample_efficiency.py --list      # what is finished
    python benchmarks/comparison/sample_efficiency.py --methods matwm --steps 10000 --results runs/short
    python benchmarks/comparison/report.py                         # curves and tables of what is finished

Every run (environment, method, seed) has a process of its own, with one thread. When it ends, its figures and its
configuration are written to ``runs/ENVIRONMENT-METHOD-SEED.json`` in the results folder, and it is not run again;
``results.csv`` (environment, method, seed, env_steps, metric, value) and ``summary.json`` there are rebuilt from all
runs. An interrupted run of MATWM resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import torch
from methods import METHODS, ROOT, Matwm, differences, has_training, is_run_in
from processes import exit_when_terminated, held, run_apart
from protocol import ENVIRONMENTS, FORMER_SEEDS, SEEDS, Environment, evaluate_policy
from tensordict.nn import TensorDictModuleBase
from tqdm import tqdm
from world_model_quality import world_model_quality

from matwm_rl.files import write_text
from matwm_rl.modules import WorldModelPolicy
from matwm_rl.training import prepare_process

RESULTS = ROOT / "benchmarks" / "results" / "sample_efficiency"
COLUMNS = ("environment", "method", "seed", "env_steps", "metric", "value")
QUALITY_EPISODES = 100
SCRIPT = Path(__file__).resolve()
"""Carries out a run in a process of its own."""


# -- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One method in one environment with one seed.

    Attributes:
        environment: its name in :data:`ENVIRONMENTS`.
        method: its name in :data:`METHODS`.
        seed: of everything random.
        total_steps: env steps; ``None``: those of the environment.
        device: on which MATWM is trained; the other methods, and all evaluations, are on the CPU.
    """

    environment: str
    method: str
    seed: int
    total_steps: int | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.environment}-{self.method}-{self.seed}"

    @property
    def spec(self) -> Environment:
        """The environment, with the run's env steps."""
        environment = ENVIRONMENTS[self.environment]
        return environment if self.total_steps is None else replace(environment, total_steps=self.total_steps)

    def path(self, results: Path) -> Path:
        return results / "runs" / f"{self}.json"

    def settings(self) -> dict[str, Any]:
        """Return the settings of the method, and those of the evaluation as ``"protocol"``."""
        environment, method = self.spec, METHODS[self.method]
        protocol = environment.protocol | {"total_steps": method.steps(environment)}
        return method.settings(environment) | {"protocol": protocol | {"world_model_episodes": QUALITY_EPISODES}}

    def other_settings(self, stored: Mapping[str, Any]) -> list[str]:
        """Return which settings of a finished run differ from the present ones."""
        return differences(stored, self.settings())


def carry_out(run: Run, results: Path, scratch: Path) -> float:
    """Train, evaluate at every checkpoint, write the run's file; return the CPU seconds that it took.

    Raises:
        RuntimeError: if the run ended without the figures of a checkpoint (then no file is written), or if another
            process is carrying it out.
    """
    prepare_process(num_threads=1, matmul_precision="highest")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the training script
    environment, method = run.spec, METHODS[run.method]
    device = "cpu"
    if isinstance(method, Matwm):
        device, method = run.device, replace(method, device=run.device)
    torch.manual_seed(run.seed)
    began = _core_seconds()
    figures: dict[str, dict[str, float]] = {}
    settings = run.settings()
    # The name has a hash of settings and device, so that no training with others is resumed.
    folder = scratch / f"{run}-{sha256(json.dumps([settings, device]).encode()).hexdigest()[:8]}"

    def on_checkpoint(env_steps: int, policy: TensorDictModuleBase, core_seconds: float | None = None) -> None:
        metrics = evaluate_policy(environment, policy)
        metrics |= {} if core_seconds is None else {"core_seconds": core_seconds}
        if isinstance(policy, WorldModelPolicy):
            asked = {"episodes": QUALITY_EPISODES, "seed": run.seed + 1_000, **environment.env_kwargs}
            metrics |= world_model_quality(policy, environment.env, **asked)
        figures[str(env_steps)] = {name: float(f"{value:.5g}") for name, value in metrics.items()}

    with held(folder):
        resumed, made_with = has_training(folder), _made_with(folder, device)
        method.train(environment, run.seed, folder, on_checkpoint)
    if missing := [step for step in method.checkpoints(environment) if str(step) not in figures]:
        raise RuntimeError(
            f"expected figures of {run} after {missing} env steps too, got those after {[*map(int, figures)]}; "
            f"to train it anew, delete {folder}"
        )
    seconds = _core_seconds() - began
    # Evaluations included, other than at a checkpoint. The time of an interrupted attempt is unknown.
    stored = {"environment": run.environment, "method": run.method, "seed": run.seed}
    timed = not resumed and device == "cpu"
    stored |= {"core_seconds": round(seconds) if timed else None, "made_with": made_with}
    stored |= {"settings": settings, "figures": figures}
    path = run.path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(stored, indent=1) + "\n")
    return seconds


def carry_out_apart(run: Run, results: Path, scratch: Path, stop: Event) -> str:
    """Call :func:`carry_out` in a process of its own, until ``stop`` is set; return the line that it printed."""
    command = [sys.executable, str(SCRIPT), "--in-process", f"--results={results}", f"--scratch={scratch}"]
    command += ["--environments", run.environment, "--methods", run.method, "--seeds", str(run.seed)]
    command += ["--device", run.device]
    command += [] if run.total_steps is None else ["--steps", str(run.total_steps)]
    return run_apart(command, stop).splitlines()[-1]


def _made_with(folder: Path, device: str) -> dict[str, str | None] | None:
    """Return the versions and the device that a training began with, ``None`` if unknown; note those of a new one."""
    path = folder.with_name(f"{folder.name}.made_with.json")  # not in the folder, which a method may clear
    if not has_training(folder):
        name = device if device == "cpu" else torch.cuda.get_device_name(device)
        write_text(path, json.dumps({"commit": _commit(), "torch": torch.__version__, "device": name}) + "\n")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _commit() -> str | None:
    """Return the commit of this tree, with a + if code or settings have changed since; ``None`` without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py", "*.yaml")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _core_seconds() -> float:
    """Return the CPU seconds of this process and of the trainings that it waited for."""
    return sum(os.times()[:4])


# -- all runs --------------------------------------------------------------------------------------------------------


def stored_runs(results: Path) -> list[dict[str, Any]]:
    """Return all finished runs, in the order of :data:`ENVIRONMENTS` and :data:`METHODS`."""
    runs = [_stored(path) for path in (results / "runs").glob("*.json")]

    def order(run: Mapping[str, Any]) -> tuple[int, int, int]:
        return [*ENVIRONMENTS].index(run["environment"]), [*METHODS].index(run["method"]), run["seed"]

    return sorted((run for run in runs if run["environment"] in ENVIRONMENTS and run["method"] in METHODS), key=order)


def reported(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs without those of :data:`FORMER_SEEDS`, where an environment and method has others."""
    anew = {(run["environment"], run["method"]) for run in runs if run["seed"] not in FORMER_SEEDS}
    return [run for run in runs if run["seed"] not in FORMER_SEEDS or (run["environment"], run["method"]) not in anew]


def _stored(path: Path) -> dict[str, Any]:
    run = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(run, dict)
    return run


def rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, int, int, str, float]]:
    """Yield the rows of the table, one per figure."""
    for run in runs:
        for env_steps, metrics in run["figures"].items():
            for metric, value in metrics.items():
                yield run["environment"], run["method"], run["seed"], int(env_steps), metric, value


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``{environment: {method: {seeds, settings, figures}}}``, figures ``[median, min, max]`` over seeds.

    They are of the :func:`reported` runs.
    """
    runs = reported(runs)
    values: dict[tuple[str, str], dict[int, dict[str, list[float]]]] = {}
    for environment, method, _, env_steps, metric, value in rows(runs):
        if not metric.endswith("/se"):
            by_metric = values.setdefault((environment, method), {}).setdefault(env_steps, {})
            by_metric.setdefault(metric, []).append(value)
    summary: dict[str, Any] = {}
    for (environment, method), by_steps in values.items():
        same = [run for run in runs if (run["environment"], run["method"]) == (environment, method)]
        summary.setdefault(environment, {})[method] = {
            "seeds": [run["seed"] for run in same],
            "settings": same[0]["settings"],
            "figures": {
                str(env_steps): {metric: [median(v), min(v), max(v)] for metric, v in by_metric.items()}
                for env_steps, by_metric in sorted(by_steps.items())
            },
        }
    return summary


def write_tables(results: Path) -> None:
    """Write ``results.csv`` and ``summary.json`` of all finished runs."""
    runs = stored_runs(results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(runs))
    write_text(results / "results.csv", text.getvalue())
    write_text(results / "summary.json", json.dumps(summarise(runs), indent=1) + "\n")


def chosen_runs(
    methods: Sequence[str] | None,
    environments: Sequence[str],
    seeds: Sequence[int],
    total_steps: int | None = None,
    device: str = "cpu",
) -> list[Run]:
    """Return the grid, seed by seed.

    A method that is not named is run in the environments of its ``only``. One that is run with fewer seeds than there
    are takes the first of them. Scripts play where there is one.
    """
    return [
        Run(environment, method, seed, total_steps, device)
        for index, seed in enumerate(seeds)
        for method in methods or METHODS
        for environment in environments
        if (methods or is_run_in(METHODS[method], environment))
        and index < (METHODS[method].num_seeds or len(seeds))
        and METHODS[method].checkpoints(ENVIRONMENTS[environment])
    ]


def carry_out_all(runs: Sequence[Run], results: Path, scratch: Path, *, jobs: int) -> int:
    """Carry out the runs, ``jobs`` at a time, report each and write the tables; return how many failed."""
    failed, stop = 0, Event()
    with exit_when_terminated(), ThreadPoolExecutor(jobs) as threads:
        try:
            futures = {threads.submit(carry_out_apart, run, results, scratch, stop): run for run in runs}
            for future in (bar := tqdm(as_completed(futures), total=len(futures), unit="run")):
                try:
                    bar.write(future.result())
                except Exception as error:
                    failed += 1
                    bar.write(f"{futures[future]} failed\n{error}")
                write_tables(results)
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)
    write_tables(results)
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    """Carry out the chosen runs that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--environments", nargs="+", choices=ENVIRONMENTS, default=[*ENVIRONMENTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS])
    parser.add_argument("--steps", type=int, help="env steps of every run, in a results folder of their own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="on which MATWM is trained")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one core each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished runs and tables")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "sample_efficiency", help="folder of trainings")
    parser.add_argument("--replace", action="store_true", help="repeat runs that were made with other settings")
    parser.add_argument("--list", action="store_true", help="only print what is finished")
    # For the process of a single run: carry it out here, finished or not.
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use; found none")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.steps is not None:
        least = max(ENVIRONMENTS[name].every for name in arguments.environments)
        if arguments.steps < least:
            parser.error(f"--steps must reach the first evaluation, after {least} env steps; got {arguments.steps}")
        if arguments.results.resolve() == RESULTS:
            parser.error("--steps makes other runs than the stored ones: name a folder for them with --results")

    chosen = chosen_runs(arguments.methods, arguments.environments, arguments.seeds, arguments.steps, arguments.device)
    if arguments.in_process:
        for run in chosen:
            print(f"{run}: {carry_out(run, arguments.results, arguments.scratch):.0f} s")
        return

    todo: list[Run] = []
    for run in chosen:
        if not run.path(arguments.results).exists():
            state = "to do"
            todo.append(run)
        elif different := run.other_settings(_stored(run.path(arguments.results))["settings"]):
            state = "to do again" if arguments.replace else "finished with other settings (--replace runs it again)"
            state += ": " + "; ".join(different[:3])
            todo += [run] if arguments.replace else []
        else:
            state = "finished"
        print(f"{str(run):48s} {state}", flush=True)
    if arguments.list:
        return

    failed = carry_out_all(todo, arguments.results, arguments.scratch, jobs=arguments.jobs)
    if failed:
        sys.exit(f"{failed} of {len(todo)} runs failed; the others are written. Start again to repeat them")


if __name__ == "__main__":
    main()
