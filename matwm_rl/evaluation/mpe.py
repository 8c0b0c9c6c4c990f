"""simple_spread and simple_speaker_listener of mpe2: reference returns, and what the agents observe.

Importing this module registers them, see :func:`~matwm_rl.evaluation.register_evaluation`.
"""

from __future__ import annotations

from matwm_rl.envs import AgentLayout
from matwm_rl.evaluation.registry import Evaluation, register_evaluation

SPREAD_REFERENCES = {"self_play": {"random": -26.4, "scripted": -7.8, "model-free, 25k": -17.0}}
LISTENER_REFERENCES = {"self_play": {"random": -42.5, "scripted": -7.2, "model-free, 25k": -15.1}}
"""Mean returns of random and scripted agents, and of the best model-free ones after 25,000 steps.

They are those of benchmarks/results/sample_efficiency.
"""


def known_sizes(layout: AgentLayout, names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Leave out the names of agents whose observations have another size, as options of the environment make them."""
    sizes = dict(zip(layout.agent_names, layout.observation_sizes, strict=True))
    return {agent: found for agent, found in names.items() if len(found) == sizes[agent]}


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


register_evaluation("mpe2/simple_spread*", Evaluation(references=SPREAD_REFERENCES, observation_names=spread_names))
register_evaluation(
    "mpe2/simple_speaker_listener*", Evaluation(references=LISTENER_REFERENCES, observation_names=listener_names)
)
