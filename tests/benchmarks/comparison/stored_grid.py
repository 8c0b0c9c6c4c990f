"""Stored runs as sample_efficiency.py would write them, of a grid whose figures are known by design."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from methods import METHODS, is_run_in
from protocol import ENVIRONMENTS, SEEDS
from results import measures
from sample_efficiency import Run

RANDOM_EVADER, FLEEING_EVADER, CHASED = measures("simple_tag")
(SPREAD,) = measures("simple_spread")
(LISTENER,) = measures("simple_speaker_listener")
STAGES = (5_000, 10_000, 15_000, 20_000, 25_000)
LONG_RUN = "isac_100k"
"""The only one, in all environments; it ends with the score 1."""
REFERENCES = {
    RANDOM_EVADER.match: (4.5, 45.8),
    FLEEING_EVADER.match: (1.6, 14.5),
    CHASED.match: (45.8, 14.5),
    "return": (-26.0, -8.0),
    "adversary_vs_random": (-30.0, -10.0),
    "agent_vs_random": (8.0, 20.0),
}
"""Of random agents, and of scripts and at the end of the long run, in all environments."""


def stored(
    environment: str, method: str, seed: int, figures: dict[int, dict[str, float]], **other: Any
) -> dict[str, Any]:
    run: dict[str, Any] = {"environment": environment, "method": method, "seed": seed, "core_seconds": 100 + seed}
    run |= {"settings": settings(environment, method)}
    return {**run, "figures": {str(env_steps): metrics for env_steps, metrics in figures.items()}, **other}


@cache
def settings(environment: str, method: str) -> dict[str, Any]:
    """Those that a run would be made with now."""
    return json.loads(json.dumps(Run(environment, method, 0).settings()))


def returns(environment: str, value: Callable[[float, float], float], other_mode: float = 0.25) -> dict[str, float]:
    """What an evaluation stores, from the random agents' and the script's return of every match."""
    metrics: dict[str, float] = {}
    for measure in measures(environment):
        found = value(*REFERENCES[measure.match])
        other = "greedy" if measure.kind == "sampled" else "sampled"
        metrics |= {measure.metric: found, f"{measure.match}/{other}": found + other_mode, f"{measure.metric}/se": 0.5}
    return metrics


def qualities(environment: str, env_steps: int, seed: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for quantity in ("observation", "reward", "teammate"):
        for horizon in (1, 5, 10):
            metrics[f"open_loop/{quantity}/{horizon}"] = horizon * (10_000 + seed) / env_steps
            metrics[f"open_loop/{quantity}/{horizon}/trivial"] = 2.0 * horizon
    if "tag" in environment:
        for data, factor in (("own", 1.0), ("scripted", 0.5)):
            metrics[f"contact_precision/{data}/true"] = factor * (0.3 + env_steps / 50_000 + 0.01 * (seed - SEEDS[0]))
            metrics[f"contact_precision/{data}/sampled"] = factor * 0.2
    return metrics


def score(method: str, env_steps: int, seed: int) -> float:
    """Of a method, by design: 0 as random agents, 1 as at the end of the long run."""
    best = {"matwm": 0.6, "isac": 0.4, "ippo": 0.3, "iql": 0.2, "mappo": 0.1}.get(method, 0.5)
    return best * env_steps / 25_000 + 0.01 * (seed - SEEDS[1])


DISCRETE = [name for name, spec in ENVIRONMENTS.items() if not spec.is_continuous]


def full_grid(seeds: tuple[int, ...] = SEEDS, environments: Sequence[str] = DISCRETE) -> list[dict[str, Any]]:
    runs = []
    for environment in environments:
        spec = ENVIRONMENTS[environment]
        for method in [name for name in METHODS if is_run_in(METHODS[name], environment)]:
            steps = METHODS[method].steps(spec)
            for seed in seeds if METHODS[method].checkpoints(spec) else ():
                by_step: dict[int, dict[str, float]] = {}
                for at in [0] if not steps else [stage for stage in STAGES if stage <= steps]:
                    level = float(method == "scripted") if not steps else score(method, at, seed)
                    by_step[at] = returns(environment, lambda low, high, level=level: low + level * (high - low))
                    if method.startswith("matwm"):
                        by_step[at] |= qualities(environment, at, seed)
                runs.append(stored(environment, method, seed, by_step))
        points = {at: at / 100_000 for at in (25_000, 50_000, 75_000, 100_000)}
        by_step = {
            at: returns(environment, lambda low, high, level=level: low + level * (high - low), other_mode=0.0)
            for at, level in points.items()
        }
        runs.append(stored(environment, LONG_RUN, seeds[0], by_step))
    return runs


def write(runs: list[dict[str, Any]], folder: Path) -> Path:
    for run in runs:
        path = Run(run["environment"], run["method"], run["seed"]).path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))
    return folder


def parsed(table: str) -> dict[str, dict[str, str]]:
    """``{first cell of a row: {column: cell}}``; of rows that begin alike, the last."""
    header, ruler, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert set("".join(ruler)) == {"-"}
    assert {len(row) for row in rows} == {len(header)}
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def slow_interquartile_mean(scores: list[list[float]]) -> float:
    pooled = sorted(value for values in scores for value in values)
    cut = len(pooled) // 4
    return mean(pooled[cut : len(pooled) - cut])
