"""Every function of tensors against plain Python, element by element; sampling against its frequencies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from matwm_rl import functional as F
from tests.helpers import grads


def test_agents_first_and_last_are_inverse_and_keep_events() -> None:
    value = torch.randn(2, 3, 4, 5, 6)
    for event_dims in range(4):
        moved = F.agents_first(value, event_dims)
        agent_dim = value.ndim - 1 - event_dims
        for n in range(value.shape[agent_dim]):
            assert torch.equal(moved[n], value.select(agent_dim, n))
        assert torch.equal(F.agents_last(moved, event_dims), value)


def slow_segments(done: list[bool]) -> list[int]:
    segments, current = [], 0
    for ended in done:
        segments.append(current)
        current += ended
    return segments


def test_segment_ids() -> None:
    done = torch.rand(4, 3, 9) < 0.3
    segments = F.segment_ids(done)
    for b, n in itertools.product(range(4), range(3)):
        assert segments[b, n].tolist() == slow_segments(done[b, n].tolist())


def test_causal_segment_mask() -> None:
    segments = F.segment_ids(torch.rand(4, 9) < 0.3)
    mask = F.causal_segment_mask(segments)
    for b, query, key in itertools.product(range(4), range(9), range(9)):
        allowed = key <= query and bool(segments[b, query] == segments[b, key])
        assert bool(mask[b, query, key]) is allowed


def test_shift_within_segments() -> None:
    segments = F.segment_ids(torch.rand(4, 9) < 0.3)
    value = torch.randn(4, 9, 2)
    shifted = F.shift_within_segments(value, segments)
    for b, t in itertools.product(range(4), range(9)):
        starts = t == 0 or segments[b, t] != segments[b, t - 1]
        expected = torch.zeros(2) if starts else value[b, t - 1]
        assert torch.equal(shifted[b, t], expected)


@pytest.mark.parametrize("draw", [F.sample_index, F.race])
@pytest.mark.parametrize("factor", [1.0, 7.5, 1e-12])
def test_categories_are_drawn_with_the_right_frequencies(draw: Callable[[Tensor], Tensor], factor: float) -> None:
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]])
    draws = draw((factor * probs).expand(40_000, 2, 3))
    assert draws.shape == (40_000, 2) and draws.dtype == torch.int64
    counts = torch.nn.functional.one_hot(draws, 3).float().mean(0)
    # Five standard deviations of the mean of 40,000 draws.
    assert (counts - probs).abs().max() < 5 * 0.5 / math.sqrt(40_000)
    assert counts[1, 1] == 0


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 1), (2, 0, 3)], ids=str)
def test_softmax_over_few_is_softmax(float64: None, shape: tuple[int, ...]) -> None:
    logits = 3 * torch.randn(shape, requires_grad=True)
    ours, theirs = F.softmax_over_few(logits), logits.softmax(-1)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(shape)
    for one, other in zip(*(grads((weight * value).sum(), [logits]) for value in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)
    masked = logits.detach().masked_fill(torch.arange(shape[-1]) == 1, -torch.inf)
    torch.testing.assert_close(F.softmax_over_few(masked), masked.softmax(-1))


def test_sample_index_of_rows_with_different_sums() -> None:
    weights = torch.tensor([[2.0, 6.0], [0.25, 0.75]])
    drawn = F.sample_index(weights.expand(40_000, 2, 2)).float().mean(0)
    assert (drawn - 0.75).abs().max() < 5 * 0.5 / math.sqrt(40_000)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 1), (2, 3, 5)], ids=str)
def test_sample_index_leaves_its_argument_alone(shape: tuple[int, ...]) -> None:
    weights = torch.rand(shape, requires_grad=True)
    before = weights.detach().clone()
    assert F.sample_index(weights).shape == shape[:-1]
    assert torch.equal(weights.detach(), before)
    assert weights._version == 0
    # And the graph that gave the weights may still be walked back.
    probs = weights.softmax(-1)
    F.sample_index(probs)
    probs.square().sum().backward()
    assert weights.grad is not None


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_sample_index_draws_no_impossible_class_at_the_edges(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, uniform))
    legal = torch.rand(2_000, 7) < 0.5
    legal[:, 3] = True
    probs = torch.randn(2_000, 7).masked_fill(~legal, -torch.inf).softmax(-1)
    assert legal.gather(-1, F.sample_index(probs).unsqueeze(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compute_dtype_is_that_of_a_product(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2, dtype=dtype)
    assert F.compute_dtype(x) == (x @ x).dtype == dtype
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert F.compute_dtype(x) == (x @ x).dtype == torch.bfloat16


def test_autocast_takes_products_in_the_precision_asked_for() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with F.autocast(x.device, precision):
            assert (x @ x).dtype == dtype
        assert (x @ x).dtype == torch.float32
    for precision in ("float16", "bf16", ""):
        with pytest.raises(ValueError, match=f"'float32' or 'bfloat16', got '{precision}'"):
            F.autocast(x.device, precision)


def test_widen_narrows_nothing() -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        value = torch.randn(5).to(dtype)
        assert F.at_least_float32(value).dtype == expected
        assert torch.equal(F.at_least_float32(value).double(), value.double())
