"""The settings of one of several processes that learn together."""

from __future__ import annotations

from dataclasses import replace

from matwm_rl.arguments import check_ints, check_kinds
from matwm_rl.data.config import starts_per_agent_by_agents
from matwm_rl.presets import TrainConfig


def split_run(cfg: TrainConfig, *, rank: int, world_size: int, num_agents: int) -> TrainConfig:
    """Divide the settings of a run among several learner processes, and return those of one of them.

    Each has an equal part of the environments, of the env steps, of replay and of every batch (slices are rounded), and
    a seed of its own. The ratio of updates to the env steps of all processes together stays the same. Warm-ups are not
    divided. See :func:`~matwm_rl.training.distribute`.

    Args:
        cfg: settings of the whole run.
        rank: number of the process, from 0.
        world_size: how many there are.
        num_agents: N of the environment.

    Raises:
        ValueError: if something cannot be split evenly.

    Examples:
        >>> from matwm_rl import presets
        >>> part = split_run(presets.vectors(), rank=1, world_size=2, num_agents=3)
        >>> part.num_envs, part.frames_per_batch, part.replay.starts_per_agent, part.seed
        (2, 10, 24, 1)
    """
    check_kinds(TrainConfig, cfg=cfg)
    check_ints(1, world_size=world_size, num_agents=num_agents)
    check_ints(0, rank=rank)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size, {world_size}, got {rank}")
    every = cfg.evaluation.every
    starts = cfg.replay.starts_per_agent or starts_per_agent_by_agents(num_agents)

    def part(name: str, number: int) -> int:
        if number % world_size:
            raise ValueError(f"{name} must be a multiple of the number of processes, {world_size}, got {number}")
        return number // world_size

    return replace(
        cfg,
        seed=cfg.seed * world_size + rank,
        num_envs=part("num_envs", cfg.num_envs),
        frames_per_batch=part("frames_per_batch", cfg.frames_per_batch),
        total_steps=-(-cfg.total_steps // world_size),
        init_random_steps=-(-cfg.init_random_steps // world_size),
        log_every=-(-cfg.log_every // world_size),
        checkpoint_every=-(-cfg.checkpoint_every // world_size),
        evaluation=replace(cfg.evaluation, every=None if every is None else -(-every // world_size)),
        replay=replace(
            cfg.replay,
            capacity=cfg.replay.capacity // world_size,
            sequences=num_agents * max(1, round(cfg.replay.sequences_per_agent(num_agents) / world_size)),
            starts_per_agent=part("replay.starts_per_agent", starts),
        ),
    )
