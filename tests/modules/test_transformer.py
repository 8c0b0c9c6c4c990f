from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from matwm_rl.functional import causal_segment_mask, segment_ids
from matwm_rl.modules import Transformer
from matwm_rl.modules import transformer as module
from tests.helpers import grads, randomize


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both forms of attention over whole sequences: the fused kernel, and plain products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=[module.IN_CACHE, 0], ids=["small", "large"])
def once_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of attention of one query over the cache: that of small tensors, and that of large ones."""
    monkeypatch.setattr(module, "IN_CACHE", request.param)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


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
def test_parallel_pass_is_attention_with_rotary_positions(float64: None, matmul_precision: None) -> None:
    model, x = make_transformer(), torch.randn(3, 6, 16)
    mask = causal_segment_mask(segment_ids(torch.rand(3, 6) < 0.3))
    out = model(x, mask)
    for b in range(3):
        # Angles are float32 in the module.
        torch.testing.assert_close(out[b], slow_transformer(model, x[b], mask[b]), rtol=1e-5, atol=1e-6)


def test_both_forms_of_attention_have_the_same_gradients(float64: None) -> None:
    """In training the choice of precision must change nothing but the rounding."""
    model, x = make_transformer(), torch.randn(3, 6, 16, requires_grad=True)
    mask = causal_segment_mask(segment_ids(torch.rand(3, 6) < 0.3))
    gradients, before = [], torch.get_float32_matmul_precision()
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        gradients.append(grads(model(x, mask).square().sum(), [x, *model.parameters()]))
    torch.set_float32_matmul_precision(before)
    for fused, *plain in zip(*gradients, strict=True):
        for grad in plain:
            torch.testing.assert_close(grad, fused)


def prefill(model: Transformer, x: Tensor, mask: Tensor, room: int) -> tuple[list[Tensor], module.KVCache]:
    """Outputs so far, and the cache; without a position, an empty cache."""
    if not x.shape[1]:
        return [], model.empty_cache(x.shape[0], room)
    out, cache = model.prefill(x, mask, room)
    return [out], cache


@torch.no_grad()
@pytest.mark.parametrize("prefilled", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_cached_steps_equal_the_parallel_pass(
    float64: None, matmul_precision: None, once_form: None, prefilled: int, per_sequence: bool
) -> None:
    model, x = make_transformer(), torch.randn(3, 7, 16)
    mask = causal(7).expand(3, 7, 7) if per_sequence else causal(7)
    whole = model(x, mask)
    outputs, cache = prefill(model, x[:, :prefilled], mask[..., :prefilled, :prefilled], 7 - prefilled)
    assert cache.length == prefilled and cache.key.shape[1] == 7
    outputs += [model.step(x[:, t], cache) for t in range(prefilled, 7)]
    torch.testing.assert_close(torch.stack(outputs, 1), whole[:, max(0, prefilled - 1) :], rtol=1e-10, atol=1e-12)
    assert cache.length == 7


@torch.no_grad()
@pytest.mark.parametrize("start", [1, 3])
def test_cached_steps_go_on_in_the_last_positions_episode_alone(
    float64: None, matmul_precision: None, once_form: None, start: int
) -> None:
    """Every sequence's own episode: what its last cached position sees, its later ones see."""
    model, x = make_transformer(), torch.randn(3, 7, 16)
    done = torch.zeros(3, 7, dtype=torch.bool)
    done[0, 0], done[1, start - 1] = True, True
    mask = causal_segment_mask(segment_ids(done))
    whole = model(x, mask)
    outputs, cache = prefill(model, x[:, : start + 1], mask[:, : start + 1, : start + 1], 6 - start)
    outputs += [model.step(x[:, t], cache) for t in range(start + 1, 7)]
    torch.testing.assert_close(torch.stack(outputs, 1), whole[:, start:], rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_cached_steps_in_bfloat16_are_near_those_in_float32(once_form: None, precision: str) -> None:
    model, x = randomize(Transformer(16, num_layers=2, num_heads=2), 0.05).eval(), torch.randn(64, 7, 16)
    whole = model(x, causal(7))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", torch.bfloat16):
        out, cache = model.prefill(x[:, :3], causal(3), room=4)
        outputs = [out, *(model.step(x[:, t], cache) for t in range(3, 7))]
        parallel = model(x, causal(7))
    torch.set_float32_matmul_precision(before)
    assert cache.key.dtype == cache.value.dtype == torch.bfloat16
    for one in (torch.stack(outputs, 1).float(), parallel[:, 2:].float()):
        error = (one - whole[:, 2:]).square().mean().sqrt() / whole[:, 2:].square().mean().sqrt()
        assert 1e-5 < error < 0.02


@torch.no_grad()
def test_each_episode_is_as_if_alone(float64: None, matmul_precision: None) -> None:
    model, x = make_transformer(), torch.randn(1, 9, 16)
    done = torch.zeros(1, 9, dtype=torch.bool)
    done[0, [2, 6]] = True
    out = model(x, causal_segment_mask(segment_ids(done)))
    for begin, end in ((0, 3), (3, 7), (7, 9)):
        length = end - begin
        alone = model(x[:, begin:end], causal(length))
        # Positions restart: rotary attention knows distances alone (up to float32 angles).
        torch.testing.assert_close(out[:, begin:end], alone, rtol=1e-5, atol=1e-6)


def test_no_gradient_from_the_future_or_another_episode(matmul_precision: None) -> None:
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
def test_invalid_cached_positions_have_no_influence(matmul_precision: None, once_form: None) -> None:
    model, x = make_transformer(), torch.randn(2, 5, 16)
    other = x.clone()
    other[:, :2] = 100 * torch.randn(2, 2, 16)
    outputs = []
    for tokens in (x, other):
        valid = torch.tensor([0, 0, 1, 1]).expand(2, 4)
        last, cache = model.prefill(tokens[:, :4], causal_segment_mask(valid), room=1)
        outputs.append(torch.stack([last, model.step(tokens[:, 4], cache)]))
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


@torch.no_grad()
def test_full_cache_says_so() -> None:
    model, x = make_transformer(), torch.randn(1, 2, 16)
    full = [model.prefill(x, causal(2), room=0)[1], model.empty_cache(1, 2)]
    for t in range(2):
        model.step(x[:, t], full[1])
    for cache in full:
        with pytest.raises(ValueError, match="made for 2 positions"):
            model.step(torch.randn(1, 16), cache)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 3])
def test_replaced_sequences_go_on_from_their_new_past_and_the_others_from_theirs(
    float64: None, once_form: None, length: int
) -> None:
    model, x = make_transformer(), torch.randn(3, 9, 16)
    past, rows = torch.randn(2, length, 16), torch.tensor([True, False, True])
    _, cache = model.prefill(x[:, :4], causal(4), room=5)
    new = prefill(model, past, causal(length), room=2)[1]
    cache.replace_rows(rows, new)
    outputs = torch.stack([model.step(x[:, t], cache) for t in range(4, 9)], 1)
    torch.testing.assert_close(outputs[1:2], model(x[1:2], causal(9))[:, 4:], rtol=1e-10, atol=1e-12)
    alone = model(torch.cat([past, x[rows, 4:]], 1), causal(length + 5))
    # Angles are float32 in the module.
    torch.testing.assert_close(outputs[rows], alone[:, length:], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_new_past_keeps_what_it_may_not_see(float64: None) -> None:
    model, x, past = make_transformer(), torch.randn(2, 8, 16), torch.randn(1, 3, 16)
    _, cache = model.prefill(x[:, :4], causal(4), room=4)
    visible = causal_segment_mask(torch.tensor([0, 1, 1]))
    cache.replace_rows(torch.tensor([False, True]), model.prefill(past, visible, room=0)[1])
    outputs = torch.stack([model.step(x[:, t], cache) for t in range(4, 8)], 1)
    alone = model(torch.cat([past[:, 1:], x[1:, 4:]], 1), causal(6))
    torch.testing.assert_close(outputs[1:], alone[:, 2:], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_longer_past_does_not_fit() -> None:
    model, x = make_transformer(), torch.randn(2, 3, 16)
    cache = model.prefill(x[:, :2], causal(2), room=4)[1]
    with pytest.raises(ValueError, match="cannot put 3 positions into a cache of 2"):
        cache.replace_rows(torch.tensor([True, True]), model.prefill(x, causal(3), room=0)[1])


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_forgotten_positions_are_seen_no_more_and_make_room(float64: None, once_form: None, count: int) -> None:
    model, x = make_transformer(), torch.randn(3, 11, 16)
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[1, :3] = False
    mask = causal(5) & (seen.unsqueeze(1) | ~seen.unsqueeze(2))
    _, cache = model.prefill(x[:, :5], mask, room=1)
    model.step(x[:, 5], cache)
    cache.forget(count)
    assert cache.length == 6 - count
    outputs = torch.stack([model.step(x[:, t], cache) for t in range(6, 6 + count)], 1) if count else x[:, :0]
    with pytest.raises(ValueError, match="full"):
        model.step(x[:, 0], cache)
    # In one pass: what was cached before has seen everything, what comes after sees nothing that was forgotten.
    whole = causal(6 + count).repeat(3, 1, 1)
    whole[:, :5, :5] = mask
    whole[1, 5:, :3] = False
    whole[:, 6:, :count] = False
    expected = model(x[:, : 6 + count], whole)[:, 6:]
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_and_never_on_a_cache() -> None:
    model, x = make_transformer(dropout=0.5), torch.randn(2, 4, 16)
    model.train()
    assert not torch.equal(model(x, causal(4)), model(x, causal(4)))

    @torch.no_grad()
    def cached() -> Tensor:
        last, cache = model.prefill(x[:, :3], causal(3), room=1)
        return torch.stack([last, model.step(x[:, 3], cache)], 1)

    first, second = cached(), cached()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(x, causal(4))[:, 2:])


def test_odd_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        Transformer(12, num_layers=1, num_heads=4)
