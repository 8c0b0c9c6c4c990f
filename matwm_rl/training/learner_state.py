"""The stored state of a learner, the checks before it is loaded, and a description of the networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import nn

from matwm_rl.settings import to_plain
from matwm_rl.state_files import check_entries, check_same, leaves, refuse

if TYPE_CHECKING:
    from matwm_rl.training.learner import Learner

NETWORKS = ("world_model", "actor", "critic")
"""Attributes of a learner that are its networks, under the same names in its state."""
_OPTIMIZERS = tuple(f"{name}_optimizer" for name in NETWORKS)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Of the attributes of modules, those that do not change what stored weights mean. The recipe holds the settings again.
_FREE = ("training", "dropout", "p", "max_boundaries", "recipe")


def learner_state(learner: Learner) -> dict[str, Any]:
    """Return everything an update changes. Of the optimizers: their moments, since the settings are the learner's."""
    return {
        **{name: getattr(learner, name).state_dict() for name in NETWORKS},
        **{name: {"state": getattr(learner, name).state_dict()["state"]} for name in _OPTIMIZERS},
        "target_critic": _target(learner).flatten_keys(".").to_dict(),
        "return_scale": learner.actor_loss.return_scale.state_dict(),
        "updates": learner.updates,
    }


def check_learner_state(learner: Learner, state: Any, *, source: str) -> None:
    """Check that a state fits a learner, and change nothing.

    Raises:
        ValueError: if an entry is missing, unknown, or of another shape or type.
    """
    expected = learner_state(learner)
    check_entries(state, list(expected), source=source)
    for name in _OPTIMIZERS:
        check_entries(state[name], ["state"], source=f"{source}, {name},")
        expected[name] = {"state": _expected_moments(getattr(learner, name), state[name]["state"])}
    check_same(state, expected, source=source)
    if state["updates"] < 0:
        raise ValueError(f"{source} does not fit: updates must not be negative, found {state['updates']}")


def load_learner_state(learner: Learner, state: Mapping[str, Any]) -> None:
    """Load a state that fits into the same objects."""
    for name in NETWORKS:
        getattr(learner, name).load_state_dict(state[name])
    for name in _OPTIMIZERS:
        optimizer = getattr(learner, name)
        # The groups have learning rates and other settings. Those of the new learner count.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state[name]["state"], "param_groups": groups})
    learner.actor_loss.return_scale.load_state_dict(state["return_scale"])
    _target(learner).data.update_(TensorDict(state["target_critic"]).unflatten_keys("."))
    learner.updates = int(state["updates"])
    learner.world_model.eval()


def describe(module: nn.Module) -> dict[str, Any]:
    """Describe what a network is made of: the classes of all modules in it, and their settings.

    Two networks may have weights of the same shapes and compute different things: with another number of attention
    heads, another spacing of bins, or other parts. Only public attributes that are plain values are settings. Dropout
    is left out, since weights mean the same with more or less of it.

    Examples:
        >>> describe(nn.Sequential(nn.Flatten(2)))["0"]
        {'class': 'torch.nn.modules.flatten.Flatten', 'start_dim': 2, 'end_dim': -1}
    """
    return {name: _describe_one(part) for name, part in module.named_modules()}


def check_built(given: Any, expected: Mapping[str, Any], *, source: str) -> None:
    """Compare descriptions of :func:`describe`, of one network or of several by their names.

    Args:
        given: of the networks whose weights shall be loaded.
        expected: of the networks that are there.
        source: what the message calls the given ones.

    Raises:
        ValueError: if they are of other parts or settings; names the first few.

    Examples:
        >>> here = describe(nn.Flatten(2))
        >>> check_built(describe(nn.Flatten(1)), here, source="state.pt")
        Traceback (most recent call last):
        ValueError: state.pt does not fit: start_dim was 1, here it is 2...
    """
    theirs, ours = (
        {name.replace("..", ".").strip("."): value for name, value in leaves(description)}
        for description in (given, expected)
    )
    classes = {name: value for name, value in (theirs | ours).items() if name.split(".")[-1] == "class"}
    problems = [
        f"{name.removesuffix('.class')} was {_show(theirs, name)}, here it is {_show(ours, name)}"
        for name in classes
        if theirs.get(name) != ours.get(name)
    ]
    # Settings that only one version of a library has do not count.
    problems += [
        f"{name} was {theirs[name]!r}, here it is {ours[name]!r}"
        for name in ours
        if name not in classes and name in theirs and theirs[name] != ours[name]
    ]
    refuse(problems, source)


def _show(classes: Mapping[str, Any], name: str) -> str:
    return f"a {classes[name]}" if name in classes else "not there"


def _describe_one(module: nn.Module) -> dict[str, Any]:
    found = {"class": f"{type(module).__module__}.{type(module).__qualname__}"}
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in _FREE:
            value = to_plain(value) if is_dataclass(value) else _plain(value)
            if value is not None:
                found[name] = value
    return found


def _plain(value: Any) -> Any:
    """Return a plain value, as it is in a file; ``None`` of anything else."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        entries = [_plain(entry) for entry in value]
        return None if None in entries else entries
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, bool | int | float | str) else None


def _target(learner: Learner) -> Any:
    return learner.critic_loss.target_critic_network_params


def _expected_moments(optimizer: torch.optim.Optimizer, given: Any) -> dict[Any, Any]:
    """Return moments like those that an Adam would have for the same parameters as the given ones.

    Parameters have none before their first step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        index: {"step": torch.zeros((), dtype=torch.float32), **{name: parameters[index].data for name in _MOMENTS}}
        for index in (given if isinstance(given, dict) else ())
        if type(index) is int and 0 <= index < len(parameters)
    }
