"""Whether an imagined step costs the same for few agents and for many: 2 to 16 agents with equal work in total.

    python benchmarks/speed/scaling.py [--output FILE] [--threads 1]

768 starts, divided equally among the agents, are imagined for 12 steps after a context of 8, at the paper's widths and
with teammates. Only the outputs of the teammate predictor grow with the number of agents. The world-model update with
16 sequences of 64 steps in total is measured too, without a target. All numbers of agents take turns, so that drift of
the machine cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from measure import Case, MatmulRate, Measurement, measure, pinned
from rows import Row, parser, progress, report
from workloads import Sizes, make_learner, model_config, random_replay

from matwm_rl.settings import to_plain

AGENTS = (2, 4, 8, 16)
REPEATS = 5


def shares_of(total: int, agents: Sequence[int], what: str) -> dict[int, int]:
    """Return how many of ``total`` each agent gets, for each number of agents."""
    if uneven := [num_agents for num_agents in agents if total % num_agents]:
        raise ValueError(f"{total} {what} cannot be divided equally among {uneven} agents")
    return {num_agents: total // num_agents for num_agents in agents}


def cases(agents: Sequence[int], sizes: Sizes) -> tuple[dict[int, Case], dict[int, Case]]:
    """Return imagination, and the update of the world model, for each number of agents."""
    sequences = shares_of(sizes.sequences, agents, "sequences")
    starts = shares_of(sizes.starts, agents, "starts")
    imagination, update = {}, {}
    for num_agents in agents:
        learner = make_learner(num_agents, sizes)
        replay = random_replay(
            num_agents, sizes, sequences_per_agent=sequences[num_agents], starts_per_agent=starts[num_agents]
        )
        imagination[num_agents] = Case(learner.imagination, prepare=replay.starts.sample().copy)
        update[num_agents] = Case(learner.update_world_model, prepare=replay.sequences.sample().copy)
    return imagination, update


def scaling_rows(
    name: str,
    measured: Mapping[int, Measurement],
    *,
    unit: str,
    per_second: float,
    target: float | None = None,
) -> list[Row]:
    """Return the cost for each number of agents, and the highest over the lowest.

    Args:
        name: of what was measured.
        measured: timings by number of agents.
        unit: of the cost.
        per_second: cost of a run that takes one second, in ``unit``.
        target: bound of the highest over the lowest.
    """
    rows = [
        Row(
            case=f"{name}, {num_agents} agents",
            value=measurement.median * per_second,
            unit=unit,
            share=measurement.share,
            better="lower",
            **measurement.fields(),
        )
        for num_agents, measurement in measured.items()
    ]
    costs = [row.value for row in rows]
    flatness = max(costs) / min(costs)
    return [*rows, Row(case=f"flatness: {name}", value=flatness, unit="ratio", target=target, better="lower")]


def main(
    arguments: Sequence[str] | None = None,
    *,
    sizes: Sizes | None = None,
    agents: Sequence[int] = AGENTS,
    repeats: int = REPEATS,
) -> None:
    """Measure, print, write."""
    options = parser(__doc__).parse_args(arguments)
    sizes = sizes or Sizes()
    torch.manual_seed(0)
    rate = MatmulRate()
    with pinned(options.threads):
        imagination, update = cases(agents, sizes)
        progress("imagination")
        imagined = measure(imagination, repeats=repeats, rate=rate)
        progress("world-model update")
        updated = measure(update, repeats=repeats, rate=rate)
        steps = sizes.starts * sizes.horizon
        rows = [
            rate.row(torch.float32),
            *scaling_rows("imagined step", imagined, unit="us", per_second=1e6 / steps, target=1.15),
            *scaling_rows("world-model update", updated, unit="ms", per_second=1e3),
        ]
        settings = {
            "agents": list(agents),
            "sizes": asdict(sizes),
            "world_model": to_plain(model_config(sizes)),
        }
        report("scaling", options.output, rows, settings=settings)


if __name__ == "__main__":
    main()
