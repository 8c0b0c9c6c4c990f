"""A trained world model or policy in one file: its weights, and what is needed to build it again."""

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

VERSION = 3


def save_world_model(
    path: str | Path, world_model: WorldModel, *, layout: AgentLayout, config: WorldModelConfig
) -> None:
    """Save a world model alone.

    Args:
        path: the file; replaced as a whole if it exists.
        world_model: built by :meth:`~matwm_rl.modules.WorldModel.from_env` or ``from_layout``.
        layout: of the agents it is of.
        config: the configuration it was built with.

    Raises:
        ValueError: if the configuration does not give a model of these shapes, as where a part was replaced by one of
            your own: then save ``world_model.state_dict()`` and build the model yourself.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> config = WorldModelConfig(hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> path = Path(tempfile.mkdtemp()) / "world_model.pt"
        >>> save_world_model(path, WorldModel.from_env(env, **asdict(config)), layout=env.layout, config=config)
        >>> load_world_model(path, layout=env.layout).num_agents
        3
    """
    _save(path, _world_model_build(world_model, layout, config), {"world_model": world_model})


def load_world_model(
    path: str | Path, *, layout: AgentLayout | None = None, device: torch.device | str = "cpu"
) -> WorldModel:
    """Build the world model that :func:`save_world_model` or :func:`save_policy` saved, in ``eval`` mode.

    Args:
        path: the file.
        layout: of the agents it shall be used for, to be told early if they do not fit.
        device: where the weights go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another version, or was trained with other agents than ``layout``'s.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> config = WorldModelConfig(hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> world_model = WorldModel.from_env(env, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_world_model(f"{folder}/model.pt", world_model, layout=env.layout, config=config)
        ...     loaded = load_world_model(f"{folder}/model.pt", layout=env.layout)
        >>> torch.equal(loaded.reward.output.weight, world_model.reward.output.weight), loaded.training
        (True, False)
    """
    saved = _load(path, layout, device)
    world_model = _build_world_model(saved["build"]).to(device)
    world_model.load_state_dict(saved["state"]["world_model"])
    return world_model.eval()


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
        **_world_model_build(policy.world_model, layout, world_model),
        "actor": dict(actor or {}),
        "context_length": policy.context_length,
    }
    _save(path, build, {"world_model": policy.world_model, "actor": policy.actor})


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
        ValueError: if it is of another version, was trained with other agents than ``layout``'s, or holds a world model
            alone.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> config = WorldModelConfig(hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> world_model = WorldModel.from_env(env, config)
        >>> policy = WorldModelPolicy(world_model, make_actor(world_model, num_cells=16), context_length=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_policy(
        ...         f"{folder}/policy.pt", policy, layout=env.layout, world_model=config, actor={"num_cells": 16}
        ...     )
        ...     load_policy(f"{folder}/policy.pt", layout=env.layout).context_length
        4
    """
    saved = _load(path, layout, device)
    if "actor" not in saved["build"]:
        raise ValueError(f"{path} holds a world model and no actor; read it with load_world_model")
    world_model = _build_world_model(saved["build"])
    actor = make_actor(world_model, **saved["build"]["actor"])
    policy = WorldModelPolicy(world_model, actor, context_length=saved["build"]["context_length"]).to(device)
    policy.world_model.load_state_dict(saved["state"]["world_model"])
    policy.actor.load_state_dict(saved["state"]["actor"])
    return policy.eval()


def _world_model_build(world_model: WorldModel, layout: AgentLayout, config: WorldModelConfig) -> dict[str, Any]:
    # As built, whatever "if the environment has a mask" meant then.
    predict_mask = world_model.action_mask is not None
    return {"layout": asdict(layout), "world_model": {**asdict(config), "predict_mask": predict_mask}}


def _save(path: str | Path, build: Mapping[str, Any], modules: Mapping[str, torch.nn.Module]) -> None:
    state = {name: module.state_dict() for name, module in modules.items()}
    with torch.random.fork_rng(devices=[]):
        world_model = _build_world_model(build)
        expected = {"world_model": world_model.state_dict()}
        if "actor" in modules:
            expected["actor"] = make_actor(world_model, **build["actor"]).state_dict()
    check_same_shapes(state, expected, source=f"the {' and '.join(modules)} given with this configuration")
    with new_file(path) as partial:
        torch.save({"version": VERSION, "build": dict(build), "state": state}, partial)


def _load(path: str | Path, layout: AgentLayout | None, device: torch.device | str) -> dict[str, Any]:
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
    return saved


def _build_world_model(build: Mapping[str, Any]) -> WorldModel:
    layout = build["layout"]
    return WorldModel.from_layout(
        observation_shape=layout["observation_shape"],
        action_counts=layout["action_counts"],
        group_index=layout["group_index"],
        config=WorldModelConfig(**build["world_model"]),
    )
