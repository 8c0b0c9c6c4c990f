from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matwm_rl.data import Replay, ReplayConfig, make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import (
    ActorCriticConfig,
    ObservationRewardConfig,
    WorldModel,
    WorldModelConfig,
    make_actor,
    make_critic,
)
from matwm_rl.state_files import write_state
from matwm_rl.training import checkpoint
from matwm_rl.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from matwm_rl.training.config import LearnerConfig
from matwm_rl.training.learner import Learner
from tests.helpers import LATENTS
from tests.training.helpers import update

CONFIG = WorldModelConfig(hidden_size=16, num_heads=2, latent=LATENTS["categorical"], dropout=0.0)


def make_learner(*, share_by_group: bool = False, **overrides: Any) -> Learner:
    model = WorldModel.from_env(make_env("mock", seed=0), replace(CONFIG, **overrides))
    sizes = ActorCriticConfig(num_cells=8, share_by_group=share_by_group)
    return Learner(model, make_actor(model, sizes), make_critic(model, sizes), LearnerConfig(horizon=2))


def make_filled_replay(capacity: int = 60, steps: int = 40) -> Replay:
    config = ReplayConfig(capacity=capacity, sequences=6, sequence_length=6, starts_per_agent=4, context_length=2)
    replay = make_replay(3, config, seed=0)
    if steps:
        replay.extend(make_env("mock", seed=0).rollout(steps, break_when_any_done=False))
    return replay


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {name: state.clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for index, item in items for key, value in tensors(item, f"{name}.{index}").items()}


def assert_same(first: Any, second: Any) -> None:
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"latent": LATENTS["gaussian"], "normalize": True},
        {"share_by_group": True, "reward": ObservationRewardConfig()},
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_exactly_as_the_uninterrupted_one(tmp_path: Path, switches: dict[str, Any]) -> None:
    learner, replay = make_learner(**switches), make_filled_replay()
    for _ in range(3):
        update(learner, replay)
    # What loading does to the newest step; without it the two runs would sample different starts.
    replay.end_episodes()
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=40, extra={"due": 0.25, "best": [1, None, "a"]})
    for _ in range(2):
        update(learner, replay)

    torch.manual_seed(1)
    resumed, resumed_replay = make_learner(**switches), make_filled_replay(steps=0)
    info = load_checkpoint(tmp_path, learner=resumed, replay=resumed_replay)
    assert info == {"env_steps": 40, "extra": {"due": 0.25, "best": [1, None, "a"]}}
    assert resumed.updates == 3
    for _ in range(2):
        update(resumed, resumed_replay)
    assert_same(resumed.state_dict(), learner.state_dict())


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    learner, replay = make_learner(), make_filled_replay()
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=40)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_checkpoint(tmp_path, learner=learner, replay=replay)
    assert torch.equal(torch.rand(3), expected)


def test_the_newest_step_ends_its_episode_after_loading(tmp_path: Path) -> None:
    # Six steps make an episode, so that the fortieth is in the middle of one.
    replay, learner = make_filled_replay(), make_learner()
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=40)
    assert not replay.sequences.storage[39]["next", "done"].any()
    loaded = make_filled_replay(steps=0)
    load_checkpoint(tmp_path, learner=learner, replay=loaded)
    assert loaded.sequences.storage[39]["next", "done"].all()
    assert len(loaded) == 40


def test_each_tensor_of_the_world_model_is_stored_once(tmp_path: Path) -> None:
    learner = make_learner()
    folder = save_checkpoint(tmp_path, learner=learner, replay=make_filled_replay(), env_steps=40)
    state = torch.load(folder / "state.pt", weights_only=True)["learner"]
    for name, weight in learner.world_model.state_dict().items():
        # Biases start at zero and norms at one, so only weights that are drawn at random are telling.
        if weight.numel() > 30 and weight.std() > 0:
            same = [key for key, value in tensors(state).items() if value.shape == weight.shape and value.equal(weight)]
            assert same == [f".world_model.{name}"]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    learner, replay = make_learner(), make_filled_replay()
    assert not has_checkpoint(tmp_path)
    for step in (10, 20, 20):
        save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=step)
    assert has_checkpoint(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000002"]
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=30, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000002", "000003"]
    assert load_checkpoint(tmp_path, learner=learner, replay=replay)["env_steps"] == 30


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    learner, replay = make_learner(), make_filled_replay()
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=10)

    def dumps(self: Replay, path: Path) -> None:
        Path(path).mkdir()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "dumps", dumps)
        with pytest.raises(type(error)):
            save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=20)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000"]
    assert load_checkpoint(tmp_path, learner=learner, replay=replay)["env_steps"] == 10


def test_what_a_killed_process_left_is_never_read_and_is_cleared_away(tmp_path: Path) -> None:
    learner, replay = make_learner(), make_filled_replay()
    folder = save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=10)
    # Killed while writing the next one, and, in an earlier run, while deleting.
    for name in (".partial-x1y2", ".partial-000007"):
        shutil.copytree(folder, folder.with_name(name))
        (folder.with_name(name) / "state.pt").write_bytes(b"half")
    assert load_checkpoint(tmp_path, learner=learner, replay=replay)["env_steps"] == 10
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=20)
    assert [path.name for path in folder.parent.iterdir()] == ["000001"]


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, replay = make_learner(), make_filled_replay()
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=10)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "remove_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=20)
    assert load_checkpoint(tmp_path, learner=learner, replay=replay)["env_steps"] == 20


def test_loading_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="start without resuming"):
        load_checkpoint(tmp_path, learner=make_learner(), replay=make_filled_replay())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 32}, r"world_model\.[\w.]+ has shape \(.*16.*\), expected \(.*32"),
        ({"num_layers": 1}, r"world_model\.\w+\.blocks\.1\.[\w.]+ is unknown here"),
        ({"num_layers": 3}, r"world_model\.\w+\.blocks\.2\.[\w.]+ is missing"),
        ({"share_by_group": True}, r"actor\.[\w.]+ has shape \(3, .*\), expected \(2, "),
    ],
)
def test_a_checkpoint_of_other_sizes_names_the_weights_and_changes_nothing(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    save_checkpoint(tmp_path, learner=make_learner(), replay=make_filled_replay(), env_steps=40)
    other, replay = make_learner(**overrides), make_filled_replay(steps=0)
    before = tensors(other.state_dict())
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, learner=other, replay=replay)
    assert_same(before, tensors(other.state_dict()))
    assert len(replay) == 0


def test_a_replay_of_other_sizes_changes_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, learner=make_learner(), replay=make_filled_replay(), env_steps=40)
    learner = make_learner()
    before = tensors(learner.state_dict())
    with pytest.raises(ValueError, match="'capacity': 60.*'capacity': 90"):
        load_checkpoint(tmp_path, learner=learner, replay=make_filled_replay(capacity=90))
    assert_same(before, tensors(learner.state_dict()))


def test_another_version_is_refused(tmp_path: Path) -> None:
    learner, replay = make_learner(), make_filled_replay()
    folder = save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=40)
    state = torch.load(folder / "state.pt", weights_only=True)
    write_state(folder / "state.pt", {**state, "version": 0})
    with pytest.raises(ValueError, match="version 0; this release reads version 8"):
        load_checkpoint(tmp_path, learner=learner, replay=replay)
    torch.save({**state, "version": 4}, folder / "state.pt")  # files of that version had no checksum
    with pytest.raises(ValueError, match="version 4"):
        load_checkpoint(tmp_path, learner=learner, replay=replay)


def test_extra_that_could_not_be_loaded_again_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="extra may hold"):
        save_checkpoint(
            tmp_path, learner=make_learner(), replay=make_filled_replay(), env_steps=1, extra={"path": Path("a")}
        )
    assert not has_checkpoint(tmp_path)
