"""The methods that sample_efficiency.py compares: MATWM, its ablations, model-free methods, agents that do not learn.

No script of its own. To add a method, add an entry to :data:`METHODS`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import clock
import model_free
from protocol import Environment
from tensordict.nn import TensorDictModuleBase

from matwm_rl import presets
from matwm_rl.evaluation import RandomActions
from matwm_rl.settings import to_plain
from matwm_rl.training import has_checkpoint, load_policy

ROOT = Path(__file__).resolve().parents[2]

OnCheckpoint = Callable[[int, TensorDictModuleBase, float | None], None]
"""Called with the env steps done, the policy at that time, and the CPU seconds of training until then.

The seconds are ``None`` if they are unknown: of an interrupted training, or where nothing is learnt.
"""

PRESET = "preset=vectors"
NO_TEAMMATES = ("world_model.teammate_predictor=false",)
NO_RECENCY = ("replay.recency_decay=1.0",)
NO_ACTION_SCALING = ("world_model.action_scaling=false",)
"""Overrides of the training script: the preset of all runs of MATWM, and the paper's ablations (Table 5)."""
DEVICES = ("device", "env_device")
"""Settings of the training script that do not change what is learnt."""


@dataclass(frozen=True)
class Matwm:
    """MATWM, trained with the command line of examples/simple_tag.py.

    Attributes:
        overrides: of the script's configuration.
        total_steps: of a run, where the environment's are not fewer; ``None``: those of the environment.
        only: the environments in which it is run by default; ``None``: all.
        num_seeds: with how many of the seeds it is run; ``None``: with all.
        device: that it is trained on. Times are of one core of a CPU: on another device none are stored.
    """

    overrides: tuple[str, ...] = ()
    total_steps: int | None = None
    only: tuple[str, ...] | None = None
    num_seeds: None = None
    device: str = "cpu"

    def steps(self, environment: Environment) -> int:
        return min(self.total_steps or environment.total_steps, environment.total_steps)

    def checkpoints(self, environment: Environment) -> list[int]:
        """Return the env steps after which the policy is evaluated, the same for all methods."""
        return [env_steps for env_steps in environment.checkpoints if env_steps <= self.steps(environment)]

    def arguments(self, environment: Environment) -> list[str]:
        """Return the script's command line, without what tells one run from another."""
        return [
            PRESET,
            f"env={environment.env}",
            *(f"env_kwargs.{name}={json.dumps(value)}" for name, value in environment.env_kwargs.items()),
            f"total_steps={self.steps(environment)}",
            "max_minutes=null",
            "progress=false",
            "num_threads=1",
            f"evaluation.every={environment.every}",
            # Few, for the log only: afterwards every kept policy is evaluated by the common protocol.
            "evaluation.episodes=10",
            "evaluation.final_episodes=10",
            "evaluation.keep_policies=true",
            *self.overrides,
        ]

    def settings(self, environment: Environment) -> dict[str, Any]:
        return configuration(*self.arguments(environment))

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: OnCheckpoint) -> None:
        command = [sys.executable, clock.__file__, str(ROOT / "examples" / "simple_tag.py")]
        command += self.arguments(environment)
        command += [f"seed={seed}", f"run_dir={folder.resolve()}", f"device={self.device}"]
        if has_checkpoint(folder):
            command += ["resume=true"]
        elif folder.exists() and not has_training(folder):
            shutil.rmtree(folder)  # of an attempt without a checkpoint: a new run refuses the metrics of another
        if not (folder / "summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "output.txt").open("a") as output:
                # close_fds=False, so that the training inherits the lock of the run and holds it too.
                done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, close_fds=False)
            if "resume=true" in command or self.device != "cpu":
                (folder / clock.SECONDS_FILE).unlink(missing_ok=True)  # after an interruption, not all of them
            if done.returncode:
                raise RuntimeError(f"training failed, return code {done.returncode}, see {folder / 'output.txt'}")
        paths = sorted((folder / "policies").glob("*.pt"))
        for path, core_seconds in zip(paths, clock.noted_seconds(folder, len(paths)), strict=True):
            on_checkpoint(int(path.stem), load_policy(path), core_seconds)


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the complete configuration of the training script with these overrides, as nested dictionaries."""
    settings: dict[str, Any] = to_plain(_composed(tuple(overrides)))
    return settings


@cache
def _composed(overrides: tuple[str, ...]) -> presets.TrainConfig:
    return presets.compose(["run_dir=unnamed", *overrides])


def configuration(*overrides: str) -> dict[str, Any]:
    """Return the configuration of the training script with these overrides, see :func:`of_every_run`."""
    return of_every_run(composed(overrides))


def of_every_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of the training script without what tells one run from another."""
    return {
        name: value
        for name, value in config.items()
        if name not in ("run_dir", "seed", "resume", "checkpoint_every", "logger", *DEVICES)
    }


def differences(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ and change what is learnt, as ``name: then, now NOW``."""
    then, now = _flat(stored), _flat(json.loads(json.dumps(settings)))
    names = sorted({*then, *now} - {*DEVICES, "learner.cuda_graphs"})
    return [f"{name}: {then.get(name)}, now {now.get(name)}" for name in names if then.get(name) != now.get(name)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def has_training(folder: Path) -> bool:
    """Whether a folder has a finished training of MATWM, or a checkpoint to resume from."""
    return (folder / "summary.json").exists() or has_checkpoint(folder)


@dataclass(frozen=True)
class ModelFree:
    """A model-free method of model_free.py.

    Attributes:
        name: of the method there.
        total_steps: of a run; ``None``: those of the environment. More than these are evaluated as often as the
            environment's whole run is long.
        only: the environments in which it is run by default; ``None``: all.
        num_seeds: with how many of the seeds it is run; ``None``: with all.
    """

    name: str
    total_steps: int | None = None
    only: tuple[str, ...] | None = None
    num_seeds: int | None = None

    def steps(self, environment: Environment) -> int:
        shortened = environment.total_steps < Environment.total_steps
        return environment.total_steps if self.total_steps is None or shortened else self.total_steps

    def checkpoints(self, environment: Environment) -> list[int]:
        """Return the env steps after which the policy is evaluated: none where the method cannot learn the actions."""
        if environment.is_continuous and self.name not in model_free.BOX_METHODS:
            return []
        total_steps, usual = self.steps(environment), environment.total_steps
        return environment.checkpoints if total_steps == usual else [*range(usual, total_steps + 1, usual)]

    def settings(self, environment: Environment) -> dict[str, Any]:
        return asdict(model_free.method_settings(self.name, continuous=environment.is_continuous))

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: OnCheckpoint) -> None:
        time = clock.Clock()

        def shown(env_steps: int, policy: TensorDictModuleBase) -> None:
            with time.pause():
                on_checkpoint(env_steps, policy, time.seconds)

        model_free.train(
            self.name,
            environment.env,
            seed=seed,
            total_steps=self.steps(environment),
            checkpoints=self.checkpoints(environment),
            on_checkpoint=shown,
            env_kwargs=environment.env_kwargs,
        )


@dataclass(frozen=True)
class Reference:
    """Agents that do not learn: random agents, or the script of the environment."""

    scripted: bool
    only: None = None
    num_seeds: None = None

    def steps(self, environment: Environment) -> int:
        return 0

    def checkpoints(self, environment: Environment) -> list[int]:
        return [] if self.scripted and environment.script is None else [0]

    def settings(self, environment: Environment) -> dict[str, Any]:
        return {"scripted": self.scripted}

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: OnCheckpoint) -> None:
        layout = environment.make().layout
        if not self.scripted:
            on_checkpoint(0, RandomActions(layout.actions), None)
        elif environment.script is not None:
            on_checkpoint(0, environment.script(layout), None)


LONG_STEPS = 100_000
LONG_RUNS: dict[str, tuple[str, ...]] = {}
"""The two model-free methods with the best returns after 25,000 steps in each environment, by the stored runs.

They are also run for :data:`LONG_STEPS`, with one seed, and the best of them has the score 1.
"""


def long(name: str) -> str:
    """Return the name of the method that is run for :data:`LONG_STEPS`."""
    return f"{name}_{LONG_STEPS // 1000}k"


def long_run(name: str) -> ModelFree:
    """Return a model-free method for :data:`LONG_STEPS`, in the environments in which :data:`LONG_RUNS` names it."""
    only = tuple(environment for environment, names in LONG_RUNS.items() if name in names)
    return ModelFree(name, total_steps=LONG_STEPS, only=only, num_seeds=1)


ABLATED = partial(Matwm, total_steps=10_000, only=("simple_tag", "simple_spread"))
METHODS: dict[str, Matwm | ModelFree | Reference] = {
    "random": Reference(scripted=False),
    "scripted": Reference(scripted=True),
    "matwm": Matwm(),
    **{name: ModelFree(name) for name in model_free.METHODS},
    **{long(name): long_run(name) for name in model_free.METHODS},
    "matwm_no_teammates": ABLATED(NO_TEAMMATES),
    "matwm_no_recency": ABLATED(NO_RECENCY),
    "matwm_no_action_scaling": ABLATED(NO_ACTION_SCALING),
}


def is_run_in(method: Matwm | ModelFree | Reference, environment: str) -> bool:
    """Whether a method is run in an environment by default."""
    return method.only is None or environment in method.only
