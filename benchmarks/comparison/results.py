"""Figures of the stored runs of sample_efficiency.py by seed, and one score over all environments.

No script of its own: the report, its tables and its pictures use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np
from methods import METHODS, Matwm, ModelFree, Reference
from protocol import ENVIRONMENTS
from scipy.stats import bootstrap, trim_mean

RESAMPLES = 5_000
"""Of the bootstrap: enough that another seed moves an end of the interval by a hundredth of its length."""

BySeed = dict[int, float]


@dataclass(frozen=True)
class Measure:
    """A figure by which a policy or a world model is judged.

    Attributes:
        environment: its name in the comparison.
        match: part of the stored name before the last slash.
        title: its name in tables and pictures.
        kind: part of the stored name after the last slash, for example the action mode.
        lower_is_better: true for the return of pursuers against a trained evader.
        digits: after the decimal point.
    """

    environment: str
    match: str
    title: str
    kind: str
    lower_is_better: bool = False
    digits: int = 1

    @property
    def metric(self) -> str:
        """The stored name."""
        return f"{self.match}/{self.kind}"

    @property
    def others(self) -> dict[str, str]:
        """``{title: stored name}`` of related figures: the other action mode, or other latents and data."""
        if self.match == CONTACT:
            scripted = CONTACT.replace("own", "scripted")
            return {
                "sampled next latent": f"{CONTACT}/sampled",
                "scripts' episodes": f"{scripted}/true",
                "both": f"{scripted}/sampled",
            }
        return {other.kind: other.metric for other in self.ways[1:]}

    @property
    def ways(self) -> list[Measure]:
        """The same figure in both action modes, this one first."""
        other = {"sampled": "greedy", "greedy": "sampled"}.get(self.kind)
        return [self] if self.match == CONTACT or other is None else [self, replace(self, kind=other)]


CONTACT = "contact_precision/own"
CROSS_PLAY = {
    "adversaries_vs_random_prey": "pursuers against a random evader",
    "adversaries_vs_fleeing_prey": "pursuers against a fleeing evader",
    "prey_vs_chasing_adversaries": "chasing pursuers against the evader",
}
"""The matches of simple_tag by which methods are compared; in the last one the evader was trained."""


def measures(environment: str) -> list[Measure]:
    """Return the measures of an environment.

    Cross-play uses sampled actions, because deterministic policies are easy to exploit; self-play uses greedy actions,
    as most published returns do.
    """
    if "simple_tag" in ENVIRONMENTS[environment].env:
        return [
            Measure(environment, match, title, "sampled", lower_is_better=match.startswith("prey"))
            for match, title in CROSS_PLAY.items()
        ]
    return [Measure(environment, "return", "mean return", "greedy")]


def contact_precision(environment: str) -> Measure:
    """Return the average precision of predicted rewards in ranking steps with contact, on the policy's own episodes."""
    return Measure(environment, CONTACT, "reward head: average precision of contact", "true", digits=2)


def baselines() -> list[str]:
    """Return the names of the model-free methods."""
    return [name for name, method in METHODS.items() if isinstance(method, ModelFree)]


def ablations() -> list[str]:
    """Return the names of MATWM without one of its parts."""
    return [name for name, method in METHODS.items() if isinstance(method, Matwm) and method.overrides]


class Results:
    """Stored figures by environment, method, env steps, metric and seed.

    Args:
        runs: of :func:`sample_efficiency.stored_runs`.
    """

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.runs = runs
        self._figures: dict[tuple[str, str], dict[int, dict[int, Mapping[str, float]]]] = {}
        for run in runs:
            by_steps = self._figures.setdefault((run["environment"], run["method"]), {})
            for env_steps, metrics in run["figures"].items():
                by_steps.setdefault(int(env_steps), {})[run["seed"]] = metrics

    def steps(self, environment: str, method: str) -> list[int]:
        """Return the env steps after which there are figures."""
        return sorted(self._figures.get((environment, method), {}))

    def get(self, environment: str, method: str, env_steps: int, metric: str) -> BySeed:
        """Return a figure by seed; agents that do not learn have the same one after any number of env steps."""
        env_steps = 0 if isinstance(METHODS[method], Reference) else env_steps
        by_seed = self._figures.get((environment, method), {}).get(env_steps, {})
        return {seed: metrics[metric] for seed, metrics in sorted(by_seed.items()) if metric in metrics}

    def measured(self, measure: Measure, method: str, env_steps: int) -> BySeed:
        """Return the figure of a measure by seed."""
        return self.get(measure.environment, method, env_steps, measure.metric)

    def best_baseline(self, measure: Measure, env_steps: int) -> tuple[str, Measure] | None:
        """Return the model-free method and the action mode with the best median after so many steps, if any."""
        medians = {
            (name, way): median(values.values())
            for name in baselines()
            for way in measure.ways
            if (values := self.measured(way, name, env_steps))
        }
        best = min if measure.lower_is_better else max
        return best(medians, key=medians.__getitem__, default=None)

    def less(self, measure: Measure, method: str, other: str, env_steps: int) -> BySeed:
        """Return the figures of a method minus those of another, seed by seed."""
        ours, theirs = (self.measured(measure, name, env_steps) for name in (method, other))
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    def scores(self, environment: str, method: str, env_steps: int) -> BySeed:
        """Return each seed's score, 0 for random agents and 1 for the script; the mean over the measures."""
        parts: list[BySeed] = []
        for measure in measures(environment):
            random, script = (self.measured(measure, name, 0) for name in ("random", "scripted"))
            if not random or not script:
                return {}
            low, high = median(random.values()), median(script.values())
            values = self.measured(measure, method, env_steps)
            parts.append({seed: (value - low) / (high - low) for seed, value in values.items()})
        return {seed: mean(part[seed] for part in parts) for seed in parts[0] if all(seed in part for part in parts)}

    def common_environments(self, env_steps: Sequence[int]) -> list[str]:
        """Return the environments in which MATWM and all model-free methods with any run have scores at all steps."""
        compared = [name for name in ("matwm", *baselines()) if any(self.steps(env, name) for env in ENVIRONMENTS)]
        return [
            environment
            for environment in ENVIRONMENTS
            if compared and all(self.scores(environment, name, step) for name in compared for step in env_steps)
        ]

    def aggregate(
        self, environments: Sequence[str], method: str, env_steps: int
    ) -> tuple[float, float | None, float | None] | None:
        """Return the :func:`interquartile_mean` of a method's scores, ``None`` if an environment has none."""
        scores = [list(self.scores(environment, method, env_steps).values()) for environment in environments]
        return interquartile_mean(scores) if scores and all(scores) else None


def interquartile_mean(scores: Sequence[Sequence[float]]) -> tuple[float, float | None, float | None]:
    """Return the mean without the lowest and the highest quarter of all scores, and its 95% bootstrap interval.

    A quarter is rounded down to whole scores. For the interval, runs are resampled within each environment; with three
    runs it is too narrow. rliable has both, but needs equally many runs in all environments.

    Args:
        scores: of the runs, one sequence per environment.

    Returns:
        the mean, and both ends of the interval; they are ``None`` if an environment has a single run.
    """
    samples = [np.asarray(values, dtype=float) for values in scores]

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return trim_mean(np.concatenate(samples, axis), 0.25, axis)

    point = float(statistic(*samples))
    if min(map(len, samples)) < 2:
        return point, None, None
    interval = bootstrap(
        samples, statistic, n_resamples=RESAMPLES, vectorized=True, method="percentile", rng=0
    ).confidence_interval
    return point, float(interval.low), float(interval.high)
