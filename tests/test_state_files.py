"""Files of tensors and plain values: whole or refused, never executed, never changed by reading."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from torch import nn

from matwm_rl.files import new_file, new_folder, remove_partial
from matwm_rl.state_files import check_same, read_state, write_state

STATE = {"weights": {"w": torch.arange(6.0).view(2, 3), 0: torch.ones(2, dtype=torch.bool)}, "steps": 3, "names": ["a"]}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files cannot grow above so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_written_is_read(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "state.pt"
    write_state(path, STATE)
    for state in (read_state(path, mmap=mmap), torch.load(path, weights_only=True)):
        check_same(state, STATE, source="state")
        assert torch.equal(state["weights"]["w"], STATE["weights"]["w"]) and state["names"] == ["a"]
    assert zipfile.ZipFile(path).testzip() is None
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_every_flipped_byte_and_every_truncation_is_refused_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_state(path, STATE)
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ (1 << index % 8)]) + data[index + 1 :])
        with pytest.raises(ValueError, match=r"state\.pt"):
            read_state(path)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"state\.pt"):
            read_state(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"state\.pt is incomplete or damaged"):
        read_state(path)


def test_links_and_other_things_are_not_followed(tmp_path: Path) -> None:
    write_state(tmp_path / "behind.pt", STATE)
    (tmp_path / "state.pt").symlink_to(tmp_path / "behind.pt")
    with pytest.raises(ValueError, match=r"state\.pt is a symbolic link"):
        read_state(tmp_path / "state.pt")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match=f"{name} is no file"):
            read_state(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_state(tmp_path / "nothing")
    # Writing replaces a link, and leaves what is behind it.
    before = (tmp_path / "behind.pt").read_bytes()
    write_state(tmp_path / "state.pt", {"other": 1})
    assert not (tmp_path / "state.pt").is_symlink() and (tmp_path / "behind.pt").read_bytes() == before


def forge(path: Path, state: dict[str, Any]) -> None:
    """Write a file as a stranger can: with anything in it, and a checksum that is right."""
    with patch("matwm_rl.state_files.check_plain"):
        write_state(path, state)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "state.pt"
    assert pickle.loads(pickle.dumps(Malicious(marker))) is None and marker.exists(), "this is what must not happen"
    marker.rmdir()
    path.write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(ValueError, match="incomplete or damaged"):
        read_state(path)
    # With a checksum that is right.
    for value in (Malicious(marker), TensorDict({"a": NonTensorData(Malicious(marker))})):
        forge(path, {"value": value})
        with pytest.raises(ValueError, match=r"state\.pt cannot be read as tensors and plain values"):
            read_state(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "value",
    [nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse(), torch.ones(2, device="meta"), {1, 2}, b"bytes", 1j],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\.pt may hold .*part\.entry"):
        write_state(tmp_path / "state.pt", {"part": {"entry": value}})
    assert not list(tmp_path.iterdir())
    forge(tmp_path / "state.pt", {"part": {"entry": value}})
    with pytest.raises(ValueError, match=r"state\.pt (may hold .*part\.entry|cannot be read)"):
        read_state(tmp_path / "state.pt")
    with pytest.raises(TypeError, match=r"other\.pt may have text or whole numbers as keys"):
        write_state(tmp_path / "other.pt", {"part": {(1, 2): 3}})
    forge(tmp_path / "state.pt", {"part": {(1, 2): 3}})
    with pytest.raises(ValueError, match=r"state\.pt may have text or whole numbers as keys"):
        read_state(tmp_path / "state.pt")


def test_changing_what_was_read_leaves_the_file(tmp_path: Path) -> None:
    write_state(tmp_path / "state.pt", STATE)
    read_state(tmp_path / "state.pt", mmap=True)["weights"]["w"].zero_()
    assert torch.equal(read_state(tmp_path / "state.pt")["weights"]["w"], STATE["weights"]["w"])


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_state(path, STATE)
    with full_disk(2**20), pytest.raises(OSError, match=r"cannot write .*state\.pt"):
        write_state(path, {"large": torch.zeros(2**20)})
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    assert read_state(path)["steps"] == 3


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    run = tmp_path / "run"
    (run / "policies").mkdir(parents=True)
    writers = [new_file(run / "policy.pt"), new_file(run / "policies" / "1.pt"), new_folder(run / "folder")]
    for writer in writers:
        writer.__enter__()  # and never left
    (run / ".partial-link").symlink_to(tmp_path / "elsewhere")
    (run / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".partial-of-others").write_text("kept")
    (run / "policy.pt").write_text("whole")
    remove_partial(run)
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == ["link", "policies", "policy.pt"]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "w is missing"),
        ({"w": torch.zeros(2), "v": 1}, "v is unknown here"),
        ({"w": torch.zeros(3)}, r"w has shape \(3,\), expected \(2,\)"),
        ({"w": torch.zeros(2).double()}, r"w has type torch.float64, expected torch.float32"),
        ({"w": [0.0, 0.0]}, "w is a list, expected a tensor"),
        ({"w": {"v": torch.zeros(2)}}, "w is missing; w.v is unknown here"),
        ([], "w is missing"),
    ],
)
def test_what_differs_is_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"state.pt does not fit: {message}"):
        check_same(given, {"w": torch.zeros(2)}, source="state.pt")
    with pytest.raises(ValueError, match="n is a bool, expected a int"):
        check_same({"n": True}, {"n": 1}, source="state.pt")
