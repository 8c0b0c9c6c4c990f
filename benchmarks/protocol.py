"""What all methods are compared by: the environments, and one evaluation for all policies.

No script of its own: sample_efficiency.py and its report import it. To add an environment, add an entry to
:data:`ENVIRONMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scripts import ListenerScript, SpreadScript
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType

from matwm_rl.envs import AgentLayout, make_env
from matwm_rl.modules import WorldModelPolicy
from matwm_rl.training import Returns, TagScript, evaluate_matches

EVALUATION_SEED = 1_000_003
"""Of the evaluation's environments and of its sampling: every policy meets the same episodes."""
EXPLORATION = {"sampled": ExplorationType.RANDOM, "greedy": ExplorationType.DETERMINISTIC}


@dataclass(frozen=True)
class Environment:
    """An environment of the comparison.

    Attributes:
        env: as given to ``make_env``.
        script: what plays it by simple rules, for the reference line; ``None`` where there is none.
        total_steps: of a run.
        every: env steps between evaluations.
        episodes: of every match of an evaluation, and of each of the two ways to choose actions.
        num_envs: in which they are played side by side.
    """

    env: str
    script: Callable[[AgentLayout], TensorDictModuleBase] | None = None
    total_steps: int = 25_000
    every: int = 5_000
    episodes: int = 100
    num_envs: int = 10

    @property
    def checkpoints(self) -> list[int]:
        """Env steps at which a method is evaluated."""
        return list(range(self.every, self.total_steps + 1, self.every))

    @property
    def protocol(self) -> dict[str, Any]:
        """What a figure depends on besides the method."""
        names = ("env", "every", "episodes", "num_envs")
        return {name: getattr(self, name) for name in names} | {"evaluation_seed": EVALUATION_SEED}


ENVIRONMENTS = {
    "simple_tag": Environment("mpe2/simple_tag_v3", TagScript),
    "simple_spread": Environment("mpe2/simple_spread_v3", SpreadScript, episodes=200),
    "simple_speaker_listener": Environment("mpe2/simple_speaker_listener_v4", ListenerScript, episodes=200),
    "vmas_simple_tag": Environment("vmas/simple_tag", TagScript, num_envs=100),
}


def evaluate_policy(environment: Environment, policy: TensorDictModuleBase) -> dict[str, float]:
    """Mean returns over the environment's fixed episodes, with sampled and with greedy actions.

    On simple_tag the pursuers' mean return in every match of the cross-play, else the mean return of an agent.

    Returns:
        ``<match>/<sampled or greedy>``, where the match of self-play is called ``return``; and the same with ``/se``
        behind, the standard error over episodes.
    """
    metrics: dict[str, float] = {}
    for name, exploration in EXPLORATION.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(EVALUATION_SEED)
            env = make_env(environment.env, num_envs=environment.num_envs, seed=EVALUATION_SEED)
            if isinstance(policy, WorldModelPolicy):
                env = TransformedEnv(env, policy.make_tensordict_primer())
            matches = evaluate_matches(
                environment.env, env, policy, episodes=environment.episodes, exploration=exploration
            )
        for match, returns in matches.returns.items():
            key = f"{match if match in matches.judged else 'return'}/{name}"
            values = _episode_values(returns, matches.judged.get(match))
            metrics[key] = float(values.mean())
            metrics[f"{key}/se"] = float(values.std() / len(values) ** 0.5)
    return metrics


def _episode_values(returns: Returns, group: str | None) -> torch.Tensor:
    """Each episode's mean return over the agents of a group, or over all."""
    layout = returns.layout
    members = [group is None or name in layout.group_map[group] for name in layout.agent_names]
    return returns.values[:, torch.tensor(members)].mean(-1)
