"""A trained world model or policy in one file: its weights, and what is needed to build it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from matwm_rl.arguments import check_kinds
from matwm_rl.envs import AgentLayout
from matwm_rl.finite import check_finite
from matwm_rl.modules import ActorCriticConfig, StateMLP, WorldModel, WorldModelConfig, WorldModelPolicy, make_actor
from matwm_rl.settings import from_plain, to_plain
from matwm_rl.state_files import check_entries, check_same, read_state, write_state
from matwm_rl.training.learner_state import check_built, describe
from matwm_rl.training.trained_policy import PolicyCard, TrainedPolicy, check_layout

VERSION = 8

SHELF = Path(__file__).parents[1] / "policies"
"""Trained policies that come with the package: ``NAME.pt``."""


def save_world_model(path: str | Path, world_model: WorldModel) -> None:
    """Save a world model alone.

    Args:
        path: the file; replaced as a whole if it exists.
        world_model: built by :meth:`~matwm_rl.modules.WorldModel.from_env`, without parts of your own.

    Raises:
        ValueError: if the model has parts of your own, or is not as it was built: then save
            ``world_model.state_dict()`` and build the model yourself; or if weights are not finite. An older
            file stays.
        OSError: if the file cannot be written, because the disk is full for one; an older one stays.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_world_model(f"{folder}/world_model.pt", world_model)
        ...     load_world_model(f"{folder}/world_model.pt", layout=env.layout).num_agents
        3
    """
    _save(path, _recipe(world_model), {"world_model": world_model})


def load_world_model(
    path: str | Path, *, layout: AgentLayout | None = None, device: torch.device | str = "cpu"
) -> WorldModel:
    """Build the world model that :func:`save_world_model` or :func:`save_policy` saved, in ``eval`` mode.

    Safe for untrusted files: loading runs no code and follows no links.

    Args:
        path: the file.
        layout: of the agents it shall be used for; an error tells early if they do not fit.
        device: where the weights go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another version, or was trained with other agents than ``layout``'s.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), presets.tiny().world_model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_world_model(f"{folder}/model.pt", world_model)
        ...     loaded = load_world_model(f"{folder}/model.pt")
        >>> torch.equal(loaded.encoder.input.weight, world_model.encoder.input.weight), loaded.training
        (True, False)
    """
    saved = _load(path, layout, device)
    return _build(path, saved)["world_model"].to(device).eval()


def save_policy(path: str | Path, policy: WorldModelPolicy, *, card: PolicyCard | None = None) -> None:
    """Save what it takes to act, and to imagine: no critics, optimizers or data.

    Args:
        path: the file; replaced as a whole if it exists.
        policy: of a world model built by :meth:`~matwm_rl.modules.WorldModel.from_env` and an actor built by
            :func:`~matwm_rl.modules.make_actor`.
        card: describes the training, so that :meth:`TrainedPolicy.make_env` knows the environment; by default the
            card that the policy was loaded with.

    Raises:
        ValueError: if the world model has parts of your own, the actor is another, or weights are not finite.
        TypeError: if ``env_kwargs`` of the card are not plain values.
        OSError: if the file cannot be written, because the disk is full for one; an older one stays.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> path = Path(tempfile.mkdtemp()) / "policy.pt"
        >>> save_policy(path, WorldModelPolicy(model, make_actor(model), history_length=4), card=PolicyCard(env="mock"))
        >>> policy = load_policy(path)
        >>> policy.make_env(seed=0).rollout(3, policy)["agents", "action"].shape
        torch.Size([3, 3])
    """
    network = actor_network(policy)
    if card is None:
        card = getattr(policy, "card", None)
    else:
        check_kinds(PolicyCard, card=card)
    recipe = {
        **_recipe(policy.world_model),
        "actor": to_plain(network.config),
        "history_length": policy.history_length,
        "card": to_plain(card),
    }
    _save(path, recipe, {"world_model": policy.world_model, "actor": policy.actor})


def load_policy(
    path: str | Path, *, layout: AgentLayout | None = None, device: torch.device | str = "cpu"
) -> TrainedPolicy:
    """Build the policy that :func:`save_policy` saved, ready to act; or one of those that come with the package.

    ``policy.make_env()`` makes its environment; to another one append ``policy.make_tensordict_primer()``.
    ``policy.world_model`` is the world model. Safe for untrusted files: loading runs no code and follows no links.

    Args:
        path: the file; or a name from the table in docs/policies.md, such as ``"simple_spread"``.
        layout: of the environment it shall act in; an error tells early if they do not fit.
        device: where the weights go.

    Raises:
        FileNotFoundError: if there is no such file, and no policy of such a name.
        ValueError: if it is damaged or of another version, was trained with other agents than ``layout``'s, or holds a
            world model alone.

    Examples:
        Play, and draw what happens:

        >>> import tempfile
        >>> from matwm_rl.evaluation import record_gif
        >>> policy = load_policy("simple_spread")
        >>> env = policy.make_env(seed=0)
        >>> returns = record_gif(env, policy, f"{tempfile.mkdtemp()}/episodes.gif", episodes=1)
        >>> len(returns[0])
        3
    """
    path = _find(path)
    saved = _load(path, layout, device)
    if "actor" not in saved["recipe"]:
        raise ValueError(f"{path} holds a world model and no actor; read it with load_world_model")
    if type(length := saved["recipe"]["history_length"]) is not int or length < 0:
        raise ValueError(f"{path}: history_length must be a number of steps, found {length!r}")
    card = _read_card(path, saved["recipe"]["card"])
    return TrainedPolicy(**_build(path, saved), history_length=length, card=card).to(device).eval()


def actor_network(policy: WorldModelPolicy) -> StateMLP:
    """Return the network of a policy's actor.

    Raises:
        ValueError: if the actor is not one of :func:`~matwm_rl.modules.make_actor`.
    """
    networks = [module for module in policy.actor.modules() if isinstance(module, StateMLP)]
    if len(networks) != 1:
        raise ValueError(
            f"only actors of make_actor are saved and exported, got a {type(policy.actor).__name__}; save "
            "policy.state_dict() and build the policy yourself"
        )
    return networks[0]


def _find(path: str | Path) -> Path:
    """Return the path of a file; of a text that is the name of a policy on the shelf, of that policy."""
    shelf = {file.stem: file for file in sorted(SHELF.glob("*.pt"))}
    if isinstance(path, str) and path in shelf:
        return shelf[path]
    if not Path(path).exists() and Path(path).name == Path(path).stem == str(path):
        raise FileNotFoundError(f"there is neither a file {path} nor a trained policy of that name: {', '.join(shelf)}")
    return Path(path)


def _read_card(path: Path, card: Any) -> PolicyCard | None:
    if card is None:
        return None
    try:
        return from_plain(PolicyCard, card)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a card that cannot be read: {error}") from error


def _recipe(world_model: WorldModel) -> dict[str, Any]:
    if world_model.recipe is None:
        raise ValueError(
            "the world model has parts of your own, which a file cannot build again: save world_model.state_dict() and "
            "build the model yourself"
        )
    layout, config = world_model.recipe
    return {"layout": layout.to_dict(), "world_model": to_plain(config)}


def _save(path: str | Path, recipe: dict[str, Any], modules: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        expected = _networks(recipe)
    for name, module in modules.items():
        source = f"the {name.replace('_', ' ')}, which is no longer as it was built,"
        check_same(module.state_dict(), expected[name].state_dict(), source=source)
        check_built(describe(module), describe(expected[name]), source=source)
        check_finite({name: module.state_dict()}, f"what is to be saved as {path}")
    saved = {
        "version": VERSION,
        "recipe": recipe,
        "built": {name: describe(module) for name, module in modules.items()},
        "state": {name: module.state_dict() for name, module in modules.items()},
    }
    write_state(path, saved)


def _load(path: str | Path, layout: AgentLayout | None, device: torch.device | str) -> dict[str, Any]:
    """Read a file, and check all but what is compared with the networks that it describes."""
    saved = read_state(path, map_location=device)
    if saved.get("version") != VERSION:
        raise ValueError(f"{path} has version {saved.get('version')}; this release reads version {VERSION}")
    check_entries(saved, ["version", "recipe", "built", "state"], source=str(path))
    recipe, networks = saved["recipe"], ["world_model"]
    if isinstance(recipe, dict) and "actor" in recipe:
        networks.append("actor")
    more = ["history_length", "card"] if "actor" in networks else []
    check_entries(recipe, ["layout", *networks, *more], source=str(path))
    for part in ("built", "state"):
        check_entries(saved[part], networks, source=f"{path}, {part},")
    if layout is not None:
        check_entries(recipe["layout"], list(layout.to_dict()), source=f"{path}, layout,")
        check_layout(recipe["layout"], layout, source=str(path))
    check_finite(saved["state"], str(path))
    return saved


def _build(path: str | Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Build the networks of a file and load their weights, after everything has been compared."""
    try:
        with torch.random.fork_rng(devices=[]):
            networks = _networks(saved["recipe"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes networks that cannot be built: {error}") from error
    for name, module in networks.items():
        check_same(saved["state"][name], module.state_dict(), source=f"{path}, {name},")
        check_built(saved["built"][name], describe(module), source=f"{path}, {name},")
    for name, module in networks.items():
        module.load_state_dict(saved["state"][name])
    return networks


def _networks(recipe: dict[str, Any]) -> dict[str, Any]:
    config = from_plain(WorldModelConfig, recipe["world_model"])
    world_model = WorldModel.from_env(AgentLayout.from_dict(recipe["layout"]), config)
    if "actor" not in recipe:
        return {"world_model": world_model}
    return {
        "world_model": world_model,
        "actor": make_actor(world_model, from_plain(ActorCriticConfig, recipe["actor"])),
    }
