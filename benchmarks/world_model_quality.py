"""How good a trained world model is on fresh data of simple_tag.

    python benchmarks/world_model_quality.py runs/NAME/policy.pt

Prints, and writes as JSON: the average precision with which the predicted rewards of pursuers rank "this step brings
contact", from the true and from the sampled next latent; and the error of open-loop imagination against the trivial
predictors (last observation, mean reward, action frequencies). Fresh data: random and scripted agents in all pairings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torch import Tensor

from matwm_rl.data import to_focal
from matwm_rl.envs import make_env
from matwm_rl.functional import agents_first, agents_last, sample_index
from matwm_rl.modules import WorldModel
from matwm_rl.training import CrossPlay, RandomActions, TagScript, episode_windows, load_policy, open_loop_errors

HORIZONS = (1, 5, 10)
PAIRINGS: dict[str, list[str]] = {
    "random against random": [],
    "chasing against random": ["adversary"],
    "random against fleeing": ["agent"],
    "chasing against fleeing": ["adversary", "agent"],
}


def average_precision(score: Tensor, label: Tensor) -> float:
    """Mean precision at every true label, in the order of falling scores."""
    hit = label[score.argsort(descending=True)].float()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    return float((precision * hit).sum() / hit.sum().clamp(min=1))


def collect(env_name: str, episodes: int, seed: int) -> list[TensorDictBase]:
    """One rollout ``[E, T]`` for every pairing."""
    env = make_env(env_name, num_envs=10, seed=seed)
    script, steps = TagScript(env.layout), 25 * episodes // 10
    return [
        env.rollout(steps, CrossPlay(script, RandomActions(), env.layout, groups), break_when_any_done=False)
        for groups in PAIRINGS.values()
    ]


@torch.no_grad()
def contact_precision(world_model: WorldModel, rollout: TensorDictBase, pursuers: int) -> dict[str, float]:
    """Average precision of the predicted reward of the first ``pursuers`` agents."""
    outputs = world_model(to_focal(rollout.copy()))
    contact = (rollout["next", "agents", "reward"][..., :pursuers, 0] > 0).flatten()
    rewards = {"true latent": world_model.two_hot.decode(outputs["next", "agents", "reward_logits"])}
    if world_model.reward_input == "next_latent":
        index = sample_index(outputs["next", "agents", "prior_log_probs"].exp())
        latent = agents_first(world_model.latent.from_index(index).value)
        rewards["sampled latent"] = agents_last(world_model.two_hot.decode(world_model.reward(latent)), 0)
    return {name: average_precision(value[..., :pursuers].flatten(), contact) for name, value in rewards.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path, help="policy.pt of a run")
    parser.add_argument("--env", default="mpe2/simple_tag_v3")
    parser.add_argument("--episodes", type=int, default=200, help="episodes of every pairing")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/world_model_quality.json"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    world_model = load_policy(arguments.policy).world_model
    rollouts = collect(arguments.env, arguments.episodes, arguments.seed)

    result: dict[str, object] = {"policy": arguments.policy.name, "env": arguments.env, "seed": arguments.seed}
    pursuers = world_model.num_agents - 1
    everything = torch.cat(rollouts)
    precision = {
        name: contact_precision(world_model, rollout, pursuers)
        for name, rollout in [*zip(PAIRINGS, rollouts, strict=True), ("all", everything)]
    }
    result["contact_precision"] = precision
    for name, values in precision.items():
        print(f"{name:26s}" + "".join(f"  {kind} {value:.2f}" for kind, value in values.items()))

    windows = episode_windows(everything, 8 + max(HORIZONS))
    errors = open_loop_errors(world_model, windows, context_length=8, horizon=max(HORIZONS))
    table = {
        quantity: {
            str(step): {source: float(errors[source, quantity][step - 1].mean()) for source in ("model", "trivial")}
            for step in HORIZONS
        }
        for quantity in ("observation", "reward", "teammate")
    }
    result["open_loop"] = table
    for quantity, by_step in table.items():
        cells = "".join(
            f"   {step:>2}: {cell['model']:7.3f} / {cell['trivial']:7.3f}" for step, cell in by_step.items()
        )
        print(f"open loop, {quantity:12s} (model / trivial){cells}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
