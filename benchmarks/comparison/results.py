"""Figures of the stored runs of sample_efficiency.py by seed, and one score over all environments.

No script of its own: the report, its tables and its pictures use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np
from methods import LONG_STEPS, METHODS, Matwm, ModelFree, Reference, long
from protocol import ENVIRONMENTS
from sample_efficiency import reported
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
    "simple_tag": {
        "adversaries_vs_random_prey": "pursuers against a random evader",
        "adversaries_vs_fleeing_prey": "pursuers against a fleeing evader",
        "prey_vs_chasing_adversaries": "chasing pursuers against the evader",
    },
    "simple_adversary": {
        "adversary_vs_random": "adversary against random agents",
        "agent_vs_random": "agents against a random adversary",
    },
    "simple_push": {
        "adversary_vs_random": "adversary against a random agent",
        "agent_vs_random": "agent against a random adversary",
    },
}
"""The matches by which methods are compared, by a part of the environment's name.

In simple_tag all are judged by the pursuers, and in the last one the evader was trained; else by the trained group.
"""
SMALL = ("give_way", "lbforaging")
"""Environments whose returns lie around 1 or below."""


def measures(environment: str) -> list[Measure]:
    """Return the measures of an environment.

    Cross-play uses sampled actions, because deterministic policies are easy to exploit; self-play uses greedy actions,
    as most published returns do.
    """
    for name, matches in CROSS_PLAY.items():
        if name in ENVIRONMENTS[environment].env:
            return [
                Measure(environment, match, title, "sampled", lower_is_better=match.startswith("prey"))
                for match, title in matches.items()
            ]
    return [Measure(environment, "return", "mean return", "greedy", digits=2 if environment in SMALL else 1)]


def contact_precision(environment: str) -> Measure:
    """Return the average precision of predicted rewards in ranking steps with contact, on the policy's own episodes."""
    return Measure(environment, CONTACT, "reward head: average precision of contact", "true", digits=2)


def baselines() -> list[str]:
    """Return the names of the model-free methods, without the long runs."""
    return [name for name, method in METHODS.items() if isinstance(method, ModelFree) and method.total_steps is None]


def ablations() -> list[str]:
    """Return the names of MATWM without one of its parts."""
    return [name for name, method in METHODS.items() if isinstance(method, Matwm) and method.overrides]


class Results:
    """Stored figures by environment, method, env steps, metric and seed.

    Args:
        runs: of :func:`sample_efficiency.stored_runs`.
    """

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.runs = reported(runs)
        self._figures, self._all = _figures(self.runs), _figures(runs)

    @property
    def environments(self) -> list[str]:
        """The environments of which there are runs."""
        return [name for name in ENVIRONMENTS if any(run["environment"] == name for run in self.runs)]

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
        return self._best(measure, env_steps, baselines())

    def best_long(self, measure: Measure) -> float | None:
        """Return the best median of the model-free methods after :data:`LONG_STEPS`, if any."""
        found = self._best(measure, LONG_STEPS, [long(name) for name in baselines()])
        return median(self.measured(found[1], found[0], LONG_STEPS).values()) if found else None

    def _best(self, measure: Measure, env_steps: int, methods: Sequence[str]) -> tuple[str, Measure] | None:
        medians = {
            (name, way): median(values.values())
            for name in methods
            for way in measure.ways
            if (values := self.measured(way, name, env_steps))
        }
        best = min if measure.lower_is_better else max
        return best(medians, key=medians.__getitem__, default=None)

    def less(self, measure: Measure, method: str, other: str, env_steps: int) -> BySeed:
        """Return the figures of a method minus those of another, seed by seed.

        The other's are compared by the seeds that are reported of the first, if there are newer ones or not.
        """
        ours, theirs = self.measured(measure, method, env_steps), self._all.get((measure.environment, other), {})
        of_seed = theirs.get(env_steps, {})
        return {
            seed: value - of_seed[seed][measure.metric]
            for seed, value in ours.items()
            if measure.metric in of_seed.get(seed, {})
        }

    def scores(self, environment: str, method: str, env_steps: int) -> BySeed:
        """Return each seed's score, 0 for random agents and 1 for the best model-free method after long runs.

        It is the mean over the measures. There is none as long as one of the measures has no long run, or none that is
        better than random agents.
        """
        parts: list[BySeed] = []
        for measure in measures(environment):
            random, high = self.measured(measure, "random", 0), self.best_long(measure)
            if not random or high is None:
                return {}
            low = median(random.values())
            if high == low or (high < low) != measure.lower_is_better:
                return {}
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


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, dict[int, Mapping[str, float]]]]:
    figures: dict[tuple[str, str], dict[int, dict[int, Mapping[str, float]]]] = {}
    for run in runs:
        by_steps = figures.setdefault((run["environment"], run["method"]), {})
        for env_steps, metrics in run["figures"].items():
            by_steps.setdefault(int(env_steps), {})[run["seed"]] = metrics
    return figures


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
