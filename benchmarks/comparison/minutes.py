"""By the clock: how long a method trains on one core until it reaches a return or a score.

No script of its own: tables.py prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from results import Measure, Results, measures

SCORE = 0.5


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        title: its name in the table.
        environment: its name in the comparison.
        bound: the return or the score.
        measure: of the return; ``None`` for the score.
    """

    title: str
    environment: str
    bound: float
    measure: Measure | None = None


TAG, SPREAD = measures("simple_tag")[0], measures("simple_spread")[0]


def goals(results: Results) -> list[Goal]:
    """Return two returns that model-free methods can reach in 25,000 steps, and the score where there is one."""
    found = [
        Goal("simple_tag: 12.0 against a random evader", TAG.environment, 12.0, TAG),
        Goal("simple_spread: mean return -17.0", SPREAD.environment, -17.0, SPREAD),
    ]
    with_scores = [name for name in results.environments if results.scores(name, "random", 0)]
    return found + [Goal(f"{name}: score {SCORE}", name, SCORE) for name in with_scores]


def minutes(results: Results, goal: Goal, method: str) -> tuple[float, float] | None:
    """Return the median over seeds of the minutes until a goal, and of those of the whole training.

    The first is infinite if more than half of the seeds do not reach it. Between checkpoints, values are interpolated
    linearly; before the first one, from those of random agents at the beginning. Returns ``None`` where no times are
    stored.
    """
    curves: dict[int, list[tuple[float, float]]] = {}
    for env_steps in results.steps(goal.environment, method):
        seconds = results.get(goal.environment, method, env_steps, "core_seconds")
        for seed, value in _values(results, goal, method, env_steps).items():
            if seed in seconds:
                curves.setdefault(seed, []).append((seconds[seed] / 60, value))
    if not curves:
        return None
    if random := _values(results, goal, "random", 0).values():
        curves = {seed: [(0.0, median(random)), *curve] for seed, curve in curves.items()}
    reached = [first_time(curve, goal.bound) for curve in curves.values()]
    return median(reached), median(curve[-1][0] for curve in curves.values())


def _values(results: Results, goal: Goal, method: str, env_steps: int) -> dict[int, float]:
    if goal.measure is None:
        return results.scores(goal.environment, method, env_steps)
    return results.measured(goal.measure, method, env_steps)


def first_time(curve: Sequence[tuple[float, float]], bound: float) -> float:
    """Return when the linear interpolation of ``(time, value)`` first reaches a bound; infinite if it does not."""
    if curve[0][1] >= bound:
        return curve[0][0]
    for (before, low), (after, high) in zip(curve, curve[1:], strict=False):
        if high >= bound:
            return before + (after - before) * (bound - low) / (high - low)
    return inf
