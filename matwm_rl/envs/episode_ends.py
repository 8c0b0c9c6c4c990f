"""How lives and episodes end: the rules for PettingZoo, VMAS, SMACv2, MeltingPot and others, live and stored.

Legend: E batch size of the environment, N agents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.libs.meltingpot import MeltingpotWrapper
from torchrl.envs.libs.pettingzoo import PettingZooWrapper
from torchrl.envs.libs.smacv2 import SMACv2Wrapper
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


def read_acting(tensordict: TensorDictBase, group_map: dict[str, list[str]], alive: Tensor) -> Tensor:
    """Read which agents the environment says are acting, bool ``[*E, N]``; as ``alive`` in groups without ``"mask"``.

    Args:
        tensordict: what a step returned, batch size ``[*E]``.
        group_map: the groups.
        alive: bool ``[*E, N]``, who lived before the step.
    """
    lived = alive.split([len(names) for names in group_map.values()], -1)
    masks = [tensordict.get(group).get("mask", before) for group, before in zip(group_map, lived, strict=True)]
    return torch.cat(masks, dim=-1)


def imposed_limit(tensordict: TensorDictBase) -> Tensor:
    """Read whether the root says that a time limit, and no termination, ended the episode, bool ``[*E, 1]``."""
    done = tensordict.get("done")
    truncated, terminated = (tensordict.get(name, None) for name in ("truncated", "terminated"))
    if truncated is None:
        return torch.zeros_like(done)
    return done & truncated if terminated is None else done & truncated & ~terminated


def combine_agent_ends(
    terminated: Tensor,
    truncated: Tensor,
    done: Tensor,
    alive: Tensor,
    *,
    acting: Tensor | None = None,
    imposed: Tensor | None = None,
) -> Ends:
    """Derive the ends of an episode from those of its agents.

    The episode is truncated if some living agent met a time limit and did not die in the same step, or if a limit was
    imposed before all its agents had ended; else terminated.

    Args:
        terminated: bool ``[*E, N]``, as the environment reports it of each agent.
        truncated: bool ``[*E, N]``.
        done: bool ``[*E, 1]``, whether the episode is over.
        alive: bool ``[*E, N]``, who lived before the step.
        acting: bool ``[*E, N]``, who acts next, as the environment says. This is how agents join or return. By
            default those of the living that have not ended.
        imposed: bool ``[*E, 1]``, see :func:`imposed_limit`; by default never.

    Examples:
        >>> yes, no = torch.tensor([True]), torch.tensor([False])
        >>> ends = combine_agent_ends(terminated=no, truncated=yes, done=yes, alive=yes)
        >>> ends.alive, ends.terminated, ends.truncated
        (tensor([True]), tensor([False]), tensor([True]))
    """
    ended = terminated | truncated
    # PettingZooWrapper also reports agents that died earlier as truncated: only the living can meet a time limit.
    met_limit = truncated & ~terminated & alive
    episode_truncated = done & met_limit.any(-1, keepdim=True)
    if imposed is not None:
        episode_truncated = episode_truncated | (imposed & (alive & ~ended).any(-1, keepdim=True))
    died_at_the_end = terminated & episode_truncated
    # At its end the environment drops all agents. Agents that end with the episode keep their last observation, from
    # which a truncated episode bootstraps; an agent that died in the very step of a time limit is dead.
    remain = (alive if acting is None else acting) & ~ended
    return Ends(
        alive=torch.where(done, alive & ~died_at_the_end, remain),
        done=done,
        terminated=done & ~episode_truncated,
        truncated=episode_truncated,
        left=met_limit & ~done,
    )


def combine_root_ends(tensordict: TensorDictBase, alive: Tensor, acting: Tensor) -> Ends:
    """Read the ends of an episode off the root's ``"done"`` and, where they are there, its other two.

    Args:
        tensordict: what a step returned, batch size ``[*E]``.
        alive: bool ``[*E, N]``, who lived before the step.
        acting: bool ``[*E, N]``, who acts next, as the environment says.
    """
    done, truncated = tensordict.get("done"), imposed_limit(tensordict)
    # An environment may drop all agents at an episode's end; they do not die of that.
    dropped = done & ~acting.any(-1, keepdim=True)
    alive = torch.where(dropped, alive, acting)
    return Ends(alive=alive, done=done, terminated=done & ~truncated, truncated=truncated)


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
    acting, imposed = read_acting(tensordict, env.group_map, alive), imposed_limit(tensordict)
    return combine_agent_ends(terminated, truncated, tensordict.get("done"), alive, acting=acting, imposed=imposed)


def end_by_root(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Rule of environments that report ends at the root alone; agents live as the groups' masks say."""
    return combine_root_ends(tensordict, alive, read_masks(tensordict, env.group_map, alive.device))


def end_vmas(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Rule of VMAS, which reports its time limit as a termination: values would not bootstrap there."""
    done, vmas = tensordict.get("done"), simulator(env)
    truncated = imposed_limit(tensordict)  # of a transform around it
    if vmas.max_steps is not None and (reached := vmas.steps >= vmas.max_steps).any():
        truncated = truncated | (reached & ~vmas.scenario.done()).view_as(done)
    return Ends(alive=alive, done=done, terminated=done & ~truncated, truncated=truncated)


def end_smac(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Rule of SMACv2, whose dead units may do nothing but action 0, which no living unit may do.

    An episode that its limit of steps ended says so in the infos, if SMACv2 was made with ``continuing_episode=True``;
    otherwise SMACv2 means such an end to be a termination.
    """
    acting = ~tensordict.get(("agents", "action_mask"))[..., 0]
    limited = tensordict.get(("info", "episode_limit")).view_as(tensordict.get("done"))
    return count_as_truncated(combine_root_ends(tensordict, alive, acting), limited)


def end_meltingpot(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """Rule of MeltingPot, whose wrapper reports its ``max_steps`` as a termination: values would not bootstrap."""
    limited = env.max_steps is not None and env.num_cycles >= env.max_steps
    ends = combine_root_ends(tensordict, alive, alive)
    return count_as_truncated(ends, torch.full_like(ends.done, limited))


register_end_rule(PettingZooWrapper, end_by_agents)
register_end_rule(SMACv2Wrapper, end_smac)
register_end_rule(MeltingpotWrapper, end_meltingpot, agents_die=False)
register_end_rule(VmasWrapper, end_vmas, agents_die=False)
