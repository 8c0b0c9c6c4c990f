"""Load damaged and malicious files of every stored kind, and count what happens.

    python benchmarks/robustness/corrupt_files.py                 # 1,000 files, minutes on one core

A file must be refused by an error that names it, or else load as exactly what was saved. Nothing may run its code,
change it or its folder, or change what it was to be loaded into before it is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor

from matwm_rl import presets
from matwm_rl.data import Replay, load_dataset, make_replay, save_dataset
from matwm_rl.envs import make_env
from matwm_rl.files import write_text
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.state_files import leaves, read_state, write_state
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


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Case:
    """What a corruption has to do with: the file, the same file of another run, a place for its code to show, chance."""

    file: Path
    other: Path
    marker: Path
    rng: random.Random

    def forge(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Write the file anew with another content, and a checksum that is right."""
        state = read_state(self.file)
        change(state)
        write_state(self.file, state)

    def entry(self, state: dict[str, Any]) -> tuple[dict[Any, Any], Any]:
        """Choose a tensor, by the dict that it is in and its name there."""
        found = []

        def search(inside: Any) -> None:
            for name, value in inside.items():
                if isinstance(value, dict):
                    search(value)
                elif isinstance(value, Tensor):
                    found.append((inside, name))

        search(state)
        return self.rng.choice(found)


def truncate(case: Case) -> None:
    data = case.file.read_bytes()
    case.file.write_bytes(data[: case.rng.randrange(len(data))])


def flip(case: Case) -> None:
    data = bytearray(case.file.read_bytes())
    data[case.rng.randrange(len(data))] ^= 1 << case.rng.randrange(8)
    case.file.write_bytes(data)


def zero_a_block(case: Case) -> None:
    data = bytearray(case.file.read_bytes())
    begin = case.rng.randrange(len(data) - 200)
    data[begin : begin + 200] = bytes(200) if any(data[begin : begin + 200]) else b"\1" * 200
    case.file.write_bytes(data)


def append(case: Case) -> None:
    case.file.write_bytes(case.file.read_bytes() + case.rng.randbytes(case.rng.randrange(1, 100)))


def swap_blocks(case: Case) -> None:
    data = bytearray(case.file.read_bytes())
    while True:
        first, second = (case.rng.randrange(len(data) // 100) * 100 for _ in range(2))
        if data[first : first + 100] != data[second : second + 100]:
            break
    data[first : first + 100], data[second : second + 100] = data[second : second + 100], data[first : first + 100]
    case.file.write_bytes(data)


def swap_half(case: Case) -> None:
    """The end of another run's file."""
    data, other = case.file.read_bytes(), case.other.read_bytes()
    cut = case.rng.randrange(len(data) // 10, 9 * len(data) // 10)
    case.file.write_bytes(data[:cut] + other[cut:])


def swap_kind(case: Case) -> None:
    """A file of another kind in its place; of a checkpoint's two files, also that of another run."""
    root = next(parent for parent in case.file.parents if (parent / "policy.pt").exists())
    others = [root / kind.file for kind in KINDS.values()]
    others = [file for file in others if file.name != case.file.name]
    if case.file.name == "policy.pt":
        others.append(case.other.parent / "world_model.pt")
    elif case.file.name == "world_model.pt":  # a policy's file holds a world model
        others.remove(root / "policy.pt")
    elif "checkpoints" in case.file.parts:
        others.append(case.other)
    shutil.copy(case.rng.choice(others), case.file)


def forge_shape(case: Case) -> None:
    def change(state: dict[str, Any]) -> None:
        inside, name = case.entry(state)
        value = inside[name]
        inside[name] = case.rng.choice([value[..., None, None], torch.zeros(7, 3), value.flatten().repeat(2)])

    case.forge(change)


def forge_type(case: Case) -> None:
    def change(state: dict[str, Any]) -> None:
        inside, name = case.entry(state)
        inside[name] = case.rng.choice([inside[name].to(torch.complex64), inside[name].tolist(), "text", None])

    case.forge(change)


def forge_missing(case: Case) -> None:
    def change(state: dict[str, Any]) -> None:
        inside = state
        while True:
            name = case.rng.choice(list(inside))
            value = inside[name]
            if not isinstance(value, dict) or not value or case.rng.random() < 0.3:
                del inside[name]
                return
            inside = value

    case.forge(change)


def forge_unknown(case: Case) -> None:
    case.forge(lambda state: state.update(payload=torch.zeros(3)))


def pickle_in_place(case: Case) -> None:
    case.file.write_bytes(pickle.dumps(Malicious(case.marker)))


def pickle_in_archive(case: Case) -> None:
    """A pickle that torch would execute, in an archive with a right checksum."""
    case.forge(lambda state: state.update({case.rng.choice(list(state)): Malicious(case.marker)}))


def pickle_as_extra_file(case: Case) -> None:
    """TensorDict's folder with a pickled entry, which its reader executes, in place of and beside the file."""
    data = TensorDict({"a": torch.zeros(2), "b": NonTensorData(Malicious(case.marker), batch_size=[2])}, [2])
    if case.rng.random() < 0.5:
        case.file.unlink()
        data.memmap(case.file)
    else:
        data.memmap(case.file.parent / "storage")


def replace_by_link(case: Case) -> None:
    target = case.rng.choice([case.other, Path("/dev/zero"), case.file.with_name("nothing")])
    case.file.unlink()
    case.file.symlink_to(target)


def remove(case: Case) -> None:
    case.file.unlink()


def empty(case: Case) -> None:
    case.file.write_bytes(case.rng.choice([b"", b"\0" * 100, b"{}"]))


def bare_archive(case: Case) -> None:
    """An archive without a checksum."""
    with zipfile.ZipFile(case.file) as archive, zipfile.ZipFile(case.file.with_name(".copy"), "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
    case.file.with_name(".copy").replace(case.file)


CORRUPTIONS: dict[str, Callable[[Case], None]] = {
    function.__name__: function
    for function in (
        *(truncate, flip, zero_a_block, append, swap_blocks, swap_half, swap_kind),
        *(forge_shape, forge_type, forge_missing, forge_unknown),
        *(pickle_in_place, pickle_in_archive, pickle_as_extra_file, replace_by_link, remove, empty, bare_archive),
    )
}
WEIGHTS = {"truncate": 5, "flip": 10}


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
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(clean, folder)
            CORRUPTIONS[corruption](Case(folder / KINDS[name].file, other / KINDS[name].file, marker, rng))
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
