"""The settings of replay, and the numbers of starts of Table C.6."""

from __future__ import annotations

from dataclasses import dataclass

from matwm_rl.arguments import check_ints
from matwm_rl.settings import Settings, setting


@dataclass(kw_only=True)
class ReplayConfig(Settings):
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

    Raises:
        ValueError: if a number is out of range, or ``capacity`` is shorter than a slice.

    Examples:
        >>> config = ReplayConfig(sequences=10)
        >>> config.capacity, config.sequences_per_agent(num_agents=4)
        (50000, 2)
    """

    capacity: int = setting(50_000, minimum=1)
    sequences: int = setting(16, minimum=1)
    sequence_length: int = setting(64, minimum=1)
    starts_per_agent: int | None = setting(None, minimum=1)
    context_length: int = setting(8, minimum=0)
    recency_decay: float = setting(0.9998, above=0, maximum=1)

    def check(self) -> None:
        """Refuse slices that are longer than what is stored."""
        for name, steps in (("sequence_length", self.sequence_length), ("context_length + 1", self.context_length + 1)):
            if steps > self.capacity:
                raise ValueError(
                    f"ReplayConfig.{name} must be at most the capacity, {self.capacity}, got {steps}: none fits"
                )

    def sequences_per_agent(self, num_agents: int) -> int:
        """Return each agent's equal part of ``sequences``: rounded, and at least one slice."""
        check_ints(1, num_agents=num_agents)
        return max(1, round(self.sequences / num_agents))


def starts_per_agent_by_agents(num_agents: int) -> int:
    """Return how many starts of imagination Table C.6 gives each agent: 512, 768 or 1024.

    Args:
        num_agents: N.

    Examples:
        >>> [starts_per_agent_by_agents(num_agents) for num_agents in (3, 4, 6, 7)]
        [512, 768, 768, 1024]
    """
    check_ints(1, num_agents=num_agents)
    if num_agents <= 3:
        return 512
    return 768 if num_agents <= 6 else 1024
