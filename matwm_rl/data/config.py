"""The settings of replay, and the numbers of starts of Table C.6."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class ReplayConfig:
    """Settings of :func:`~matwm_rl.data.make_replay`, by default the paper's (docs/algorithm.md, Hyperparameters).

    Attributes:
        capacity: env steps stored, all environments together; rounded down to a multiple of their number.
        sequences: slices of a world-model batch, all agents together; see :meth:`sequences_per_agent`.
        sequence_length: T, steps of such a slice.
        starts_per_agent: starts of imagination per agent of an agent batch. ``None``: by the number of agents, see
            :func:`starts_per_agent_by_agents`.
        context_length: C, real steps before the one that imagination starts from; may be 0.
        recency_decay: weight per env step of age of a world-model slice, in (0, 1], see
            :class:`~matwm_rl.data.RecencySliceSampler`; 1.0 samples uniformly.

    Examples:
        >>> config = ReplayConfig(sequences=10)
        >>> config.capacity, config.sequences_per_agent(num_agents=4)
        (50000, 2)
    """

    capacity: int = 50_000
    sequences: int = 16
    sequence_length: int = 64
    starts_per_agent: int | None = None
    context_length: int = 8
    recency_decay: float = 0.9998

    def sequences_per_agent(self, num_agents: int) -> int:
        """Return each agent's equal part of ``sequences``: rounded, and at least one slice."""
        return max(1, round(self.sequences / num_agents))


def starts_per_agent_by_agents(num_agents: int) -> int:
    """Return how many starts of imagination Table C.6 gives each agent: 512, 768 or 1024.

    Args:
        num_agents: N.

    Examples:
        >>> [starts_per_agent_by_agents(num_agents) for num_agents in (3, 4, 6, 7)]
        [512, 768, 768, 1024]
    """
    if num_agents <= 3:
        return 512
    return 768 if num_agents <= 6 else 1024
