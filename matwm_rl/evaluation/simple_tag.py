"""simple_tag of mpe2 and VMAS: scripted opponents, cross-play, pictures without a renderer, reference returns.

Importing this module registers them, see :func:`~matwm_rl.evaluation.register_evaluation`.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from matwm_rl import keys
from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints, check_numbers
from matwm_rl.checks import read_entry
from matwm_rl.envs import AgentLayout
from matwm_rl.evaluation.gif import Frame
from matwm_rl.evaluation.mpe import Disc, draw_discs, first_observation, known_sizes
from matwm_rl.evaluation.opponents import CrossPlay, RandomActions
from matwm_rl.evaluation.registry import Evaluation, register_evaluation, self_play
from matwm_rl.evaluation.returns import EvaluationConfig, Matches, evaluate

ARENA = 0.9
"""Half width of simple_tag's arena: beyond it, mpe2 punishes the evader."""
REFERENCES = {
    "adversaries_vs_random_prey": {"random": 4.1, "scripted": 48.9, "model-free, 25k": 12.0},
    "adversaries_vs_fleeing_prey": {"random": 0.5, "scripted": 15.3, "model-free, 25k": 4.6},
    "prey_vs_chasing_adversaries": {"random": 47.8, "scripted": 14.3, "model-free, 25k": 29.2},
}
"""Mean returns of mpe2's pursuers: random and scripted policies, and the best model-free one after 25,000 steps.

They are those of benchmarks/results/sample_efficiency; in the last match, lower is better.
"""
VMAS_REFERENCES = {
    "adversaries_vs_random_prey": {"random": 9.3, "scripted": 907.2, "model-free, 25k": 71.5},
    "adversaries_vs_fleeing_prey": {"random": 0.5, "scripted": 212.2, "model-free, 25k": 12.8},
    "prey_vs_chasing_adversaries": {"random": 896.6, "scripted": 225.4, "model-free, 25k": 602.8},
}
"""The same of VMAS's pursuers."""


class TagScript(TensorDictModuleBase):
    """Scripted policy for simple_tag (mpe2 and VMAS): pursuers chase, the evader flees.

    Each agent moves along one axis. A pursuer takes the axis on which the evader is further away, and moves towards it.
    The evader takes the axis on which the nearest pursuer is further away, and moves away from it; outside the arena (a
    coordinate beyond 0.9, where mpe2's penalty begins) it moves back towards the centre.

    An observation is ``[velocity 2, position 2, obstacles 2 each, other agents 2 each, ...]``; obstacles and agents are
    relative to the observer. The actions of mpe2 are 0 stay, 1 left, 2 right, 3 down, 4 up. VMAS has nine,
    ``3 x + y``, where x and y are 0 for stay, 1 for the negative and 2 for the positive direction. Continuous actions
    are five numbers in mpe2, with the force in each of these directions, and two in VMAS, the forces along x and y.

    Args:
        layout: layout of a simple_tag environment with one evader.

    Keys read: ``("agents", "observation")``; written: ``("agents", "action")``.

    Raises:
        ValueError: if the layout is not that of simple_tag with one evader.
        KeyError: if there is no observation.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> env.rollout(3, TagScript(env.layout))["agents", "action"].shape
        torch.Size([3, 4])
    """

    steps: Tensor

    def __init__(self, layout: AgentLayout) -> None:
        super().__init__()
        groups = {name: len(agents) for name, agents in layout.group_map.items()}
        if list(groups) != ["adversary", "agent"] or groups["agent"] != 1:
            raise ValueError(f"TagScript plays simple_tag with one evader, got the groups {groups}")
        self.num_pursuers = groups["adversary"]
        steps = _steps(layout.actions)
        if steps is None:
            raise ValueError(
                "TagScript knows 5 (mpe2) or 9 (VMAS) discrete actions, or continuous ones of 5 or 2 numbers, got "
                f"{layout.actions}"
            )
        self.register_buffer("steps", steps, persistent=False)
        # The evader's observation ends with the pursuers' positions; what precedes them is the same for all agents.
        self.others_start = layout.observation_sizes[-1] - 2 * self.num_pursuers
        self.in_keys: list[NestedKey] = [keys.OBSERVATION]
        self.out_keys: list[NestedKey] = [keys.ACTION]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actions of chasing pursuers and a fleeing evader."""
        observation = read_entry(tensordict, keys.OBSERVATION, self)
        end = self.others_start + 2 * self.num_pursuers
        others = observation[..., self.others_start : end].unflatten(-1, (self.num_pursuers, 2))
        # The evader is the last of the agents that a pursuer sees. The evader sees pursuers only.
        chase = self._step_along(others[..., :-1, -1, :])
        from_evader = others[..., -1, :, :]
        nearest = from_evader.norm(dim=-1).argmin(-1, keepdim=True).unsqueeze(-1)
        away = -from_evader.gather(-2, nearest.expand(*nearest.shape[:-1], 2)).squeeze(-2)
        position = observation[..., -1, 2:4]
        outside = position.abs().amax(-1, keepdim=True) > ARENA
        flee = self._step_along(torch.where(outside, -position, away))
        agents = observation.ndim - 2
        return tensordict.set(keys.ACTION, torch.cat([chase, flee.unsqueeze(agents)], agents))

    def _step_along(self, direction: Tensor) -> Tensor:
        """Return the action that moves along the larger axis of ``direction [..., 2]``."""
        axis = direction.abs().argmax(-1, keepdim=True)
        positive = direction.gather(-1, axis) > 0
        return self.steps[axis.squeeze(-1), positive.long().squeeze(-1)]


def _steps(actions: ActionSpace) -> Tensor | None:
    """Return the action of every step, by axis (0 = x, 1 = y) and direction (0 = negative, 1 = positive), if known."""
    if actions.has_probs:
        steps = {5: [[1, 2], [3, 4]], 9: [[3, 6], [1, 2]]}.get(actions.num_actions)
        return None if steps is None else torch.tensor(steps)
    if actions.num_actions == 5:
        return 2 * torch.eye(5)[torch.tensor([[1, 2], [3, 4]])] - 1  # -1 stands for no force
    return torch.stack([-torch.eye(2), torch.eye(2)], 1) if actions.num_actions == 2 else None


def evaluate_tag(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int = EvaluationConfig.episodes,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> Matches:
    """Play the cross-play of simple_tag: trained agents against random and scripted opponents.

    Both sides learn, so that returns of self-play do not tell how good either is. Instead, trained pursuers play
    against a random and a fleeing evader, and a trained evader against random and chasing pursuers. Every match is
    judged by the *pursuers'* mean return; in the last two, lower is better.

    Args:
        env: simple_tag of mpe2 or VMAS with one evader, with the policy's primer if it has one.
        policy: the trained agents.
        episodes: episodes of every match; see :func:`evaluate`.
        exploration: see :func:`evaluate`.

    Returns:
        the returns of the four matches.

    Raises:
        ValueError: if the environment is not simple_tag with one evader, or ``episodes`` is below 1.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> list(evaluate_tag(env, RandomActions(), episodes=1).summary())[:2]
        ['adversaries_vs_random_prey', 'adversaries_vs_fleeing_prey']
    """
    script, random = TagScript(env.layout), RandomActions(env.layout.actions)
    matches = {
        "adversaries_vs_random_prey": (random, "adversary"),
        "adversaries_vs_fleeing_prey": (script, "adversary"),
        "prey_vs_random_adversaries": (random, "agent"),
        "prey_vs_chasing_adversaries": (script, "agent"),
    }
    returns = {
        name: evaluate(
            env, CrossPlay(policy, opponents, env.layout, [group]), episodes=episodes, exploration=exploration
        )
        for name, (opponents, group) in matches.items()
    }
    return Matches(returns, dict.fromkeys(returns, "adversary"))


class DrawTag:
    """Draw simple_tag (mpe2 and VMAS) from its observations with Pillow, on machines without a renderer.

    Pursuers are orange, evaders green, obstacles grey; the frame marks coordinates from -1 to 1.

    Args:
        layout: layout of the environment.
        size: side of the picture in pixels.
        arena: largest coordinate that the picture shows; agents may leave it.

    Raises:
        ValueError: if the layout is not that of simple_tag.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> DrawTag(env.layout, size=64)(env.reset()).shape
        (64, 64, 3)
    """

    def __init__(self, layout: AgentLayout, *, size: int = 320, arena: float = 1.4) -> None:
        check_ints(1, size=size)
        check_numbers(above=0, arena=arena)
        groups = {name: len(agents) for name, agents in layout.group_map.items()}
        if list(groups) != ["adversary", "agent"]:
            raise ValueError(f"DrawTag draws simple_tag, got the groups {groups}")
        self.num_pursuers = groups["adversary"]
        self.num_obstacles = _num_obstacles(layout)
        self.size, self.arena = size, arena

    def __call__(self, tensordict: TensorDictBase) -> Frame:
        """Return the picture ``[size, size, 3]`` of a step's tensordict, the first environment of a batch."""
        observation = first_observation(tensordict)
        positions = observation[:, 2:4]
        obstacles = observation[0, 4 : 4 + 2 * self.num_obstacles].view(-1, 2) + positions[0]
        discs: list[Disc] = [(place, 0.2, (170, 170, 170)) for place in obstacles.tolist()]
        for index, place in enumerate(positions.tolist()):
            discs.append((place, 0.075, (213, 94, 0)) if index < self.num_pursuers else (place, 0.05, (0, 158, 115)))
        return draw_discs(discs, size=self.size, arena=self.arena)


def _num_obstacles(layout: AgentLayout) -> int:
    # An observation is: velocity 2, position 2, obstacles 2 each, other agents 2 each, evaders' velocities 2 each. The
    # last evader sees the velocities of the other evaders only.
    others = 2 * (layout.num_agents - 1) + 2 * (len(layout.group_map["agent"]) - 1)
    return (layout.observation_sizes[-1] - 4 - others) // 2


def _observation_names(layout: AgentLayout) -> dict[str, list[str]]:
    """Return the names of what each agent observes; others and obstacles are relative to it."""
    names: dict[str, list[str]] = {}
    if list(layout.group_map) != ["adversary", "agent"]:
        return names
    for agent in layout.agent_names:
        others = [name for name in layout.agent_names if name != agent]
        seen = ["own velocity", "own position", *(f"obstacle {i + 1}" for i in range(_num_obstacles(layout)))]
        seen += [*others, *(f"{name} velocity" for name in others if name in layout.group_map["agent"])]
        names[agent] = [f"{what} {axis}" for what in seen for axis in "xy"]
    return known_sizes(layout, names)


def _play(
    env: EnvBase, policy: TensorDictModuleBase, *, episodes: int, exploration: ExplorationType = ExplorationType.RANDOM
) -> Matches:
    """Play the cross-play if there is one evader, as the script needs; otherwise self-play."""
    one_evader = len(env.layout.group_map.get("agent", ())) == 1
    return (evaluate_tag if one_evader else self_play)(env, policy, episodes=episodes, exploration=exploration)


for pattern, references in (("*", {}), ("mpe2", REFERENCES), ("vmas", VMAS_REFERENCES)):
    register_evaluation(f"{pattern}/simple_tag*", Evaluation(_play, DrawTag, references, _observation_names))
