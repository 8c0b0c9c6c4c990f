"""A checkpoint is loaded as it was saved or refused by name, and what is refused changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from matwm_rl.data import ReplayConfig, make_replay
from matwm_rl.modules import (
    ActorCriticConfig,
    CategoricalLatentConfig,
    Interpolation,
    TwoHot,
    WorldModel,
    WorldModelConfig,
    make_actor,
    make_critic,
)
from matwm_rl.objectives import WorldModelLossWeights
from matwm_rl.state_files import read_state, write_state
from matwm_rl.training import Learner, LearnerConfig, load_checkpoint, save_checkpoint
from tests.helpers import make_layout, mock_replay
from tests.test_state_files import Malicious, full_disk
from tests.training.helpers import assert_same, snapshot, update

CONFIG = WorldModelConfig(
    hidden_size=16, num_heads=2, latent=CategoricalLatentConfig(num_dims=4, num_classes=5), dropout=0.0
)
SIZES = ActorCriticConfig(num_cells=8)


def make_learner(
    config: WorldModelConfig = CONFIG,
    settings: LearnerConfig | None = None,
    *,
    two_hot: TwoHot | None = None,
    layout: Any = None,
    **parts: Any,
) -> Learner:
    model = WorldModel.from_env(layout or make_layout(), config, **parts)
    critic = make_critic(model, SIZES, two_hot=two_hot)
    return Learner(model, make_actor(model, SIZES), critic, settings or LearnerConfig(horizon=2))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a learner that was updated once."""
    folder = tmp_path_factory.mktemp("original")
    learner, replay = make_learner(), mock_replay()
    update(learner, replay)
    save_checkpoint(folder, learner=learner, replay=replay, env_steps=40, extra={"due": 1})
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy of that folder, for one test to damage."""
    return shutil.copytree(original, tmp_path, dirs_exist_ok=True)


@cache
def unchanged() -> tuple[Learner, Any]:
    """What tests try to load into; it stays as it is, which :func:`refused` checks."""
    return make_learner(), mock_replay()


def refused(run_dir: Path, message: str, learner: Learner | None = None, replay: Any = None) -> None:
    """The newest checkpoint is refused with this message; learner, replay, random state and files stay."""
    learner, replay = learner or unchanged()[0], replay or unchanged()[1]
    before = [snapshot(learner), TensorDict(replay.state_dict()["rows"]).clone(), replay.state_dict()["writer"]]
    random, files = torch.get_rng_state(), {path: path.lstat() for path in run_dir.rglob("*")}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(run_dir, learner=learner, replay=replay)
    assert_same(learner.state_dict(), before[0])
    assert (TensorDict(replay.state_dict()["rows"]) == before[1]).all() and replay.state_dict()["writer"] == before[2]
    assert torch.equal(torch.get_rng_state(), random)
    after = {path: path.lstat() for path in run_dir.rglob("*")}
    assert {path: (stat.st_size, stat.st_mtime_ns) for path, stat in after.items()} == {
        path: (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()
    }


def forge(run_dir: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the state, with a checksum that is right."""
    file = run_dir / "checkpoints" / "000000" / "state.pt"
    state = read_state(file)
    change(state)
    write_state(file, state)


@pytest.mark.parametrize("entry", ["env_steps", "learner", "built", "replay", "collector", "random", "extra"])
def test_a_missing_entry_is_named(saved: Path, entry: str) -> None:
    forge(saved, lambda state: state.pop(entry))
    refused(saved, rf"state\.pt does not fit: {entry} is missing")


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("learner", "updates"),
        ("learner", "actor_optimizer"),
        ("learner", "return_scale"),
        ("learner", "target_critic"),
        ("random", "torch_cpu"),
        ("random", "numpy"),
    ],
)
def test_a_missing_entry_of_a_part_is_named(saved: Path, part: str, entry: str) -> None:
    forge(saved, lambda state: state[part].pop(entry))
    refused(saved, rf"state\.pt.* does not fit: {entry} is missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg": torch.zeros(1)}, r"actor_optimizer\.state\.0\.exp_avg has shape \(1,\), expected \(3, "),
        ({"exp_avg_sq": torch.zeros(3, 56, 8).double()}, r"exp_avg_sq has (type torch.float64|shape)"),
        ({"step": torch.zeros(2)}, r"actor_optimizer\.state\.0\.step has shape \(2,\), expected \(\)"),
        ({"step": 3}, r"state\.0\.step is a int, expected a tensor"),
        ({"max_exp_avg_sq": torch.zeros(1)}, r"state\.0\.max_exp_avg_sq is unknown here"),
        ({"exp_avg": None}, r"state\.0\.exp_avg is a NoneType, expected a tensor"),
    ],
)
def test_moments_are_those_of_their_parameters(saved: Path, change: dict[str, Any], message: str) -> None:
    forge(saved, lambda state: state["learner"]["actor_optimizer"]["state"][0].update(change))
    refused(saved, message)


def test_moments_of_no_parameter(saved: Path) -> None:
    forge(saved, lambda state: state["learner"]["actor_optimizer"]["state"].update({99: {"step": torch.zeros(())}}))
    refused(saved, r"actor_optimizer\.state\.99\.step is unknown here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(env_steps=-1), "env_steps must be a number of steps, found -1"),
        (lambda state: state.update(env_steps="4"), "env_steps must be a number of steps, found '4'"),
        (lambda state: state.update(extra=[1]), "extra must be a dict, found a list"),
        (lambda state: state["random"].update(torch_cpu=torch.zeros(5)), "holds no random states: RNG state must be"),
        (
            lambda state: state["random"].update(torch_cpu=torch.zeros(5, dtype=torch.uint8)),
            "found the input RNG state size to be 5",
        ),
        (
            lambda state: state["random"].update(torch_cpu=torch.full((5056,), 9, dtype=torch.uint8)),
            "holds no random states: Invalid mt19937 state",
        ),
        (lambda state: state["random"].update(python=(3, (1, 2), None)), "holds no random states: state vector is"),
        (
            lambda state: state["random"].update(numpy=("MT19937", [1], 0, 0, 0.0)),
            "holds no random states: list index out of range",
        ),
        (
            lambda state: state["random"].update(numpy=(*state["random"]["numpy"][:2], 10**9, 0, 0.0)),
            "position in NumPy's state is 1000000000",
        ),
        (lambda state: state["random"].update(torch_tpu=[]), "torch_tpu is unknown here"),
        (lambda state: state["learner"].update(updates=-2), "updates must not be negative"),
        (lambda state: state["learner"].update(updates=2.5), "updates is a float, expected a int"),
        (lambda state: state["learner"]["world_model"].popitem(), r"world_model\.[\w.]+ is missing"),
        (lambda state: state.update(built={}), "was not there, here it is a matwm_rl"),
    ],
)
def test_values_that_cannot_be_are_refused(saved: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    forge(saved, change)
    refused(saved, message)


@pytest.mark.parametrize("name", ["state.pt", "replay/replay.pt"])
def test_damaged_and_missing_files_are_named(saved: Path, name: str) -> None:
    file = saved / "checkpoints" / "000000" / name
    data = file.read_bytes()
    for begin in range(100, len(data), len(data) // 20):
        file.write_bytes(data[:begin] + bytes([data[begin] ^ 8]) + data[begin + 1 :])
        refused(saved, rf"{file.name} is damaged")
    file.write_bytes(data[: len(data) // 2])
    refused(saved, rf"{file.name} is incomplete or damaged")
    file.unlink()
    refused(saved, rf"{file.name} is missing")
    (saved / "behind.pt").write_bytes(data)
    file.symlink_to(saved / "behind.pt")
    refused(saved, rf"{file.name} is a symbolic link")


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/000000", "checkpoints/000000/replay"])
def test_links_in_place_of_folders_are_refused(saved: Path, name: str) -> None:
    (saved / name).rename(saved / "elsewhere")
    (saved / name).symlink_to(saved / "elsewhere")
    refused(saved, f"{Path(name).name} is a symbolic link")


def test_the_replay_of_another_run_is_refused(saved: Path) -> None:
    other = saved / "other"
    replay = mock_replay()
    replay.end_episodes()
    save_checkpoint(other, learner=make_learner(), replay=replay, env_steps=40)
    shutil.copy(other / "checkpoints/000000/replay/replay.pt", saved / "checkpoints/000000/replay/replay.pt")
    refused(saved, r"replay\.pt is not the replay that .*state\.pt was saved with")


def test_what_is_planted_beside_the_files_is_not_executed(saved: Path) -> None:
    marker = saved / "marker"
    data = TensorDict({"a": torch.zeros(2), "b": NonTensorData(Malicious(marker), batch_size=[2])}, [2])
    data.memmap(saved / "checkpoints/000000/replay/storage")
    TensorDict.load_memmap(saved / "checkpoints/000000/replay/storage")["b"]
    assert marker.exists(), "this is what must not happen"
    marker.rmdir()
    load_checkpoint(saved, learner=make_learner(), replay=mock_replay())
    (saved / "checkpoints/000000/replay/replay.pt").unlink()
    refused(saved, r"replay\.pt is missing")
    assert not marker.exists()


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_of_the_new_one(saved: Path) -> None:
    learner, replay = make_learner(), mock_replay()
    folder = saved / "checkpoints" / "000000"
    sizes = [(folder / name).stat().st_size for name in ("replay/replay.pt", "state.pt")]
    assert sizes[0] < sizes[1]
    for size in (sizes[0] // 2, sizes[0] + 100):  # too small for replay, and for the state
        with full_disk(size), pytest.raises(OSError, match=r"cannot write .*\.pt"):
            save_checkpoint(saved, learner=learner, replay=replay, env_steps=80)
        assert os.listdir(saved / "checkpoints") == ["000000"]
    assert load_checkpoint(saved, learner=learner, replay=replay)["env_steps"] == 40


# -- settings that changed between save and load -----------------------------------------------------------------------


def test_settings_of_the_learner_are_the_new_ones(tmp_path: Path) -> None:
    learner, replay = make_learner(settings=LearnerConfig(horizon=2, world_model_lr=3e-3)), mock_replay()
    update(learner, replay)
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=40)
    changed = LearnerConfig(
        horizon=3,
        world_model_lr=1e-5,
        actor_lr=2e-5,
        critic_lr=4e-5,
        gamma=0.5,
        loss_weights=WorldModelLossWeights(mask=9),
    )
    resumed = make_learner(settings=changed)
    load_checkpoint(tmp_path, learner=resumed, replay=replay)
    optimizers = [resumed.world_model_optimizer, resumed.actor_optimizer, resumed.critic_optimizer]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1e-5, 2e-5, 4e-5]
    assert resumed.config == changed and resumed.imagination.horizon == 3
    # The moments are those that were saved.
    for one, other in zip(optimizers, (learner.world_model_optimizer, learner.actor_optimizer), strict=False):
        assert_same(one.state_dict()["state"], other.state_dict()["state"])
    before = [parameter.detach().clone() for parameter in resumed.world_model.parameters()]
    update(resumed, replay)
    step = max(
        float((new.detach() - old).abs().max())
        for new, old in zip(resumed.world_model.parameters(), before, strict=True)
    )
    assert 0 < step < 1e-4, "as large as the new learning rate, not the old one"


def test_settings_of_replay_are_applied_or_refused(saved: Path) -> None:
    config = ReplayConfig(capacity=60, sequences=3, sequence_length=5, starts_per_agent=2, recency_decay=0.5)
    state = read_state(saved / "checkpoints/000000/replay/replay.pt")
    capacity = state["layout"]["capacity"]
    replay = make_replay(3, replace(config, capacity=capacity, context_length=1), seed=1)
    load_checkpoint(saved, learner=make_learner(), replay=replay)
    assert replay.sequences.sampler.decay == 0.5 and replay.sequences.sample().shape == (1, 5)
    with pytest.raises(ValueError, match=f"'capacity': {capacity}.*'capacity': {capacity + 1}"):
        load_checkpoint(
            saved,
            learner=make_learner(),
            replay=make_replay(3, replace(config, capacity=capacity + 1, context_length=1)),
        )


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (
            lambda: make_learner(replace(CONFIG, num_heads=4)),
            r"world_model\.transformer\.num_heads was 2, here it is 4",
        ),
        (
            lambda: make_learner(replace(CONFIG, reward_interpolation=Interpolation.raw)),
            r"world_model\.two_hot\.interpolation was 'symlog', here it is 'raw'.*critic\.[\w.]+interpolation was",
        ),
        (lambda: make_learner(replace(CONFIG, reencode=True)), r"world_model\.reencode was False, here it is True"),
        (lambda: make_learner(two_hot=TwoHot(interpolation="raw")), r"critic\.module\.1\.module\.interpolation was"),
        (lambda: make_learner(latent=Sharp()), r"world_model\.latent was a .*CategoricalLatent, here it is a .*Sharp"),
        (
            lambda: make_learner(layout=replace(make_layout(), agent_names=["x", "y", "z"])),
            r"layout\.agent_names was \['agent_0', .*, here it is \['x', 'y', 'z'\]",
        ),
    ],
    ids=["heads", "interpolation", "reencode", "critic", "latent", "agents"],
)
def test_networks_of_the_same_shapes_and_another_meaning_are_refused(
    saved: Path, learner: Callable[[], Learner], message: str
) -> None:
    refused(saved, message, learner())


def test_dropout_may_change(saved: Path) -> None:
    resumed = make_learner(replace(CONFIG, dropout=0.3))
    load_checkpoint(saved, learner=resumed, replay=mock_replay())
    assert resumed.world_model.transformer.blocks[0].dropout == 0.3


class Sharp(type(CONFIG.latent.build())):  # type: ignore[misc]
    """A latent space of one's own, with tensors of the same shapes."""

    def __init__(self) -> None:
        super().__init__(4, 5)
