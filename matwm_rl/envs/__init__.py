"""Multi-agent environments with one dense group of agents."""

from matwm_rl.envs.factory import make_env
from matwm_rl.envs.imagination_env import Dreamer, ImaginationEnv
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.merge_groups import merge_rollout
from matwm_rl.envs.mock import MockEnv
from matwm_rl.envs.multi_agent_env import MultiAgentEnv, ParallelMultiAgentEnv, SerialMultiAgentEnv
from matwm_rl.envs.render import render_frame

__all__ = [
    "AgentLayout",
    "Dreamer",
    "ImaginationEnv",
    "MockEnv",
    "MultiAgentEnv",
    "ParallelMultiAgentEnv",
    "SerialMultiAgentEnv",
    "make_env",
    "merge_rollout",
    "render_frame",
]
