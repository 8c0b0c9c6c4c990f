"""Replay and data sets in files: whole or refused, and never killed by a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from matwm_rl.data import ReplayConfig, load_dataset, make_replay, save_dataset
from matwm_rl.state_files import read_state, write_state
from tests.helpers import mock_env, mock_replay

CONFIG = ReplayConfig(capacity=200, sequence_length=8, sequences=6, starts_per_agent=4, context_length=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("writer"), "writer is missing"),
        (lambda state: state["rows"].pop("alive"), "alive is missing"),
        (lambda state: state["rows"].update(extra=torch.zeros(60, 1, 3)), "extra is unknown here"),
        (lambda state: state["rows"]["next"].update(reward=torch.zeros(60, 1, 3)), r"next\.reward has shape"),
        (lambda state: state["rows"].update(alive=state["rows"]["alive"].float()), "alive has type torch.float32"),
        (lambda state: state["rows"].update(action=torch.zeros(900, 1, 3)), "900 steps of 1 environments"),
        (lambda state: state["writer"].update(_cursor=-1), "writer._cursor must be a number of steps, found -1"),
        (lambda state: state["sequences"].clear(), "generator is missing"),
        (
            lambda state: state["starts"].update(generator=torch.zeros(3)),
            "starts, does not fit: random state has shape",
        ),
    ],
)
def test_entries_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    mock_replay().dumps(tmp_path)
    state = read_state(tmp_path / "replay.pt")
    change(state)
    write_state(tmp_path / "replay.pt", state)
    replay = make_replay(3, CONFIG, seed=0)
    with pytest.raises(ValueError, match=rf"replay\.pt.*{message}"):
        replay.loads(tmp_path)
    assert len(replay) == 0


def test_a_file_holds_what_is_stored_and_not_the_room_that_is_left(tmp_path: Path) -> None:
    rollout = mock_env().rollout(20, break_when_any_done=False)
    for name, capacity in (("small", 20), ("large", 100_000)):
        replay = make_replay(
            3, ReplayConfig(capacity=capacity, sequence_length=4, sequences=3, context_length=3), seed=0
        )
        replay.extend(rollout)
        replay.dumps(tmp_path / name)
    small, large = ((tmp_path / name / "replay.pt").stat().st_size for name in ("small", "large"))
    assert abs(large - small) < 1000


def test_room_for_memory_mapped_data_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = mock_env().rollout(20, break_when_any_done=False)
    make_replay(3, CONFIG, scratch_dir=tmp_path / "a").extend(rollout)
    for file in (tmp_path / "a").rglob("*.memmap"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size > 0, file

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for replay's data in .*: No space left"):
        make_replay(3, CONFIG, scratch_dir=tmp_path / "b").extend(rollout)


def test_a_dataset_comes_back(tmp_path: Path) -> None:
    rollout = mock_env().rollout(20, break_when_any_done=False)
    save_dataset(tmp_path / "data.pt", rollout)
    loaded = load_dataset(tmp_path / "data.pt")
    assert loaded.batch_size == (20,)
    loaded["agents", "observation"].zero_()
    again = load_dataset(tmp_path / "data.pt")
    names = set(rollout.keys(include_nested=True, leaves_only=True))
    assert set(again.keys(include_nested=True, leaves_only=True)) == names
    assert all(torch.equal(again[name], rollout[name]) for name in names), "the file stays as it is"


def test_a_dataset_holds_tensors_alone(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="part.note is a"):
        save_dataset(tmp_path / "data.pt", TensorDict({"part": {"note": NonTensorData("text")}}))
    for data in ({"a": torch.zeros(2)}, {"a": "text"}, {"a": {"b": [1.0]}}):
        write_state(tmp_path / "data.pt", {"batch_size": [3], "data": data})
        with pytest.raises(ValueError, match=r"data\.pt is no data set: a"):
            load_dataset(tmp_path / "data.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["data.pt"]
