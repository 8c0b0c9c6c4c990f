"""Load damaged and malicious files of every stored kind, and count what happens.

    python benchmarks/robustness/corrupt_files.py                 # 1,000 files, minutes on one core

A file must be refused by an error that names it, or else load as exactly what was saved. Nothing may run its code,
change it or its folder, or change what it was to be loaded into before it is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corruptions import CORRUPTIONS, WEIGHTS, Case
from torch import Tensor

from matwm_rl import presets
from matwm_rl.data import Replay, load_dataset, make_replay, save_dataset
from matwm_rl.envs import make_env
from matwm_rl.files import write_text
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.state_files import leaves
from matwm_rl.training import (
    Learner,
    load_checkpoint,
    load_policy,
    load_world_model,
    save_checkpoint,
    save_policy,
    save_world_model,
)

OUTPUT = Path(__file__).parents[1] / "results" / "robustness" / "corrupt_files.json"
REFUSED, SAME = "refused", "loaded as saved"
BAD = ("ran code", "loaded as something else", "changed files", "changed what it was loaded into", "unclear error")
"""Outcomes that must not be."""


class Loaded:
    """A small learner and a replay, to be saved and loaded into."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        settings, env = presets.tiny(), make_env("mock", seed=seed)
        model = WorldModel.from_env(env, settings.world_model)
        actor, critic = make_actor(model, settings.actor_critic), make_critic(model, settings.actor_critic)
        self.learner = Learner(model, actor, critic, settings.learner)
        self.replay: Replay = make_replay(env.num_agents, settings.replay, seed=seed)
        self.rollout = env.rollout(60, break_when_any_done=False)
        self.replay.extend(self.rollout)
        for _ in range(2):
            self.learner.update_world_model(self.replay.sequences.sample())
            self.learner.update_agents(self.replay.starts.sample())

    def state(self) -> dict[str, Any]:
        """Everything that loading may change, copied."""
        state = {"learner": self.learner.state_dict(), "replay": self.replay.state_dict(), "rng": torch.get_rng_state()}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in leaves(state)}

    def save(self, folder: Path) -> None:
        """Write one file of every kind."""
        save_checkpoint(folder, learner=self.learner, replay=self.replay, env_steps=60)
        self.replay.dumps(folder / "replay")
        policy = WorldModelPolicy(self.learner.world_model, self.learner.actor, history_length=4)
        save_policy(folder / "policy.pt", policy)
        save_world_model(folder / "world_model.pt", self.learner.world_model)
        save_dataset(folder / "data.pt", self.rollout)


@dataclass(frozen=True)
class Kind:
    """A stored file, and what loads it: into the target, or as a state of its own."""

    file: str
    load: Callable[[Path, Loaded], Any]


def _checkpoint(folder: Path, target: Loaded) -> Any:
    return load_checkpoint(folder, learner=target.learner, replay=target.replay)


KINDS = {
    "checkpoint, state": Kind("checkpoints/000000/state.pt", _checkpoint),
    "checkpoint, replay": Kind("checkpoints/000000/replay/replay.pt", _checkpoint),
    "replay": Kind("replay/replay.pt", lambda folder, target: target.replay.loads(folder / "replay")),
    "policy": Kind("policy.pt", lambda folder, target: load_policy(folder / "policy.pt").state_dict()),
    "world model": Kind(
        "world_model.pt", lambda folder, target: load_world_model(folder / "world_model.pt").state_dict()
    ),
    "data set": Kind("data.pt", lambda folder, target: load_dataset(folder / "data.pt").flatten_keys(".").to_dict()),
}


def snapshot(folder: Path) -> dict[str, Any]:
    """Content and kind of everything in a folder."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def outcome(kind: Kind, folder: Path, marker: Path, target: Loaded, expected: dict[str, Any]) -> tuple[str, str]:
    """Load a file, and return what happened and the error's message.

    Args:
        kind: of the file.
        folder: all files are in it.
        marker: exists once code has run.
        target: what is loaded into.
        expected: what :func:`load` returns of the file as it was saved.
    """
    files, before, message = snapshot(folder), target.state(), ""
    try:
        loaded = load(kind, folder, target)
        result = SAME if same(loaded, expected) else "loaded as something else"
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        result = REFUSED if str(folder) in message else "unclear error"
        if not same(target.state(), before):
            result = "changed what it was loaded into"
    except Exception as error:
        message, result = f"{type(error).__name__}: {error}", "unclear error"
    if snapshot(folder) != files:
        result = "changed files"
    return ("ran code" if marker.exists() else result), message


def load(kind: Kind, folder: Path, target: Loaded) -> dict[str, Any]:
    """Load a file; return all tensors that came of it."""
    returned = kind.load(folder, target)
    return {**target.state(), **{f"returned.{name}": value for name, value in leaves(returned)}}


def run(count: int, seed: int = 0) -> dict[str, Any]:
    """Corrupt and load so many files; return the counts.

    Args:
        count: number of files.
        seed: of all choices.
    """
    rng = random.Random(seed)
    names = [name for name in CORRUPTIONS for _ in range(WEIGHTS.get(name, 1))]
    counts: dict[str, Counter[str]] = {name: Counter() for name in CORRUPTIONS}
    kinds: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    bad = []
    with tempfile.TemporaryDirectory() as root:
        clean, other, folder, marker = (Path(root) / name for name in ("clean", "other", "run", "marker"))
        for path, run_seed in ((clean, 1), (other, 2)):
            path.mkdir()
            Loaded(run_seed).save(path)
        expected, target = {}, Loaded(3)
        start = target.state()
        for name, kind in KINDS.items():
            expected[name] = load(kind, clean, target)
            target = Loaded(3)
        assert same(start, target.state()), "what is loaded into must be the same each time"
        for index in range(count):
            corruption, name = names[index % len(names)], list(KINDS)[index // len(names) % len(KINDS)]
            if name == "data set" and corruption.startswith("forge"):
                corruption = "flip"  # any tensors with a right checksum are a data set
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(clean, folder)
            CORRUPTIONS[corruption](Case(folder, other, KINDS[name].file, marker, rng))
            result, message = outcome(KINDS[name], folder, marker, target, expected[name])
            counts[corruption][result] += 1
            kinds[name][result] += 1
            if result in BAD:
                bad.append(f"{name}, {corruption}: {result}: {message[:300]}")
                print(bad[-1], file=sys.stderr)
                shutil.rmtree(marker, ignore_errors=True)
            if result != REFUSED:
                target = Loaded(3)
    totals = sum(counts.values(), Counter())
    return {
        "files": count,
        "totals": {name: totals[name] for name in (REFUSED, SAME, *BAD)},
        "corruptions": {name: dict(found) for name, found in counts.items()},
        "kinds": {name: dict(found) for name, found in kinds.items()},
        "bad": bad,
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="number of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    result = run(options.count, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["totals"], indent=1))
    if result["bad"]:
        sys.exit(f"{len(result['bad'])} files were not refused as they must be")


if __name__ == "__main__":
    main()
