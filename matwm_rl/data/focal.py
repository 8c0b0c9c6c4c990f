"""Folding agents into the batch: agent i's share of a batch consumes what agent i saw and did (the focal agent).

Three layouts of the same data. Legend: B slices per agent, T time, E environments, N agents.

- *plain*, as an environment gives it: ``[*batch]`` with ``("agents", ...)`` entries ``[*batch, N, ...]``, root dones;
- *rows*, as replay stores it: ``[*batch, N]``: one row per step and agent with all that concerns this agent, so that a
  sample reads the focal agent's observations only and not the N - 1 others' as well (with images: most of the memory);
- *focal*, as the model reads it: ``[B, T]`` with ``("agents", ...)`` entries ``[B, T, N, ...]``, where agent n's come
  from a slice of agent n's own share: the N agents of one batch row did not act at the same time.
"""

from __future__ import annotations

import math

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.transforms import Transform

from matwm_rl.checks import read_entry
from matwm_rl.data.continuity import Continuity
from matwm_rl.keys import (
    ACTION,
    ACTION_MASK,
    AGENT_DONE,
    AGENT_TERMINATED,
    AGENTS,
    ALIVE,
    DONE,
    NEXT_ALIVE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TEAMMATE_ACTION,
    TEAMMATE_ALIVE,
    TERMINATED,
)

REPLAY_KEYS: tuple[NestedKey, ...] = (
    OBSERVATION,
    ACTION,
    ACTION_MASK,
    ALIVE,
    NEXT_OBSERVATION,
    REWARD,
    NEXT_ALIVE,
    DONE,
    TERMINATED,
)
"""What replay stores of a step. A truncation needs no key of its own: it is done and not terminated."""


def teammate_actions(action: Tensor) -> Tensor:
    """For each focal agent, the others' actions in agent order without itself.

    Args:
        action (Tensor): ``[..., N]``, of any dtype.

    Returns:
        Tensor: ``[..., N, N-1]``.

    Examples:
        >>> teammate_actions(torch.tensor([10, 11, 12]))
        tensor([[11, 12],
                [10, 12],
                [10, 11]])
    """
    num_agents = action.shape[-1]
    agent = torch.arange(num_agents, device=action.device).unsqueeze(-1)
    other = torch.arange(num_agents - 1, device=action.device)
    return action[..., other + (other >= agent).long()]


def to_focal(td: TensorDictBase) -> TensorDictBase:
    """Adds to a plain rollout what concerns each agent as the focal one (section 1).

    Writes ``("agents", "teammate_action")`` ``[*batch, N, N-1]``, ``("agents", "teammate_alive")`` (if
    ``("agents", "alive")`` is there: what a dead teammate "did" is no target) and, where the root has them,
    ``("next", "agents", "done")`` and ``("next", "agents", "terminated")`` ``[*batch, N, 1]``.

    Args:
        td (TensorDictBase): plain, ``[*batch]``, with ``("agents", "action")`` ``[*batch, N]``.

    Returns:
        TensorDictBase: a shallow copy with the new entries.

    Raises:
        KeyError: if there are no actions.
        ValueError: if the action does not have one dimension more than the batch.

    Examples:
        >>> td = TensorDict({"agents": {"action": torch.tensor([[0, 1, 2]])}, "next": {"done": torch.ones(1, 1)}}, [1])
        >>> to_focal(td)["next", "agents", "done"].shape
        torch.Size([1, 3, 1])
    """
    action = read_entry(td, ACTION, "to_focal")
    if action.shape[:-1] != td.batch_size:
        raise ValueError(
            f"got {ACTION} of shape {tuple(action.shape)} in a batch of {tuple(td.batch_size)}; expected the batch and "
            "one dimension of agents, actions being categorical."
        )
    td = td.copy()
    td.set(TEAMMATE_ACTION, teammate_actions(action))
    alive = td.get(ALIVE, default=None)
    if alive is not None:
        td.set(TEAMMATE_ALIVE, teammate_actions(alive))
    for root_key, agent_key in ((DONE, AGENT_DONE), (TERMINATED, AGENT_TERMINATED)):
        root = td.get(root_key, default=None)
        if root is not None:
            td.set(agent_key, root.unsqueeze(-2).expand(*td.batch_size, action.shape[-1], 1))
    return td


def agent_rows(td: TensorDictBase) -> TensorDictBase:
    """Turns plain data into rows: ``[*batch]`` to ``[*batch, N]``. Root entries that belong to no agent are dropped.

    Args:
        td (TensorDictBase): plain, ``[*batch]``, see :func:`to_focal`.

    Returns:
        TensorDictBase: ``[*batch, N]`` with the agents' entries at the root and under ``"next"``; shares memory with
        ``td`` where possible.

    Raises:
        KeyError: if there are no actions.
        ValueError: see :func:`to_focal`.

    Examples:
        >>> rows = agent_rows(TensorDict({"agents": {"action": torch.tensor([[0, 1, 2]])}}, [1]))
        >>> rows.batch_size, rows["teammate_action"].tolist()
        (torch.Size([1, 3]), [[[1, 2], [0, 2], [0, 1]]])
    """
    td = to_focal(td)
    batch = (*td.batch_size, td.get(ACTION).shape[-1])
    rows = TensorDict(dict(td.get(AGENTS).items()), batch)
    following = td.get(("next", AGENTS), default=None)
    if following is not None:
        rows.set("next", TensorDict(dict(following.items()), batch))
    return rows


def focal_batch(rows: TensorDictBase) -> TensorDictBase:
    """Turns rows ``[*batch, N]`` back into ``[*batch]`` with ``("agents", ...)`` entries ``[*batch, N, ...]``.

    Args:
        rows (TensorDictBase): see :func:`agent_rows`; row n of the last dimension is agent n's.

    Returns:
        TensorDictBase: the same memory under the keys of :mod:`matwm_rl.keys`.

    Examples:
        >>> rows = TensorDict({"action": torch.tensor([[0, 1, 2]]), "next": {"reward": torch.zeros(1, 3, 1)}}, [1, 3])
        >>> batch = focal_batch(rows)
        >>> batch.batch_size, batch["next", "agents", "reward"].shape
        (torch.Size([1]), torch.Size([1, 3, 1]))
    """
    out = TensorDict({AGENTS: rows.exclude("next")}, rows.batch_size[:-1])
    following = rows.get("next", default=None)
    if following is not None:
        out.set(("next", AGENTS), following)
    return out


def select_focal(td: TensorDictBase, num_agents: int) -> TensorDictBase:
    """Folds plain slices into a focal batch: agent n's are from the n-th of N equal shares (section 6).

    Args:
        td (TensorDictBase): plain, ``[N*B, T]``: agent 0's B slices, then agent 1's, and so on.
        num_agents (int): N.

    Returns:
        TensorDictBase: ``[B, T]``, where ``("agents", key)[b, t, n]`` is agent n's entry in slice ``n*B + b``, its
        teammates' actions and its dones included.

    Raises:
        ValueError: if the batch is not ``[N*B, T]`` or the actions are not of N agents.

    Examples:
        >>> action = torch.arange(4 * 5 * 2).reshape(4, 5, 2)
        >>> select_focal(TensorDict({"agents": {"action": action}}, [4, 5]), 2)["agents", "action"][0, 0]
        tensor([ 0, 21])
    """
    if td.ndim != 2 or td.shape[0] % num_agents:
        raise ValueError(
            f"got a batch of {tuple(td.batch_size)}; expected [N*B, T], the first a multiple of num_agents={num_agents}"
            ", so that every agent has an equal share."
        )
    rows = agent_rows(td)
    if rows.shape[-1] != num_agents:
        raise ValueError(f"got actions of {rows.shape[-1]} agents and num_agents={num_agents}; they must agree.")
    B, T = td.shape[0] // num_agents, td.shape[1]
    b, t, n = torch.meshgrid(*(torch.arange(size, device=td.device) for size in (B, T, num_agents)), indexing="ij")
    return focal_batch(rows[n * B + b, t, n])


class FocalSlices(Transform):
    """Stores rows and samples focal batches (section 6): the transform of a buffer on a [time, env, agent] storage.

    On ``extend`` it takes a plain rollout as TorchRL's collectors give it, ``[T]``, ``[E, T]`` or, of W workers,
    ``[W, E/W, T]``, keeps :data:`REPLAY_KEYS` and returns rows ``[T, E, N]``. Rollouts must continue one another, see
    :class:`~matwm_rl.data.Continuity`; where several processes write to one buffer (TorchRL then calls
    :meth:`share_memory_`) they must be whole episodes. On ``sample`` it takes the N equal shares of whole slices that
    a slice sampler with ``num_shares=N`` draws, ``[N*B*T]``, and returns a focal batch ``[B, T]``.

    The buffer must be built with ``dim_extend=0`` (time comes first already), and be a ``ReplayBuffer``: a
    ``TensorDictReplayBuffer`` writes the flat index into the sample and refuses transforms that change its shape.

    Args:
        num_agents (int): N.
        slice_len (int): T of a sample.
        num_envs (int, optional): E, environments that step together; other rollouts are refused. Defaults to any.

    Keys stored: :data:`REPLAY_KEYS`, which the rollout must have. Keys of a sample, ``[B, T, N, ...]``: the agents' own
    among them, and what :func:`to_focal` adds.

    Raises:
        KeyError: on ``extend``, if an entry that is stored is missing.
        ValueError: if a rollout does not continue the one before, or the number of agents, of environments or of steps
            does not fit.

    Examples:
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> from matwm_rl.data import RecencySliceSampler
        >>> rb = ReplayBuffer(
        ...     storage=LazyTensorStorage(2 * 100, ndim=3), dim_extend=0, batch_size=2 * 4 * 8,
        ...     sampler=RecencySliceSampler(8, num_shares=2), transform=FocalSlices(2, 8),
        ... )
        >>> state = {"observation": torch.rand(50, 2, 3), "alive": torch.ones(50, 2, dtype=torch.bool)}
        >>> acting = {"action": torch.zeros(50, 2).long(), "action_mask": torch.ones(50, 2, 5, dtype=torch.bool)}
        >>> over = torch.zeros(50, 1, dtype=torch.bool)
        >>> following = {"agents": {**state, "reward": torch.zeros(50, 2, 1)}, "done": over, "terminated": over}
        >>> _ = rb.extend(TensorDict({"agents": {**state, **acting}, "next": following}, [50]))
        >>> rb.sample()["agents", "observation"].shape
        torch.Size([4, 8, 2, 3])
    """

    def __init__(self, num_agents: int, slice_len: int, num_envs: int | None = None) -> None:
        super().__init__()
        self.num_agents = num_agents
        self.slice_len = slice_len
        self.num_envs = num_envs
        self.continuity = Continuity()
        self.whole_episodes = False

    def share_memory_(self) -> None:
        """From now on several processes write, in any order: what each writes must be whole episodes."""
        self.whole_episodes = True
        self.continuity.forget()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Turns a sample of rows, ``[N*B*T]``, into a focal batch ``[B, T]``.

        Raises:
            ValueError: if the sample does not hold the same number of whole slices of every agent.
        """
        if tensordict.ndim != 1 or tensordict.numel() % (self.num_agents * self.slice_len):
            raise ValueError(
                f"got a sample of {tuple(tensordict.batch_size)}; expected one dimension, a multiple of num_agents * "
                f"slice_len = {self.num_agents} * {self.slice_len}, so that every agent has an equal share."
            )
        return focal_batch(tensordict.reshape(self.num_agents, -1, self.slice_len).permute(1, 2, 0))

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        present = set(tensordict.keys(include_nested=True, leaves_only=True))
        missing = [key for key in REPLAY_KEYS if key not in present]
        if missing:
            raise KeyError(f"replay stores {missing}, which the given data lacks; it has {sorted(map(str, present))}.")
        *envs, length = tensordict.batch_size
        num_envs = math.prod(envs)
        if self.num_envs is not None and num_envs != self.num_envs:
            raise ValueError(
                f"got data of batch {tuple(tensordict.batch_size)}; expected [{self.num_envs}, T]"
                f"{' or [T]' if self.num_envs == 1 else ''}: this replay was built with num_envs={self.num_envs}, the "
                "environments of all workers together."
            )
        plain = tensordict.reshape(num_envs, length)
        if self.whole_episodes and not plain.get(DONE)[:, -1].all():
            raise ValueError(
                "several processes write to this replay, and one of them a rollout whose last step does not end its "
                "episode: another's would follow it. Have the workers write whole episodes, with the collector's "
                "trajs_per_batch=1; or leave out its replay_buffer and store what it yields with Replay.extend."
            )
        rows = agent_rows(plain.select(*REPLAY_KEYS).transpose(0, 1))
        if rows.shape[-1] != self.num_agents:
            raise ValueError(f"got actions of {rows.shape[-1]} agents; this buffer was built for {self.num_agents}.")
        # Last: a rollout that is refused was not stored, and the next goes on where the one before it stopped.
        self.continuity.check(plain)
        return rows
