"""Checkpoints to resume a run from: learner, replay, counters and random states."""

from __future__ import annotations

import io
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matwm_rl.arguments import check_ints
from matwm_rl.data import Replay
from matwm_rl.files import PARTIAL, new_folder, remove_folder
from matwm_rl.training.learner import Learner

FOLDER = "checkpoints"
STATE_FILE = "state.pt"
REPLAY_FOLDER = "replay"
VERSION = 4


def save_checkpoint(
    run_dir: str | Path,
    *,
    learner: Learner,
    replay: Replay,
    env_steps: int,
    extra: Mapping[str, Any] | None = None,
    keep: int = 1,
) -> Path:
    """Save everything that training needs to go on.

    Written to ``run_dir/checkpoints/<number>``, a folder that appears under its name only when it is complete; older
    ones are deleted afterwards. Whatever interrupts this, the previous checkpoint stays whole.

    Args:
        run_dir: folder of the run.
        learner: its world model is stored once, with the agents and all optimizers.
        replay: stored as it is.
        env_steps: env steps so far.
        extra: anything else to get back: tensors and plain Python values in dicts and lists.
        keep: number of newest checkpoints that stay.

    Returns:
        the new folder.

    Raises:
        ValueError: if ``keep`` is below 1.
        TypeError: if ``extra`` holds what ``torch.load(weights_only=True)`` refuses.
        RuntimeError: if nothing has been stored in replay yet.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import make_replay
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_actor, make_critic
        >>> settings, env = presets.tiny(), make_env("mock", seed=0)
        >>> model = WorldModel.from_env(env, settings.world_model)
        >>> learner = Learner(model, make_actor(model), make_critic(model), settings.learner)
        >>> replay = make_replay(env.num_agents, settings.replay)
        >>> replay.extend(env.rollout(50, break_when_any_done=False))
        >>> run_dir = tempfile.mkdtemp()
        >>> folder = save_checkpoint(run_dir, learner=learner, replay=replay, env_steps=50, extra={"due": 0.5})
        >>> load_checkpoint(run_dir, learner=learner, replay=replay)
        {'env_steps': 50, 'extra': {'due': 0.5}}
    """
    check_ints(1, keep=keep)
    check_ints(0, env_steps=env_steps)
    extra = dict(extra or {})
    _check_extra(extra)
    root = Path(run_dir) / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    _remove_partial(root)
    older = _complete(root)
    folder = root / f"{int(older[-1].name) + 1 if older else 0:06d}"
    state = {
        "version": VERSION,
        "env_steps": int(env_steps),
        "learner": learner.state_dict(),
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        },
        "extra": extra,
    }
    with new_folder(folder) as partial:
        torch.save(state, partial / STATE_FILE)
        replay.dumps(partial / REPLAY_FOLDER)
    for old in [*older, folder][:-keep]:
        remove_folder(old)
    return folder


def has_checkpoint(run_dir: str | Path) -> bool:
    """Whether there is a complete checkpoint in a run's folder.

    Args:
        run_dir: folder of the run.

    Examples:
        >>> has_checkpoint("no/such/run")
        False
    """
    return bool(_complete(Path(run_dir) / FOLDER))


def load_checkpoint(
    run_dir: str | Path,
    *,
    learner: Learner,
    replay: Replay,
    map_location: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Restore the newest complete checkpoint.

    The environments start new episodes, so the newest stored step of each is marked as the end of its own. Nothing is
    changed if the checkpoint does not fit.

    Args:
        run_dir: folder of the run.
        learner: built like the one that was saved; takes its state.
        replay: built like the one that was saved; takes its data.
        map_location: where the file's tensors are read to, before they are copied to where the learner has its own.

    Returns:
        ``{"env_steps": ..., "extra": ...}`` as given to :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is of another version, or of a learner or replay with other sizes.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import make_replay
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_actor, make_critic
        >>> settings, env = presets.tiny(), make_env("mock", seed=0)
        >>> model = WorldModel.from_env(env, settings.world_model)
        >>> learner = Learner(model, make_actor(model), make_critic(model), settings.learner)
        >>> replay = make_replay(env.num_agents, settings.replay)
        >>> replay.extend(env.rollout(50, break_when_any_done=False))
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     _ = save_checkpoint(run_dir, learner=learner, replay=replay, env_steps=50)
        ...     load_checkpoint(run_dir, learner=learner, replay=replay)["env_steps"]
        50
    """
    folders = _complete(Path(run_dir) / FOLDER)
    if not folders:
        raise FileNotFoundError(f"no checkpoint in {Path(run_dir) / FOLDER}: start without resuming, or check run_dir")
    folder = folders[-1]
    state = torch.load(folder / STATE_FILE, map_location=map_location, weights_only=True)
    if state["version"] != VERSION:
        raise ValueError(f"{folder} has version {state['version']}; this release reads version {VERSION}")
    check_same_shapes(state["learner"], learner.state_dict(), source=str(folder), ignore=r"\w+_optimizer\.state\.")
    replay.loads(folder / REPLAY_FOLDER)
    replay.end_episodes()
    learner.load_state_dict(state["learner"])
    torch.set_rng_state(state["rng"]["cpu"].cpu())
    for index, cuda_state in enumerate(state["rng"]["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state.cpu(), index)
    return {"env_steps": state["env_steps"], "extra": state["extra"]}


def check_same_shapes(
    given: Mapping[str, Any], expected: Mapping[str, Any], *, source: str, ignore: str | None = None
) -> None:
    """Compare two nested states before one is loaded where the other is from.

    Args:
        given: the state to load.
        expected: the state that is there.
        source: what the message calls the given one.
        ignore: pattern of names that may differ; Adam, for one, has a state only after its first step.

    Raises:
        ValueError: if they have other names or shapes; lists the first few.

    Examples:
        >>> check_same_shapes({"w": torch.zeros(3)}, {"w": torch.zeros(2)}, source="weights.pt")
        Traceback (most recent call last):
        ValueError: weights.pt does not fit: w has shape (3,), expected (2,)...
    """
    theirs, ours = (
        {name: shape for name, shape in _shapes(state) if ignore is None or not re.match(ignore, name)}
        for state in (given, expected)
    )
    problems = [f"{name} is missing" for name in ours if name not in theirs]
    problems += [f"{name} is unknown here" for name in theirs if name not in ours]
    problems += [
        f"{name} has shape {theirs[name]}, expected {ours[name]}"
        for name in ours
        if name in theirs and theirs[name] != ours[name]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{source} does not fit: {'; '.join(problems[:5])}{more}. "
            "Build the environment and the networks with the configuration that it was saved with"
        )


def _shapes(state: Any, name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Dotted name and shape of every tensor in a nested state."""
    if isinstance(state, Tensor):
        yield name, tuple(state.shape)
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _shapes(value, f"{name}.{key}" if name else str(key))


def _complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in root.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def _remove_partial(root: Path) -> None:
    """Clear away what an interrupted save or deletion has left."""
    for path in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _check_extra(extra: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(extra, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"extra may hold tensors and plain Python values, got what could not be loaded again safely: {error}"
        ) from error
