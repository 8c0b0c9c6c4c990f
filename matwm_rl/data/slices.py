"""Slices of consecutive steps in a storage whose first dimension is time: which ones exist, and their indices.

A storage has ``ndim=1``: ``[time]``, ``ndim=2``: ``[time, env]``, or ``ndim=3``: ``[time, env, agent]``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage, TensorStorage
from torchrl.data.replay_buffers.writers import RoundRobinWriter

from matwm_rl.arguments import check_ints, check_kinds
from matwm_rl.torchrl_internals import attached_entities, buffer_generator, write_cursor

_STATE_FILE = "sampler.json"


class Timeline(NamedTuple):
    """What a storage holds, in order of time: step ``t`` (0 is the oldest) lies at index ``(oldest + t) % length``.

    Attributes:
        length: steps stored of each environment.
        oldest: index of the oldest step.
        num_envs: E.
    """

    length: int
    oldest: int
    num_envs: int


def timeline(storage: Storage) -> Timeline:
    """Read the order of time from a storage and the writers of the buffers built on it.

    The write cursor is taken from the writer, because the storage's own record of it is lost by ``state_dict`` and
    ``dumps`` and stale after ``load_state_dict``. So a buffer that only reads (with an ``ImmutableDatasetWriter``)
    finds the cursor of the buffer that writes, before and after a checkpoint.

    Args:
        storage: a TensorStorage, LazyTensorStorage or LazyMemmapStorage, time first, with at most three dimensions.

    Raises:
        TypeError: If the storage is of another kind.
        ValueError: If it has more than three dimensions.
        RuntimeError: If two buffers have written to it.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(10))
        >>> for _ in range(3):
        ...     _ = rb.extend(TensorDict({"obs": torch.zeros(4)}, [4]))
        >>> timeline(rb.storage)
        Timeline(length=10, oldest=2, num_envs=1)
    """
    if not isinstance(storage, TensorStorage):
        raise TypeError(f"got a {type(storage).__name__}; use a LazyTensorStorage or a LazyMemmapStorage.")
    if storage.ndim > 3:
        raise ValueError(f"got a storage with ndim={storage.ndim}; expected [time], [time, env] or [time, env, agent].")
    if not len(storage):
        return Timeline(0, 0, 1)
    length = storage.shape[0]
    num_envs = storage.shape[1] if storage.ndim > 1 else 1
    if len(storage) < storage.max_size:
        return Timeline(length, 0, num_envs)
    buffers = [b for b in attached_entities(storage) if isinstance(getattr(b, "writer", None), RoundRobinWriter)]
    writers = [buffer.writer for buffer in buffers if buffer.write_count > 0]
    if len(writers) > 1:
        raise RuntimeError(
            f"{len(writers)} buffers have written to this storage, so that its steps are in no order of time; "
            "write through one buffer and give the others an ImmutableDatasetWriter."
        )
    # Without a writer the storage was filled from outside, oldest step first.
    return Timeline(length, write_cursor(writers[0]) % length if writers else 0, num_envs)


class SliceSamplerBase(Sampler):
    """Base of the slice samplers: valid starts, the shares of a batch, indices, generator and state.

    TorchRL's ``SliceSampler`` does not serve as a base: its slices end with the episode, and it can neither weight
    starts nor keep slices from overlapping.
    """

    def __init__(self, slice_len: int, *, num_shares: int = 1, generator: torch.Generator | None = None) -> None:
        check_ints(1, slice_len=slice_len, num_shares=num_shares)
        if generator is not None:
            check_kinds(torch.Generator, generator=generator)
        self.slice_len = slice_len
        self.num_shares = num_shares
        self._generator = generator

    def sample(self, storage: Storage, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draw the indices of slices of consecutive steps, ``batch_size`` steps in all.

        Args:
            storage: see :func:`timeline`.
            batch_size: slices times ``slice_len``, all shares together.

        Returns:
            The index and an empty info dictionary. The index has one tensor per dimension of the storage. For one or
            two dimensions they are flat, ``[batch_size]``, slice after slice and share after share, and a single tensor
            is in no tuple. For [time, env, agent] they are ``[B, slice_len, num_shares]``, B slices per share, and so
            is the batch of the sample.

        Raises:
            ValueError: If ``batch_size`` is not a multiple of ``slice_len * num_shares``, or if the agent dimension
                of a [time, env, agent] storage differs from ``num_shares``.
            RuntimeError: If the storage holds too few steps.
        """
        per_share = self._slices_per_share(batch_size)
        now = timeline(storage)
        if storage.ndim == 3 and now.length and storage.shape[2] != self.num_shares:
            raise ValueError(
                f"the storage has {storage.shape[2]} agents, the sampler num_shares={self.num_shares}; they must agree."
            )
        if not self._fits(now, per_share):
            raise RuntimeError(
                f"cannot draw {per_share} slices of {self.slice_len} steps per share: the storage holds {now.length} "
                f"steps of {now.num_envs} environment(s). {self._needed(per_share, now.num_envs)} Collect more data "
                "first (`can_sample` tells when), or ask for fewer or shorter slices."
            )
        start, env = self._draw(now, per_share)
        time = (start.unsqueeze(-1) + torch.arange(self.slice_len) + now.oldest) % now.length
        if storage.ndim == 1:
            return time.flatten(), {}
        env = env.unsqueeze(-1).expand_as(time)
        if storage.ndim == 2:
            return (time.flatten(), env.flatten()), {}
        shares = (self.num_shares, per_share, self.slice_len)
        agent = torch.arange(self.num_shares).view(-1, 1, 1).expand(shares)
        # Permuted views: in memory the sample is agent by agent, as the networks compute.
        return tuple(index.view(shares).permute(1, 2, 0) for index in (time, env, agent)), {}

    def can_sample(self, storage: Storage, batch_size: int) -> bool:
        """Return whether the storage holds enough steps for the batch.

        Raises:
            ValueError: If ``batch_size`` is not a multiple of ``slice_len * num_shares``.
        """
        return self._fits(timeline(storage), self._slices_per_share(batch_size))

    def _slices_per_share(self, batch_size: int) -> int:
        per_share, rest = divmod(batch_size, self.slice_len * self.num_shares)
        if rest or per_share < 1:
            raise ValueError(
                f"got batch_size={batch_size}; expected a positive multiple of slice_len * num_shares = "
                f"{self.slice_len} * {self.num_shares}, so that every share gets the same number of whole slices."
            )
        return per_share

    def _num_starts(self, now: Timeline) -> int:
        return now.length - self.slice_len + 1

    def _fits(self, now: Timeline, per_share: int) -> bool:
        raise NotImplementedError

    def _needed(self, per_share: int, num_envs: int) -> str:
        raise NotImplementedError

    def _draw(self, now: Timeline, per_share: int) -> tuple[Tensor, Tensor]:
        """Draw starts (in order of time, 0 is the oldest) and environments, each ``[num_shares * per_share]``."""
        raise NotImplementedError

    @property
    def _source(self) -> torch.Generator | None:
        return self._generator if self._generator is not None else buffer_generator(self)

    def _randint(self, high: int, num: int) -> Tensor:
        source = self._source
        return torch.randint(high, (num,), generator=source, device=source.device if source else "cpu").cpu()

    def _rand(self, num: int) -> Tensor:
        source = self._source
        device = source.device if source else "cpu"
        return torch.rand(num, generator=source, device=device, dtype=torch.float64).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state, if the sampler has a generator of its own; sampling continues from there."""
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generator; a sampler without one gets one if the state holds it."""
        if "generator" in state_dict:
            if self._generator is None:
                self._generator = torch.Generator()
            self._generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        # A generator is sent to another process as a tensor in shared memory, which is freed before it arrives.
        own = self._generator
        numbers = None if own is None else (str(own.device), own.get_state().tolist())
        return {**super().__getstate__(), "_generator": numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_generator"] is not None:
            device, numbers = state["_generator"]
            self._generator = torch.Generator(device)
            self._generator.set_state(torch.tensor(numbers, dtype=torch.uint8))

    def dumps(self, path: str | Path) -> None:
        """Write the state below the folder ``path``, as JSON."""
        Path(path).mkdir(parents=True, exist_ok=True)
        state = {key: value.tolist() for key, value in self.state_dict().items()}
        (Path(path) / _STATE_FILE).write_text(json.dumps(state))

    def loads(self, path: str | Path) -> None:
        """Read what :meth:`dumps` wrote.

        Raises:
            ValueError: If the file is damaged.
        """
        file = Path(path) / _STATE_FILE
        try:
            state = json.loads(file.read_text())
            self.load_state_dict({key: torch.tensor(value, dtype=torch.uint8) for key, value in state.items()})
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def _empty(self) -> None:
        # Nothing is kept about the data: it is read from the storage at every call.
        pass
