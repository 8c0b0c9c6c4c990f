"""Checkpoints to resume a run from: learner, replay, counters and random states.

Random states are TorchRL's :class:`~torchrl.checkpoint.GlobalRNGState`. Its ``Checkpoint`` and ``CheckpointRotation``
(0.14.1) are not used. They are as fast, but load damaged files without a word, run code that a stranger put into them,
change the learner before they find that replay does not fit, and leave the folders of killed writers behind; a full
disk kills the process (docs/lab_notes.md, Written by hand).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from matwm_rl.arguments import check_ints
from matwm_rl.data import Replay
from matwm_rl.data.replay import REPLAY_FILE
from matwm_rl.files import new_folder, remove_folder, remove_partial
from matwm_rl.finite import check_finite
from matwm_rl.state_files import check_entries, check_plain, read_state, refuse, stored_checksum, write_state
from matwm_rl.training.collector import ResumableCollector
from matwm_rl.training.learner import Learner
from matwm_rl.training.learner_state import check_built
from matwm_rl.training.process import check_random_states, random_states, set_random_states

FOLDER = "checkpoints"
STATE_FILE = "state.pt"
REPLAY_FOLDER = "replay"
VERSION = 8
_ENTRIES = ("version", "env_steps", "learner", "built", "replay", "collector", "random", "extra")


def save_checkpoint(
    run_dir: str | Path,
    *,
    learner: Learner,
    replay: Replay,
    env_steps: int,
    collector: ResumableCollector | None = None,
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
        collector: if given, its episodes go on when the run is resumed.
        extra: anything else to get back: tensors and plain Python values in dicts and lists.
        keep: number of newest checkpoints that stay.

    Returns:
        the new folder.

    Raises:
        ValueError: if ``keep`` is below 1.
        TypeError: if ``extra`` holds anything else.
        RuntimeError: if nothing has been stored in replay yet.
        OSError: if the disk is full; the older checkpoints stay, and nothing is left of the new one.

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
    check_plain(extra, "extra")
    learner_state = learner.state_dict()
    check_finite(learner_state, "the learner")
    root = Path(run_dir) / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    remove_partial(root)
    older = _complete(root)
    folder = root / f"{int(older[-1].name) + 1 if older else 0:06d}"
    with new_folder(folder) as partial:
        replay.dumps(partial / REPLAY_FOLDER)
        state = {
            "version": VERSION,
            "env_steps": int(env_steps),
            "learner": learner_state,
            "built": _built(learner),
            # Ties the two files together: another run's replay would fit as well.
            "replay": stored_checksum(partial / REPLAY_FOLDER / REPLAY_FILE),
            "collector": None if collector is None else collector.state_dict(),
            "random": random_states(),
            "extra": extra,
        }
        write_state(partial / STATE_FILE, state)
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
    collector: ResumableCollector | None = None,
    map_location: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Restore the newest complete checkpoint.

    With a collector, a run goes on bit by bit as if it had not been interrupted (on a CPU). Without one, or where
    environments do not repeat themselves, they begin new episodes, and the newest stored step of each is marked as the
    end of its own. Everything is checked before anything is changed.
    Safe for untrusted files: loading runs no code and follows no links.

    Args:
        run_dir: folder of the run.
        learner: built like the one that was saved; takes its state.
        replay: built like the one that was saved; takes its data.
        collector: built like the one that was saved; goes on where that one stood.
        map_location: where the file's tensors are read to, before they are copied to where the learner has its own.

    Returns:
        ``{"env_steps": ..., "extra": ...}`` as given to :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged or of another version, or of another learner or replay: with other networks,
            sizes or agents. Settings of the learner that weights do not depend on may differ; they stay as they are.

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
    # First everything is read and checked; nothing of the learner, replay or random state changes.
    state = _read(folder, map_location)
    replay_state = _read_replay(folder, state["replay"])
    _check(state, replay_state, learner, replay, folder)
    if collector is not None and state["collector"] is not None:
        collector.check_state_dict(state["collector"], source=f"{folder / STATE_FILE}, collector,")
    # Then everything is applied.
    replay.load_state_dict(replay_state)
    learner.load_state_dict(state["learner"])
    if collector is not None and state["collector"] is not None:
        collector.load_state_dict(state["collector"])
    if collector is None or state["collector"] is None or not collector.continues:
        replay.end_episodes()
    set_random_states(state["random"])
    return {"env_steps": state["env_steps"], "extra": state["extra"]}


def _read(folder: Path, map_location: torch.device | str) -> dict[str, Any]:
    """Read the state, and check its version and the names of its entries."""
    for link in (folder.parent, folder, folder / REPLAY_FOLDER):
        if link.is_symlink():
            raise ValueError(f"{link} is a symbolic link, and links are not followed: copy what it points to there")
    file = folder / STATE_FILE
    if not file.exists():
        raise ValueError(f"{file} is missing: the checkpoint is not complete. Use another copy of {folder}")
    state = read_state(file, map_location=map_location)
    if state.get("version") != VERSION:
        raise ValueError(f"{file} has version {state.get('version')}; this release reads version {VERSION}")
    check_entries(state, _ENTRIES, source=str(file))
    return state


def _read_replay(folder: Path, checksum: Any) -> dict[str, Any]:
    file = folder / REPLAY_FOLDER / REPLAY_FILE
    if not file.exists():
        raise ValueError(f"{file} is missing: the checkpoint is not complete. Use another copy of {folder}")
    if stored_checksum(file) != checksum:
        raise ValueError(f"{file} is not the replay that {folder / STATE_FILE} was saved with. Use another copy")
    return read_state(file, mmap=True)


def _check(state: dict[str, Any], replay_state: dict[str, Any], learner: Learner, replay: Replay, folder: Path) -> None:
    """Check that all entries of a checkpoint fit what they shall be loaded into."""
    source = str(folder / STATE_FILE)
    learner.check_state_dict(state["learner"], source=source)
    check_finite(state["learner"], source)
    check_built(state["built"], _built(learner), source=source)
    replay.check_state_dict(replay_state, source=str(folder / REPLAY_FOLDER / REPLAY_FILE))
    _check_sizes(replay_state["rows"], learner, source=str(folder / REPLAY_FOLDER / REPLAY_FILE))
    if type(state["env_steps"]) is not int or state["env_steps"] < 0:
        raise ValueError(f"{source}: env_steps must be a number of steps, found {state['env_steps']!r}")
    if not isinstance(state["extra"], dict):
        raise ValueError(f"{source}: extra must be a dict, found a {type(state['extra']).__name__}")
    check_random_states(state["random"], source=f"{source}, random,")


def _check_sizes(rows: dict[str, Any], learner: Learner, *, source: str) -> None:
    """Check that the world model can read the rows of replay."""
    model = learner.world_model
    found = {name: tuple(rows[name].shape[3:]) for name in ("observation", "action", "action_mask")} if rows else {}
    expected = {
        "observation": model.observation_shape,
        "action": tuple(model.actions.action_shape),
        "action_mask": (model.num_actions,),
    }
    refuse(
        [
            f"{name} of an agent has shape {found[name]}, expected {expected[name]}"
            for name in found
            if found[name] != expected[name]
        ],
        source,
    )


def _built(learner: Learner) -> dict[str, Any]:
    """Describe what the weights are of: the networks, and the agents where the world model knows them."""
    recipe = learner.world_model.recipe
    return {**learner.built, **({} if recipe is None else {"layout": recipe[0].to_dict()})}


def _complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in root.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name))
