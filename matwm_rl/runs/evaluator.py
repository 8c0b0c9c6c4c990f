"""The evaluations of a run. They show their progress, stop at a signal, and do not change the random states."""

from __future__ import annotations

from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from matwm_rl.evaluation import Matches, RandomActions, RunLog, evaluate_matches, find_evaluation, report_episodes
from matwm_rl.presets import TrainConfig
from matwm_rl.runs.time_left import TimeLeft
from matwm_rl.training.process import random_states, set_random_states
from matwm_rl.training.signals import StopRequest

EVALUATIONS = 10
"""Evaluations of a run that does not say after how many steps they are, the one before the first step not counted."""
PICTURE_SECONDS = 10.0
"""What the pictures are taken to need, on a slow core. How long they do take is known when the run is over."""


class _StopEvaluation(BaseException):
    """A signal has come during an evaluation; not an ``Exception``, which a play function might catch."""


class Evaluator:
    """Plays the evaluations of a run, on the same episodes every time.

    Args:
        cfg: settings of the run.
        env: to play in, with the policy's primer; made for nothing else.
        log: gets the returns, and shows how far an evaluation is.
        time_left: is told how long the evaluations to come will take.
        stop: ends an evaluation.

    Attributes:
        last: the newest evaluation.
        last_steps: env steps after which it was.
        random: returns of random agents, ``{match: {label: value}}``, where the environment's references have none.
    """

    def __init__(self, cfg: TrainConfig, env: EnvBase, *, log: RunLog, time_left: TimeLeft, stop: StopRequest) -> None:
        self.last: Matches | None = None
        self.last_steps = 0
        self.random: dict[str, dict[str, float]] = {}
        # The known returns were measured in the environment without further arguments.
        self._known = {} if cfg.env_kwargs else find_evaluation(cfg.env).references
        self._cfg, self._env, self._log, self._time, self._stop = cfg, env, log, time_left, stop
        self._every = cfg.evaluation.every or max(1, cfg.total_steps // EVALUATIONS)

    @property
    def references(self) -> dict[str, dict[str, float]]:
        """Returns to compare those of the policy with, ``{match: {label: value}}``."""
        return {
            match: {**self.random.get(match, {}), **self._known.get(match, {})}
            for match in {**self.random, **self._known}
        }

    def is_due(self, env_steps: int, new_steps: int) -> bool:
        """Return whether to evaluate now, after a batch or before the first step; the final evaluation is separate."""
        return env_steps < self._cfg.total_steps and due(self._every, env_steps, new_steps)

    def evaluate(self, policy: TensorDictModuleBase, env_steps: int, *, final: bool = False) -> Matches | None:
        """Play, log, and tell the returns.

        Returns:
            the returns; ``None`` if a signal came in between, or if they are logged already and not ``final``.
        """
        settings, is_logged = self._cfg.evaluation, env_steps in self._log.evaluated
        if is_logged and not final:
            return None
        when = f"after {env_steps:,} steps" if env_steps else "of untrained agents"
        episodes = settings.final_episodes if final else settings.episodes
        began = self._time.elapsed
        matches = self._play(policy, episodes, f"{'final ' if final else ''}evaluation {when}")
        if matches is None:
            return None
        self.last, self.last_steps = matches, env_steps
        if not is_logged:
            self._log.log(matches.metrics(), env_steps)
        self._log.note(f"{env_steps:,} steps: {matches}{'' if env_steps else ' (untrained)'}")
        seconds = (self._time.elapsed - began) / matches.episodes
        to_come = max(0, (self._cfg.total_steps - 1) // self._every - env_steps // self._every)
        self._time.later = to_come * settings.episodes * seconds
        self._time.final = settings.final_episodes * seconds + PICTURE_SECONDS
        return matches

    def play_random_agents(self) -> None:
        """Play random agents, for the pictures, unless the environment's evaluation knows what they get."""
        if any("random" in lines for lines in self._known.values()):
            return
        random = RandomActions(self._env.layout.actions)
        matches = self._play(random, self._cfg.evaluation.episodes, "evaluation of random agents")
        if matches is not None:
            for match, returns in matches.returns.items():
                groups = returns.per_group()
                self.random[match] = {f"random {group}": groups[group] for group in groups}
            self._log.note(f"random agents: {matches}")

    def _play(self, policy: TensorDictModuleBase, episodes: int, name: str) -> Matches | None:
        """Play; return nothing if a signal came in between."""
        number, of = 0, f" of {len(self.last.returns)}" if self.last else ""
        before = random_states()
        try:
            with self._time.pause(), self._log.task(name, "episode") as tell:

                def report(played: int, total: int, steps: int) -> None:
                    nonlocal number
                    number += steps == 0
                    tell(played, total, f"match {number}{of}, {steps:,} steps")
                    if self._stop:
                        raise _StopEvaluation

                self._env.set_seed(self._cfg.seed + 1)
                with report_episodes(report):
                    return evaluate_matches(self._cfg.env, self._env, policy, episodes=episodes)
        except _StopEvaluation:
            return None
        finally:
            set_random_states(before)


def due(every: int, env_steps: int, new_steps: int) -> bool:
    """Return whether the last ``new_steps`` steps passed a multiple of ``every``."""
    return env_steps // every > (env_steps - new_steps) // every
