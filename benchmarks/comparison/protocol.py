"""The environments of the comparison, and the one evaluation that all policies get.

No script of its own: sample_efficiency.py and its report import it. To add an environment, add an entry to
:data:`ENVIRONMENTS`.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scripts import ListenerScript, SpreadScript
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType

from matwm_rl.envs import AgentLayout, make_env
from matwm_rl.evaluation import Returns, TagScript, evaluate_matches
from matwm_rl.modules import WorldModelPolicy

SEEDS = (10, 11, 12)
"""Seeds of every method in every environment, by default."""
EVALUATION_SEED = 2_000_003
"""Seed of the evaluation's environments and sampling: all policies play the same episodes."""
FORMER_SEEDS = (0, 1, 2)
"""Seeds on which settings were chosen, by episodes of the evaluation seed 1,000,003.

Their stored runs are reported where there are no others.
"""
EXPLORATION = {"sampled": ExplorationType.RANDOM, "greedy": ExplorationType.DETERMINISTIC}


@dataclass(frozen=True)
class Environment:
    """An environment of the comparison.

    Attributes:
        env: as given to ``make_env``.
        script: plays it by simple rules, as a reference; ``None`` if there is none.
        total_steps: of a run.
        every: env steps between evaluations.
        episodes: of every match of an evaluation, in each of the two action modes.
        num_envs: environments that are played in parallel.
        env_kwargs: further arguments of ``make_env``, for training and evaluation.
    """

    env: str
    script: Callable[[AgentLayout], TensorDictModuleBase] | None = None
    total_steps: int = 25_000
    every: int = 5_000
    episodes: int = 100
    num_envs: int = 10
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_continuous(self) -> bool:
        """Whether actions are continuous; the environments of mpe2 and VMAS are asked for them alike."""
        return bool(self.env_kwargs.get("continuous_actions", False))

    def make(self, **options: Any) -> EnvBase:
        """Return the environment; ``options`` of ``make_env`` are the seed and the number of parallel ones."""
        return make_env(self.env, **options, **self.env_kwargs)

    @property
    def checkpoints(self) -> list[int]:
        """Env steps at which a method is evaluated."""
        return list(range(self.every, self.total_steps + 1, self.every))

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings of the evaluation, on which figures depend besides the method."""
        names = ("env", "every", "episodes", "num_envs", *(["env_kwargs"] if self.env_kwargs else []))
        return {name: getattr(self, name) for name in names} | {"evaluation_seed": EVALUATION_SEED}


CONTINUOUS = {"continuous_actions": True}
ENVIRONMENTS = {
    "simple_tag": Environment("mpe2/simple_tag_v3", TagScript),
    "simple_spread": Environment("mpe2/simple_spread_v3", SpreadScript, episodes=200),
    "simple_speaker_listener": Environment("mpe2/simple_speaker_listener_v4", ListenerScript, episodes=200),
    "vmas_simple_tag": Environment("vmas/simple_tag", TagScript, num_envs=100),
    "balance": Environment("vmas/balance", num_envs=100),
    "wheel": Environment("vmas/wheel", num_envs=100),
    "give_way": Environment("vmas/give_way", num_envs=100),
    "simple_adversary": Environment("mpe2/simple_adversary_v3", episodes=200),
    "simple_push": Environment("mpe2/simple_push_v3", episodes=200),
    "lbforaging": Environment("lbforaging/Foraging-8x8-2p-3f-v3", episodes=200),
    "simple_tag_continuous": Environment("mpe2/simple_tag_v3", TagScript, env_kwargs=CONTINUOUS),
    "simple_spread_continuous": Environment("mpe2/simple_spread_v3", SpreadScript, episodes=200, env_kwargs=CONTINUOUS),
    "vmas_simple_tag_continuous": Environment("vmas/simple_tag", TagScript, num_envs=100, env_kwargs=CONTINUOUS),
    "balance_continuous": Environment("vmas/balance", num_envs=100, env_kwargs=CONTINUOUS),
}


def env_argument(text: str) -> tuple[str, Any]:
    """Return the name and the value of an environment's argument that is written ``NAME=VALUE``.

    The value is read as JSON, and as text if it is not JSON.

    Raises:
        argparse.ArgumentTypeError: if there is no name or no value.

    Examples:
        >>> env_argument("continuous_actions=true"), env_argument("max_cycles=50"), env_argument("render_mode=human")
        (('continuous_actions', True), ('max_cycles', 50), ('render_mode', 'human'))
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def evaluate_policy(environment: Environment, policy: TensorDictModuleBase) -> dict[str, float]:
    """Return the mean returns over the environment's fixed episodes, with sampled and with greedy actions.

    In a match that is judged by a group, such as those of simple_tag by the pursuers, they are the group's mean
    returns, else the means over all agents.

    Returns:
        ``<match>/<sampled or greedy>``, where self-play is called ``return``; and the standard error over episodes as
        the same name with ``/se``.
    """
    metrics: dict[str, float] = {}
    for name, exploration in EXPLORATION.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(EVALUATION_SEED)
            env = environment.make(num_envs=environment.num_envs, seed=EVALUATION_SEED)
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
    """Return each episode's mean return over the agents of a group, or over all agents."""
    layout = returns.layout
    members = [group is None or name in layout.group_map[group] for name in layout.agent_names]
    return returns.values[:, torch.tensor(members)].mean(-1)
