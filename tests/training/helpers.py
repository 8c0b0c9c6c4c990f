"""What several tests of the learner do: updates, and comparisons of its state."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from matwm_rl.data import Replay
from matwm_rl.training.learner import Learner

OPTIONS = {"world_model_lr": 1e-2, "actor_lr": 1e-2, "critic_lr": 1e-2}


def update(learner: Learner, replay: Replay, **kwargs: bool) -> TensorDict:
    """Update the world model and all agents once, as training does."""
    metrics = learner.update_world_model(replay.sequences.sample())
    return metrics.update(learner.update_agents(replay.starts.sample(), **kwargs))


def learn_from(learner: Learner, imagined: TensorDictBase) -> TensorDict:
    """Update all agents on a given imagined rollout."""
    imagination = learner.imagination
    learner.imagination = lambda _: imagined.clone()
    try:
        return learner.update_agents(imagined)
    finally:
        learner.imagination = imagination


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """All entries of a state dict that are no containers."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{path}/{i}").items()}
    return {path: tree}


def assert_same(one: Any, other: Any) -> None:
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        same = torch.equal(value, other[path]) if isinstance(value, Tensor) else value == other[path]
        assert same, path


def snapshot(learner: Learner) -> dict[str, Any]:
    return copy.deepcopy(learner.state_dict())


def changed_parts(learner: Learner, before: dict[str, Any]) -> set[str]:
    after = learner.state_dict()
    return {
        part
        for part in before
        if any(
            not torch.equal(value, leaves(after[part])[path])
            for path, value in leaves(before[part]).items()
            if isinstance(value, Tensor) and path in leaves(after[part])
        )
    }
