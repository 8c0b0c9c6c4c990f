from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from matwm_rl.functional import causal_segment_mask, segment_ids
from matwm_rl.modules import Transformer
from tests.helpers import grads, randomize


def make_transformer(**kwargs: float) -> Transformer:
    return randomize(Transformer(16, num_layers=2, num_heads=2, **({"dropout": 0.0} | kwargs)))


def slow_rotate(x: Tensor, position: int) -> Tensor:
    """Rotary embedding: dimensions i and i + half turn by position * 10000^(-i / half)."""
    half = x.shape[0] // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10_000.0 ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


def slow_transformer(model: Transformer, x: Tensor, mask: Tensor) -> Tensor:
    """One sequence ``[T, D]``, one query and one head at a time."""
    T, D = x.shape
    size = D // model.num_heads
    for block in model.blocks:
        normed = layer_norm(x, (D,), block.norm_attention.weight, block.norm_attention.bias)
        query, key, value = (normed @ block.qkv.weight.T).chunk(3, -1)
        attended = torch.zeros_like(x)
        for t in range(T):
            for head in range(model.num_heads):
                part = slice(head * size, (head + 1) * size)
                allowed = [s for s in range(T) if mask[t, s]]
                scores = [
                    torch.dot(slow_rotate(query[t, part], t), slow_rotate(key[s, part], s)) / math.sqrt(size)
                    for s in allowed
                ]
                weights = torch.stack(scores).softmax(0)
                attended[t, part] = sum(w * value[s, part] for w, s in zip(weights, allowed, strict=True))
        x = x + attended @ block.out.weight.T
        normed = layer_norm(x, (D,), block.norm_feedforward.weight, block.norm_feedforward.bias)
        first, last = block.feedforward[0], block.feedforward[-1]
        x = x + silu(normed @ first.weight.T + first.bias) @ last.weight.T + last.bias
    return layer_norm(x, (D,), model.norm.weight, model.norm.bias)


@torch.no_grad()
def test_parallel_pass_is_attention_with_rotary_positions(float64: None) -> None:
    model, x = make_transformer(), torch.randn(3, 6, 16)
    mask = causal_segment_mask(segment_ids(torch.rand(3, 6) < 0.3))
    out = model(x, mask)
    for b in range(3):
        # Angles are float32 in the module.
        torch.testing.assert_close(out[b], slow_transformer(model, x[b], mask[b]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 1, 2], [1, 6]])
def test_cached_steps_equal_the_parallel_pass(float64: None, chunks: list[int]) -> None:
    model, x = make_transformer(), torch.randn(3, 7, 16)
    whole = model(x, torch.ones(7, 7, dtype=torch.bool).tril())
    cache = model.make_cache(3, 7)
    parts = [model.cached(part, cache) for part in x.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    assert cache.length == 7


@torch.no_grad()
def test_each_episode_is_as_if_alone(float64: None) -> None:
    model, x = make_transformer(), torch.randn(1, 9, 16)
    done = torch.zeros(1, 9, dtype=torch.bool)
    done[0, [2, 6]] = True
    out = model(x, causal_segment_mask(segment_ids(done)))
    for begin, end in ((0, 3), (3, 7), (7, 9)):
        length = end - begin
        alone = model(x[:, begin:end], torch.ones(length, length, dtype=torch.bool).tril())
        # Positions restart: rotary attention knows distances alone (up to float32 angles).
        torch.testing.assert_close(out[:, begin:end], alone, rtol=1e-5, atol=1e-6)


def test_no_gradient_from_the_future_or_another_episode() -> None:
    model, x = make_transformer(), torch.randn(2, 6, 16, requires_grad=True)
    done = torch.zeros(2, 6, dtype=torch.bool)
    done[:, 2] = True
    out = model(x, causal_segment_mask(segment_ids(done)))
    for t in range(6):
        (grad,) = grads(out[:, t].square().sum(), [x])
        start = 0 if t <= 2 else 3
        assert grad[:, start : t + 1].abs().sum(-1).all()
        assert not grad[:, :start].any() and not grad[:, t + 1 :].any()


@torch.no_grad()
def test_invalid_cached_positions_have_no_influence() -> None:
    model, x = make_transformer(), torch.randn(2, 5, 16)
    other = x.clone()
    other[:, :2] = 100 * torch.randn(2, 2, 16)
    outputs = []
    for tokens in (x, other):
        cache = model.make_cache(2, 5)
        cache.valid[:, :2] = False
        valid = cache.valid[:, :4]
        model.cached(tokens[:, :4], cache, causal_segment_mask(valid.long()))
        outputs.append(model.cached(tokens[:, 4:], cache))
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


def test_full_cache_says_so() -> None:
    model = make_transformer()
    cache = model.make_cache(1, 2)
    model.cached(torch.randn(1, 2, 16), cache)
    with pytest.raises(ValueError, match="cache of 2 positions holds 2"):
        model.cached(torch.randn(1, 1, 16), cache)


def test_dropout_acts_in_training_and_never_on_a_cache() -> None:
    model, x = make_transformer(dropout=0.5), torch.randn(2, 4, 16)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    model.train()
    assert not torch.equal(model(x, mask), model(x, mask))
    first, second = (model.cached(x, model.make_cache(2, 4)) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(x, mask))


def test_odd_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        Transformer(12, num_heads=4)
