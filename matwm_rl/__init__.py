"""MATWM, a multi-agent transformer world model (arXiv:2506.18537), as modular TorchRL components."""

from matwm_rl import presets
from matwm_rl.data import RecencySliceSampler, Replay, ReplayConfig, add_agent_entries, make_replay
from matwm_rl.envs import ImaginationEnv, MultiAgentEnv, make_env
from matwm_rl.modules import Imagination, WorldModel, WorldModelConfig, WorldModelPolicy, make_actor, make_critic
from matwm_rl.objectives import ActorLoss, CriticLoss, LambdaReturn, WorldModelLoss, WorldModelLossWeights
from matwm_rl.training import Learner, LearnerConfig, load_policy

__version__ = "0.1.0"

__all__ = [
    "ActorLoss",
    "CriticLoss",
    "Imagination",
    "ImaginationEnv",
    "LambdaReturn",
    "Learner",
    "LearnerConfig",
    "MultiAgentEnv",
    "RecencySliceSampler",
    "Replay",
    "ReplayConfig",
    "WorldModel",
    "WorldModelConfig",
    "WorldModelLoss",
    "WorldModelLossWeights",
    "WorldModelPolicy",
    "add_agent_entries",
    "load_policy",
    "make_actor",
    "make_critic",
    "make_env",
    "make_replay",
    "presets",
]
