"""Replay: slice samplers, folding agents into the batch, and both buffers on one storage."""

from matwm_rl.data.continuity import Continuity
from matwm_rl.data.focal import (
    REPLAY_KEYS,
    FocalSlices,
    agent_rows,
    focal_batch,
    select_focal,
    teammate_actions,
    to_focal,
)
from matwm_rl.data.replay import Replay, make_replay
from matwm_rl.data.samplers import RecencySliceSampler, UniformSliceSampler
from matwm_rl.data.slices import timeline

__all__ = [
    "REPLAY_KEYS",
    "Continuity",
    "FocalSlices",
    "RecencySliceSampler",
    "Replay",
    "UniformSliceSampler",
    "agent_rows",
    "focal_batch",
    "make_replay",
    "select_focal",
    "teammate_actions",
    "timeline",
    "to_focal",
]
