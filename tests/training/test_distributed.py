"""A distributed learner is one learner: the same weights in every process, and those of the whole batch."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from matwm_rl.training import distribute, distributed
from tests.helpers import make_learner
from tests.training import processes
from tests.training.helpers import leaves


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two connected processes returned."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(processes.run, (str(folder),), nprocs=processes.WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes.WORLD)]


def assert_close(one: Any, other: Any) -> None:
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        same = torch.allclose(value, other[path], 1e-7, 1e-9) if isinstance(value, Tensor) else value == other[path]
        assert same, path


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", processes.CASES)
def test_two_processes_with_half_of_a_batch_each_learn_as_one_with_the_whole(
    results: list[dict[str, Any]], name: str
) -> None:
    cfg = processes.CASES[name]()
    living = [part["agents", "alive"].sum() for part in processes.make_batches(cfg)[0][0]]
    assert living[0] != living[1]  # else means of the parts would have the mean of the whole
    whole = processes.learn(processes.make_learner(cfg), cfg, None)
    for part in (result["learn_in_parts"][name] for result in results):
        assert_close(part["state"], whole["state"])
        assert_close(part["metrics"], whole["metrics"])


@pytest.mark.parametrize("name", processes.CASES)
def test_after_every_update_the_state_is_the_same_in_every_process(results: list[dict[str, Any]], name: str) -> None:
    first, second = (result["learn_in_parts"][name]["checksums"] for result in results)
    assert first == second
    assert len(set(first)) == 2 * processes.UPDATES  # and every update has changed it


def test_a_group_outlives_the_learners_that_use_it() -> None:
    """Otherwise PyTorch's destructors wait for each other, now and then for ever."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    try:
        learner = distribute(make_learner())
        assert learner.group is not None
        del learner
        gc.collect()
        assert len([one for one in distributed._groups if one is group]) == 1
    finally:
        dist.destroy_process_group()


def test_a_number_that_is_not_finite_in_one_process_is_an_error_in_all_of_them(results: list[dict[str, Any]]) -> None:
    for messages, changed, _ in (result["fail_in_one"] for result in results):
        assert len(messages) == 2 and not changed
    (good, _, states), (bad, _, same_states) = (result["fail_in_one"] for result in results)
    assert states == same_states  # norms, too
    assert all("the batch holds nan" in message for message in bad)
    assert not any("the batch holds" in message for message in good)


def test_parts_of_other_sizes_are_an_error_in_all_processes(results: list[dict[str, Any]]) -> None:
    first, second = (result["give_parts_of_other_sizes"] for result in results)
    assert first == second and len(first) == 2
    assert all("process 1 has a part of" in message and "of the same size" in message for message in first)


def test_the_bonus_on_signalling_counts_over_parts_that_move_differently(results: list[dict[str, Any]]) -> None:
    bonus, gradient = processes.signal(None)
    assert bonus and gradient.any()
    for of_all in (result["signal"] for result in results):
        torch.testing.assert_close(of_all, [bonus, gradient])


def test_learners_that_cannot_learn_together_are_refused(results: list[dict[str, Any]]) -> None:
    assert results[0]["refuse"] == results[1]["refuse"]
    random, settings, networks = results[0]["refuse"]
    assert "processes 0 and 1 draw the same random numbers" in random and "manual_seed(seed + rank)" in random
    assert "process 1 has other settings" in settings
    assert "the learner of process 1 does not fit" in networks


def test_the_world_model_is_sent_once_and_is_in_one_optimizer(results: list[dict[str, Any]]) -> None:
    for sent in (result["send"] for result in results):
        assert set(sent["listed"]) == {1}
        # A pickled tensor has some 400 bytes besides its numbers; another copy of the world model would be more.
        assert (
            sent["state"]
            < sent["sent"]
            < sent["state"] + 500 * sent["entries"]
            < sent["state"] + sent["of the world model"]
        )


def test_processes_must_be_connected() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        distribute(processes.make_learner(processes.paper()))


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_copy_of_a_distributed_learner_learns_alone() -> None:
    learner = distribute(processes.make_learner(processes.paper()))
    learner_of_its_own = copy.deepcopy(learner)
    assert learner.group is not None and learner_of_its_own.group is None
    learner_of_its_own.update_world_model(processes.make_batches(processes.paper())[0][0][0])
