"""Multi-agent environments with one dense group of agents."""

from matwm_rl.envs.factory import make_env
from matwm_rl.envs.imagination_env import ImaginationEnv
from matwm_rl.envs.imagination_model import ImaginationModel
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.merge_rollout import merge_rollout
from matwm_rl.envs.mock import MockEnv
from matwm_rl.envs.multi_agent_env import MultiAgentEnv, ParallelMultiAgentEnv, SerialMultiAgentEnv
from matwm_rl.envs.registry import Ends, register_end_rule, register_family, register_renderer
from matwm_rl.envs.render import render_frame
from matwm_rl.envs.wrap import wrap_env

__all__ = [
    "AgentLayout",
    "Ends",
    "ImaginationEnv",
    "ImaginationModel",
    "MockEnv",
    "MultiAgentEnv",
    "ParallelMultiAgentEnv",
    "SerialMultiAgentEnv",
    "make_env",
    "merge_rollout",
    "register_end_rule",
    "register_family",
    "register_renderer",
    "render_frame",
    "wrap_env",
]
