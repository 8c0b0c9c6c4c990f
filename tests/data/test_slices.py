"""Where slices lie in a storage: the order of time, the layout of a sample, restoring and sending samplers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
    TensorStorage,
)

from matwm_rl.data import RecencySliceSampler, UniformSliceSampler, timeline
from tests.data.test_samplers import buffer, draw, generator, steps


@pytest.mark.parametrize("buffer_cls", [ReplayBuffer, TensorDictReplayBuffer])
def test_a_sample_of_a_three_dimensional_storage_has_its_agents_side_by_side(buffer_cls):
    """Share i of the same draws from a [time, env] storage is what agent i reads, ``[B, T, N]``."""
    N, B, T = 3, 4, 2
    storage = LazyTensorStorage(10 * 2 * N, ndim=3)
    sampler = RecencySliceSampler(T, num_shares=N, generator=generator())
    rb = buffer_cls(storage=storage, sampler=sampler, dim_extend=0, batch_size=N * B * T)
    data = steps(0, 14, 2).unsqueeze(-1).expand(14, 2, N).clone()
    data["agent"] = torch.arange(N).expand_as(data["step"]).clone()
    rb.extend(data[:9])
    rb.extend(data[9:])
    sample = rb.sample()
    assert sample.batch_size == (B, T, N)
    assert torch.equal(sample["agent"], torch.arange(N).expand(B, T, N))
    flat = buffer(RecencySliceSampler(T, num_shares=N, generator=generator()), 10, 2, 14)
    shares = flat.sample(N * B * T).reshape(N, B, T).permute(1, 2, 0)
    assert all(torch.equal(sample[key], shares[key]) for key in ("step", "env"))
    if buffer_cls is TensorDictReplayBuffer:
        assert sample["index"].shape == (B, T, N, 3)
        index = tuple(sample["index"].unbind(-1))
        assert all(torch.equal(storage[index][key], sample[key]) for key in ("step", "env", "agent"))
    rb.set_sampler(UniformSliceSampler(2, num_shares=2))
    with pytest.raises(ValueError, match="3 agents.*num_shares=2"):
        rb.sample()


def test_storages_without_an_order_of_time():
    with pytest.raises(TypeError, match="ListStorage"):
        timeline(ListStorage(5))
    with pytest.raises(ValueError, match="ndim=4"):
        timeline(LazyTensorStorage(5, ndim=4))
    rb = buffer(UniformSliceSampler(2), 9, 1, 12)
    second = ReplayBuffer(storage=rb.storage, sampler=UniformSliceSampler(2), dim_extend=0)
    assert timeline(rb.storage).oldest == 3  # the second has written nothing, so its cursor says nothing
    second.extend(steps(0, 2, 1))
    with pytest.raises(RuntimeError, match="2 buffers have written"):
        rb.sample(2)


def test_a_storage_filled_from_outside_starts_at_zero():
    storage = TensorStorage(steps(0, 6, 2), ndim=2)
    rb = ReplayBuffer(storage=storage, sampler=UniformSliceSampler(5, generator=generator()), dim_extend=0)
    assert {share[0][0] for _ in range(20) for share in draw(rb, 1, 1, 5)} == {0, 1}


def test_emptying_sets_the_cursor_back_whatever_becomes_of_the_count():
    for empty_write_count in (True, False):
        rb = buffer(UniformSliceSampler(5, generator=generator()), 6, 1, 8)
        rb.empty(empty_write_count=empty_write_count)
        rb.extend(steps(10, 16, 1))
        assert timeline(rb.storage) == (6, 0, 1)
        assert {share[0][0] for _ in range(20) for share in draw(rb, 1, 1, 5)} == {10, 11}


def test_a_buffer_that_only_reads_finds_the_cursor():
    rb = buffer(RecencySliceSampler(4), 16, 2, 16)
    reader = ReplayBuffer(
        storage=rb.storage, sampler=UniformSliceSampler(4, generator=generator()), writer=ImmutableDatasetWriter()
    )
    for written in range(16, 50):
        rb.extend(steps(written, written + 1, 2))
        seen = [share[0][0] for share in draw(reader, 8, 1, 4)]
        assert written - 15 <= min(seen) and max(seen) <= written - 3


@pytest.mark.parametrize("storage_cls", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("way", ["state_dict", "dumps"])
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized")
def test_sampling_goes_on_exactly_after_a_restore(storage_cls, way, used_before, tmp_path: Path):
    def build(seed: int, written: int) -> tuple[ReplayBuffer, ReplayBuffer]:
        recency = RecencySliceSampler(4, decay=0.9, num_shares=2, generator=generator(seed))
        rb = buffer(recency, 20, 2, written, storage_cls)
        uniform = UniformSliceSampler(4, generator=generator(seed + 100))
        return rb, ReplayBuffer(storage=rb.storage, sampler=uniform, writer=ImmutableDatasetWriter())

    rb, reader = build(0, 27)
    rb.sample(16), reader.sample(16)
    other, other_reader = build(5, 31 if used_before else 0)
    if way == "state_dict":
        torch.save({"rb": rb.state_dict(), "reader": reader.sampler.state_dict()}, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        other.load_state_dict(state["rb"])
        other_reader.sampler.load_state_dict(state["reader"])
    else:
        rb.dumps(tmp_path / "rb")
        reader.sampler.dumps(tmp_path / "reader")
        other.loads(tmp_path / "rb")
        other_reader.sampler.loads(tmp_path / "reader")
    assert timeline(other.storage) == timeline(rb.storage) == (20, 7, 2)
    for written in range(27, 35):
        assert draw(rb, 2, 3, 4) == draw(other, 2, 3, 4)
        assert draw(reader, 5, 1, 4) == draw(other_reader, 5, 1, 4)
        rb.extend(steps(written, written + 1, 2))
        other.extend(steps(written, written + 1, 2))


def test_generator_of_the_buffer_is_used_where_the_sampler_has_none():
    def build() -> ReplayBuffer:
        rb = ReplayBuffer(
            storage=LazyTensorStorage(40), sampler=RecencySliceSampler(2), batch_size=8, generator=generator(3)
        )
        rb.extend(TensorDict({"step": torch.arange(40)}, [40]))
        return rb

    first, second = build(), build()
    torch.manual_seed(0)
    a = [first.sample()["step"].tolist() for _ in range(3)]
    torch.manual_seed(1)
    assert a == [second.sample()["step"].tolist() for _ in range(3)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_copies_go_on_from_the_same_random_state(copied: Callable[[Any], Any]) -> None:
    sampler = RecencySliceSampler(3, generator=generator())
    storage = buffer(sampler, 40, 1, 40).storage
    one, other = (each.sample(storage, 6)[0] for each in (sampler, copied(sampler)))
    assert all(map(torch.equal, one, other))
    assert repr(copied(sampler)) == repr(sampler)
    assert copied(UniformSliceSampler(3)).state_dict() == {}


def test_a_generator_is_sent_to_other_processes_without_shared_memory() -> None:
    """As tensors do not survive on their way there when nobody holds them here."""
    pickled = bytes(ForkingPickler.dumps(UniformSliceSampler(3, generator=generator())))
    assert b"rebuild" not in pickled
    assert b"rebuild" in bytes(ForkingPickler.dumps(generator().get_state()))
