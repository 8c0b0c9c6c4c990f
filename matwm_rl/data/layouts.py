"""The layouts that data has on its way from an environment to a network, and where each is turned into the next.

Legend: E environments, T time, N agents, B slices per agent.

=============  ================================================================  =======================================
layout         shape                                                             turned into the next one by
=============  ================================================================  =======================================
*grouped*      as a backend gives it: entries per group of agents                :class:`~matwm_rl.envs.MultiAgentEnv`
*plain*        ``[E, T]``; ``("agents", key)`` ``[E, T, N, ...]``, root ends     :class:`FocalSlices`, on ``extend``
*rows*         ``[T, E, N]``, as stored; ``key`` ``[T, E, N, ...]``              :class:`FocalSlices`, on ``sample``
*focal*        ``[B, T]``; ``("agents", key)`` ``[B, T, N, ...]``                :mod:`matwm_rl.modules`, on input
*agent-major*  ``[N, B, T, ...]`` tensors, as stacked networks compute           the modules, on output (focal again)
=============  ================================================================  =======================================

A *row* is all that concerns one agent at one step, its teammates' actions included. Replay stores rows so that a sample
reads the observations of the focal agent only. With images, those are most of the memory. A *focal* batch has the
agents' keys of plain data and those of :func:`add_agent_entries`, but agent n's entries come from a slice of its own:
the N agents of one batch row did not act at the same time (docs/algorithm.md, World model).
"""

from __future__ import annotations

import math

from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs.transforms import Transform

from matwm_rl.arguments import check_ints
from matwm_rl.checks import read_entry
from matwm_rl.data.continuity import Continuity
from matwm_rl.data.entry_check import check_rollout
from matwm_rl.functional import of_teammates
from matwm_rl.keys import (
    ACTION,
    ACTION_MASK,
    AGENT_DONE,
    AGENT_TERMINATED,
    AGENT_TRUNCATED,
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
"""What replay reads of a step, and :data:`~matwm_rl.keys.AGENT_TRUNCATED` where it is there.

A truncation of the episode needs no key of its own: it is done and not terminated.
"""


def add_agent_entries(td: TensorDictBase) -> TensorDictBase:
    """Add to plain data, for each agent, its teammates' actions and the end of its episode.

    Writes ``("agents", "teammate_action")`` ``[*batch, N, N-1]``, of continuous actions ``[*batch, N, N-1, A]``,
    ``("agents", "teammate_alive")`` if there is ``("agents", "alive")`` (the action of a dead teammate is no target),
    and ``("next", "agents", "done")`` and ``("next", "agents", "terminated")`` ``[*batch, N, 1]`` where the root has
    them. Teammates are in agent order, without the agent itself.

    An agent's own episode also ends where a time limit takes it out alone (``("next", "agents", "truncated")``): it is
    done, not terminated, and counts as alive in its last observation, as agents do that end with the episode. And it
    begins anew where the agent joins or returns, so that nothing reaches across its absence.

    Args:
        td: plain data, ``[*batch]``, with ``("agents", "action")`` ``[*batch, N]``, or ``[*batch, N, A]`` if they are
            continuous.

    Returns:
        A shallow copy with the new entries.

    Raises:
        KeyError: If there are no actions.
        ValueError: If discrete actions do not have one dimension more than the batch, or continuous ones two.

    Examples:
        >>> import torch
        >>> td = TensorDict({"agents": {"action": torch.tensor([[0, 1, 2]])}, "next": {"done": torch.ones(1, 1)}}, [1])
        >>> td = add_agent_entries(td)
        >>> td["agents", "teammate_action"].tolist(), td["next", "agents", "done"].shape
        ([[[1, 2], [0, 2], [0, 1]]], torch.Size([1, 3, 1]))
    """
    action = read_entry(td, ACTION, "add_agent_entries")
    own = int(action.is_floating_point())
    if action.ndim != td.ndim + 1 + own:
        raise ValueError(
            f"got {ACTION} of shape {tuple(action.shape)} in a batch of {tuple(td.batch_size)}; expected the batch and "
            f"one dimension of agents, actions being {'vectors, which have one more' if own else 'categorical'}."
        )
    td, num_agents = td.copy(), action.shape[td.ndim]
    td.set(TEAMMATE_ACTION, of_teammates(action, td.ndim))
    alive = td.get(ALIVE, default=None)
    if alive is not None:
        td.set(TEAMMATE_ALIVE, of_teammates(alive, td.ndim))
    for root_key, agent_key in ((DONE, AGENT_DONE), (TERMINATED, AGENT_TERMINATED)):
        root = td.get(root_key, default=None)
        if root is not None:
            td.set(agent_key, root.unsqueeze(-2).expand(*td.batch_size, num_agents, 1))
    _end_lives(td)
    return td


def _end_lives(td: TensorDictBase) -> None:
    """Write the ends of single agents, in the middle of an episode, into their entries."""
    after, left = td.get(NEXT_ALIVE, default=None), td.get(AGENT_TRUNCATED, default=None)
    done, terminated = td.get(AGENT_DONE, default=None), td.get(AGENT_TERMINATED, default=None)
    alive = td.get(ALIVE, default=None)
    if left is not None:
        if after is not None:
            td.set(NEXT_ALIVE, after | left.squeeze(-1))
        if terminated is not None:
            td.set(AGENT_TERMINATED, terminated.bool() & ~left)
        done = None if done is None else done.bool() | left
    if done is not None and after is not None and alive is not None:
        done = done.bool() | (~alive & after).unsqueeze(-1)
    if done is not None:
        td.set(AGENT_DONE, done)


def _to_rows(td: TensorDictBase) -> TensorDictBase:
    """Turn plain data ``[*batch]`` into rows ``[*batch, N]``; root entries, which belong to no agent, are dropped."""
    batch = (*td.batch_size, td.get(ACTION).shape[td.ndim])
    rows = TensorDict(dict(td.get(AGENTS).items()), batch)
    rows.set("next", TensorDict(dict(td.get(("next", AGENTS)).items()), batch))
    return rows


def _to_focal(rows: TensorDictBase) -> TensorDictBase:
    """Turn rows ``[B, T, N]`` into a focal batch ``[B, T]``, on the same memory."""
    focal = TensorDict({AGENTS: rows.exclude("next")}, rows.batch_size[:-1])
    return focal.set(("next", AGENTS), rows.get("next"))


class FocalSlices(Transform):
    """Store rows and sample focal batches: the transform of a buffer on a [time, env, agent] storage.

    On ``extend`` it takes a plain rollout as TorchRL's collectors give it, ``[T]``, ``[E, T]`` or, of W workers,
    ``[W, E/W, T]``, and returns rows ``[T, E, N]`` made of :data:`REPLAY_KEYS`. Each rollout must continue the one
    before, see :class:`~matwm_rl.data.Continuity`. If several processes write to one buffer (TorchRL then calls
    :meth:`share_memory_`), each rollout must consist of whole episodes. On ``sample`` it takes the rows ``[B, T, N]``
    that a slice sampler with ``num_shares=N`` draws, and returns a focal batch ``[B, T]``.

    The buffer must be built with ``dim_extend=0``, as rows have time first already.

    Args:
        num_agents: N.
        num_envs: E, environments that step together; other rollouts are refused. ``None`` accepts any number.

    Keys read on ``extend``: :data:`REPLAY_KEYS`. Keys of a sample, ``[B, T, N, ...]``: those of them that are agents'
    own, and what :func:`add_agent_entries` adds.

    Raises:
        KeyError: On ``extend``, if an entry that is stored is missing.
        ValueError: If a rollout does not continue the one before, if the number of agents or of environments or the
            shape or type of an entry does not fit, if a number is not finite, or if a living agent's action is not
            legal; on ``sample``, if the sampler draws no slices.

    Examples:
        >>> import torch
        >>> from torchrl.data import LazyTensorStorage, RoundRobinWriter, TensorDictReplayBuffer
        >>> from matwm_rl.data import RecencySliceSampler
        >>> rb = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(2 * 100, ndim=3), dim_extend=0, batch_size=2 * 4 * 8,
        ...     sampler=RecencySliceSampler(8, num_shares=2), writer=RoundRobinWriter(), transform=FocalSlices(2),
        ... )
        >>> state = {"observation": torch.rand(50, 2, 3), "alive": torch.ones(50, 2, dtype=torch.bool)}
        >>> acting = {"action": torch.zeros(50, 2).long(), "action_mask": torch.ones(50, 2, 5, dtype=torch.bool)}
        >>> over = torch.zeros(50, 1, dtype=torch.bool)
        >>> following = {"agents": {**state, "reward": torch.zeros(50, 2, 1)}, "done": over, "terminated": over}
        >>> _ = rb.extend(TensorDict({"agents": {**state, **acting}, "next": following}, [50]))
        >>> rb.sample()["agents", "observation"].shape
        torch.Size([4, 8, 2, 3])
    """

    def __init__(self, num_agents: int, num_envs: int | None = None) -> None:
        super().__init__()
        check_ints(1, num_agents=num_agents)
        if num_envs is not None:
            check_ints(1, num_envs=num_envs)
        self.num_agents = num_agents
        self.num_envs = num_envs
        self.continuity = Continuity()
        self.whole_episodes = False

    def share_memory_(self) -> None:
        """Expect several processes to write, in any order: from now on rollouts must be whole episodes."""
        self.whole_episodes = True
        self.continuity.forget()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Turn a sample of rows, ``[B, T, N]``, into a focal batch ``[B, T]``.

        Raises:
            ValueError: If the sample is not ``[B, T, N]``.
        """
        if tensordict.ndim != 3 or tensordict.shape[-1] != self.num_agents:
            raise ValueError(
                f"got a sample of {tuple(tensordict.batch_size)}; expected [B, T, {self.num_agents}], as a slice "
                f"sampler of matwm_rl.data with num_shares={self.num_agents} draws it from a storage with ndim=3."
            )
        return _to_focal(tensordict)

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
                "several processes write to this replay, and the last step of this rollout does not end its episode: "
                "another process's steps would follow it. Have the workers write whole episodes, with the collector's "
                "trajs_per_batch=1, or give the collector no replay_buffer and store what it yields with Replay.extend."
            )
        check_rollout(plain, self.num_agents)
        read = [*REPLAY_KEYS, AGENT_TRUNCATED] if AGENT_TRUNCATED in present else REPLAY_KEYS
        rows = _to_rows(add_agent_entries(plain.select(*read).transpose(0, 1)).exclude(AGENT_TRUNCATED))
        # Checked last, because the check remembers the rollout: one that is refused above is not stored.
        self.continuity.check(plain)
        return rows
