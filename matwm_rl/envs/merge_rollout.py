"""Merging the agent groups of stored data into one dense group."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from matwm_rl.checks import read_entry
from matwm_rl.envs.entries import observation_keys
from matwm_rl.envs.episode_ends import (
    combine_agent_ends,
    combine_root_ends,
    count_as_truncated,
    imposed_limit,
    read_acting,
)
from matwm_rl.envs.groups import DenseReader, Group, groups_of_rollout
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.keys import AGENTS


def merge_rollout(rollout: TensorDictBase, layout: AgentLayout, *, max_steps: int | None = None) -> TensorDict:
    """Merge the groups of stored data, as :class:`~matwm_rl.envs.MultiAgentEnv` does those of a live environment.

    So a replay buffer that was filled from a grouped environment, such as :class:`~torchrl.envs.PettingZooWrapper` or
    :class:`~torchrl.envs.VmasEnv`, can be given to :meth:`matwm_rl.data.Replay.extend` and
    :func:`matwm_rl.training.episode_windows`. No environment is needed.

    Args:
        rollout: ``[T]`` or ``[E, T]``, steps in order of time, with the keys that collectors give: ``(group,
            "observation" | "action")``, the same observation and ``(group, "reward")`` under ``"next"``, and
            ``("next", "done")``. ``(group, "action_mask" | "mask" | "terminated" | "truncated")`` and
            ``("next", "truncated")`` are read where they are present.
        layout: who the agents are; see :meth:`AgentLayout.from_rollout` where there is no environment.
        max_steps: a time limit that the environment reports as a termination, as VMAS does: episodes of so many steps
            count as truncated. The first stored step is taken for the first of its episode.

    Returns:
        ``[T]`` or ``[E, T]``, plain: the ``("agents", ...)`` group at the root and under ``"next"``, and
        ``("next", "done" | "terminated" | "truncated")``.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if one has another shape than the layout says.

    Examples:
        >>> from matwm_rl.envs import MockEnv
        >>> stored = MockEnv().rollout(20, break_when_any_done=False)
        >>> merged = merge_rollout(stored, AgentLayout.from_rollout(stored))
        >>> merged["agents", "observation"].shape, merged["next", "agents", "reward"].shape
        (torch.Size([20, 3, 5]), torch.Size([20, 3, 1]))
    """
    _check_rollout(rollout, layout)
    groups = groups_of_rollout(rollout, layout)
    half_stored = [(group.name, "mask") for group in groups if not group.has_mask]
    rollout = rollout.exclude(*half_stored, *(("next", *key) for key in half_stored))
    following = rollout.get("next")
    agents_end = all(group.has_ends for group in groups)
    agents_die = agents_end or any(group.has_mask for group in groups)
    reader = DenseReader(layout, groups, agents_die=agents_die)
    done = following.get("done")
    alive = reader.mask(rollout, done.device)
    if agents_end:
        alive = alive & ~(reader.flag(rollout, "terminated") | reader.flag(rollout, "truncated"))
        terminated, truncated = (reader.flag(following, name) for name in ("terminated", "truncated"))
        acting, imposed = read_acting(following, layout.group_map, alive), imposed_limit(following)
        ends = combine_agent_ends(terminated, truncated, done, alive, acting=acting, imposed=imposed)
    else:
        ends = combine_root_ends(following, alive, reader.mask(following, done.device))
    if max_steps is not None:
        ends = count_as_truncated(ends, _steps_so_far(ends.done) >= max_steps)
    left = torch.zeros_like(ends.alive) if ends.left is None else ends.left
    now = reader.agents(rollout, alive, reader.legal_actions(rollout, alive), alive | _before(left))
    now.set("action", _stored_actions(rollout, layout, groups, alive))
    after = reader.agents(following, ends.alive, reader.legal_actions(following, ends.alive), ends.alive | left)
    after.set("reward", reader.reward(following))
    if agents_die:
        after.set("truncated", left.unsqueeze(-1))
    root = {"done": ends.done, "terminated": ends.terminated, "truncated": ends.truncated}
    return TensorDict(
        {AGENTS: now, "next": TensorDict({AGENTS: after, **root}, rollout.shape)}, rollout.shape, rollout.device
    )


def _check_rollout(rollout: TensorDictBase, layout: AgentLayout) -> None:
    if rollout.ndim not in (1, 2):
        raise ValueError(f"got data of batch {list(rollout.shape)}; expected [T] or [E, T].")
    reader = "merge_rollout"
    read_entry(rollout, ("next", "done"), reader, (*rollout.shape, 1))
    for group, names in layout.group_map.items():
        shape = (*rollout.shape, len(names))
        read_entry(rollout, (group, "observation"), reader)
        for key in observation_keys(rollout.keys(True, True), group):
            observation = read_entry(rollout, key, reader)
            read_entry(rollout, key, reader, (*shape, *observation.shape[len(shape) :]))
            read_entry(rollout, ("next", *key), reader, observation.shape)
        if rollout.get(("next", "reward"), None) is None:
            read_entry(rollout, ("next", group, "reward"), reader)
        action = read_entry(rollout, (group, "action"), reader)
        read_entry(rollout, (group, "action"), reader, (*shape, *[None] * (action.ndim > len(shape))))


def _stored_actions(rollout: TensorDictBase, layout: AgentLayout, groups: list[Group], alive: Tensor) -> Tensor:
    parts = [group.actions.to_dense(rollout.get((group.name, "action"))) for group in groups]
    if layout.actions.action_shape:
        parts = [pad(part, (0, layout.num_actions - part.shape[-1])) for part in parts]
    action = torch.cat(parts, rollout.ndim)
    if layout.actions.action_shape:
        action = torch.where(alive.unsqueeze(-1), action, 0.0)  # what is stored of the dead may be anything
    problem = layout.actions.problem(action)
    if problem is not None and layout.actions.action_shape:
        raise ValueError(f"stored actions, scaled to the bounds of {layout.actions}: {problem}; correct the layout.")
    if problem is not None:
        found = action.flatten(0, -2).amax(0).tolist()
        raise ValueError(
            f"stored actions go up to {found}, where agents {layout.agent_names} have {layout.action_counts} actions; "
            "correct the layout."
        )
    return action


def _before(flag: Tensor) -> Tensor:
    """Return what a flag ``[*B, T, N]`` was one step before; False at first."""
    before = flag.roll(1, -2)
    before[..., 0, :] = False
    return before


def _steps_so_far(done: Tensor) -> Tensor:
    """Count the steps of the episode up to each stored one, this one included, ``[*B, T, 1]``."""
    step = torch.arange(1, done.shape[-2] + 1, device=done.device).view(-1, 1).expand(done.shape)
    before = torch.where(done, step, 0).cummax(-2).values.roll(1, -2)
    before[..., 0, :] = 0
    return step - before
