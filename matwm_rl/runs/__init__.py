"""What surrounds the loop of a training script: the command line, the run, and what a sweep leaves."""

from matwm_rl.runs.command_line import command_line, to_config
from matwm_rl.runs.split_run import split_run
from matwm_rl.runs.sweep import summarize_sweep
from matwm_rl.runs.training_run import TrainingRun

__all__ = ["TrainingRun", "command_line", "split_run", "summarize_sweep", "to_config"]
