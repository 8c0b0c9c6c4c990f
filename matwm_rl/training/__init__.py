"""What a training script is made of: the learner, checkpoints, model files and settings of the process."""

from matwm_rl.files import lock_folder
from matwm_rl.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from matwm_rl.training.collector import ResumableCollector
from matwm_rl.training.config import LearnerConfig
from matwm_rl.training.distributed import distribute
from matwm_rl.training.export import export_policy
from matwm_rl.training.learner import Learner
from matwm_rl.training.model_files import load_policy, load_world_model, save_policy, save_world_model
from matwm_rl.training.process import prepare_process
from matwm_rl.training.signals import fail_with_workers, stop_on_signal
from matwm_rl.training.trained_policy import PolicyCard, TrainedPolicy

__all__ = [
    "Learner",
    "LearnerConfig",
    "PolicyCard",
    "ResumableCollector",
    "TrainedPolicy",
    "distribute",
    "export_policy",
    "fail_with_workers",
    "has_checkpoint",
    "load_checkpoint",
    "load_policy",
    "load_world_model",
    "lock_folder",
    "prepare_process",
    "save_checkpoint",
    "save_policy",
    "save_world_model",
    "stop_on_signal",
]
