"""Scripted agents, which show how well simple rules that know the task play the environments of the comparison.

No script of its own: protocol.py names them. Those of simple_tag are ``matwm_rl.evaluation.TagScript``.
"""

from __future__ import annotations

from itertools import permutations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.nn.functional import one_hot

from matwm_rl import keys
from matwm_rl.envs import AgentLayout

LANDMARKS = 3
STEPS = torch.tensor([[1, 2], [3, 4]])
"""mpe2's discrete action for a step along an axis (0 = x, 1 = y) in the negative or positive direction."""
NEAR = 0.05
"""Distance below which an agent stays."""
GLIDE = 0.2
"""Steps of velocity by which an agent looks ahead; without it agents overshoot, with -13 on simple_spread."""


class _Script(TensorDictModuleBase):
    """Reads ``("agents", "observation")``, writes ``("agents", "action")``.

    Continuous actions of mpe2 have a number for each discrete action: 1 for the chosen one, and -1, which has no
    effect, for the others.
    """

    def __init__(self, layout: AgentLayout, expected: dict[str, int]) -> None:
        super().__init__()
        groups = {name: len(agents) for name, agents in layout.group_map.items()}
        if groups != expected or layout.num_actions != 5:
            raise ValueError(f"{type(self).__name__} plays mpe2 with the groups {expected}, got {groups}")
        self.continuous, self.legal = not layout.actions.has_probs, layout.actions.legal()
        self.in_keys: list[NestedKey] = [keys.OBSERVATION]
        self.out_keys: list[NestedKey] = [keys.ACTION]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actions."""
        action = self.act(tensordict.get(keys.OBSERVATION))
        if self.continuous:
            action = (2.0 * one_hot(action, self.legal.shape[-1]) - 1.0) * self.legal
        return tensordict.set(keys.ACTION, action)

    def act(self, observation: Tensor) -> Tensor:
        """Return discrete actions ``[*batch, N]`` for observations ``[*batch, N, D]``."""
        raise NotImplementedError


class SpreadScript(_Script):
    """simple_spread: each agent goes to its landmark in the assignment with the least total distance."""

    def __init__(self, layout: AgentLayout) -> None:
        super().__init__(layout, {"agent": LANDMARKS})

    def act(self, observation: Tensor) -> Tensor:
        """Return the actions; observations begin with velocity, position and landmarks, 2 numbers each."""
        to_landmark = observation[..., 4 : 4 + 2 * LANDMARKS].unflatten(-1, (LANDMARKS, 2))
        distance = to_landmark.norm(dim=-1)
        assignments = torch.tensor(list(permutations(range(LANDMARKS))))
        agents = torch.arange(LANDMARKS)
        total = torch.stack([distance[..., agents, assigned].sum(-1) for assigned in assignments], -1)
        own = assignments[total.argmin(-1)]
        offset = to_landmark.gather(-2, own[..., None, None].expand(*own.shape, 1, 2)).squeeze(-2)
        return step_towards(offset, observation[..., :2])


class ListenerScript(_Script):
    """simple_speaker_listener: the listener goes to the goal, which it reads from the speaker's observation."""

    def __init__(self, layout: AgentLayout) -> None:
        super().__init__(layout, {"speaker": 1, "listener": 1})

    def act(self, observation: Tensor) -> Tensor:
        """Return the actions; the speaker sees the goal's colour, the listener its velocity and the landmarks."""
        goal = observation[..., 0, :LANDMARKS].argmax(-1)
        to_landmark = observation[..., 1, 2 : 2 + 2 * LANDMARKS].unflatten(-1, (LANDMARKS, 2))
        offset = to_landmark.gather(-2, goal[..., None, None].expand(*goal.shape, 1, 2)).squeeze(-2)
        return torch.stack([goal, step_towards(offset, observation[..., 1, :2])], -1)


def step_towards(offset: Tensor, velocity: Tensor) -> Tensor:
    """Return the action along the larger axis of the remaining way ``[..., 2]``, or 0 (stay) close to the goal."""
    left = offset - GLIDE * velocity
    axis = left.abs().argmax(-1, keepdim=True)
    along = left.gather(-1, axis)
    return torch.where(along.abs() < NEAR, 0, STEPS[axis, (along > 0).long()]).squeeze(-1)
