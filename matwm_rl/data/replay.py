"""Replay: one storage behind two buffers, sequences for the world model and starts of imagination for the agents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    ReplayBuffer,
    RoundRobinWriter,
    TensorDictReplayBuffer,
    Writer,
)
from torchrl.data.replay_buffers.samplers import Sampler

from matwm_rl.arguments import check_ints, check_kinds, read_device
from matwm_rl.data.config import ReplayConfig, starts_per_agent_by_agents
from matwm_rl.data.entry_check import check_like_stored
from matwm_rl.data.layouts import REPLAY_KEYS, FocalSlices
from matwm_rl.data.replay_state import check_generator, check_rows, check_writer, load_rows, stored_rows
from matwm_rl.data.samplers import RecencySliceSampler, UniformSliceSampler
from matwm_rl.data.slices import timeline
from matwm_rl.state_files import check_entries, read_state, write_state
from matwm_rl.torchrl_internals import ReservedMemmapStorage

_DONE_ROW = ("next", "done")
REPLAY_FILE = "replay.pt"
"""Name of the file that :meth:`Replay.dumps` writes into its folder."""


@dataclass(frozen=True)
class Replay:
    """Two buffers on one storage: write with :meth:`extend`, read with ``sequences.sample()``, ``starts.sample()``.

    Built by :func:`make_replay`. Both samples are focal batches (:mod:`matwm_rl.data.layouts`). A collector can take
    ``sequences`` as its ``replay_buffer``. If it collects in worker processes, they have to write whole episodes
    (``sync=False, trajs_per_batch=1, traj_format="cat"``), and the functions that make their environments have to add
    the policy's primer, which TorchRL then does not. On a Ray cluster replay lies in an actor, see :func:`make_replay`.

    Attributes:
        sequences: recency-weighted slices for the world model, ``[B, T]``; the buffer that is written to.
        starts: uniform slices, ``[B, C+1]``: the context and the step to imagine from. Reads only.
        num_agents: N.
        num_envs: E.

    Keys stored: see :class:`~matwm_rl.data.FocalSlices`. Samples also have TorchRL's ``"index"``, ``[B, T, N, 3]``: the
    place of each agent's step in the [time, env, agent] storage.

    Raises:
        ValueError: By :meth:`extend`, :meth:`load_state_dict` and :meth:`loads`, if what they are given does not fit.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> config = ReplayConfig(capacity=100, sequences=6, sequence_length=8, starts_per_agent=4, context_length=2)
        >>> replay = make_replay(3, config)
        >>> replay.extend(make_env("mock", seed=0).rollout(50, break_when_any_done=False))
        >>> replay.sequences.sample()["agents", "action"].shape, replay.starts.sample()["agents", "action"].shape
        (torch.Size([2, 8, 3]), torch.Size([4, 3, 3]))
    """

    sequences: TensorDictReplayBuffer
    starts: TensorDictReplayBuffer
    num_agents: int
    num_envs: int

    def extend(self, td: TensorDictBase) -> None:
        """Store what a collector yields; of its entries only :data:`~matwm_rl.data.REPLAY_KEYS`.

        Each call must continue the one before in time; if it does not, call :meth:`end_episodes` in between. What a
        collector yields is checked for this (:class:`~matwm_rl.data.Continuity`).

        Args:
            td: plain rollout, ``[E, T]``, ``[W, E/W, T]`` of W workers, or ``[T]`` of a single environment or of whole
                episodes one after the other.

        Raises:
            ValueError: If the batch does not fit the number of environments, the capacity, the number of agents or what
                is stored, does not continue the one before, or holds numbers, flags or actions that cannot be; see
                :class:`~matwm_rl.data.FocalSlices`. Nothing is stored then.
            KeyError: If an entry that replay stores is missing.
        """
        capacity = self.capacity // self.num_envs
        if td.shape[-1] > capacity:
            raise ValueError(
                f"got {td.shape[-1]} steps per environment at once, where replay holds {capacity}; raise the capacity "
                "or collect fewer frames per batch."
            )
        if not len(self):
            self._focal_slices.continuity.forget()
        self.sequences.extend(td)

    def end_episodes(self) -> None:
        """Mark the newest stored step of every environment as the end of its episode (by truncation).

        Otherwise a slice could run from this step into one that does not follow it. Call it when the environments are
        reset in the middle of an episode: after resuming from a checkpoint, or between unrelated rollouts.
        """
        self._focal_slices.continuity.forget()
        storage = self.sequences.storage
        now = timeline(storage)
        if now.length:
            newest = (now.oldest + now.length - 1) % now.length
            # A copy: rows of a memory-mapped storage are locked.
            row = storage[newest].clone()
            storage[newest] = row.set(_DONE_ROW, torch.ones_like(row.get(_DONE_ROW)))

    @property
    def _focal_slices(self) -> FocalSlices:
        return next(transform for transform in self.sequences.transform if isinstance(transform, FocalSlices))

    @property
    def capacity(self) -> int:
        """Number of env steps that replay can hold, all environments together."""
        return int(self.sequences.storage.max_size) // self.num_agents

    @property
    def env_steps(self) -> int:
        """Number of env steps ever written, all environments together, including those overwritten since."""
        return self.sequences.write_count * self.num_envs

    @property
    def can_sample(self) -> bool:
        """Whether both buffers can serve a batch."""
        return self.sequences.can_sample() and self.starts.can_sample()

    def __len__(self) -> int:
        """Return the number of env steps stored, all environments together."""
        return len(self.sequences.storage) // self.num_agents

    def state_dict(self) -> dict[str, Any]:
        """Return data, write cursor and random state, each once; ``torch.load(..., weights_only=True)`` accepts it.

        The tensors are replay's own, not copies: save them before the next :meth:`extend`.
        """
        return {
            "layout": self._layout,
            "rows": stored_rows(self.sequences.storage),
            **{name: part.state_dict() for name, part in self._parts.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, source: str = "the state") -> None:
        """Restore what :meth:`state_dict` returned: both buffers draw exactly the batches that would have come next.

        Batch sizes, slice lengths and recency stay those this replay was built with. If the next rollout does not
        continue the last one stored, call :meth:`end_episodes` in between.

        Args:
            state_dict: what :meth:`state_dict` returned, perhaps in another process.
            source: what the message calls it.

        Raises:
            ValueError: If the state does not fit, see :meth:`check_state_dict`; then nothing is changed.
        """
        self.check_state_dict(state_dict, source=source)
        self.sequences.empty()
        load_rows(self.sequences.storage, state_dict["rows"])
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        self._focal_slices.continuity.forget()

    def check_state_dict(self, state_dict: Any, *, source: str = "the state") -> None:
        """Check that :meth:`load_state_dict` can restore a state, and change nothing.

        Args:
            state_dict: what :meth:`state_dict` returned, perhaps in another process.
            source: what the message calls it.

        Raises:
            ValueError: If it is of a replay with another capacity, number of agents or of environments, or an entry is
                missing, unknown, or of another shape or type than replay stores.
        """
        check_entries(state_dict, ["layout", "rows", *self._parts], source=source)
        if state_dict["layout"] != self._layout:
            raise ValueError(
                f"{source} is of a replay with {state_dict['layout']}; this one has {self._layout}. Build it to match."
            )
        check_rows(state_dict["rows"], self.sequences.storage, num_agents=self.num_agents, source=source)
        check_writer(state_dict["writer"], self.sequences.writer, source=source)
        for name, sampler in (("sequences", self.sequences.sampler), ("starts", self.starts.sampler)):
            check_generator(state_dict[name], sampler, source=f"{source}, {name},")

    def dumps(self, path: str | Path) -> None:
        """Write everything into the folder ``path``, as one file of tensors and plain values.

        ``ReplayBuffer.dumps`` is not used. TensorDict's memory-mapped folders may hold pickles, which their reader
        executes, and a full disk kills the process that writes to a memory map.

        Raises:
            RuntimeError: If nothing has been stored yet.
            OSError: If it cannot be written, because the disk is full for one.
        """
        if not len(self):
            raise RuntimeError("nothing has been stored yet, so that there is nothing to save")
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_state(path / REPLAY_FILE, self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Restore what :meth:`dumps` wrote: both buffers draw exactly the batches that would have come next.

        If the next rollout does not continue the last one stored, call :meth:`end_episodes` in between. Safe for
        untrusted folders: loading runs no code, follows no links and changes nothing in the folder.

        Raises:
            FileNotFoundError: If there is no such folder, or it holds no replay.
            ValueError: If the file is damaged, or of a replay that does not fit; then nothing is changed.
        """
        file = Path(path) / REPLAY_FILE
        self.load_state_dict(read_state(file, mmap=True), source=str(file))

    @property
    def _parts(self) -> dict[str, Writer | Sampler]:
        """Return the parts that have a state, apart from the data, by their names in a saved state."""
        return {
            "writer": self.sequences.writer,
            "sequences": self.sequences.sampler,
            "starts": self.starts.sampler,
        }

    @property
    def _layout(self) -> dict[str, int]:
        return {"capacity": self.capacity, "num_agents": self.num_agents, "num_envs": self.num_envs}


class _RowBuffer(TensorDictReplayBuffer):
    """A buffer of rows.

    ``TensorDictReplayBuffer.extend`` also writes the index into what it was given, for priorities, and cannot do so if
    a [time, env, agent] storage has one environment and one agent. Rows have no priorities and are not used again.
    """

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """Store what the transform makes of the data, see :meth:`torchrl.data.ReplayBuffer.extend`."""
        if len(self.storage):
            check_like_stored(tensordicts, self.storage[0], REPLAY_KEYS)
        return ReplayBuffer.extend(self, tensordicts, update_priority=update_priority)


def make_replay(
    num_agents: int,
    config: ReplayConfig | None = None,
    *,
    num_envs: int = 1,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    scratch_dir: str | Path | None = None,
    remote_config: dict[str, Any] | None = None,
) -> Replay:
    """Build replay: one [time, env, agent] storage with a recency-weighted and a uniform buffer.

    Args:
        num_agents: N.
        config: sizes and recency; by default the paper's.
        num_envs: E, environments that step together.
        device: where the data is stored and sampled; "cpu" with ``scratch_dir``.
        seed: of both samplers. ``None``: they use the global random state, which ``state_dict`` leaves out.
        scratch_dir: folder for memory-mapped data, whose room on the disk is reserved when the first data arrives.
            ``None``: the data is kept in memory.
        remote_config: options of ``ray.remote``, such as ``{"num_cpus": 1}``: everything above is made in a Ray actor.
            Then a :class:`~torchrl.collectors.distributed.RayCollector` can take ``sequences`` as its
            ``replay_buffer``, and its workers write whole episodes (``trajs_per_batch=1``). Random frames at the
            beginning are those until the steps of *all* workers exceed ``init_random_frames / num_collectors``.
            ``sequences.shutdown()`` ends the actor. ``None``: replay is made in this process.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or a batch could never be drawn.

    Examples:
        >>> replay = make_replay(3, ReplayConfig(capacity=10_000), seed=0)
        >>> replay.capacity, replay.can_sample
        (10000, False)
    """
    config = ReplayConfig() if config is None else config
    check_kinds(ReplayConfig, config=config)
    config.check()
    check_ints(1, num_agents=num_agents, num_envs=num_envs)
    if seed is not None:
        check_ints(0, seed=seed)
    device = read_device("device", device)
    if remote_config is not None:
        # It imports this module.
        from matwm_rl.data.ray_replay import RayReplay

        make = partial(make_replay, num_agents, config, num_envs=num_envs, device=device, seed=seed)
        return RayReplay.start(partial(make, scratch_dir=scratch_dir), remote_config, num_agents, num_envs)
    starts_per_agent = config.starts_per_agent
    if starts_per_agent is None:
        starts_per_agent = starts_per_agent_by_agents(num_agents)
    sequences_per_agent = config.sequences_per_agent(num_agents)
    steps_per_env = config.capacity // num_envs
    start_length = config.context_length + 1
    if num_envs * (steps_per_env // config.sequence_length) < sequences_per_agent or steps_per_env < start_length:
        raise ValueError(
            f"a capacity of {steps_per_env} steps for each of {num_envs} environment(s) can never hold "
            f"{sequences_per_agent} slices of {config.sequence_length} steps side by side and one of {start_length}; "
            "raise it."
        )
    # A multiple of E * N, so that TorchRL does not round it up when the first data arrives.
    max_size = steps_per_env * num_envs * num_agents
    storage: LazyTensorStorage
    if scratch_dir is None:
        storage = LazyTensorStorage(max_size, ndim=3, device=device)
    else:
        storage = ReservedMemmapStorage(max_size, ndim=3, device=device, scratch_dir=scratch_dir)
    generators = [None if seed is None else torch.Generator().manual_seed(seed + offset) for offset in (0, 1)]
    sequences = _RowBuffer(
        storage=storage,
        sampler=RecencySliceSampler(
            config.sequence_length, decay=config.recency_decay, num_shares=num_agents, generator=generators[0]
        ),
        # TensorDictReplayBuffer's default writer would store an index with every row.
        writer=RoundRobinWriter(),
        transform=FocalSlices(num_agents, num_envs),
        batch_size=num_agents * sequences_per_agent * config.sequence_length,
        dim_extend=0,
    )
    starts = _RowBuffer(
        storage=storage,
        sampler=UniformSliceSampler(start_length, num_shares=num_agents, generator=generators[1]),
        writer=ImmutableDatasetWriter(),
        transform=FocalSlices(num_agents, num_envs),
        batch_size=num_agents * starts_per_agent * start_length,
        dim_extend=0,
    )
    return Replay(sequences=sequences, starts=starts, num_agents=num_agents, num_envs=num_envs)
