"""How lives and episodes end: the rules for PettingZoo, VMAS and other environments, live and stored.

Legend: E batch size of the environment, N agents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.libs.pettingzoo import PettingZooWrapper
from torchrl.envs.libs.vmas import VmasWrapper

from matwm_rl.envs.registry import Ends, register_end_rule
from matwm_rl.torchrl_internals import simulator


def read_agents(tensordict: TensorDictBase, groups: Iterable[str], name: str) -> Tensor:
    """Read one entry of all groups, ``[*E, N, ...]``, agents in the order of their groups.

    Args:
        tensordict: batch size ``[*E]``; keys read: ``(group, name)``.
        groups: names of the groups.
        name: of the entry, such as ``"reward"``.
    """
    parts = [tensordict.get(group).get(name) for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=tensordict.ndim)


def read_masks(tensordict: TensorDictBase, group_map: dict[str, list[str]], device: torch.device) -> Tensor:
    """Read which agents the environment says are acting, bool ``[*E, N]``; True in groups that have no ``"mask"``."""
    masks = []
    for group, names in group_map.items():
        mask = tensordict.get(group).get("mask", None)
        if mask is None:
            mask = torch.ones((*tensordict.batch_size, len(names)), dtype=torch.bool, device=device)
        masks.append(mask)
    return torch.cat(masks, dim=-1)


def combine_agent_ends(terminated: Tensor, truncated: Tensor, done: Tensor, alive: Tensor) -> Ends:
    """Derive the ends of an episode from those of its agents.

    The episode is truncated if some living agent met a time limit and did not die in the same step, else terminated.

    Args:
        terminated: bool ``[*E, N]``, as the environment reports it of each agent.
        truncated: bool ``[*E, N]``.
        done: bool ``[*E, 1]``, whether the episode is over.
        alive: bool ``[*E, N]``, who lived before the step.

    Examples:
        >>> yes, no = torch.tensor([True]), torch.tensor([False])
        >>> combine_agent_ends(terminated=no, truncated=yes, done=yes, alive=yes)
        Ends(alive=tensor([True]), done=tensor([True]), terminated=tensor([False]), truncated=tensor([True]))
    """
    # PettingZooWrapper also reports agents that died earlier as truncated: only the living can meet a time limit.
    episode_truncated = done & (truncated & ~terminated & alive).any(-1, keepdim=True)
    died_at_the_end = terminated & episode_truncated
    left_before = terminated | truncated
    # At its end the environment drops all agents. Agents that end with the episode keep their last observation, from
    # which a truncated episode bootstraps; an agent that died in the very step of a time limit is dead.
    alive = alive & ~torch.where(done, died_at_the_end, left_before)
    return Ends(alive=alive, done=done, terminated=done & ~episode_truncated, truncated=episode_truncated)


def combine_root_ends(tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Read the ends of an episode off the root's ``"done"`` and, where it is there, ``"truncated"``."""
    done, truncated = tensordict.get("done"), tensordict.get("truncated", None)
    truncated = torch.zeros_like(done) if truncated is None else truncated
    return Ends(alive=alive, done=done, terminated=done & ~truncated, truncated=done & truncated)


def count_as_truncated(ends: Ends, limited: Tensor) -> Ends:
    """Turn the terminations ``limited``, bool ``[*E, 1]``, into truncations."""
    limited = ends.terminated & limited
    return replace(ends, terminated=ends.terminated & ~limited, truncated=ends.truncated | limited)


# ---------------------------------------------------------------------- rules


def end_by_agents(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Rule of environments in which every group has its own ``"terminated"`` and ``"truncated"``, as PettingZoo's."""
    terminated, truncated = (
        read_agents(tensordict, env.group_map, name).squeeze(-1) for name in ("terminated", "truncated")
    )
    return combine_agent_ends(terminated, truncated, tensordict.get("done"), alive)


def end_by_root(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Rule of environments that report ends at the root alone; agents live as the groups' masks say."""
    return combine_root_ends(tensordict, read_masks(tensordict, env.group_map, alive.device))


def end_vmas(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Rule of VMAS, which reports its time limit as a termination: values would not bootstrap there."""
    done, vmas = tensordict.get("done"), simulator(env)
    truncated = torch.zeros_like(done)
    if vmas.max_steps is not None and (reached := vmas.steps >= vmas.max_steps).any():
        truncated = (reached & ~vmas.scenario.done()).view_as(done)
    return Ends(alive=alive, done=done, terminated=done & ~truncated, truncated=truncated)


register_end_rule(PettingZooWrapper, end_by_agents)
register_end_rule(VmasWrapper, end_vmas, agents_die=False)
