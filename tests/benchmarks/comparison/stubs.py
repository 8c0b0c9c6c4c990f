"""Methods that do not train, small environments, and a way to start the grid with them in this process."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import sample_efficiency as grid
from processes import held
from protocol import Environment
from sample_efficiency import Run

from matwm_rl.evaluation import RandomActions

MOCK = Environment("mock", total_steps=20, every=10, episodes=2, num_envs=2)
SPREAD = Environment("mpe2/simple_spread_v3", total_steps=60, every=60, episodes=2, num_envs=2)
TINY = (
    "init_random_steps=40",
    "num_envs=1",
    "updates_per_batch=1",
    "evaluation.num_envs=2",
    "replay.sequences=8",
    "replay.starts_per_agent=4",
    "world_model_warmup=2",
    "world_model.hidden_size=32",
    "world_model.latent.num_dims=8",
)


@dataclass
class Stub:
    """Shows random agents at every checkpoint.

    Attributes:
        setting: what it is run with.
        fails: the seed that ends in an error.
        only: the environments it is run in by default.
        num_seeds: with how many of the seeds it is run.
    """

    setting: float = 0.5
    fails: int | None = None
    only: tuple[str, ...] | None = None
    num_seeds: int | None = None

    def steps(self, environment: Environment) -> int:
        return environment.total_steps

    def checkpoints(self, environment: Environment) -> list[int]:
        return environment.checkpoints

    def settings(self, environment: Environment) -> dict[str, Any]:
        return {"setting": self.setting, "nested": {"sizes": (1, 2)}}

    def train(self, environment: Environment, seed: int, folder: Path, on_checkpoint: Callable[..., None]) -> None:
        if seed == self.fails:
            raise RuntimeError("the stub fails")
        for env_steps in environment.checkpoints:
            on_checkpoint(env_steps, RandomActions())


DONE: list[str] = []
"""Runs carried out since the test began."""


def carry_out_here(run: Run, results: Path, scratch: Path, stop: Event) -> str:
    """In this process, in which stubs exist too."""
    DONE.append(str(run))
    return f"{run}: {grid.carry_out(run, results, scratch):.0f} s"


def start(folder: Path, *arguments: str) -> list[str]:
    """Start the grid and return the runs that it carried out."""
    DONE.clear()
    grid.main([f"--results={folder}", f"--scratch={folder / 'scratch'}", *arguments])
    return list(DONE)


def table(folder: Path) -> list[dict[str, str]]:
    text = (folder / "results.csv").read_text()
    assert text.splitlines()[0] == "environment,method,seed,env_steps,metric,value"
    return list(csv.DictReader(text.splitlines()))


def free(folder: Path) -> bool:
    """Whether no process trains there."""
    try:
        with held(folder):
            return True
    except RuntimeError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
