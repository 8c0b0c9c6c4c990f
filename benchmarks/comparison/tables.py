"""Tables of report.py: targets, methods, ablations, scores, open-loop errors, minutes and CPU seconds.

No script of its own: the report prints them. A dash stands for what has not been run yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

from figures import TITLES, label
from methods import LONG_RUNS, LONG_STEPS, METHODS, is_run_in, long
from minutes import goals, minutes
from protocol import ENVIRONMENTS, SEEDS
from results import BySeed, Measure, Results, ablations, baselines, contact_precision, measures
from world_model_quality import HORIZONS, QUANTITIES

MISSING = "–"
STEPS = (10_000, 25_000)
"""Env steps after which methods are compared."""
STAGES = (5_000, 15_000, 25_000)
"""Env steps after which world models are compared."""


@dataclass(frozen=True)
class Target:
    """A value that MATWM should reach.

    Attributes:
        measure: the figure that is judged.
        env_steps: after which it is judged.
        bound: that should be reached; an upper bound if lower is better.
        reference: of tuned BenchMARL 1.5.2 algorithms after as many env steps, or as named.
    """

    measure: Measure
    env_steps: int
    bound: float
    reference: str

    def met(self, value: float) -> bool:
        return value <= self.bound if self.measure.lower_is_better else value >= self.bound


RANDOM_EVADER, FLEEING_EVADER, CHASED = measures("simple_tag")
SPREAD, LISTENER = (measures(name)[0] for name in ("simple_spread", "simple_speaker_listener"))
TARGETS = (
    Target(RANDOM_EVADER, 25_000, 20.0, "10.5; 13.0 at 50K, 13.5 at 200K"),
    Target(FLEEING_EVADER, 25_000, 9.0, "5.4; 8.4 at 50K"),
    Target(CHASED, 25_000, 24.0, "30.0; 28.2 at 50K"),
    Target(contact_precision("simple_tag"), 10_000, 0.4, "MLP on the true next observation: 0.70"),
    Target(contact_precision("simple_tag"), 25_000, 0.6, "MLP on the true next observation: 0.85"),
    Target(SPREAD, 10_000, -18.5, "-19.7"),
    Target(SPREAD, 25_000, -15.5, "-17.1; -15.2 at 50K"),
    Target(LISTENER, 10_000, -15.0, "-17.8; -15.9 at 25K"),
)


# -- cells -----------------------------------------------------------------------------------------------------------


def cell(values: BySeed, digits: int = 1, *, sign: str = "") -> str:
    """Return the median (min to max) over seeds, and the number of seeds if some are missing."""
    if not values:
        return MISSING
    notes = []
    if len(values) > 1:
        notes.append(f"{min(values.values()):{sign}z.{digits}f} to {max(values.values()):{sign}z.{digits}f}")
    if len(values) < len(SEEDS):
        notes.append(f"{len(values)} of {len(SEEDS)} seeds")
    return f"{middle(values, digits, sign=sign)} ({'; '.join(notes)})" if notes else middle(values, digits, sign=sign)


def middle(values: BySeed, digits: int = 1, *, sign: str = "") -> str:
    """Return the median over seeds."""
    return f"{median(values.values()):{sign}z.{digits}f}" if values else MISSING


def thousands(env_steps: int) -> str:
    return f"{env_steps / 1000:g}K"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines)


# -- tables ----------------------------------------------------------------------------------------------------------


def targets_table(results: Results) -> str:
    """Return the targets, the figures of MATWM and of the best model-free method, and whether MATWM meets them."""
    header = ["", "after", "target", "MATWM", "other action mode; s.e.", "best model-free", "BenchMARL, tuned", "met"]
    rows = []
    for target in TARGETS:
        measure, steps = target.measure, target.env_steps
        ours = results.measured(measure, "matwm", steps)
        others = [
            f"{title} {middle(results.get(measure.environment, 'matwm', steps, metric), measure.digits)}"
            for title, metric in measure.others.items()
        ]
        if errors := results.get(measure.environment, "matwm", steps, f"{measure.metric}/se"):
            others.append(f"s.e. {middle(errors, measure.digits)}")
        rows.append(
            [
                f"{measure.environment}: {measure.title}",
                thousands(steps),
                f"{'≤' if measure.lower_is_better else '≥'} {target.bound}",
                f"**{cell(ours, measure.digits)}**" if ours else MISSING,
                "; ".join(others) if ours else MISSING,
                _best_baseline(results, measure, steps),
                target.reference,
                _verdict(target, ours),
            ]
        )
    return markdown(header, rows)


def _best_baseline(results: Results, measure: Measure, steps: int) -> str:
    found = results.best_baseline(measure, steps)
    if found is None:
        return MISSING
    method, way = found
    return f"{cell(results.measured(way, method, steps), way.digits)} {label(method)}, {way.kind}"


def _verdict(target: Target, values: BySeed) -> str:
    if not values:
        return MISSING
    verdict = "yes" if target.met(median(values.values())) else "no"
    return verdict if len(values) >= len(SEEDS) else f"{verdict} so far"


def targets_seeds(results: Results) -> str:
    """Return the number of seeds behind :func:`targets_table`: ``3 seeds``, or ``3 or more seeds``."""
    numbers = set()
    for target in TARGETS:
        numbers.add(len(results.measured(target.measure, "matwm", target.env_steps)))
        if found := results.best_baseline(target.measure, target.env_steps):
            method, way = found
            numbers.add(len(results.measured(way, method, target.env_steps)))
    numbers = numbers - {0} or {len(SEEDS)}
    least = f"{min(numbers)}{' or more' if len(numbers) > 1 else ''}"
    return f"{least} {'seed' if numbers == {1} else 'seeds'}"


def methods_table(results: Results, environment: str) -> str:
    """Return all methods by all measures of an environment; long runs stand in columns of their own."""
    stages = (*STEPS, LONG_STEPS) if environment in LONG_RUNS else STEPS
    columns = [(measure, steps) for measure in measures(environment) for steps in stages]
    header = ["", *(f"{measure.title}, {thousands(steps)}" for measure, steps in columns)]
    long_runs = {long(name): name for name in baselines()}
    rows = []
    for method, spec in METHODS.items():
        if method in long_runs or not (is_run_in(spec, environment) and spec.checkpoints(ENVIRONMENTS[environment])):
            continue
        # Agents that do not learn play the same episodes with every seed and in both action modes.
        show = _middle_of if spec.steps(ENVIRONMENTS[environment]) == 0 else _both_ways
        row = [label(method)]
        for measure, steps in columns:
            is_long = steps == LONG_STEPS and method in baselines()
            row.append((_middle_of if is_long else show)(results, measure, long(method) if is_long else method, steps))
        rows.append(row)
    return markdown(header, rows)


def _middle_of(results: Results, measure: Measure, method: str, steps: int) -> str:
    return middle(results.measured(measure, method, steps), measure.digits)


def _both_ways(results: Results, measure: Measure, method: str, steps: int) -> str:
    values, *others = (results.measured(way, method, steps) for way in measure.ways)
    modes = [f"{way.kind} {middle(other, way.digits)}" for way, other in zip(measure.ways[1:], others, strict=True)]
    return f"{cell(values, measure.digits)}; {', '.join(modes)}" if values and modes else cell(values, measure.digits)


def aggregate_table(results: Results) -> str:
    """Return one score of every method over all environments."""
    environments = results.common_environments(STEPS)
    rows = []
    for method in ("matwm", *baselines()):
        found = [results.aggregate(environments, method, steps) for steps in STEPS]
        rows.append([label(method), *map(_interval, found)])
    return markdown(["", *(thousands(steps) for steps in STEPS)], rows)


def _interval(found: tuple[float, float | None, float | None] | None) -> str:
    if found is None:
        return MISSING
    point, low, high = found
    return f"{point:z.2f}" if low is None or high is None else f"{point:z.2f} ({low:z.2f} to {high:z.2f})"


def ablations_table(results: Results) -> str:
    """Return the differences in return of MATWM without a part."""
    names = [name for name in ENVIRONMENTS if any(is_run_in(METHODS[method], name) for method in ablations())]
    columns = [measure for name in names for measure in measures(name)]
    rows = []
    for method in ablations():
        row = [label(method).removeprefix("MATWM ")]
        for measure in columns:
            steps = METHODS[method].steps(ENVIRONMENTS[measure.environment])
            row.append(cell(results.less(measure, method, "matwm", steps), measure.digits, sign="+"))
        rows.append(row)
    return markdown(["", *(f"{measure.environment}: {measure.title}" for measure in columns)], rows)


def open_loop_table(results: Results) -> str:
    """Return the errors of the world model and of the trivial predictors after the steps of :data:`STAGES`."""
    header = ["", *(f"{h} ahead, {thousands(steps)}" for steps in STAGES for h in HORIZONS)]
    rows = []
    for environment in results.environments:
        for quantity in QUANTITIES:
            row = [f"{environment}: {TITLES[quantity]}"]
            for steps in STAGES:
                for horizon in HORIZONS:
                    name = f"open_loop/{quantity}/{horizon}"
                    pair = [results.get(environment, "matwm", steps, metric) for metric in (name, f"{name}/trivial")]
                    row.append(" / ".join(_short(values) for values in pair) if all(pair) else MISSING)
            rows.append(row)
    return markdown(header, rows)


def _short(values: BySeed) -> str:
    """Return the median with three digits at most."""
    value = median(values.values())
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def minutes_table(results: Results) -> str:
    """Return the minutes of training on one core until a return or a score is reached, by method."""
    found = goals(results)
    rows = []
    for method in ("matwm", *baselines(), *map(long, baselines())):
        cells = [_minutes(minutes(results, goal, method)) for goal in found]
        if method not in map(long, baselines()) or any(cell != MISSING for cell in cells):
            rows.append([label(method), *cells])
    return markdown(["", *(goal.title for goal in found)], rows)


def _minutes(found: tuple[float, float] | None) -> str:
    if found is None:
        return MISSING
    reached, trained = found
    return f"{reached:.1f}" if isfinite(reached) else f"not in {trained:.1f}"


def seconds_table(results: Results) -> str:
    """Return the median CPU seconds of the runs in which they were measured."""
    rows = []
    for method in METHODS:
        row = [label(method)]
        for environment in results.environments:
            same = [run for run in results.runs if (run["environment"], run["method"]) == (environment, method)]
            seconds = [run["core_seconds"] for run in same if run["core_seconds"] is not None]
            row.append(f"{median(seconds):,.0f}" if seconds else MISSING)
        rows += [row] if METHODS[method].num_seeds is None or set(row[1:]) != {MISSING} else []
    return markdown(["", *results.environments], rows)


def first_run_table(results: Results, evaluation: Mapping[str, float]) -> str:
    """Return the matches of one run of the example, with those of the stored runs."""
    header = ["match", "random agents", "**MATWM**", f"best model-free, {thousands(STEPS[-1])}", "scripted"]
    rows = [
        [
            f"{measure.title}{' (lower is better)' if measure.lower_is_better else ''}",
            _middle_of(results, measure, "random", 0),
            f"**{evaluation[measure.match]:.1f}**",
            _best_baseline(results, measure, STEPS[-1]),
            _middle_of(results, measure, "scripted", 0),
        ]
        for measure in measures("simple_tag")
    ]
    return markdown(header, rows)
