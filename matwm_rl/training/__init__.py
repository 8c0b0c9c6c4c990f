"""What a training script is made of: the learner, checkpoints, model files and settings of the process."""

from matwm_rl.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from matwm_rl.training.learner import Learner, LearnerConfig
from matwm_rl.training.model_files import load_policy, load_world_model, save_policy, save_world_model
from matwm_rl.training.process import prepare_process

__all__ = [
    "Learner",
    "LearnerConfig",
    "has_checkpoint",
    "load_checkpoint",
    "load_policy",
    "load_world_model",
    "prepare_process",
    "save_checkpoint",
    "save_policy",
    "save_world_model",
]
