"""A trained policy in one file: the shared world model, the actors, and what is needed to build them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from matwm_rl.envs import AgentLayout
from matwm_rl.modules import WorldModel, WorldModelConfig, WorldModelPolicy, make_actor
from matwm_rl.training.checkpoint import check_same_shapes
from matwm_rl.training.files import new_file

VERSION = 2


def save_policy(
    path: str | Path,
    policy: WorldModelPolicy,
    *,
    layout: AgentLayout,
    world_model: WorldModelConfig,
    actor: Mapping[str, Any] | None = None,
) -> None:
    """Save what it takes to act, and to imagine: no critics, optimizers or data.

    Args:
        path: the file; replaced as a whole if it exists.
        policy: of a world model and an actor built by :meth:`~matwm_rl.modules.WorldModel.from_env` and
            :func:`~matwm_rl.modules.make_actor`.
        layout: of the environment it was trained in.
        world_model: the configuration the world model was built with.
        actor: keyword arguments of :func:`~matwm_rl.modules.make_actor`.

    Raises:
        ValueError: if the configuration does not give networks of the policy's shapes.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> config = WorldModelConfig(hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> model = WorldModel.from_env(env, **asdict(config))
        >>> policy = WorldModelPolicy(model, make_actor(model, num_cells=16), context_length=4)
        >>> path = Path(tempfile.mkdtemp()) / "policy.pt"
        >>> save_policy(path, policy, layout=env.layout, world_model=config, actor={"num_cells": 16})
        >>> acting = load_policy(path, layout=env.layout)
        >>> env.append_transform(acting.make_tensordict_primer()).rollout(3, acting)["agents", "action"].shape
        torch.Size([3, 3])
    """
    build = {
        "layout": asdict(layout),
        # As built, whatever "if the environment has a mask" meant then.
        "world_model": {**asdict(world_model), "predict_mask": policy.world_model.action_mask is not None},
        "actor": dict(actor or {}),
        "context_length": policy.context_length,
    }
    state = {"world_model": policy.world_model.state_dict(), "actor": policy.actor.state_dict()}
    with torch.random.fork_rng(devices=[]):
        rebuilt = _build(build)
    expected = {"world_model": rebuilt.world_model.state_dict(), "actor": rebuilt.actor.state_dict()}
    check_same_shapes(state, expected, source="the policy given with this configuration")
    with new_file(path) as partial:
        torch.save({"version": VERSION, "build": build, "state": state}, partial)


def load_policy(
    path: str | Path, *, layout: AgentLayout | None = None, device: torch.device | str = "cpu"
) -> WorldModelPolicy:
    """Build the policy that :func:`save_policy` saved, ready to act.

    Append its ``make_tensordict_primer()`` to the environment; ``policy.world_model`` is the world model.

    Args:
        path: the file.
        layout: of the environment it shall act in, to be told early if they do not fit.
        device: where the weights go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another version, or was trained with other agents than ``layout``'s.
    """
    saved = torch.load(path, map_location=device, weights_only=True)
    if saved["version"] != VERSION:
        raise ValueError(f"{path} has version {saved['version']}; this release reads version {VERSION}")
    trained = saved["build"]["layout"]
    if layout is not None and (different := [name for name in trained if getattr(layout, name, None) != trained[name]]):
        name = different[0]
        raise ValueError(
            f"{path} was trained in an environment with other {', '.join(different)}: {name} was {trained[name]}, "
            f"here it is {getattr(layout, name, None)}"
        )
    policy = _build(saved["build"]).to(device)
    policy.world_model.load_state_dict(saved["state"]["world_model"])
    policy.actor.load_state_dict(saved["state"]["actor"])
    return policy.eval()


def _build(build: Mapping[str, Any]) -> WorldModelPolicy:
    layout = build["layout"]
    world_model = WorldModel.from_layout(
        observation_shape=layout["observation_shape"],
        action_counts=layout["action_counts"],
        group_index=layout["group_index"],
        config=WorldModelConfig(**build["world_model"]),
    )
    actor = make_actor(world_model, **build["actor"])
    return WorldModelPolicy(world_model, actor, context_length=build["context_length"])
