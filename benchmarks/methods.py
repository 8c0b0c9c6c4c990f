"""What sample_efficiency.py compares: MATWM, its ablations, model-free methods, and agents that do not learn.

No script of its own. To add a method, add an entry to :data:`METHODS`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import model_free
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from protocol import Environment
from tensordict.nn import TensorDictModuleBase

from matwm_rl.envs import make_env
from matwm_rl.training import RandomActions, has_checkpoint, load_policy

ROOT = Path(__file__).resolve().parents[1]

OnCheckpoint = Callable[[int, TensorDictModuleBase], None]
"""Called with env steps and the policy that a method has after them."""


@dataclass(frozen=True)
class Matwm:
    """The training script as a user would start it.

    Attributes:
        overrides: of its configuration.
        total_steps: of a run; ``None``: the environment's.
        only: the environments it is run in by default; ``None``: all.
    """

    overrides: tuple[str, ...] = ()
    total_steps: int | None = None
    only: tuple[str, ...] | None = None

    def steps(self, environment: Environment) -> int:
        return self.total_steps or environment.total_steps

    def checkpoints(self, environment: Environment) -> list[int]:
        """Env steps after which it is evaluated, as for all methods."""
        return [env_steps for env_steps in environment.checkpoints if env_steps <= self.steps(environment)]

    def arguments(self, environment: Environment) -> list[str]:
        return [
            f"env={environment.env}",
            f"total_steps={self.steps(environment)}",
            "max_minutes=null",
            "progress=false",
            "num_threads=1",
            f"evaluation.every={environment.every}",
            # A glance for the log: what counts is evaluated afterwards, as for all methods.
            "evaluation.episodes=10",
            "evaluation.final_episodes=10",
            "evaluation.keep_policies=true",
            *self.overrides,
        ]

    def settings(self, environment: Environment) -> dict[str, Any]:
        return configuration(*self.arguments(environment))

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: OnCheckpoint) -> None:
        command = [sys.executable, str(ROOT / "examples" / "simple_tag.py"), *self.arguments(environment)]
        command += [f"seed={seed}", f"run_dir={folder.resolve()}"]
        if has_checkpoint(folder):
            command += ["resume=true"]
        elif folder.exists() and not has_training(folder):
            shutil.rmtree(folder)  # of an attempt that came to nothing: a new run refuses the metrics of another
        if not (folder / "summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "output.txt").open("a") as output:
                # Inheritable files stay open, so that the training holds the run's lock too.
                done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, close_fds=False)
            if done.returncode:
                raise RuntimeError(f"training failed, return code {done.returncode}, see {folder / 'output.txt'}")
        for path in sorted((folder / "policies").glob("*.pt")):
            on_checkpoint(int(path.stem), load_policy(path))


def configuration(*overrides: str) -> dict[str, Any]:
    """What the example is run with, see :func:`of_every_run`."""
    with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base=None):
        config = compose("config", overrides=["run_dir=unnamed", *overrides])
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    return of_every_run(settings)


def of_every_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the example without what tells one run from another."""
    return {name: value for name, value in config.items() if name not in ("run_dir", "seed", "resume")}


def has_training(folder: Path) -> bool:
    """Whether MATWM was trained in a folder, or can go on there from a checkpoint."""
    return (folder / "summary.json").exists() or has_checkpoint(folder)


@dataclass(frozen=True)
class ModelFree:
    """A method of model_free.py."""

    name: str
    only: None = None

    def steps(self, environment: Environment) -> int:
        return environment.total_steps

    def checkpoints(self, environment: Environment) -> list[int]:
        return environment.checkpoints

    def settings(self, environment: Environment) -> dict[str, Any]:
        return asdict(model_free.METHODS[self.name])

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: OnCheckpoint) -> None:
        model_free.train(
            self.name,
            environment.env,
            seed=seed,
            total_steps=environment.total_steps,
            checkpoints=environment.checkpoints,
            on_checkpoint=on_checkpoint,
        )


@dataclass(frozen=True)
class Reference:
    """Agents that do not learn: random ones, or the environment's script."""

    scripted: bool
    only: None = None

    def steps(self, environment: Environment) -> int:
        return 0

    def checkpoints(self, environment: Environment) -> list[int]:
        return [] if self.scripted and environment.script is None else [0]

    def settings(self, environment: Environment) -> dict[str, Any]:
        return {"scripted": self.scripted}

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: OnCheckpoint) -> None:
        if not self.scripted:
            on_checkpoint(0, RandomActions())
        elif environment.script is not None:
            on_checkpoint(0, environment.script(make_env(environment.env).layout))


ABLATED = partial(Matwm, total_steps=10_000, only=("simple_tag", "simple_spread"))
METHODS: dict[str, Matwm | ModelFree | Reference] = {
    "random": Reference(scripted=False),
    "scripted": Reference(scripted=True),
    "matwm": Matwm(),
    **{name: ModelFree(name) for name in model_free.METHODS},
    "matwm_no_teammates": ABLATED(("teammate_predictor=false",)),
    "matwm_no_recency": ABLATED(("recency=false",)),
    "matwm_no_action_scaling": ABLATED(("action_scaling=false",)),
}
