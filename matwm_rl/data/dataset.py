"""Stored data sets: the tensors of a rollout or of a buffer in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from matwm_rl.data.replay_state import as_dict
from matwm_rl.state_files import check_entries, leaves, read_state, write_state


def save_dataset(path: str | Path, data: TensorDictBase) -> None:
    """Write data into one file that :func:`load_dataset` reads, and that others may read without running its code.

    ``TensorDict.memmap`` and ``ReplayBuffer.dumps`` have no such reader: theirs execute pickles that a folder holds.

    Args:
        path: the file; replaced as a whole if it exists.
        data: any nesting of tensors. Nested tensordicts come back with the batch size of the whole.

    Raises:
        TypeError: if an entry is no tensor.
        OSError: if the file cannot be written, because the disk is full for one; an older one stays.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.envs import make_env
        >>> rollout = make_env("mock", seed=0).rollout(20, break_when_any_done=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_dataset(f"{folder}/data.pt", rollout)
        ...     load_dataset(f"{folder}/data.pt")["agents", "action"].shape
        torch.Size([20, 3])
    """
    rows = as_dict(data.detach())
    for name, value in leaves(rows):
        if not isinstance(value, Tensor | dict):
            raise TypeError(f"a data set holds tensors alone; {name} is a {type(value).__name__}. Leave it out")
    write_state(path, {"batch_size": list(data.batch_size), "data": rows})


def load_dataset(path: str | Path) -> TensorDict:
    """Read what :func:`save_dataset` wrote.

    Safe for untrusted files: loading runs no code and follows no links.

    Args:
        path: the file. Its tensors stay in it until they are read, so that it may be larger than the memory; changing
            them does not change the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no data set.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_dataset(f"{folder}/data.pt", TensorDict({"reward": torch.arange(3.0)}, [3]))
        ...     load_dataset(f"{folder}/data.pt")["reward"]
        tensor([0., 1., 2.])
    """
    saved = read_state(path, mmap=True)
    check_entries(saved, ["batch_size", "data"], source=str(path))
    batch = saved["batch_size"]
    if not isinstance(batch, list) or not all(type(size) is int and size >= 0 for size in batch):
        raise ValueError(f"{path} is no data set: batch_size must be a list of sizes, found {batch!r}")
    for name, value in leaves(saved["data"]):
        if not isinstance(value, Tensor | dict):
            raise ValueError(f"{path} is no data set: {name} is a {type(value).__name__}, expected a tensor")
        if isinstance(value, Tensor) and list(value.shape[: len(batch)]) != batch:
            raise ValueError(f"{path} is no data set: {name} has shape {tuple(value.shape)}, expected {batch} first")
    return TensorDict(saved["data"], batch_size=torch.Size(batch))
