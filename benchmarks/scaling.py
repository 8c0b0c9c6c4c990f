"""Whether an imagined step costs the same for few agents and for many: 2 to 16 agents with equal work in total.

    python benchmarks/scaling.py [--output FILE] [--threads 1]

768 starts, shared out among the agents, are imagined for 12 steps after a context of 8, at the paper's widths, with
teammates. Only the teammate predictor's outputs grow with the agents. Then the same for the world-model update with 16
sequences of 64 steps in all, for information. All numbers of agents take turns, so that drift of the machine cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from measure import (
    Case,
    MatmulRate,
    Measurement,
    Row,
    Sizes,
    make_learner,
    measure,
    model_config,
    parser,
    pinned,
    progress,
    random_replay,
    report,
)

AGENTS = (2, 4, 8, 16)
REPEATS = 5


def shares_of(total: int, agents: Sequence[int], what: str) -> dict[int, int]:
    """How many of ``total`` each agent gets."""
    if uneven := [num_agents for num_agents in agents if total % num_agents]:
        raise ValueError(f"{total} {what} cannot be shared out evenly among {uneven} agents")
    return {num_agents: total // num_agents for num_agents in agents}


def cases(agents: Sequence[int], sizes: Sizes) -> tuple[dict[int, Case], dict[int, Case]]:
    """Imagination, and the update of the world model, for each number of agents."""
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
    """The cost for each number of agents, and the highest over the lowest.

    Args:
        name: of what was measured.
        measured: by number of agents.
        unit: of the cost.
        per_second: units of cost in a second of a run.
        target: bound of highest over lowest.
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
            "world_model": asdict(model_config(sizes)),
        }
        report("scaling", options.output, rows, settings=settings)


if __name__ == "__main__":
    main()
