"""Reading whole sequences: into the agent-major layout, and with the successor of every observation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.checks import check_shape, read_entry
from matwm_rl.functional import agents_first

MISSING_ENTRIES = "rollouts get their per-agent entries from matwm_rl.data.add_agent_entries"
"""End of the message about a missing entry which environments do not write."""


def read_sequences(
    tensordict: TensorDictBase, key: NestedKey, reader: object, shape: Sequence[int], event: Sequence[int], agents: int
) -> Tensor:
    """Read an entry ``[*B, T, N, *event]`` as ``[N, B, T, *event]``: the one turn from TorchRL's layout.

    Args:
        tensordict: the batch.
        key: of the entry.
        reader: the module that reads it, for the message.
        shape: ``[*B, T]``.
        event: sizes of the dimensions behind the agents'.
        agents: N.

    Raises:
        KeyError: if there is no such entry.
        ValueError: if it has another shape, or ``shape`` is that of a single step.

    Examples:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"reward": torch.zeros(2, 5, 3, 1)}, [2, 5])
        >>> read_sequences(batch, "reward", "SomeModel", [2, 5], [1], agents=3).shape
        torch.Size([3, 2, 5, 1])
    """
    if not shape:
        raise ValueError(f"{type(reader).__name__} reads sequences of batch size [*B, T], got {key!r} of a single step")
    entry = read_entry(tensordict, key, reader, (*shape, agents, *event), MISSING_ENTRIES)
    value = agents_first(entry, len(event))
    return value.reshape(agents, -1, shape[-1], *event)


def sequence_batch(tensordict: TensorDictBase, reader: object, action_dims: int) -> torch.Size:
    """Batch size ``[*B, T]`` of sequences, read off entries: a tensordict made from keyword arguments has none.

    Args:
        tensordict: the batch.
        reader: the module that reads it, for the message.
        action_dims: dimensions of one agent's action.

    Raises:
        KeyError: if there are no ends, or no actions.
        ValueError: if ends and actions are not of one batch.

    Examples:
        >>> from tensordict import TensorDict
        >>> agents = {"action": torch.zeros(2, 5, 3), "done": torch.zeros(2, 5, 3, 1).bool()}
        >>> sequence_batch(TensorDict({"agents": agents, "next": {"agents": agents}}, [2]), "SomeModel", 0)
        torch.Size([2, 5])
    """
    action = read_entry(tensordict, keys.ACTION, reader, note=MISSING_ENTRIES)
    ends = read_entry(tensordict, keys.AGENT_DONE, reader, note=MISSING_ENTRIES)
    batch = action.shape[: action.ndim - 1 - action_dims]
    what = f"{type(reader).__name__} reads, beside {keys.ACTION!r} of shape {list(action.shape)}, {keys.AGENT_DONE!r}"
    check_shape(ends, what, (*batch, None, 1))
    return batch


def in_type_of(module: nn.Module, observation: Tensor) -> Tensor:
    """Cast vector observations to the type of a module's weights, such as float64; images stay bytes.

    Args:
        module: that reads them.
        observation: of any shape.

    Examples:
        >>> in_type_of(nn.Linear(2, 2).double(), torch.zeros(2)).dtype
        torch.float64
    """
    if not observation.is_floating_point():
        return observation
    return observation.to(next(module.parameters(), observation).dtype)


def encode_with_successors(
    encode: Callable[[Tensor], Tensor],
    observation: Tensor,
    following: Tensor,
    done: Tensor,
    max_boundaries: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode o_t and o_{t+1} of every step of ``[N, B, T]``.

    Inside an episode the successor stands in the slice. At the slice's end and at an episode's end, where it is the
    true final observation, it is encoded apart, in the same call: for every agent as many as the agent with most has.

    Args:
        encode: turns observations ``[N, *batch, *O]`` into features ``[N, *batch, F]``.
        observation: o_t, ``[N, B, T, *O]``.
        following: o_{t+1}, ``[N, B, T, *O]``.
        done: bool ``[N, B, T]``, true where an episode ends after the step.
        max_boundaries: how many successors to encode apart, per agent; ``None`` counts them.

    Returns:
        features of o_t and of o_{t+1}, each ``[N, B, T, F]``.

    Examples:
        >>> observation, following = (torch.tensor(o).view(1, 1, 3, 1) for o in ([0.0, 1.0, 2.0], [1.0, 11.0, 12.0]))
        >>> done = torch.tensor([[[False, True, False]]])
        >>> features, successors = encode_with_successors(nn.Identity(), observation, following, done)
        >>> features.flatten().tolist(), successors.flatten().tolist()
        ([0.0, 1.0, 2.0], [1.0, 11.0, 12.0])
    """
    num_agents, sequences, time = done.shape
    boundary = done.clone()
    boundary[..., -1] = True
    boundary = boundary.flatten(1)
    count = max_boundaries or _count(boundary)
    where = boundary.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    agent = torch.arange(num_agents, device=where.device).unsqueeze(-1)
    flat = torch.cat([observation.flatten(1, 2), following.flatten(1, 2)[agent, where]], 1)
    features, apart = encode(flat).split([flat.shape[1] - where.shape[1], where.shape[1]], 1)
    # For agents with fewer boundaries, `where` also names inner steps. Their successors get the same value as before.
    successors = torch.roll(features, -1, 1).index_put((agent, where), apart)
    shape = (num_agents, sequences, time, -1)
    return features.view(shape), successors.view(shape)


def _count(boundary: Tensor) -> int:
    """Count the successors to encode apart, ``boundary [N, B * T]``; rounded up, since few shapes are faster."""
    if torch.compiler.is_compiling():
        # A shape that depends on data would break the graph.
        return boundary.shape[1]
    most = int(boundary.sum(1).max())
    return min(-(-most // 8) * 8, boundary.shape[1])
