"""Replay: one storage behind two buffers, sequences for the world model and starts of imagination for the agents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ImmutableDatasetWriter, LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

from matwm_rl.data.focal import FocalSlices
from matwm_rl.data.samplers import RecencySliceSampler, UniformSliceSampler
from matwm_rl.data.slices import timeline

_DONE_ROW = ("next", "done")
_LAYOUT_FILE = "layout.json"


@dataclass(frozen=True)
class Replay:
    """Two buffers on one storage; write with :meth:`extend`, read with ``sequences.sample()`` and ``starts.sample()``.

    Built by :func:`make_replay` (section 6). Both samples are focal batches (:mod:`matwm_rl.data.focal`). A collector
    may also be given ``sequences`` as its ``replay_buffer``. Its workers then have to write whole episodes
    (``sync=False, trajs_per_batch=1, traj_format="cat"``), and the functions that make their environments to add the
    policy's primer, which TorchRL then does not.

    Attributes:
        sequences (ReplayBuffer): recency-weighted slices for the world model, ``[B, T]``. The one that is written to.
        starts (ReplayBuffer): uniform slices of the context and the step to imagine from, ``[B, C+1]``. Reads only.
        num_agents (int): N.
        num_envs (int): E.

    Raises:
        ValueError: by :meth:`extend`, :meth:`load_state_dict` and :meth:`loads`, if what they are given does not fit.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> sizes = {"sequences_per_agent": 2, "starts_per_agent": 4, "sequence_length": 8, "context_length": 2}
        >>> replay = make_replay(num_agents=3, capacity=100, **sizes)
        >>> replay.extend(make_env("mock", seed=0).rollout(50, break_when_any_done=False))
        >>> replay.sequences.sample()["agents", "action"].shape, replay.starts.sample()["agents", "action"].shape
        (torch.Size([2, 8, 3]), torch.Size([4, 3, 3]))
    """

    sequences: ReplayBuffer
    starts: ReplayBuffer
    num_agents: int
    num_envs: int

    def extend(self, td: TensorDictBase) -> None:
        """Stores what a collector yields; of its entries only :data:`~matwm_rl.data.REPLAY_KEYS`.

        Successive calls must continue one another in time; where they do not, call :meth:`end_episodes` in between.
        What a collector yields is checked for it (:class:`~matwm_rl.data.Continuity`).

        Args:
            td (TensorDictBase): plain rollout, ``[E, T]``, ``[W, E/W, T]`` of W workers, or ``[T]`` of a single
                environment or of whole episodes one after the other.

        Raises:
            ValueError: if the batch does not fit the number of environments, the capacity or the number of agents, or
                does not continue the one before.
            KeyError: if an entry that replay stores is missing.
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
        """Marks the newest stored step of every environment as the end of its episode (by truncation).

        Without it a slice could run from this step into one that does not follow it. To be called when the environments
        are reset in the middle of an episode: after resuming from a checkpoint, or between unrelated rollouts.
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
        """Env steps that replay holds at most, all environments together."""
        return int(self.sequences.storage.max_size) // self.num_agents

    @property
    def env_steps(self) -> int:
        """Env steps ever written, all environments together, those overwritten since included."""
        return self.sequences.write_count * self.num_envs

    @property
    def can_sample(self) -> bool:
        """Whether both buffers can serve a batch."""
        return self.sequences.can_sample() and self.starts.can_sample()

    def __len__(self) -> int:
        """Env steps stored, all environments together."""
        return len(self.sequences.storage) // self.num_agents

    def state_dict(self) -> dict[str, Any]:
        """Data, write cursor and random state, each once; ``torch.load(..., weights_only=True)`` accepts it.

        The tensors are replay's own, not copies: save them before the next :meth:`extend`.
        """
        return {
            "layout": self._layout,
            "storage": self.sequences.storage.state_dict(),
            "writer": self.sequences.writer.state_dict(),
            "sequences": self.sequences.sampler.state_dict(),
            "starts": self.starts.sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave: both buffers go on with exactly the batches that were to come.

        Batch sizes and slice lengths stay those this replay was built with. Where what is stored next does not follow
        what was stored last, call :meth:`end_episodes` in between. With a ``scratch_dir`` use :meth:`loads`:
        here TorchRL would put the data of a replay that is still empty into a temporary folder instead.

        Raises:
            ValueError: if the state is of a replay with another capacity, number of agents or of environments.
        """
        self._check_layout(state_dict["layout"])
        self.sequences.storage.load_state_dict(state_dict["storage"])
        self.sequences.writer.load_state_dict(state_dict["writer"])
        self.sequences.sampler.load_state_dict(state_dict["sequences"])
        self.starts.sampler.load_state_dict(state_dict["starts"])
        self._focal_slices.continuity.forget()

    def dumps(self, path: str | Path) -> None:
        """Writes everything below the folder ``path``, as memory-mapped tensors and JSON.

        The parts are written one by one: ``ReplayBuffer.dumps`` would add a pickle, which its ``loads`` executes.

        Raises:
            RuntimeError: if nothing has been stored yet.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.sequences.storage.dumps(path / "storage")
        self.sequences.writer.dumps(path / "writer")
        self.sequences.sampler.dumps(path / "sequences")
        self.starts.sampler.dumps(path / "starts")
        (path / _LAYOUT_FILE).write_text(json.dumps(self._layout))

    def loads(self, path: str | Path) -> None:
        """Restores what :meth:`dumps` wrote: both buffers go on with exactly the batches that were to come.

        Where what is stored next does not follow what was stored last, call :meth:`end_episodes` in between.

        Raises:
            ValueError: if it is of a replay with another capacity, number of agents or of environments.
        """
        path = Path(path)
        self._check_layout(json.loads((path / _LAYOUT_FILE).read_text()))
        self.sequences.storage.loads(path / "storage")
        self.sequences.writer.loads(path / "writer")
        self.sequences.sampler.loads(path / "sequences")
        self.starts.sampler.loads(path / "starts")
        self._focal_slices.continuity.forget()

    @property
    def _layout(self) -> dict[str, int]:
        return {"capacity": self.capacity, "num_agents": self.num_agents, "num_envs": self.num_envs}

    def _check_layout(self, layout: dict[str, int]) -> None:
        if layout != self._layout:
            raise ValueError(f"the state is of a replay with {layout}; this one has {self._layout}. Build it to match.")


def make_replay(
    *,
    num_agents: int,
    sequences_per_agent: int,
    starts_per_agent: int,
    num_envs: int = 1,
    capacity: int = 50_000,
    sequence_length: int = 64,
    context_length: int = 8,
    decay: float = 0.9998,
    scratch_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> Replay:
    """Builds replay: one [time, env, agent] storage with a recency-weighted and a uniform buffer (section 6).

    Keyword Args:
        num_agents (int): N.
        sequences_per_agent (int): slices per agent in a world-model batch; the paper's 16 in total, in equal shares.
        starts_per_agent (int): starts of imagination per agent in an agent batch.
        num_envs (int, optional): E, environments that step together. Defaults to 1.
        capacity (int, optional): env steps stored, all environments together; rounded down to a multiple of E.
        sequence_length (int, optional): T of ``sequences``. Defaults to 64.
        context_length (int, optional): C, real steps before the one that imagination starts from. Defaults to 8.
        decay (float, optional): see :class:`~matwm_rl.data.RecencySliceSampler`; 1.0 turns recency off.
        scratch_dir (str or Path, optional): folder for memory-mapped data. Defaults to memory.
        device (torch.device, optional): where the data is stored and sampled; "cpu" with ``scratch_dir``.
        seed (int, optional): of both samplers. Defaults to the global random state, which ``state_dict`` leaves out.

    Raises:
        ValueError: if a number is not positive, ``decay`` is not in (0, 1], or a batch could never be drawn.

    Examples:
        >>> replay = make_replay(num_agents=3, sequences_per_agent=5, starts_per_agent=170, seed=0)
        >>> replay.capacity, replay.can_sample
        (50000, False)
    """
    counts = {
        "num_agents": num_agents,
        "sequences_per_agent": sequences_per_agent,
        "starts_per_agent": starts_per_agent,
        "num_envs": num_envs,
        "capacity": capacity,
        "sequence_length": sequence_length,
        "context_length": context_length,
    }
    if wrong := {name: value for name, value in counts.items() if value < (name != "context_length")}:
        raise ValueError(f"got {wrong}; expected positive numbers (context_length may be 0).")
    steps_per_env = capacity // num_envs
    start_length = context_length + 1
    if num_envs * (steps_per_env // sequence_length) < sequences_per_agent or steps_per_env < start_length:
        raise ValueError(
            f"a capacity of {steps_per_env} steps for each of {num_envs} environment(s) can never hold "
            f"{sequences_per_agent} slices of {sequence_length} steps side by side and one of {start_length}; raise it."
        )
    # A multiple of E * N, so that TorchRL does not round it up when the first data arrives.
    max_size = steps_per_env * num_envs * num_agents
    storage: LazyTensorStorage
    if scratch_dir is None:
        storage = LazyTensorStorage(max_size, ndim=3, device=device)
    else:
        storage = LazyMemmapStorage(max_size, ndim=3, device=device, scratch_dir=scratch_dir)
    generators = [None if seed is None else torch.Generator().manual_seed(seed + offset) for offset in (0, 1)]
    sequences = ReplayBuffer(
        storage=storage,
        sampler=RecencySliceSampler(sequence_length, decay=decay, num_shares=num_agents, generator=generators[0]),
        transform=FocalSlices(num_agents, sequence_length, num_envs),
        batch_size=num_agents * sequences_per_agent * sequence_length,
        dim_extend=0,
    )
    starts = ReplayBuffer(
        storage=storage,
        sampler=UniformSliceSampler(start_length, num_shares=num_agents, generator=generators[1]),
        writer=ImmutableDatasetWriter(),
        transform=FocalSlices(num_agents, start_length, num_envs),
        batch_size=num_agents * starts_per_agent * start_length,
        dim_extend=0,
    )
    return Replay(sequences=sequences, starts=starts, num_agents=num_agents, num_envs=num_envs)
