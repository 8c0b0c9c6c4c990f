"""How good a trained world model is on fresh data.

    python benchmarks/comparison/world_model_quality.py runs/NAME/policy.pt

Prints the open-loop errors of observations, rewards and teammates' actions, and those of trivial predictors (last
observation, mean reward, best constant distribution of actions), on fresh episodes of the policy with sampled actions,
as in training. On simple_tag it also prints the average precision with which the predicted rewards of pursuers rank
steps with contact, given the true and the sampled next latent, on those episodes and on episodes of random and scripted
agents in all pairings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from protocol import env_argument
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import AgentLayout, make_env
from matwm_rl.evaluation import CrossPlay, RandomActions, TagScript, episode_windows, open_loop_errors
from matwm_rl.functional import agents_last
from matwm_rl.modules import Transition, WorldModel, WorldModelPolicy
from matwm_rl.training import load_policy

HORIZONS = (1, 5, 10)
CONTEXT = 8
ROLLOUT = 200
"""Length of a rollout where episodes differ in length."""
QUANTITIES = ("observation", "reward", "teammate")
PAIRINGS: tuple[list[str], ...] = ([], ["adversary"], ["agent"], ["adversary", "agent"])
"""Groups of simple_tag that are scripted; the others act randomly."""


def world_model_quality(
    policy: WorldModelPolicy, env_name: str, *, episodes: int, seed: int, **env_kwargs: Any
) -> dict[str, float]:
    """Return all figures in one dictionary: those of :func:`open_loop_table` and of :func:`contact_precision`.

    Args:
        policy: of a trained world model.
        env_name: as given to ``make_env``.
        episodes: of the policy; each pairing of scripts plays a quarter as many.
        seed: of environments and sampling; the global generator is left as it was.
        **env_kwargs: further arguments of ``make_env``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        env = make_env(env_name, num_envs=10, seed=seed, **env_kwargs)
        own = play(TransformedEnv(env, policy.make_tensordict_primer()), policy, episodes)
        metrics = open_loop_table(policy.world_model, own)
        if is_tag(env_name, env.layout):
            env = make_env(env_name, num_envs=10, seed=seed, **env_kwargs)
            script, random = TagScript(env.layout), RandomActions(env.layout.actions)
            quota = max(10, episodes // len(PAIRINGS))
            played = [play(env, CrossPlay(script, random, env.layout, groups), quota) for groups in PAIRINGS]
            for name, rollout in {"own": own, "scripted": torch.cat(played)}.items():
                precision = contact_precision(policy.world_model, rollout, len(env.layout.group_map["adversary"]))
                metrics |= {f"contact_precision/{name}/{latent}": value for latent, value in precision.items()}
    return metrics


def is_tag(env_name: str, layout: AgentLayout) -> bool:
    """Whether there are pursuers that are rewarded by contact with a single evader."""
    return (
        "simple_tag" in env_name
        and list(layout.group_map) == ["adversary", "agent"]
        and len(layout.group_map["agent"]) == 1
    )


@torch.no_grad()
def play(env: TransformedEnv, policy: torch.nn.Module, episodes: int) -> TensorDictBase:
    """Play at least so many whole episodes ``[E, T]`` with sampled actions.

    Where episodes differ in length, there are also parts of episodes, each of which ends with ``("next", "done")``.
    """
    quota = -(-episodes // env.batch_size.numel())
    with set_exploration_type(ExplorationType.RANDOM):
        parts = [env.rollout(1000, policy)]
        if bool(parts[0][keys.DONE][..., -1, :].all()):
            if quota > 1:
                length = parts[0].shape[-1] * (quota - 1)
                parts.append(env.rollout(length, policy, break_when_any_done=False))
        else:
            parts, ended = [], 0
            while ended < episodes:
                parts.append(env.rollout(ROLLOUT, policy, break_when_any_done=False))
                ended += int(parts[-1][keys.DONE].sum())
                parts[-1][keys.DONE][..., -1, :] = True  # what follows begins anew
    kept = [key for key in add_agent_entries(parts[0].copy()).keys(True, True) if key in parts[0].keys(True, True)]
    return torch.cat([part.select(*kept, ("next", "done"), ("next", "terminated")) for part in parts], 1)


def open_loop_table(world_model: WorldModel, rollout: TensorDictBase) -> dict[str, float]:
    """Return ``open_loop/<quantity>/<steps ahead>`` of the model, and ``.../trivial``; means over agents.

    They are of episodes of 18 steps or more; there are none if agents end all episodes before.
    """
    try:
        windows = episode_windows(rollout, CONTEXT + max(HORIZONS))
    except ValueError:
        return {}
    errors = open_loop_errors(world_model, windows, context_length=CONTEXT, horizon=max(HORIZONS))
    return {
        f"open_loop/{quantity}/{step}{suffix}": float(errors[source, quantity][step - 1].mean())
        for source, suffix in (("model", ""), ("trivial", "/trivial"))
        for quantity in QUANTITIES
        for step in HORIZONS
        if (source, quantity) in errors.keys(include_nested=True)
    }


@torch.no_grad()
def contact_precision(world_model: WorldModel, rollout: TensorDictBase, pursuers: int) -> dict[str, float]:
    """Return the average precision of the first ``pursuers`` agents' predicted rewards, and the share of contact steps.

    Given the true next latent (``true``), and a next latent drawn from the dynamics predictor (``sampled``); a model
    whose reward head reads no successor has only the former.
    """
    transitions: list[Transition] = []
    note = world_model.reward.register_forward_pre_hook(lambda head, arguments: transitions.append(arguments[0]))
    outputs = world_model(add_agent_entries(rollout.copy()))
    note.remove()
    contact = (rollout["next", "agents", "reward"][..., :pursuers, 0] > 0).flatten()
    rewards = {"true": world_model.two_hot.decode(outputs["next", "agents", "reward_logits"])}
    if world_model.reward.reads_successor:
        (true,) = transitions
        drawn = world_model.dynamics.sample(true.hidden, true.latent)
        imagined = (lambda: drawn), (lambda: world_model.decode(true.latent)), (lambda: world_model.decode(drawn))
        sampled = Transition(true.latent, true.action, true.hidden, *imagined, world_model.observation_norm)
        rewards["sampled"] = world_model.two_hot.decode(agents_last(world_model.reward(sampled)))
    precision = {name: average_precision(value[..., :pursuers].flatten(), contact) for name, value in rewards.items()}
    return {**precision, "base_rate": float(contact.float().mean())}


def average_precision(score: Tensor, label: Tensor) -> float:
    """Return the mean precision at every true label, by descending score; equal scores count as one."""
    _, rank = score.unique(return_inverse=True)
    ranked = rank.bincount().flip(0)
    hits = rank[label].bincount(minlength=len(ranked)).flip(0)
    precision = hits.cumsum(0) / ranked.cumsum(0)
    return float((precision * hits).sum() / hits.sum().clamp(min=1))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path, help="policy.pt of a run")
    parser.add_argument("--env", default="mpe2/simple_tag_v3", help="the environment it was trained in")
    env_help = "arguments of make_env, such as continuous_actions=true"
    parser.add_argument("--env-kwargs", type=env_argument, nargs="+", default=[], metavar="NAME=VALUE", help=env_help)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    env_kwargs = dict(arguments.env_kwargs)
    policy = load_policy(arguments.policy, layout=make_env(arguments.env, **env_kwargs).layout)
    asked = {"episodes": arguments.episodes, "seed": arguments.seed, **env_kwargs}
    metrics = world_model_quality(policy, arguments.env, **asked)
    for name, value in metrics.items():
        print(f"{name:36s} {value:8.3f}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
