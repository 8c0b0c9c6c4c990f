"""Model-free baselines from TorchRL's own losses, tuned for small budgets: MAPPO, IPPO, independent Q-learning and SAC.

    python benchmarks/comparison/model_free.py --method iql --environment mpe2/simple_tag_v3 --seed 0
    python benchmarks/comparison/model_free.py --method isac --env-kwargs continuous_actions=true

Prints the mean returns of sampled and of greedy actions at every checkpoint. All methods see the environments as the
world model does, through one dense group of agents; learners.py and continuous_learners.py have the methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from time import process_time
from typing import Any

import torch
from continuous_learners import BOX_METHODS, make_learners
from learners import METHODS, Group, Settings
from protocol import env_argument
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType

from matwm_rl import keys
from matwm_rl.envs import make_env
from matwm_rl.evaluation import evaluate_matches
from matwm_rl.training import prepare_process


class GroupPolicies(TensorDictModuleBase):
    """Acts for all agents, each group with its own policy.

    Keys read: ``("agents", "observation")``, ``("agents", "action_mask")``. Written: ``("agents", "action")`` and, by
    stochastic policies, ``("agents", "action_log_prob")``.
    """

    def __init__(self, groups: Sequence[Group], policies: Sequence[TensorDictModuleBase]) -> None:
        super().__init__()
        self.groups, self.policies = list(groups), nn.ModuleList(policies)
        self.in_keys: list[NestedKey] = [keys.OBSERVATION, keys.ACTION_MASK]
        written = [key for key in ("action", "action_log_prob") if key in policies[0].out_keys]
        self.out_keys: list[NestedKey] = [(keys.AGENTS, key) for key in written]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every agent."""
        members = zip(self.groups, self.policies, strict=True)
        views = [policy(group.acting_view(tensordict)) for group, policy in members]
        for group, view in zip(self.groups, views, strict=True):
            view["action"] = group.env_action(view["action"])
        agents = tensordict.get(keys.ACTION_MASK).ndim - 2
        for key in self.out_keys:
            tensordict.set(key, torch.cat([view[key[-1]] for view in views], agents))
        return tensordict


def method_settings(method: str, *, continuous: bool) -> Settings:
    """Return the settings of a method for discrete or for continuous actions.

    Raises:
        ValueError: if the method cannot learn continuous actions.
    """
    if continuous and method not in BOX_METHODS:
        raise ValueError(f"{method!r} learns discrete actions only; {sorted(BOX_METHODS)} learn continuous ones too")
    return BOX_METHODS[method] if continuous else METHODS[method]


def train(
    method: str,
    env_name: str,
    *,
    seed: int,
    total_steps: int,
    checkpoints: Sequence[int],
    on_checkpoint: Callable[[int, TensorDictModuleBase], None],
    settings: Settings | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Train, and hand the policy to a callback at every checkpoint.

    Args:
        method: a name in :data:`METHODS`.
        env_name: as given to :func:`~matwm_rl.envs.make_env`; its agents observe vectors.
        seed: of environments, networks and sampling. Draws of ``on_checkpoint`` do not change the run.
        total_steps: environment steps, rounded up to whole batches; one step is one action of every agent.
        checkpoints: environment steps from 1 to ``total_steps``.
        on_checkpoint: called with the environment steps done and the policy when they first reach a checkpoint. The
            policy explores under ``ExplorationType.RANDOM`` and is greedy under ``DETERMINISTIC``; it goes on learning.
        settings: of the method; ``None``: those of :func:`method_settings`.
        env_kwargs: further arguments of ``make_env``.

    Raises:
        ValueError: if the method is unknown or cannot learn this kind of actions, a checkpoint is out of reach, or
            observations are images.
    """
    env_kwargs = env_kwargs or {}
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {sorted(METHODS)}")
    if unreachable := [point for point in checkpoints if not 0 < point <= total_steps]:
        raise ValueError(f"checkpoints must lie from 1 to total_steps={total_steps}, got {unreachable}")
    if settings is None:
        layout = make_env(env_name, **env_kwargs).layout
        settings = method_settings(method, continuous=not layout.actions.has_probs)
    torch.manual_seed(seed)
    env = make_env(env_name, seed=seed, num_envs=settings.num_envs, **env_kwargs)
    if env.layout.is_image:
        raise ValueError(f"expected vector observations, which MLPs can read; {env_name!r} has images")
    learners = make_learners(env.layout, settings)
    policy = GroupPolicies([learner.group for learner in learners], [learner.policy for learner in learners])
    frames = {"frames_per_batch": settings.frames_per_batch, "total_frames": -1}
    collector = Collector(env, policy, **frames, auto_register_policy_transforms=False)
    env_steps, ahead = 0, sorted(set(checkpoints))
    for batch in collector:
        env_steps += batch.numel()
        for learner in learners:
            learner.learn(batch)
        if ahead and env_steps >= ahead[0]:
            ahead = [point for point in ahead if point > env_steps]
            with torch.random.fork_rng():
                on_checkpoint(env_steps, policy)
        if env_steps >= total_steps:
            break
    collector.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    parser.add_argument("--environment", default="mpe2/simple_tag_v3", help="a name that make_env knows")
    env_help = "arguments of make_env, such as continuous_actions=true"
    parser.add_argument("--env-kwargs", type=env_argument, nargs="+", default=[], metavar="NAME=VALUE", help=env_help)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total-steps", type=int, default=25_000)
    parser.add_argument("--every", type=int, default=5_000, help="environment steps between evaluations")
    parser.add_argument("--episodes", type=int, default=50, help="of every match")
    options = parser.parse_args(argv)
    for name in ("total_steps", "every", "episodes"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    prepare_process(num_threads=1, matmul_precision="highest")
    env_name, env_kwargs = options.environment, dict(options.env_kwargs)
    test_env = make_env(env_name, seed=10_000, num_envs=10, **env_kwargs)
    settings = method_settings(options.method, continuous=not test_env.layout.actions.has_probs)
    print(asdict(settings))
    kinds = {"sampled": ExplorationType.RANDOM, "greedy": ExplorationType.DETERMINISTIC}

    def on_checkpoint(env_steps: int, policy: TensorDictModuleBase) -> None:
        for name, kind in kinds.items():
            matches = evaluate_matches(env_name, test_env, policy, episodes=options.episodes, exploration=kind)
            print(f"{env_steps} steps, {process_time():.0f} s, {name}: {matches}", flush=True)

    points = [*range(options.every, options.total_steps, options.every), options.total_steps]
    plan = {"seed": options.seed, "total_steps": options.total_steps, "checkpoints": points}
    train(options.method, env_name, **plan, on_checkpoint=on_checkpoint, settings=settings, env_kwargs=env_kwargs)


if __name__ == "__main__":
    main()
