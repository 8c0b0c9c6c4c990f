"""What a training script is made of: the learner, evaluation, checkpoints, logs and pictures."""

from matwm_rl.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from matwm_rl.training.evaluation import Matches, Returns, evaluate, evaluate_matches, evaluate_tag
from matwm_rl.training.figures import plot_learning_curves
from matwm_rl.training.gif import DrawTag, record_gif
from matwm_rl.training.learner import Learner, LearnerConfig
from matwm_rl.training.model_files import load_policy, load_world_model, save_policy, save_world_model
from matwm_rl.training.open_loop import episode_windows, open_loop, open_loop_errors
from matwm_rl.training.open_loop_figure import plot_open_loop
from matwm_rl.training.opponents import CrossPlay, RandomActions, TagScript
from matwm_rl.training.process import prepare_process
from matwm_rl.training.run_log import RunLog, read_metrics

__all__ = [
    "CrossPlay",
    "DrawTag",
    "Learner",
    "LearnerConfig",
    "Matches",
    "RandomActions",
    "Returns",
    "RunLog",
    "TagScript",
    "episode_windows",
    "evaluate",
    "evaluate_matches",
    "evaluate_tag",
    "has_checkpoint",
    "load_checkpoint",
    "load_policy",
    "load_world_model",
    "open_loop",
    "open_loop_errors",
    "plot_learning_curves",
    "plot_open_loop",
    "prepare_process",
    "read_metrics",
    "record_gif",
    "save_checkpoint",
    "save_policy",
    "save_world_model",
]
