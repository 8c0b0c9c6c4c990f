"""What the stored runs of sample_efficiency.py say: figures by seed, and one score over all environments.

No script of its own: the report and its pictures ask it.
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
"""Of a bootstrap. A percentile of them moves by about a hundredth of the interval from one seed to another."""

BySeed = dict[int, float]


@dataclass(frozen=True)
class Measure:
    """One number that a policy or a world model is judged by.

    Attributes:
        environment: name in the comparison.
        match: what is stored before the last slash.
        title: in tables and pictures.
        kind: what is stored behind it, for example how actions were chosen.
        lower_is_better: so for the pursuers' return against a trained evader.
        digits: behind the point.
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
    def beside(self) -> dict[str, str]:
        """``{title: stored name}`` of what is told beside it."""
        if self.match == CONTACT:
            elsewhere = CONTACT.replace("own", "scripted")
            return {
                "next latent drawn": f"{CONTACT}/sampled",
                "scripts' data": f"{elsewhere}/true",
                "both": f"{elsewhere}/sampled",
            }
        return {other.kind: other.metric for other in self.ways[1:]}

    @property
    def ways(self) -> list[Measure]:
        """The same by both ways to choose actions, this one first."""
        other = {"sampled": "greedy", "greedy": "sampled"}.get(self.kind)
        return [self] if self.match == CONTACT or other is None else [self, replace(self, kind=other)]


CONTACT = "contact_precision/own"
CROSS_PLAY = {
    "adversaries_vs_random_prey": "pursuers against a random evader",
    "adversaries_vs_fleeing_prey": "pursuers against a fleeing evader",
    "prey_vs_chasing_adversaries": "chasing pursuers against the evader",
}
"""simple_tag's matches by which methods are compared; in the last the evader was trained."""


def measures(environment: str) -> list[Measure]:
    """What an environment is judged by.

    Cross-play with sampled actions, since a pursuer or evader that always does the same is easily foreseen; returns of
    self-play with greedy ones, as in what others report.
    """
    if "simple_tag" in ENVIRONMENTS[environment].env:
        return [
            Measure(environment, match, title, "sampled", lower_is_better=match.startswith("prey"))
            for match, title in CROSS_PLAY.items()
        ]
    return [Measure(environment, "return", "mean return", "greedy")]


def contact_precision(environment: str) -> Measure:
    """Average precision with which predicted rewards rank "this step brings contact", on the policy's own episodes."""
    return Measure(environment, CONTACT, "reward head: average precision of contact", "true", digits=2)


def baselines() -> list[str]:
    """Model-free methods."""
    return [name for name, method in METHODS.items() if isinstance(method, ModelFree)]


def ablations() -> list[str]:
    """MATWM with a part left out."""
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
        """Env steps after which there are figures."""
        return sorted(self._figures.get((environment, method), {}))

    def get(self, environment: str, method: str, env_steps: int, metric: str) -> BySeed:
        """A figure of every seed that has it; agents that do not learn have the same at all times."""
        env_steps = 0 if isinstance(METHODS[method], Reference) else env_steps
        by_seed = self._figures.get((environment, method), {}).get(env_steps, {})
        return {seed: metrics[metric] for seed, metrics in sorted(by_seed.items()) if metric in metrics}

    def measured(self, measure: Measure, method: str, env_steps: int) -> BySeed:
        """A measure of every seed that has it."""
        return self.get(measure.environment, method, env_steps, measure.metric)

    def best_baseline(self, measure: Measure, env_steps: int) -> tuple[str, Measure] | None:
        """The model-free method, and its way to choose actions, with the best median after so many steps, if any."""
        medians = {
            (name, way): median(values.values())
            for name in baselines()
            for way in measure.ways
            if (values := self.measured(way, name, env_steps))
        }
        best = min if measure.lower_is_better else max
        return best(medians, key=medians.__getitem__, default=None)

    def less(self, measure: Measure, method: str, other: str, env_steps: int) -> BySeed:
        """A method's figures less another's, seed by seed."""
        ours, theirs = (self.measured(measure, name, env_steps) for name in (method, other))
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    def scores(self, environment: str, method: str, env_steps: int) -> BySeed:
        """Each seed's score: random agents have 0, the script 1; the mean over what the environment is judged by."""
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
        """Environments in which MATWM and every model-free method that was run at all have scores at all steps."""
        compared = [name for name in ("matwm", *baselines()) if any(self.steps(env, name) for env in ENVIRONMENTS)]
        return [
            environment
            for environment in ENVIRONMENTS
            if compared and all(self.scores(environment, name, step) for name in compared for step in env_steps)
        ]

    def aggregate(
        self, environments: Sequence[str], method: str, env_steps: int
    ) -> tuple[float, float | None, float | None] | None:
        """:func:`interquartile_mean` of a method's scores, ``None`` if an environment has none."""
        scores = [list(self.scores(environment, method, env_steps).values()) for environment in environments]
        return interquartile_mean(scores) if scores and all(scores) else None


def interquartile_mean(scores: Sequence[Sequence[float]]) -> tuple[float, float | None, float | None]:
    """Mean without the lowest and the highest quarter of all scores, and its 95% bootstrap interval.

    Of each end as many whole scores are left out as a quarter holds. For the interval, runs are drawn anew in each
    environment; of three runs it is too narrow. rliable has both, but of equally many runs in all environments alone.

    Args:
        scores: of every environment, those of its runs.

    Returns:
        the mean, and both ends of the interval: ``None`` where an environment has a single run.
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
