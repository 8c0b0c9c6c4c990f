"""Ways to damage a stored file, or to make it malicious."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor

from matwm_rl.state_files import read_state, write_state


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Case:
    """What a corruption has to do with.

    Attributes:
        folder: of a run, with files of every kind.
        other_folder: of another run.
        name: of the file to corrupt, in both.
        marker: what exists once code has run.
        rng: of all choices.
    """

    folder: Path
    other_folder: Path
    name: str
    marker: Path
    rng: random.Random

    @property
    def file(self) -> Path:
        return self.folder / self.name

    @property
    def other(self) -> Path:
        return self.other_folder / self.name

    def forge(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Write the file anew with another content, and a checksum that is right."""
        state = read_state(self.file)
        change(state)
        # A stranger's program checks nothing.
        with patch("matwm_rl.state_files.check_plain"):
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
    # Where both halves differ: otherwise the file would be one of the two, as a whole.
    differing = [index for index, (one, two) in enumerate(zip(data, other, strict=False)) if one != two]
    cut = case.rng.randrange(differing[0] + 1, differing[-1] + 1)
    case.file.write_bytes(data[:cut] + other[cut:])


def swap_kind(case: Case) -> None:
    """A file of another kind in its place; of a checkpoint's two files, also that of another run."""
    others = [file for file in case.folder.rglob("*.pt") if file.name != case.file.name]
    if case.file.name == "policy.pt":
        others.append(case.other.parent / "world_model.pt")
    elif case.file.name == "world_model.pt":  # a policy's file holds a world model
        others.remove(case.folder / "policy.pt")
    elif "checkpoints" in case.name:
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
