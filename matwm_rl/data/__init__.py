"""Replay: slice samplers, the layouts of stored data, and two buffers on one storage; data sets in files."""

from matwm_rl.data.config import ReplayConfig, starts_per_agent_by_agents
from matwm_rl.data.continuity import Continuity
from matwm_rl.data.dataset import load_dataset, save_dataset
from matwm_rl.data.layouts import REPLAY_KEYS, FocalSlices, add_agent_entries
from matwm_rl.data.replay import Replay, make_replay
from matwm_rl.data.samplers import RecencySliceSampler, UniformSliceSampler
from matwm_rl.data.slices import timeline

__all__ = [
    "REPLAY_KEYS",
    "Continuity",
    "FocalSlices",
    "RecencySliceSampler",
    "Replay",
    "ReplayConfig",
    "UniformSliceSampler",
    "add_agent_entries",
    "load_dataset",
    "make_replay",
    "save_dataset",
    "starts_per_agent_by_agents",
    "timeline",
]
