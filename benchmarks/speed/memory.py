"""Whether one world model for all agents takes the memory of one: parameters and optimizer state for 1 to 64 agents.

    python benchmarks/speed/memory.py [--output FILE] [--threads 1]

With N agents of A actions and width F, only the action rows (N A F) and the outputs of the teammate predictor ((N - 1)
A (F + 1)) may grow; the rest has to be the same for all N >= 2. A single agent has no teammate predictor, so it is left
out of that comparison; N models of a single agent are a lower bound of what separate models would take. The state of
Adam is measured after one real update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from measure import pinned
from rows import Row, parser, progress, report
from torch import Tensor
from workloads import Sizes, make_learner, model_config, random_replay

from matwm_rl.settings import to_plain

AGENTS = (1, 2, 4, 8, 16, 32, 64)
# One short sequence per agent and small actors, since neither belongs to the world model.
SIZES = Sizes(starts=1, sequence_length=2, num_cells=8)
MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Memory of one world model.

    Attributes:
        agents: N.
        parameters: number of parameters.
        parameter_bytes: their size.
        adam_bytes: size of Adam's state.
        growing: parameters that may grow with N.
        growing_bytes: their size.
    """

    agents: int
    parameters: int
    parameter_bytes: int
    adam_bytes: int
    growing: int
    growing_bytes: int

    @property
    def remainder(self) -> int:
        """Number of parameters that must not depend on N."""
        return self.parameters - self.growing

    @property
    def adam_remainder(self) -> int:
        """Bytes of Adam's state that must not depend on N: it keeps two moments of every parameter."""
        return self.adam_bytes - 2 * self.growing_bytes


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def expected_growth(num_agents: int, num_actions: int, width: int) -> int:
    """Return the number of action rows and of teammate outputs with their bias."""
    return num_agents * num_actions * width + (num_agents - 1) * num_actions * (width + 1)


def measure_memory(num_agents: int, sizes: Sizes) -> Memory:
    """Build the world model of ``num_agents`` agents, and update it once."""
    learner = make_learner(num_agents, sizes)
    replay = random_replay(num_agents, sizes, sequences_per_agent=1, starts_per_agent=sizes.starts)
    learner.update_world_model(replay.sequences.sample())
    parameters = list(learner.world_model.parameters())
    state = [value for entry in learner.world_model_optimizer.state.values() for value in entry.values()]
    count = sum(parameter.numel() for parameter in parameters)
    growing = expected_growth(num_agents, sizes.num_actions, learner.world_model.transformer.features)
    return Memory(
        agents=num_agents,
        parameters=count,
        parameter_bytes=num_bytes(parameters),
        adam_bytes=num_bytes(value for value in state if isinstance(value, Tensor)),
        growing=growing,
        growing_bytes=growing * parameters[0].element_size(),
    )


def memory_rows(memories: Sequence[Memory]) -> list[Row]:
    """Return the memory for each number of agents, and whether it grows as expected; the first is of one agent."""
    single, *shared = memories
    if single.agents != 1 or len(shared) < 2:
        raise ValueError(f"expected 1 and at least two larger numbers of agents, got {[m.agents for m in memories]}")
    rows = []
    for memory in memories:
        start = f"{memory.agents} agent{'s' if memory.agents > 1 else ''}"
        copies = memory.parameters / (memory.agents * single.parameters)
        rows += [
            Row(case=f"{start}: parameters", value=memory.parameters, unit="parameters", better="lower"),
            Row(case=f"{start}: parameters", value=memory.parameter_bytes / MIB, unit="MiB", better="lower"),
            Row(case=f"{start}: Adam's state", value=memory.adam_bytes / MIB, unit="MiB", better="lower"),
            Row(case=f"{start}: parameters over those of separate models", value=copies, unit="ratio", better="lower"),
        ]
    rows += [
        Row(
            case=f"{memory.agents} agents: parameters without action rows and teammate outputs",
            value=memory.remainder,
            unit="parameters",
            better="lower",
        )
        for memory in shared
    ]
    span = f"{shared[0].agents} to {shared[-1].agents} agents, most over fewest"
    what = "without action rows and teammate outputs"
    return [
        *rows,
        flatness(f"parameters {what}, {span}", [memory.remainder for memory in shared]),
        flatness(f"Adam's state {what}, {span}", [memory.adam_remainder for memory in shared]),
    ]


def flatness(case: str, values: Sequence[int]) -> Row:
    """Return the largest over the smallest value, 1 if nothing grows."""
    return Row(case=case, value=max(values) / min(values), unit="ratio", target=1.0, better="lower")


def main(arguments: Sequence[str] | None = None, *, sizes: Sizes = SIZES, agents: Sequence[int] = AGENTS) -> None:
    """Measure, print, write."""
    options = parser(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    memories = []
    with pinned(options.threads):
        for num_agents in agents:
            progress(f"agents: {num_agents}")
            memories.append(measure_memory(num_agents, sizes))
        settings = {
            "agents": list(agents),
            "observation_size": sizes.observation_size,
            "num_actions": sizes.num_actions,
            "world_model": to_plain(model_config(sizes)),
        }
        report("memory", options.output, memory_rows(memories), settings=settings)


if __name__ == "__main__":
    main()
