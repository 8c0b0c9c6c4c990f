"""How many bytes go between processes, and when: weights to workers, frames to the learner, gradients, checkpoints.

    python benchmarks/speed/traffic.py [--env mpe2/simple_spread_v3] [--presets vectors paper]

Nothing is timed: everything is counted in the objects themselves, built for the environment with the preset's sizes.
docs/scaling.md has the figures, and what follows from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl import torchrl_logger
from torchrl.collectors import Collector

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.training import Learner

STEPS = 64
"""Collected steps by which a frame is measured."""
torchrl_logger.setLevel("WARNING")


def traffic(preset: str, env_name: str) -> dict[str, float]:
    """Count parameters and bytes of one preset in one environment.

    Args:
        preset: name of a preset.
        env_name: see :func:`matwm_rl.envs.make_env`.

    Returns:
        numbers by what they count. A frame is one env step of all agents of one environment.
    """
    cfg = presets.PRESETS[preset]()
    env = make_env(env_name, seed=0)
    world_model = WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (make_actor, make_critic))
    learner = Learner(world_model, actor, critic, cfg.learner)
    policy = WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    replay = make_replay(env.num_agents, cfg.replay)
    primed = env.append_transform(policy.make_tensordict_primer())
    frames = {"frames_per_batch": STEPS, "total_frames": STEPS, "auto_register_policy_transforms": False}
    collector = Collector(primed, policy, **frames)
    (batch,) = list(collector)
    collector.shutdown()
    replay.extend(batch)
    stored = replay.sequences.storage[:]
    updates = cfg.updates_per_batch / cfg.frames_per_batch
    gradients = gradient_bytes(learner)
    return {
        "agents": env.num_agents,
        "parameters: world model": count(world_model),
        "parameters: actors": count(actor),
        "parameters: critics": count(critic),
        "bytes: policy weights, to a worker, per synchronisation": size(unique(policy)),
        "bytes: a frame as the policy leaves it": batch.bytes() / STEPS,
        "bytes: a frame without the policy's history": without_history(batch) / STEPS,
        "bytes: a frame in replay": stored.bytes() / STEPS,
        "bytes: gradients of the world model, per update": size(optimizer_parameters(learner.world_model_optimizer)),
        "bytes: all gradients, per update": gradients,
        "optimizer steps per update": 1 + 2 * cfg.learner.agent_steps,
        "updates per env step": updates,
        "bytes: all gradients, per env step": gradients * updates,
        "bytes: learner in a checkpoint": state_size(learner.state_dict()) + 8 * count_all(learner),
        "bytes: replay in a checkpoint, when full": stored.bytes() / STEPS * cfg.replay.capacity,
    }


def unique(module: nn.Module) -> list[Tensor]:
    """Return every parameter and buffer of a module once."""
    return list({id(entry): entry for entry in [*module.parameters(), *module.buffers()]}.values())


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradient_bytes(learner: Learner) -> int:
    """Return the bytes of all gradients in one update, in which actors and critics take several steps."""
    of_agents = [learner.actor_optimizer, learner.critic_optimizer]
    optimizers = [learner.world_model_optimizer, *learner.config.agent_steps * of_agents]
    return sum(size(optimizer_parameters(optimizer)) for optimizer in optimizers)


def count_all(learner: Learner) -> int:
    """Return how many numbers are trained: Adam keeps two moments of each, from its first step on."""
    optimizers = (learner.world_model_optimizer, learner.actor_optimizer, learner.critic_optimizer)
    return sum(parameter.numel() for optimizer in optimizers for parameter in optimizer_parameters(optimizer))


def state_size(state: Any) -> int:
    """Return the bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return size([state])
    parts = state.values() if hasattr(state, "values") else state if isinstance(state, list | tuple) else ()
    return sum(map(state_size, parts))


def without_history(batch: TensorDictBase) -> int:
    """Return the bytes of a batch without what the policy carries through an episode."""
    names = [key for key in batch.keys(True, True) if "history" in key]
    return batch.exclude(*names).bytes()


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="mpe2/simple_spread_v3")
    parser.add_argument("--presets", nargs="+", default=["vectors", "paper"], choices=[*presets.PRESETS])
    options = parser.parse_args(arguments)
    counted = {preset: traffic(preset, options.env) for preset in options.presets}
    print(f"{options.env:<58}" + "".join(f"{preset:>16}" for preset in counted))
    for name in next(iter(counted.values())):
        print(f"{name:<58}" + "".join(f"{round(figures[name], 1):>16,}" for figures in counted.values()))


if __name__ == "__main__":
    main()
