"""Weights that are not finite are neither saved nor loaded, and the last good file stays and is gone on from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from matwm_rl import keys
from matwm_rl.modules import WorldModelPolicy
from matwm_rl.training import Learner, load_checkpoint, load_policy, save_checkpoint, save_policy
from tests.helpers import make_learner, mock_replay
from tests.training.helpers import OPTIONS, assert_same, snapshot, update


def ruin(module: torch.nn.Module, number: float = math.nan) -> None:
    with torch.no_grad():
        next(iter(module.parameters())).view(-1)[0] = number


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["world_model", "actor", "critic", "target_critic", "world_model_optimizer", "scale"])
def test_the_last_good_checkpoint_stays(part: str, number: float, tmp_path: Path) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    folder = save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=60, keep=1)
    good = snapshot(learner)
    if part == "target_critic":
        next(iter(learner.critic_loss.target_critic_network_params.data.values(True, True))).view(-1)[0] = number
    elif part == "world_model_optimizer":
        next(iter(learner.world_model_optimizer.state.values()))["exp_avg"].view(-1)[0] = number
    elif part == "scale":
        learner.actor_loss.return_scale.high[0] = number
    else:
        ruin(getattr(learner, part), number)
    with pytest.raises(ValueError, match=rf"the learner holds numbers that are not finite: .*\({number}\)"):
        save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=70, keep=1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert load_checkpoint(tmp_path, learner=learner, replay=replay)["env_steps"] == 60
    assert_same(learner.state_dict(), good)


def test_after_the_error_of_an_update_a_resumed_run_goes_on(tmp_path: Path) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=60)
    batch = replay.sequences.sample()
    batch[keys.REWARD][0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        learner.update_world_model(batch)
    resumed, resumed_replay = make_learner(**OPTIONS), mock_replay()
    load_checkpoint(tmp_path, learner=resumed, replay=resumed_replay)
    assert_same(resumed.state_dict(), learner.state_dict())
    assert all(value.isfinite().all() for value in update(resumed, resumed_replay).values())


def test_a_ruined_checkpoint_of_before_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    other = snapshot(learner)
    ruin(learner.actor)
    with monkeypatch.context() as patch:
        patch.setattr("matwm_rl.training.checkpoint.check_finite", lambda state, source: None)
        save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=60)
    learner.load_state_dict(other)
    before = replay.sequences.storage[:].clone()
    with pytest.raises(ValueError, match=r"000000/state.pt holds numbers that are not finite: actor\..* \(nan\)"):
        load_checkpoint(tmp_path, learner=learner, replay=replay)
    assert_same(learner.state_dict(), other)
    assert (replay.sequences.storage[:] == before).all()


@pytest.fixture
def learner() -> Learner:
    return make_learner()


def test_a_ruined_policy_is_not_saved_over_a_good_one(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.pt"
    policy = WorldModelPolicy(learner.world_model, learner.actor, history_length=4)
    save_policy(path, policy)
    good = path.read_bytes()
    ruin(learner.actor, math.inf)
    with pytest.raises(ValueError, match=r"policy.pt holds numbers that are not finite: actor\..* \(inf\)"):
        save_policy(path, policy)
    assert path.read_bytes() == good and load_policy(path).history_length == 4
    with monkeypatch.context() as patch:
        patch.setattr("matwm_rl.training.model_files.check_finite", lambda state, source: None)
        save_policy(path, policy)
    with pytest.raises(ValueError, match="policy.pt holds numbers that are not finite"):
        load_policy(path)
