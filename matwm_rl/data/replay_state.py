"""The stored rows of a replay as a state to save, and the checks before a state is loaded.

Legend: L stored time steps, E environments, N agents.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torchrl.data import LazyTensorStorage, Writer
from torchrl.data.replay_buffers.samplers import Sampler

from matwm_rl.state_files import check_entries, check_same, refuse

_OF_AGENT = ("observation", "action", "action_mask", "alive", "teammate_action", "teammate_alive")
_NEXT = ("observation", "reward", "alive", "done", "terminated")


def stored_rows(storage: LazyTensorStorage) -> dict[str, Any]:
    """Return what a storage holds as a nested dict of tensors ``[L, E, N, ...]``, on the storage's own memory."""
    return _own_extent(as_dict(storage[:])) if len(storage) else {}


def _own_extent(rows: Any) -> Any:
    """Limit the memory of each tensor to its own elements.

    ``torch.save`` writes the whole memory that a tensor is a view of, which is that of the full capacity here.
    """
    return {name: _own_extent(rows[name]) for name in rows} if isinstance(rows, dict) else from_dlpack(rows)


def load_rows(storage: LazyTensorStorage, rows: dict[str, Any]) -> None:
    """Copy the rows of :func:`stored_rows` into an empty storage."""
    if rows:
        data = TensorDict(rows, batch_size=rows["action"].shape[:3])
        storage.set(slice(0, len(data)), data)


def check_rows(rows: Any, storage: LazyTensorStorage, *, num_agents: int, source: str) -> None:
    """Check that stored rows have the entries of a replay, and fit the rows that the storage holds already.

    Raises:
        ValueError: If an entry is missing or unknown, or has another shape or type.
    """
    if rows == {}:
        return
    check_entries(rows, [*_OF_AGENT, "next"], source=source)
    check_entries(rows["next"], _NEXT, source=f"{source}, next,")
    sizes = {}
    for name in ("observation", "action", "action_mask"):
        entry = rows[name]
        if not isinstance(entry, Tensor) or entry.ndim < 3:
            raise ValueError(f"{source} does not fit: {name} must be a tensor [time, environment, agent, ...]")
        sizes[name] = entry.shape[3:]
    length, envs = rows["action"].shape[:2]
    if not 0 < length * envs * num_agents <= storage.max_size:
        raise ValueError(f"{source} has {length} steps of {envs} environments, more or less than replay can hold")
    batch, others = (length, envs, num_agents), num_agents - 1
    observation, action = rows["observation"].dtype, rows["action"].dtype
    reward = getattr(rows["next"]["reward"], "dtype", torch.float32)
    if not reward.is_floating_point:
        raise ValueError(f"{source} does not fit: rewards must be floating-point numbers, found {reward}")

    def like(*event: int, dtype: torch.dtype = torch.bool) -> Tensor:
        return torch.empty(*batch, *event, dtype=dtype, device="meta")

    expected: dict[str, Any] = {
        "observation": like(*sizes["observation"], dtype=observation),
        "action": like(*sizes["action"], dtype=action),
        "action_mask": like(*sizes["action_mask"]),
        "alive": like(),
        "teammate_action": like(others, *sizes["action"], dtype=action),
        "teammate_alive": like(others),
        "next": {
            "observation": like(*sizes["observation"], dtype=observation),
            "reward": like(1, dtype=reward),
            "alive": like(),
            "done": like(1),
            "terminated": like(1),
        },
    }
    check_same(rows, expected, source=source)
    if storage.initialized:
        held = TensorDict(rows, batch_size=batch)[0]
        check_same(as_dict(held), as_dict(storage.get(slice(0, 1))[0]), source=source)


def check_writer(state: Any, writer: Writer, *, source: str) -> None:
    """Check the stored state of a replay writer: its cursor, and the number of steps ever written.

    Raises:
        ValueError: If an entry is missing or unknown, or is no number of steps.
    """
    check_entries(state, list(writer.state_dict()), source=f"{source}, writer,")
    steps = {name: value for name, value in state.items() if type(value) is not int or value < 0}
    refuse([f"writer.{name} must be a number of steps, found {value!r}" for name, value in steps.items()], source)


def check_generator(state: Any, sampler: Sampler, *, source: str) -> None:
    """Check the stored state of a slice sampler, which is the state of its random generator, if it has one.

    Raises:
        ValueError: If it is no state of a generator.
    """
    # If the state has a generator, the sampler takes it. If only the sampler has one, its draws would not be restored.
    if state != {} or sampler.state_dict():
        check_entries(state, ["generator"], source=source)
        check_random_state(state["generator"], source=source)


def check_random_state(state: Any, *, source: str) -> None:
    """Check the state of a random generator of torch, on the CPU.

    Raises:
        ValueError: If it is none.
    """
    generator = torch.Generator()
    check_same({"random state": state}, {"random state": generator.get_state()}, source=source)
    try:
        generator.set_state(state.cpu())
    except RuntimeError as error:
        raise ValueError(f"{source} holds no state of a random generator: {error}") from error


def as_dict(rows: Any) -> Any:
    """Turn a tensordict into nested dicts of plain tensors, views of the same memory; leave what is no tensor."""
    if not isinstance(rows, TensorDictBase):
        return rows.as_subclass(Tensor) if isinstance(rows, Tensor) else rows
    return {name: as_dict(rows.get(name)) for name in rows.keys()}
