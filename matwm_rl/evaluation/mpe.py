"""Environments of mpe2 other than simple_tag: matches, reference returns, what the agents observe, and pictures.

Importing this module registers them, see :func:`~matwm_rl.evaluation.register_evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tensordict import TensorDictBase
from torch import Tensor

from matwm_rl import keys
from matwm_rl.envs import AgentLayout
from matwm_rl.evaluation.gif import Frame
from matwm_rl.evaluation.opponents import against_random
from matwm_rl.evaluation.registry import Evaluation, register_evaluation
from matwm_rl.files import import_optional

SPREAD_REFERENCES = {"self_play": {"random": -25.3, "scripted": -7.8, "model-free, 25k": -17.0}}
LISTENER_REFERENCES = {"self_play": {"random": -42.5, "scripted": -7.2, "model-free, 25k": -15.1}}
"""Mean returns of random and scripted agents, and of the best model-free ones after 25,000 steps.

They are those of benchmarks/results/sample_efficiency.
"""


def known_sizes(layout: AgentLayout, names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Leave out the names of agents whose observations have another size, as options of the environment make them."""
    sizes = dict(zip(layout.agent_names, layout.observation_sizes, strict=True))
    return {agent: found for agent, found in names.items() if len(found) == sizes[agent]}


Disc = tuple[Sequence[float], float, tuple[int, int, int]]
"""Position, radius and colour."""
BLUE, DARK = (0, 114, 178), (60, 60, 60)


def draw_discs(discs: Sequence[Disc], *, size: int, arena: float) -> Frame:
    """Return a picture ``[size, size, 3]`` of discs, the last on top, and of the square from -1 to 1.

    Args:
        discs: what to draw, in units of the environment.
        size: side of the picture in pixels.
        arena: largest coordinate that the picture shows.
    """
    # Drawn twice as large and reduced, which makes edges smooth.
    scale = size / arena
    image = import_optional("PIL.Image").new("RGB", (2 * size, 2 * size), "white")
    pen = import_optional("PIL.ImageDraw").Draw(image)
    low, high = (arena - 1) * scale, (arena + 1) * scale
    pen.rectangle([low, low, high, high], outline=(200, 200, 200), width=2)
    for position, radius, color in discs:
        x, y = (position[0] + arena) * scale, (arena - position[1]) * scale
        pen.ellipse([x - radius * scale, y - radius * scale, x + radius * scale, y + radius * scale], fill=color)
    return np.asarray(image.reduce(2), dtype=np.uint8)


def first_observation(tensordict: TensorDictBase) -> Tensor:
    """Return the observations ``[N, D]`` of the first environment of a batch."""
    observation = tensordict.get(keys.OBSERVATION)
    return observation.reshape(-1, *observation.shape[-2:])[0].cpu()


def draw_spread(layout: AgentLayout) -> Callable[[TensorDictBase], Frame] | None:
    """Return what draws simple_spread from its observations: agents blue, landmarks dark.

    mpe2's own camera follows the agents, so that the landmarks seem to move, and cuts off who is furthest out.
    """
    num_landmarks = layout.num_agents
    if not spread_names(layout):
        return None  # the observation has other entries; the environment draws itself

    def draw(tensordict: TensorDictBase) -> Frame:
        observation = first_observation(tensordict)
        landmarks = observation[0, 4 : 4 + 2 * num_landmarks].view(-1, 2) + observation[0, 2:4]
        discs: list[Disc] = [(place, 0.15, BLUE) for place in observation[:, 2:4].tolist()]
        # Landmarks on top, because they are smaller.
        return draw_discs([*discs, *((place, 0.05, DARK) for place in landmarks.tolist())], size=320, arena=1.4)

    return draw


def spread_names(layout: AgentLayout) -> dict[str, list[str]]:
    """Return the names of what each agent of simple_spread observes; landmarks and others are relative to it."""
    names = {}
    for agent in layout.agent_names:
        others = [name for name in layout.agent_names if name != agent]
        seen = ["own velocity", "own position", *(f"landmark {i + 1}" for i in range(layout.num_agents)), *others]
        names[agent] = [f"{what} {axis}" for what in seen for axis in "xy"]
        names[agent] += [f"{name} says {word}" for name in others for word in range(2)]
    return known_sizes(layout, names)


def listener_names(layout: AgentLayout) -> dict[str, list[str]]:
    """Return the names of what speaker and listener observe; landmarks are relative to the listener."""
    seen = ["own velocity", *(f"landmark {i + 1}" for i in range(3))]
    listener = [f"{what} {axis}" for what in seen for axis in "xy"] + [f"speaker says {word}" for word in range(3)]
    speaker = [f"goal's {color}" for color in ("red", "green", "blue")]
    return known_sizes(layout, {"speaker_0": speaker, "listener_0": listener})


def adversary_names(layout: AgentLayout) -> dict[str, list[str]]:
    """Return the names of what each agent of simple_adversary observes; everything is relative to it."""
    names = {}
    for agent in layout.agent_names:
        goal = ["goal"] if agent in layout.group_map.get("agent", ()) else []
        others = [name for name in layout.agent_names if name != agent]
        seen = [*goal, *(f"landmark {i + 1}" for i in range(layout.num_agents - 1)), *others]
        names[agent] = [f"{what} {axis}" for what in seen for axis in "xy"]
    return known_sizes(layout, names)


def push_names(layout: AgentLayout) -> dict[str, list[str]]:
    """Return the names of what the agents of simple_push observe; landmarks and the other are relative to them.

    The agent has the colour of its goal.
    """
    velocity, landmarks = ["own velocity x", "own velocity y"], ["landmark 1", "landmark 2"]
    whose = ("own", *(f"{landmark}'s" for landmark in landmarks))
    colors = [f"{owner} {color}" for owner in whose for color in ("red", "green", "blue")]
    places = [f"{landmark} {axis}" for landmark in landmarks for axis in "xy"]
    agent = [*velocity, "goal x", "goal y", *colors[:3], *places, *colors[3:], "adversary_0 x", "adversary_0 y"]
    return known_sizes(layout, {"adversary_0": [*velocity, *places, "agent_0 x", "agent_0 y"], "agent_0": agent})


register_evaluation("mpe2/simple_adversary*", Evaluation(against_random, observation_names=adversary_names))
register_evaluation("mpe2/simple_push*", Evaluation(against_random, observation_names=push_names))
register_evaluation(
    "mpe2/simple_spread*", Evaluation(draw=draw_spread, references=SPREAD_REFERENCES, observation_names=spread_names)
)
register_evaluation(
    "mpe2/simple_speaker_listener*", Evaluation(references=LISTENER_REFERENCES, observation_names=listener_names)
)
