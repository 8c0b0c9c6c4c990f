"""All private parts of PyTorch, TorchRL and VMAS in use, each with the reason why there is no public way.

They may change with any release. ``tests/test_torchrl_internals.py`` and ``tests/test_simulator_internals.py`` fail
then; the fix belongs here and nowhere else. Methods with a leading underscore that TorchRL asks its subclasses to
define (``Sampler._empty``, ``Transform._inv_call``) are not private in this sense.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage
from torchrl.data.replay_buffers import RoundRobinWriter, Sampler, Storage
from torchrl.envs import EnvBase
from torchrl.modules import PercentileValueNorm
from torchrl.objectives import LossModule


def is_batched(value: Tensor) -> bool:
    """Return whether ``torch.vmap`` is at work on a tensor, which PyTorch has no public way to ask.

    Examples:
        >>> is_batched(torch.ones(2)), torch.vmap(lambda row: row + is_batched(row))(torch.zeros(2, 1)).tolist()
        (False, [[1.0], [1.0]])
    """
    return torch._C._functorch.is_batchedtensor(value)


def attached_entities(storage: Storage) -> Sequence[Any]:
    """Return the buffers built on a storage, and whatever else was attached to it.

    A sampler is given the storage alone, and must find the writer, which knows the order of time. ``Storage.attach`` is
    public; the list that it adds to is not.

    Examples:
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(10))
        >>> attached_entities(rb.storage)[0] is rb
        True
    """
    return storage._attached_entities


def write_cursor(writer: RoundRobinWriter) -> int:
    """Return the index along the first dimension that the next step will be written to.

    The writer has no public attribute for it; it is read off the writer's public state, under a private name.
    ``ReplayBuffer.write_count`` is public but does not tell: ``ReplayBuffer.empty(empty_write_count=False)`` sets the
    cursor back and leaves the count.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(10))
        >>> for _ in range(3):
        ...     _ = rb.extend(TensorDict({"obs": torch.zeros(4)}, [4]))
        >>> write_cursor(rb.writer)
        2
    """
    return int(writer.state_dict()["_cursor"])


class ReservedMemmapStorage(LazyMemmapStorage):
    """A memory-mapped storage that takes its room on the disk when it creates its files.

    Otherwise the disk may become full later, and a process that writes to a page without room is killed. The files are
    created by a private method (``_init``); a public place to reserve them before the first write does not exist.

    Raises:
        OSError: When the first data arrives, if the disk has no room.
    """

    def _init(self, data: Any) -> None:
        super()._init(data)
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            for file in Path(self.scratch_dir).rglob("*.memmap"):
                with file.open("r+b") as opened:
                    if size := os.fstat(opened.fileno()).st_size:
                        os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            self.initialized, self._storage = False, None
            raise OSError(error.errno, f"no room for replay's data in {self.scratch_dir}: {error.strerror}") from None


def buffer_generator(sampler: Sampler) -> torch.Generator | None:
    """Return the generator that the buffer gave to its sampler, or ``None`` for the global random state.

    ``ReplayBuffer.set_rng`` hands the buffer's generator to the sampler by setting a private attribute. TorchRL's own
    samplers read it from there.

    Examples:
        >>> from torchrl.data import LazyTensorStorage, RandomSampler, ReplayBuffer
        >>> sampler, generator = RandomSampler(), torch.Generator()
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(10), sampler=sampler, generator=generator)
        >>> buffer_generator(sampler) is generator
        True
    """
    return sampler._rng


def simulator(env: EnvBase) -> Any:
    """Return the simulator behind one of TorchRL's wrappers: a PettingZoo or a VMAS environment (``env._env``).

    Needed to draw it and to read its time limit. TorchRL's wrappers forward unknown attributes to it, but not those
    that they have themselves.
    """
    return env._env


def replace_simulator(env: EnvBase, other: Any) -> None:
    """Put another object in the place of the simulator behind one of TorchRL's wrappers.

    The wrapper reads specs when it is made, and cannot be told afterwards to look at what the simulator returns.
    """
    env._env = other


def vmas_random_state(env: EnvBase) -> list[Any]:
    """Return the random state that all VMAS environments of a process share, a list to be changed in place.

    An attribute of VMAS's class ``Environment``: the states of ``torch``, ``numpy`` and ``random``. Needed to give a
    seeded environment a random state of its own.
    """
    state: list[Any] = simulator(env).vmas_random_state
    return state


def collector_carrier(collector: Collector) -> TensorDictBase:
    """Return the tensordict that a collector will act on next: the present observation, and the policy's history.

    ``Collector.state_dict`` leaves it out, and ``reset`` is the only public way to change it.
    """
    carrier: TensorDictBase = collector._carrier
    return carrier


def lock_batch(env: EnvBase) -> None:
    """Make an environment refuse tensordicts of another batch size than its own (``env._batch_locked``).

    ``ModelBasedEnvBase`` steps tensordicts of any batch size, and the public property cannot be set.
    """
    env._batch_locked = True


def padding_masks(loss: LossModule, tensordict: TensorDictBase, like: Tensor) -> list[Tensor]:
    """Return the masks of steps that are no padding, bool as ``like [*batch, N]``: those that the batch has.

    Collectors mark padding under ``("collector", "mask")``; ``LossModule`` takes other keys by ``loss_mask_key``. Both
    the keys and the mask's expansion are private, since TorchRL's own losses apply them inside.
    """
    masks = (tensordict.get(key, None) for key in loss._loss_mask_keys())
    return [loss._expand_loss_mask(mask, like) for mask in masks if mask is not None]


def percentile_levels(norm: PercentileValueNorm) -> Tensor:
    """Return the two levels of ``PercentileValueNorm``'s percentiles, ``[2]``.

    :class:`~matwm_rl.objectives.ReturnScale` overrides the update, so that dead agents do not count, and needs them.
    """
    return norm._q


def show_out_keys(module: Any, keys: list[NestedKey]) -> None:
    """Set the ``out_keys`` that a TensorDict module shows, a part of those that it has (``out_keys_source``).

    TensorDict's ``select_out_keys`` does it for modules that read all of their ``in_keys``; some of a loss's may be
    missing.
    """
    module._out_keys_apparent = keys
