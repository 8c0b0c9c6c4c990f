"""What surrounds the loop of a training: its folder, its log, evaluations, checkpoints, and its end."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from tensordict import TensorDictBase
from torchrl.envs import TransformedEnv

from matwm_rl.data import Replay
from matwm_rl.envs import make_env
from matwm_rl.evaluation import Matches, RunLog
from matwm_rl.files import write_text
from matwm_rl.modules import WorldModelPolicy
from matwm_rl.presets import TrainConfig
from matwm_rl.runs.command_line import resume_command, this_command
from matwm_rl.runs.evaluator import Evaluator, due
from matwm_rl.runs.pictures import draw_pictures
from matwm_rl.runs.time_left import TimeLeft
from matwm_rl.runs.workers import is_orphan, parallel_run, wait_for_other_runs
from matwm_rl.settings import to_plain
from matwm_rl.training import (
    Learner,
    PolicyCard,
    ResumableCollector,
    has_checkpoint,
    load_checkpoint,
    lock_folder,
    save_checkpoint,
    save_policy,
    stop_on_signal,
)
from matwm_rl.training.signals import StopRequest

CONFIG_FILE = "config.json"
"""Settings of a run that has not ended; then its summary has them."""


class TrainingRun:
    """What surrounds the loop of a training: its folder, its log, evaluations, checkpoints, and its end.

    The loop itself is the script's: it takes the batches, and learns from them. The run locks its folder, goes on from
    a checkpoint if ``cfg.resume``, evaluates the untrained policy and then as ``cfg.evaluation`` says, logs, saves
    checkpoints, and ends with ``total_steps``, ``max_minutes``, or a signal. What it does in between leaves the random
    states as they were, so that nothing that is learnt depends on it.

    Args:
        cfg: settings of the run.
        policy: the acting policy, which is evaluated and saved: ``collector.policy``, where a copy acts.
        learner: part of the checkpoints.
        replay: part of the checkpoints.
        collector: part of the checkpoints; it yields the batches.

    Attributes:
        env_steps: env steps so far, those of the present batch included.
        log: the log of the run.

    Raises:
        RuntimeError: if another process writes into the folder, or the run ends before anything was learnt.
        SystemExit: with the signal's exit code, when a signal has stopped the run.

    Examples:
        >>> import contextlib, io, tempfile
        >>> from dataclasses import replace
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import make_replay
        >>> from matwm_rl.modules import WorldModel, make_actor, make_critic
        >>> cfg = replace(presets.tiny(), run_dir=tempfile.mkdtemp(), progress=False)
        >>> env = make_env(cfg.env, seed=0)
        >>> model = WorldModel.from_env(env, cfg.world_model)
        >>> learner = Learner(model, make_actor(model), make_critic(model), cfg.learner)
        >>> policy = WorldModelPolicy(model, learner.actor, history_length=cfg.policy.history_length)
        >>> replay = make_replay(env.num_agents, cfg.replay)
        >>> frames = {"frames_per_batch": 20, "total_frames": cfg.total_steps, "auto_register_policy_transforms": False}
        >>> env = TransformedEnv(env, policy.make_tensordict_primer())
        >>> parts = {"replay": replay, "collector": ResumableCollector(env, policy, seed=0, **frames)}
        >>> with contextlib.redirect_stdout(io.StringIO()), TrainingRun(cfg, policy, learner=learner, **parts) as run:
        ...     for batch in run.batches():
        ...         replay.extend(batch)
        ...         metrics = learner.update_world_model(replay.sequences.sample())
        ...         run.log.accumulate(metrics.update(learner.update_agents(replay.starts.sample())))
        ...     matches = run.finish()
        >>> matches.episodes, sorted(path.name for path in run.run_dir.glob("*.*"))[:3]
        (2, ['.lock', 'imagination.png', 'learning_curves.png'])
    """

    def __init__(
        self,
        cfg: TrainConfig,
        policy: WorldModelPolicy,
        *,
        learner: Learner,
        replay: Replay,
        collector: ResumableCollector,
    ) -> None:
        self.cfg, self.policy = cfg, policy
        self.run_dir = Path(cfg.run_dir)
        self.env_steps = 0
        self._time = TimeLeft(cfg.total_steps, max_seconds=cfg.max_minutes and 60 * cfg.max_minutes)
        self._learner, self._replay, self._collector = learner, replay, collector
        self._parts: dict[str, Any] = {"learner": learner, "replay": replay, "collector": collector}
        self._test_env = self._make_env(cfg.seed + 1, num_envs=cfg.evaluation.num_envs)

    def __enter__(self) -> Self:
        cfg = self.cfg
        with ExitStack() as stack:
            self._stop = StopRequest()
            stack.callback(self._wait_if_stopped)  # first of all: its own lock is free by then
            stack.enter_context(lock_folder(self.run_dir))
            stack.enter_context(_quiet_torchrl())
            self._stop = stack.enter_context(stop_on_signal())
            resumes = cfg.resume and has_checkpoint(self.run_dir)
            saved = load_checkpoint(self.run_dir, **self._parts) if resumes else {}
            self.env_steps = self._first_step = saved.get("env_steps", 0)
            self.log = RunLog(
                self.run_dir,
                total_steps=cfg.total_steps,
                resume_from=self.env_steps if cfg.resume else None,
                progress=cfg.progress,
                logger=cfg.logger,
                time_left=self._time.__str__,
                name=parallel_run(),
            )
            stack.enter_context(self.log)
            write_text(self.run_dir / CONFIG_FILE, json.dumps(to_plain(cfg), indent=2) + "\n")
            self._announce(resumes)
            self._evaluator = Evaluator(cfg, self._test_env, log=self.log, time_left=self._time, stop=self._stop)
            self._evaluator.random = saved.get("extra", {}).get("random", {})
            self._evaluate_if_due(min(self.env_steps, cfg.frames_per_batch) or 1)
            if not self.env_steps:
                self._evaluator.play_random_agents()
            if self._stop:
                self._end_by_signal()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _wait_if_stopped(self) -> None:
        if self._stop:
            wait_for_other_runs(self.run_dir, self._stop.exit_code)

    def batches(self) -> Iterator[TensorDictBase]:
        """Yield the collector's batches; between them log, evaluate and save as the settings say.

        Raises:
            SystemExit: when a signal has stopped the run.
        """
        cfg = self.cfg
        for batch in self._collector:
            new_steps = batch.numel()
            self.env_steps += new_steps
            yield batch
            if not self._stop and is_orphan():
                self._stop.receive(signal.SIGTERM)
            if self._learner.updates:
                self._time.measure(self.env_steps)
            self.log.advance(new_steps, self._phase())
            if due(cfg.log_every, self.env_steps, new_steps):
                self.log.write(self.env_steps)
            if not self._ends():
                self._evaluate_if_due(new_steps)
            # Saved last, so that the checkpoint includes everything logged before it.
            if (ends := self._ends()) or due(cfg.checkpoint_every, self.env_steps, new_steps):
                self._save()
            if self._stop:
                self._end_by_signal()
            if ends:
                break
        self._collector.shutdown()

    def _evaluate_if_due(self, new_steps: int) -> None:
        # Before the first update, nothing has been learnt since the first evaluation.
        if self._evaluator.is_due(self.env_steps, new_steps) and (self._learner.updates or not self.env_steps):
            matches = self._evaluator.evaluate(self.policy, self.env_steps)
            if matches is not None and self.env_steps:
                self._keep_policy(matches)

    def _ends(self) -> bool:
        return bool(self._stop) or self._time.is_up or self.env_steps >= self.cfg.total_steps

    def track(self, name: str, count: int) -> Iterable[int]:
        """Count to ``count`` and show it, for updates without env steps.

        Args:
            name: what the updates are.
            count: how many there are.
        """
        with self.log.task(name, "update") as tell:
            for done in range(count):
                tell(done, count, "")
                yield done

    def finish(self) -> Matches:
        """Evaluate, save the policy and the summary, draw the pictures.

        Returns:
            the final evaluation.

        Raises:
            RuntimeError: if nothing was learnt.
            SystemExit: when a signal has stopped the run.
        """
        cfg = self.cfg
        early = self._time.is_up and self.env_steps < cfg.total_steps
        if early:
            self.log.note(f"max_minutes={cfg.max_minutes:g} ends the run after {self.env_steps:,} steps")
        if not self._learner.updates:
            raise RuntimeError(
                f"nothing was learnt in {self.env_steps} steps: updates begin after init_random_steps="
                f"{cfg.init_random_steps}, when replay holds enough for a batch (it holds {len(self._replay)} steps)"
                + (f"; max_minutes={cfg.max_minutes:g} was over before" if early else "")
            )
        matches = self._evaluator.evaluate(self.policy, self.env_steps, final=True)
        if matches is None:
            self._end_by_signal()
        save_policy(self.run_dir / "policy.pt", self.policy, card=self._card(matches))
        self._keep_policy(matches)
        summary = {
            "env": cfg.env,
            "seed": cfg.seed,
            "env_steps": self.env_steps,
            "updates": self._learner.updates,
            "resumed_from": self._first_step or None,
            "wall_seconds": self._time.elapsed,
            "evaluation": matches.summary(),
            "evaluation_per_agent": matches.per_agent(),
            "evaluation_episodes": matches.episodes,
            "config": to_plain(cfg),
        }
        self.log.write_summary(summary)
        (self.run_dir / CONFIG_FILE).unlink(missing_ok=True)  # the summary has it
        self.log.note("drawing pictures")
        draw_pictures(
            self.run_dir,
            self._make_env(cfg.seed + 2),
            self.policy,
            env_name=cfg.env,
            references=self._evaluator.references,
            context_length=cfg.replay.context_length,
            note=self.log.note,
        )
        self.log.note(f"results in {self.run_dir}")
        return matches

    # -- what is told --------------------------------------------------------------------------------------------------

    def _announce(self, resumes: bool) -> None:
        cfg, note = self.cfg, self.log.note
        if resumes:
            note(f"{cfg.env}, seed {cfg.seed}: goes on after {self.env_steps:,} of {cfg.total_steps:,} steps")
        else:
            note(f"{cfg.env}, seed {cfg.seed}: {cfg.total_steps:,} env steps")
        if cfg.resume and not resumes:
            note(f"no checkpoint in {self.run_dir}: the run begins anew")
        if cfg.max_minutes:
            note(f"at most {cfg.max_minutes:g} minutes (max_minutes), evaluations and pictures included")
        note(f"everything goes to {self.run_dir}; Ctrl-C saves a checkpoint and ends the run")
        warm_up = {
            f"{cfg.init_random_steps:,} steps with random actions": cfg.init_random_steps,
            f"{cfg.world_model_warmup:,} updates of the world model alone": cfg.world_model_warmup,
            f"{cfg.critic_warmup:,} updates of the world model and the critics, not yet the actors": cfg.critic_warmup,
        }
        if not resumes and (parts := [text for text, count in warm_up.items() if count]):
            note(f"warm-up: {', then '.join(parts)}")

    def _phase(self) -> str:
        if not self._learner.updates:
            return "random actions" if self.env_steps <= self.cfg.init_random_steps else "filling replay"
        return "model and critics" if self._learner.updates < self.cfg.critic_warmup else "training"

    def _end_by_signal(self) -> NoReturn:
        """Tell what there is and how to go on, and end the process as the signal would have."""
        cfg, note = self.cfg, self.log.note
        note(f"stopped by {self._stop} after {self.env_steps:,} of {cfg.total_steps:,} steps")
        if self._evaluator.last is not None:
            note(f"last evaluation, after {self._evaluator.last_steps:,} steps: {self._evaluator.last}")
        if has_checkpoint(self.run_dir):
            note(f"checkpoint: {self.run_dir / 'checkpoints'}")
            note(f"to go on: {resume_command(self.run_dir)}")
        raise SystemExit(self._stop.exit_code)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        extra = {"random": self._evaluator.random}
        save_checkpoint(self.run_dir, **self._parts, env_steps=self.env_steps, extra=extra)

    def _keep_policy(self, matches: Matches) -> None:
        """Save the policy as ``policies/STEPS.pt``, if all are to be kept."""
        if self.cfg.evaluation.keep_policies:
            (self.run_dir / "policies").mkdir(exist_ok=True)
            path = self.run_dir / "policies" / f"{self.env_steps:08d}.pt"
            save_policy(path, self.policy, card=self._card(matches))

    def _card(self, matches: Matches) -> PolicyCard:
        cfg = self.cfg
        return PolicyCard(
            env=cfg.env,
            env_kwargs=cfg.env_kwargs,
            seed=cfg.seed,
            env_steps=self.env_steps,
            returns=matches.summary(),
            command=this_command(),
        )

    def _make_env(self, seed: int, num_envs: int = 1) -> TransformedEnv:
        cfg = self.cfg
        env = make_env(cfg.env, seed=seed, num_envs=num_envs, device=cfg.env_device, **cfg.env_kwargs)
        return TransformedEnv(env, self.policy.make_tensordict_primer())


@contextmanager
def _quiet_torchrl() -> Iterator[None]:
    """Silence messages of TorchRL and TensorDict for developers: shapes of storages, captures of CUDA graphs."""
    loggers = [logging.getLogger(name) for name in ("torchrl", "tensordict")]
    levels = [logger.level for logger in loggers]
    if "RL_LOGGING_LEVEL" not in os.environ:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
