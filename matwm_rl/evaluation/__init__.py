"""How good are the agents and their world model: returns, opponents, open-loop errors, logs and pictures."""

from matwm_rl.evaluation.figures import plot_learning_curves
from matwm_rl.evaluation.gif import record_gif
from matwm_rl.evaluation.loggers import LoggerName, make_logger
from matwm_rl.evaluation.open_loop import episode_windows, open_loop, open_loop_errors
from matwm_rl.evaluation.open_loop_figure import plot_open_loop
from matwm_rl.evaluation.opponents import CrossPlay, RandomActions, against_random
from matwm_rl.evaluation.registry import (
    Evaluation,
    evaluate_matches,
    find_evaluation,
    observation_names,
    register_evaluation,
)
from matwm_rl.evaluation.returns import EvaluationConfig, Matches, Returns, evaluate, report_episodes
from matwm_rl.evaluation.run_log import RunLog, read_metrics
from matwm_rl.evaluation.simple_tag import DrawTag, TagScript, evaluate_tag

__all__ = [
    "CrossPlay",
    "DrawTag",
    "Evaluation",
    "EvaluationConfig",
    "LoggerName",
    "Matches",
    "RandomActions",
    "Returns",
    "RunLog",
    "TagScript",
    "against_random",
    "episode_windows",
    "evaluate",
    "evaluate_matches",
    "evaluate_tag",
    "find_evaluation",
    "make_logger",
    "observation_names",
    "open_loop",
    "open_loop_errors",
    "plot_learning_curves",
    "plot_open_loop",
    "read_metrics",
    "record_gif",
    "register_evaluation",
    "report_episodes",
]
