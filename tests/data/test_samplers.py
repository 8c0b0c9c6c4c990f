from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
)

from matwm_rl.data import RecencySliceSampler, ReplayConfig, UniformSliceSampler

Slice = tuple[int, int]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(begin: int, end: int, num_envs: int) -> TensorDict:
    """[T, E] with the time and the environment of every step."""
    step = torch.arange(begin, end).unsqueeze(-1).expand(-1, num_envs)
    env = torch.arange(num_envs).expand_as(step)
    return TensorDict({"step": step, "env": env}, step.shape)


def buffer(sampler, capacity: int, num_envs: int, written: int, storage_cls=LazyTensorStorage) -> ReplayBuffer:
    storage = storage_cls(capacity * num_envs, ndim=2)
    rb = ReplayBuffer(storage=storage, sampler=sampler, dim_extend=0)
    for begin in range(0, written, 3):
        rb.extend(steps(begin, min(begin + 3, written), num_envs))
    return rb


def draw(rb: ReplayBuffer, num_shares: int, per_share: int, slice_len: int) -> list[tuple[Slice, ...]]:
    """Per share its (step, env) starts, in the order drawn; checks that every slice is consecutive, in one env."""
    sample = rb.sample(num_shares * per_share * slice_len).reshape(num_shares, per_share, slice_len)
    assert (sample["step"].diff(dim=-1) == 1).all()
    assert (sample["env"].diff(dim=-1) == 0).all()
    starts, envs = sample["step"][..., 0].tolist(), sample["env"][..., 0].tolist()
    return [tuple(zip(s, e, strict=True)) for s, e in zip(starts, envs, strict=True)]


def overlap(a: Slice, b: Slice, slice_len: int) -> bool:
    return a[1] == b[1] and abs(a[0] - b[0]) < slice_len


def still_fit(taken: tuple[Slice, ...], length: int, num_envs: int, slice_len: int) -> int:
    """How many slices fit beside those taken: fill every environment from the left."""
    count = 0
    for env in range(num_envs):
        at = 0
        while at + slice_len <= length:
            if any(overlap((at, env), other, slice_len) for other in taken):
                at += 1
            else:
                count += 1
                at += slice_len
    return count


def reference(
    length: int, num_envs: int, slice_len: int, per_share: int, decay: float
) -> dict[tuple[Slice, ...], float]:
    """The probability of every ordered share, by enumeration of what the docstring says."""
    newest = length - slice_len
    shares: dict[tuple[Slice, ...], float] = {(): 1.0}
    for drawn in range(per_share):
        longer: dict[tuple[Slice, ...], float] = {}
        for share, probability in shares.items():
            weights = {
                (start, env): decay ** (num_envs * (newest - start))
                for start, env in product(range(newest + 1), range(num_envs))
                if not any(overlap((start, env), other, slice_len) for other in share)
                and still_fit((*share, (start, env)), length, num_envs, slice_len) >= per_share - drawn - 1
            }
            total = sum(weights.values())
            for start_env, weight in weights.items():
                longer[(*share, start_env)] = probability * weight / total
        shares = longer
    return shares


def assert_distribution(drawn: list[tuple[Slice, ...]], expected: dict[tuple[Slice, ...], float]) -> None:
    counts = Counter(drawn)
    assert set(counts) <= set(expected)
    # Rare cells are pooled: the chi-square approximation wants about five expected in each.
    cells, rare_seen, rare_expected = [], 0, 0.0
    for share, probability in expected.items():
        if probability * len(drawn) >= 5:
            cells.append((counts[share], probability * len(drawn)))
        else:
            rare_seen += counts[share]
            rare_expected += probability * len(drawn)
    if rare_expected >= 5:
        cells.append((rare_seen, rare_expected))
    else:
        assert rare_seen <= 20
    chi_square = sum((seen - want) ** 2 / want for seen, want in cells)
    degrees = len(cells) - 1
    assert degrees >= 2
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(
    ("capacity", "written", "num_envs", "slice_len", "per_share", "decay"),
    [
        (12, 9, 1, 2, 2, 0.8),  # not full
        (9, 9, 1, 2, 2, 0.8),  # full, the cursor back at 0
        (9, 13, 1, 2, 2, 0.8),  # full and wrapped
        (7, 12, 3, 2, 2, 0.9),  # age counts env steps: decay**3 per step
        (7, 12, 3, 2, 2, 1.0),  # without recency
        (9, 13, 1, 2, 2, 0.05),  # most proposals are rejected: rejection hands over to the exact method
        (7, 12, 1, 2, 3, 0.7),  # barely fits: the room for the others decides
        (6, 8, 2, 3, 4, 0.7),  # fits in one way only per environment
        (7, 5, 1, 2, 1, 0.6),
    ],
)
def test_recency_follows_the_documented_distribution(capacity, written, num_envs, slice_len, per_share, decay):
    # Where the slices barely fit, each takes a millisecond.
    num_shares = 4_000 if per_share > 2 else 10_000
    sampler = RecencySliceSampler(slice_len, decay=decay, num_shares=num_shares, generator=generator())
    rb = buffer(sampler, capacity, num_envs, written)
    length, oldest = min(capacity, written), max(0, written - capacity)
    drawn = [tuple((step - oldest, env) for step, env in share) for share in draw(rb, num_shares, per_share, slice_len)]
    assert_distribution(drawn, reference(length, num_envs, slice_len, per_share, decay))


@pytest.mark.parametrize("written", [9, 14])
def test_uniform_follows_the_uniform_distribution(written):
    sampler = UniformSliceSampler(3, num_shares=2, generator=generator())
    rb = buffer(sampler, 10, 3, written)
    oldest, num_starts = max(0, written - 10), min(10, written) - 2
    drawn = [((step - oldest, env),) for share in draw(rb, 2, 10_000, 3) for step, env in share]
    expected = {((start, env),): 1 / (3 * num_starts) for start, env in product(range(num_starts), range(3))}
    assert_distribution(drawn, expected)


def test_old_and_new_data_of_a_large_buffer_in_the_right_proportion():
    # At the paper's size: half of the weight lies on the ages below log(2) / -log(decay).
    sampler = RecencySliceSampler(64, decay=0.9998, num_shares=3, generator=generator())
    rb = buffer(sampler, 50_000, 1, 0)
    rb.extend(steps(0, 50_000, 1))
    starts = torch.tensor([step for _ in range(300) for share in draw(rb, 3, 5, 64) for step, _ in share])
    age = 50_000 - 64 - starts
    new = (age < 3465).float().mean().item()
    assert abs(new - 0.5) < 0.04
    assert age.max() > 20_000


@pytest.mark.parametrize("storage_cls", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("written", [40, 64, 100, 129])
def test_shares_do_not_overlap_and_never_cross_the_cursor(storage_cls, written):
    sampler = RecencySliceSampler(5, decay=0.97, num_shares=4, generator=generator())
    rb = buffer(sampler, 64, 2, written, storage_cls)
    for _ in range(50):
        for share in draw(rb, 4, 6, 5):
            assert not any(overlap(a, b, 5) for i, a in enumerate(share) for b in share[:i])


def test_shares_are_independent_and_may_overlap():
    rb = buffer(RecencySliceSampler(5, num_shares=4, generator=generator()), 12, 1, 12)
    shares = [draw(rb, 4, 1, 5) for _ in range(20)]
    assert any(overlap(first[0], second[0], 5) for first, second, *_ in shares)


@pytest.mark.parametrize("written", [7, 10, 17])
def test_one_dimension(written):
    storage = LazyTensorStorage(10)
    rb = TensorDictReplayBuffer(storage=storage, sampler=RecencySliceSampler(3, generator=generator()), batch_size=6)
    for step in range(written):
        rb.add(TensorDict({"step": torch.tensor(step)}, []))
    for _ in range(30):
        sample = rb.sample().reshape(2, 3)
        assert (sample["step"].diff(dim=-1) == 1).all()
        assert abs(int(sample["step"][0, 0] - sample["step"][1, 0])) >= 3


def test_barely_fitting_buffer_never_gets_stuck():
    # Three slices of four in twelve steps: a single arrangement.
    rb = buffer(RecencySliceSampler(4, num_shares=5, generator=generator()), 12, 1, 17)
    for _ in range(20):
        for share in draw(rb, 5, 3, 4):
            assert sorted(share) == [(5, 0), (9, 0), (13, 0)]


def test_can_sample_and_errors():
    sampler = RecencySliceSampler(4, num_shares=2)
    rb = buffer(sampler, 12, 2, 0)
    assert not sampler.can_sample(rb.storage, 8)
    with pytest.raises(RuntimeError, match="holds 0 steps"):
        rb.sample(8)
    rb.extend(steps(0, 7, 2))
    assert sampler.can_sample(rb.storage, 2 * 2 * 4)
    assert not sampler.can_sample(rb.storage, 2 * 3 * 4)
    with pytest.raises(RuntimeError, match="at least 8 steps of each"):
        rb.sample(2 * 3 * 4)
    with pytest.raises(ValueError, match="multiple of slice_len"):
        rb.sample(12)
    uniform = UniformSliceSampler(8)
    assert not uniform.can_sample(rb.storage, 8)
    rb.extend(steps(7, 8, 2))
    assert uniform.can_sample(rb.storage, 800)
    rb.empty()
    assert not sampler.can_sample(rb.storage, 8)


@pytest.mark.parametrize(
    "arguments", [{"slice_len": 0}, {"slice_len": 2, "decay": 0.0}, {"slice_len": 2, "decay": 1.1}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="got"):
        RecencySliceSampler(**arguments)


def test_decay_is_the_configured_one_by_default():
    assert RecencySliceSampler(2).decay == ReplayConfig().recency_decay
