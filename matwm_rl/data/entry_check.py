"""Checks of a rollout before it is stored in replay: shapes, types and values of all entries.

They read the values once, when the rollout is stored, and never in an update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from matwm_rl.box_actions import TOLERANCE
from matwm_rl.checks import read_entry
from matwm_rl.finite import first_non_finite, is_finite
from matwm_rl.keys import (
    ACTION,
    ACTION_MASK,
    AGENTS,
    ALIVE,
    DONE,
    NEXT_ALIVE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
)

_READER = "replay"


def check_rollout(td: TensorDictBase, num_agents: int) -> None:
    """Check all entries that replay stores.

    Args:
        td: plain rollout ``[E, T]`` with all of :data:`~matwm_rl.data.REPLAY_KEYS`.
        num_agents: N.

    Raises:
        TypeError: if flags are not bool, or rewards no floating-point numbers.
        ValueError: if an entry has another shape or type than plain data has, holds a NaN or an infinity, or if the
            action of a living agent is not among its legal ones, or a continuous one is not within its bounds; names
            entry, agent, environment and step.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> td = make_env("mock", seed=0).rollout(4).unsqueeze(0)
        >>> check_rollout(td, 3)
        >>> td["agents", "action"][0, 2, 1] = 99
        >>> check_rollout(td, 3)
        Traceback (most recent call last):
        ValueError: replay got the action 99 of agent 1 in step 2 of environment 0 of the batch; expected 0 to 3...
    """
    _check_shapes(td, num_agents)
    _check_types(td)
    for key in (OBSERVATION, NEXT_OBSERVATION, REWARD):
        value = td.get(key)
        if not is_finite(value):
            index, number = first_non_finite(value)
            raise ValueError(
                f"replay got {number} in {key!r} {_place(index)}. Nothing can be learned from it: correct what "
                "collected it, or leave such steps out"
            )
    _check_actions(td)
    if (early := td.get(TERMINATED) & ~td.get(DONE)).any():
        raise ValueError(
            f"replay got {TERMINATED!r} without {DONE!r} {_place(_first(early)[:2])}; a terminated step is done"
        )


def check_like_stored(td: TensorDictBase, stored: TensorDictBase, keys: Sequence[NestedKey]) -> None:
    """Check that entries have the sizes and types of those that are stored already.

    Args:
        td: plain rollout ``[*batch]``.
        stored: one stored step, rows ``[E, N]``.
        keys: of the entries; those that are missing are left to another check.

    Raises:
        ValueError: if one has another size or type.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"agents": {"observation": torch.zeros(9, 3, 5)}}, [9])
        >>> row = TensorDict({"observation": torch.zeros(1, 3, 4)}, [1, 3])
        >>> check_like_stored(td, row, [("agents", "observation")])
        Traceback (most recent call last):
        ValueError: replay holds ('agents', 'observation') of [4] torch.float32 per agent, got [5] torch.float32...
    """
    for key in keys:
        value = td.get(key, None)
        if value is None:
            continue
        path = [name for name in key if name != AGENTS]
        before = stored.get(path[0] if len(path) == 1 else tuple(path))
        size = list(value.shape[td.ndim + (AGENTS in key) :])
        expected = list(before.shape[stored.ndim :])
        if (size, value.dtype) != (expected, before.dtype):
            raise ValueError(
                f"replay holds {key!r} of {expected} {before.dtype} per agent, got {size} {value.dtype}. What is "
                "stored in one replay must be of one layout: make another replay for this, or convert it"
            )


def _check_shapes(td: TensorDictBase, num_agents: int) -> None:
    note = "actions are one index for each agent, or a vector of floating-point numbers"
    action = read_entry(td, ACTION, _READER)
    is_vector = action.is_floating_point() and action.ndim > td.ndim + 1
    read_entry(td, ACTION, _READER, (*td.batch_size, *[None] * (1 + is_vector)), note)
    agents = action.shape[: td.ndim + 1]
    if agents[-1] != num_agents:
        raise ValueError(f"got actions of {agents[-1]} agents; this buffer was built for {num_agents}.")
    observation = read_entry(td, OBSERVATION, _READER)
    read_entry(td, OBSERVATION, _READER, (*agents, *observation.shape[len(agents) :]))
    read_entry(td, NEXT_OBSERVATION, _READER, observation.shape, "as the observation before the step")
    read_entry(td, ACTION_MASK, _READER, (*agents, None))
    read_entry(td, REWARD, _READER, (*agents, 1))
    for key in (ALIVE, NEXT_ALIVE):
        read_entry(td, key, _READER, agents)
    for key in (DONE, TERMINATED):
        read_entry(td, key, _READER, (*td.batch_size, 1))


def _check_types(td: TensorDictBase) -> None:
    action = td.get(ACTION)
    expected = torch.int64 if action.ndim == td.ndim + 1 else torch.float32
    kind = "indices of torch.int64 (of one-hot actions: argmax(-1)), or vectors of torch.float32"
    _check_type(td, ACTION, action.dtype == expected, kind)
    observation = td.get(OBSERVATION)
    known = observation.is_floating_point() or observation.dtype == torch.uint8
    _check_type(td, OBSERVATION, known, "floating-point numbers, or images of torch.uint8")
    same = td.get(NEXT_OBSERVATION).dtype == observation.dtype
    _check_type(td, NEXT_OBSERVATION, same, f"{observation.dtype}, as the observation before the step")


def _check_type(td: TensorDictBase, key: NestedKey, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ValueError(f"replay got {key!r} of {td.get(key).dtype}; expected {expected}")


def _check_actions(td: TensorDictBase) -> None:
    action, mask, alive = td.get(ACTION), td.get(ACTION_MASK), td.get(ALIVE)
    count = mask.shape[-1]
    if action.is_floating_point():
        _check_vectors(action, mask, alive)
        return
    if (outside := (action < 0) | (action >= count)).any():
        index = _first(outside)
        raise ValueError(
            f"replay got the action {int(action[tuple(index)])} {_place(index)}; expected 0 to {count - 1}, as "
            f"{ACTION_MASK!r} has {count} entries"
        )
    taken = mask.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    if (illegal := alive & ~taken).any():
        index = _first(illegal)
        legal = mask[tuple(index)].nonzero().squeeze(-1).tolist()
        raise ValueError(
            f"replay got the action {int(action[tuple(index)])} {_place(index)}, "
            + (
                f"of which {ACTION_MASK!r} allows {legal}; correct the mask, or let the policy obey it"
                if legal
                else f"which {ACTION_MASK!r} allows no action, though it is alive; allow it at least one"
            )
        )


def _check_vectors(action: Tensor, mask: Tensor, alive: Tensor) -> None:
    """Check continuous actions ``[*batch, N, A]`` of living agents."""
    if action.shape != mask.shape:
        raise ValueError(
            f"replay got actions of {action.shape[-1]} numbers, of which {ACTION_MASK!r} has {mask.shape[-1]} entries"
        )
    inside = action.abs() <= mask * (1 + TOLERANCE)  # of NaN this is false
    if (wrong := alive & ~inside.all(-1)).any():
        index = _first(wrong)
        raise ValueError(
            f"replay got the action {action[tuple(index)].tolist()} {_place(index)}; expected numbers from -1 to 1, "
            f"which stand for the bounds of the environment's actions, and 0 where {ACTION_MASK!r} is false, "
            f"{mask[tuple(index)].tolist()}"
        )


def _first(flags: Tensor) -> list[int]:
    index: list[int] = flags.nonzero()[0].tolist()
    return index


def _place(index: Sequence[int]) -> str:
    env, step, *agent = index
    return f"{f'of agent {agent[0]} ' if agent else ''}in step {step} of environment {env} of the batch"
