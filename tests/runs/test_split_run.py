"""The parts of a run make up the whole of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from matwm_rl import presets
from matwm_rl.runs import split_run


def test_parts_make_up_the_whole() -> None:
    cfg = presets.vectors()
    cfg = replace(cfg, seed=3, evaluation=replace(cfg.evaluation, every=5000))
    parts = [split_run(cfg, rank=rank, world_size=2, num_agents=4) for rank in (0, 1)]
    for name in ("num_envs", "total_steps", "init_random_steps", "frames_per_batch", "log_every", "checkpoint_every"):
        assert sum(getattr(part, name) for part in parts) == getattr(cfg, name)
    for name in ("capacity", "sequences", "starts_per_agent"):
        assert sum(getattr(part.replay, name) for part in parts) == getattr(cfg.replay, name)
    assert sum(part.evaluation.every for part in parts) == cfg.evaluation.every
    # Updates per step of all processes, and what precedes them, stay the same.
    assert {part.updates_per_batch for part in parts} == {cfg.updates_per_batch}
    assert [part.seed for part in parts] == [6, 7]
    assert parts[0].learner == cfg.learner and parts[0].world_model == cfg.world_model


def test_one_process_does_the_whole() -> None:
    cfg = presets.vectors()
    part = split_run(cfg, rank=0, world_size=1, num_agents=4)
    assert part == cfg


def test_slices_are_rounded_and_starts_by_the_number_of_agents_are_split() -> None:
    part = split_run(replace(presets.paper(), num_envs=2, frames_per_batch=2), rank=1, world_size=2, num_agents=3)
    assert part.replay.sequences_per_agent(3) == 2  # of 5
    assert part.replay.starts_per_agent == 256


@pytest.mark.parametrize("world_size", [3, 8])
def test_what_cannot_be_split_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"num_envs must be a multiple of .* {world_size}, got 4"):
        split_run(presets.vectors(), rank=0, world_size=world_size, num_agents=4)


def test_a_rank_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be below world_size, 2, got 2"):
        split_run(presets.vectors(), rank=2, world_size=2, num_agents=4)
