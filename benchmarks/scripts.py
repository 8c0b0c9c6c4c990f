"""Scripted agents: how well the environments of the comparison can be played by simple rules that know the task.

No script of its own: protocol.py names them. simple_tag's stand in ``matwm_rl.training.TagScript``.
"""

from __future__ import annotations

from itertools import permutations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from matwm_rl import keys
from matwm_rl.envs import AgentLayout

LANDMARKS = 3
STEPS = torch.tensor([[1, 2], [3, 4]])
"""mpe2's action that steps along an axis (0 = x, 1 = y) in the negative or positive direction."""
NEAR = 0.05
"""Closer than this, an agent stays."""
GLIDE = 0.2
"""Where an agent counts as being: this times its velocity ahead. Without it, it overshoots: -13 on simple_spread."""


class _Script(TensorDictModuleBase):
    """Reads ``("agents", "observation")``, writes ``("agents", "action")``."""

    def __init__(self, layout: AgentLayout, expected: dict[str, int]) -> None:
        super().__init__()
        groups = {name: len(agents) for name, agents in layout.group_map.items()}
        if groups != expected or layout.num_actions != 5:
            raise ValueError(f"{type(self).__name__} plays mpe2 with the groups {expected}, got {groups}")
        self.in_keys: list[NestedKey] = [keys.OBSERVATION]
        self.out_keys: list[NestedKey] = [keys.ACTION]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actions."""
        return tensordict.set(keys.ACTION, self.act(tensordict.get(keys.OBSERVATION)))

    def act(self, observation: Tensor) -> Tensor:
        """Actions ``[*batch, N]`` for observations ``[*batch, N, D]``."""
        raise NotImplementedError


class SpreadScript(_Script):
    """simple_spread: the assignment of agents to landmarks with the least way to go in all; each goes to its own."""

    def __init__(self, layout: AgentLayout) -> None:
        super().__init__(layout, {"agent": LANDMARKS})

    def act(self, observation: Tensor) -> Tensor:
        """See the class; observations begin with velocity, position and landmarks, 2 numbers each."""
        to_landmark = observation[..., 4 : 4 + 2 * LANDMARKS].unflatten(-1, (LANDMARKS, 2))
        distance = to_landmark.norm(dim=-1)
        assignments = torch.tensor(list(permutations(range(LANDMARKS))))
        agents = torch.arange(LANDMARKS)
        total = torch.stack([distance[..., agents, assigned].sum(-1) for assigned in assignments], -1)
        own = assignments[total.argmin(-1)]
        offset = to_landmark.gather(-2, own[..., None, None].expand(*own.shape, 1, 2)).squeeze(-2)
        return step_towards(offset, observation[..., :2])


class ListenerScript(_Script):
    """simple_speaker_listener: the listener is told the goal by reading the speaker's observation."""

    def __init__(self, layout: AgentLayout) -> None:
        super().__init__(layout, {"speaker": 1, "listener": 1})

    def act(self, observation: Tensor) -> Tensor:
        """See the class; the speaker sees the goal's colour, the listener velocity and landmarks."""
        goal = observation[..., 0, :LANDMARKS].argmax(-1)
        to_landmark = observation[..., 1, 2 : 2 + 2 * LANDMARKS].unflatten(-1, (LANDMARKS, 2))
        offset = to_landmark.gather(-2, goal[..., None, None].expand(*goal.shape, 1, 2)).squeeze(-2)
        return torch.stack([goal, step_towards(offset, observation[..., 1, :2])], -1)


def step_towards(offset: Tensor, velocity: Tensor) -> Tensor:
    """The action that steps along the larger axis of what is left to go, both ``[..., 2]``; 0, to stay, where near."""
    left = offset - GLIDE * velocity
    axis = left.abs().argmax(-1, keepdim=True)
    along = left.gather(-1, axis)
    return torch.where(along.abs() < NEAR, 0, STEPS[axis, (along > 0).long()]).squeeze(-1)
