"""A learner that is saved, loaded or copied goes on exactly."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from matwm_rl.training.learner import Learner
from tests.helpers import make_learner, make_model, mock_replay
from tests.training.helpers import OPTIONS, assert_same, changed_parts, snapshot, update


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, with the loader that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_restored_learner_acts_as_the_one_that_was_saved() -> None:
    learner, restored = make_learner(**OPTIONS), make_learner(**OPTIONS)
    update(learner, mock_replay())
    restored.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert not learner.world_model.training
    assert not restored.world_model.training


def update_from(learner: Learner, sequences: TensorDict, starts: TensorDict, seed: int) -> None:
    torch.manual_seed(seed)
    learner.update_world_model(sequences)
    learner.update_agents(starts)


@pytest.mark.parametrize("share_by_group", [False, True])
def test_resumed_learner_goes_on_exactly(share_by_group: bool) -> None:
    learner, replay = make_learner(share_by_group=share_by_group, **OPTIONS), mock_replay()
    data = [(replay.sequences.sample(), replay.starts.sample()) for _ in range(5)]
    for seed, (sequences, starts) in enumerate(data[:3]):
        update_from(learner, sequences, starts, seed)
    state = saved(learner.state_dict())
    resumed = make_learner(share_by_group=share_by_group, **OPTIONS)
    resumed.load_state_dict(state)
    assert_same(resumed.state_dict(), learner.state_dict())
    for seed, (sequences, starts) in enumerate(data[3:]):
        update_from(learner, sequences, starts, seed)
        update_from(resumed, sequences, starts, seed)
    assert_same(resumed.state_dict(), learner.state_dict())
    assert resumed.updates == 5


def test_loading_keeps_the_objects_and_their_ties() -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    update(learner, replay)
    state = saved(learner.state_dict())
    resumed = make_learner(**OPTIONS)
    objects = [
        id(p) for p in (*resumed.world_model.parameters(), *resumed.actor.parameters(), *resumed.critic.parameters())
    ]
    resumed.load_state_dict(state)
    assert objects == [
        id(p) for p in (*resumed.world_model.parameters(), *resumed.actor.parameters(), *resumed.critic.parameters())
    ]
    before = snapshot(resumed)
    update(resumed, replay)
    # The optimizers still step what acts, dreams and evaluates, and the EMA copy still follows.
    assert {"world_model", "actor", "critic", "target_critic"} <= changed_parts(resumed, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copied_learner_goes_on_exactly_and_leaves_the_original_alone(copied: Callable[[Learner], Learner]) -> None:
    learner, replay = make_learner(**OPTIONS), mock_replay()
    data = [(replay.sequences.sample(), replay.starts.sample()) for _ in range(4)]
    for seed, (sequences, starts) in enumerate(data[:2]):
        update_from(learner, sequences, starts, seed)
    before, other = snapshot(learner), copied(learner)
    for seed, (sequences, starts) in enumerate(data[2:]):
        update_from(other, sequences, starts, seed)
    assert_same(learner.state_dict(), before)
    for seed, (sequences, starts) in enumerate(data[2:]):
        update_from(learner, sequences, starts, seed)
    assert_same(other.state_dict(), learner.state_dict())


def test_state_of_another_size_is_refused() -> None:
    state = make_learner().state_dict()
    with pytest.raises(ValueError, match=r"has shape \(2, 5, 16\), expected \(2, 5, 32\)"):
        make_learner(make_model(hidden_size=32)).load_state_dict(state)
