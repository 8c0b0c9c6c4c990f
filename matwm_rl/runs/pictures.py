"""The pictures that a run leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl.evaluation import find_evaluation, observation_names, plot_learning_curves, plot_open_loop, record_gif
from matwm_rl.modules import WorldModelPolicy

HORIZON = 15
"""Steps that the world model is drawn to imagine."""
PICTURED_STEPS = 500
"""Steps of real episodes that its errors are means over; the longest window among them is drawn."""


def draw_pictures(
    run_dir: Path,
    env: EnvBase,
    policy: WorldModelPolicy,
    *,
    env_name: str,
    references: Mapping[str, Mapping[str, float]],
    context_length: int,
    note: Callable[[str], Any],
) -> None:
    """Draw learning curves, a GIF of real episodes, and open-loop imagination against what really happened.

    Args:
        run_dir: folder of the run, which gets ``learning_curves.png``, ``episodes.gif`` and ``imagination.png``.
        env: one environment, with the policy's primer.
        policy: plays the episodes.
        env_name: as given to :func:`~matwm_rl.envs.make_env`; what is registered for it is drawn so.
        references: returns to compare with, see :func:`~matwm_rl.evaluation.plot_learning_curves`.
        context_length: steps before those that are imagined.
        note: is told if the environment cannot be drawn.
    """
    plot_learning_curves(run_dir, run_dir / "learning_curves.png", references=references)
    draw = find_evaluation(env_name).draw
    try:
        record_gif(env, policy, run_dir / "episodes.gif", episodes=4, draw=draw and draw(env.layout))
    except Exception as error:  # whatever a renderer raises: results are saved, and the other picture is to come
        note(f"no GIF: {type(error).__name__}: {error}")
    with set_exploration_type(ExplorationType.RANDOM):  # as the world model has seen them play
        episodes = env.rollout(PICTURED_STEPS, policy, break_when_any_done=False).reshape(-1)
    plot_open_loop(
        policy.world_model,
        episodes,
        run_dir / "imagination.png",
        layout=env.layout,
        observation_names=observation_names(env_name, env),
        context_length=context_length,
        horizon=HORIZON,
    )
