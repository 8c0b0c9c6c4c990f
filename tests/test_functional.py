"""Every formula against plain Python arithmetic, element by element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import td_lambda_return_estimate

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


def slow_kl(q: Tensor, p: Tensor) -> float:
    return sum(
        float(q[k, c]) * (math.log(float(q[k, c])) - math.log(float(p[k, c])))
        for k, c in itertools.product(range(q.shape[0]), range(q.shape[1]))
    )


def test_categorical_kl_is_from_the_first_to_the_second(float64: None) -> None:
    q, p = (torch.randn(5, 3, 4).softmax(-1) for _ in range(2))
    kl = F.categorical_kl(q.log(), p.log())
    for b in range(5):
        assert float(kl[b]) == pytest.approx(slow_kl(q[b], p[b]), rel=1e-9)
        assert float(kl[b]) != pytest.approx(slow_kl(p[b], q[b]), rel=1e-3)


def test_balanced_kl_is_the_kl_twice_and_moves_one_side_each(float64: None) -> None:
    q_logits, p_logits = (torch.randn(3, 3, 4) for _ in range(2))
    q_logits.requires_grad_()
    p_logits.requires_grad_()
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    dynamics, representation = F.balanced_kl(log_q, log_p)
    values = torch.stack([dynamics, representation]).detach()
    for b in range(3):
        expected = slow_kl(log_q[b].exp().detach(), log_p[b].exp().detach())
        assert values[:, b].tolist() == pytest.approx([expected, expected], rel=1e-9)

    for loss, moved, still in ((dynamics, p_logits, q_logits), (representation, q_logits, p_logits)):
        grad, none = grads(loss.sum(), [moved, still])
        assert not none.any()
        assert grad.flatten(1).any(1).all()


def test_balanced_kl_has_the_gradients_of_two_kls_that_stop_one_each(float64: None) -> None:
    log_q, log_p = (torch.randn(5, 2, 3, 4).log_softmax(-1).requires_grad_() for _ in range(2))
    weights = torch.randn(2, 5, 2)
    ours = F.balanced_kl(log_q, log_p)
    theirs = F.categorical_kl(log_q.detach(), log_p), F.categorical_kl(log_q, log_p.detach())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    combined = [sum((w * value).sum() for w, value in zip(weights, pair, strict=True)) for pair in (ours, theirs)]
    for one, other in zip(*(grads(value, [log_q, log_p]) for value in combined), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other)
    # One side may be a constant.
    (grad,) = grads(F.balanced_kl(log_q.detach(), log_p)[0].sum(), [log_p])
    torch.testing.assert_close(grad, -log_q.detach().exp())


def as_normal(parameters: Tensor) -> torch.distributions.Normal:
    return torch.distributions.Normal(parameters[..., 0], parameters[..., 1].exp())


def test_gaussian_kl_is_that_of_distributions_from_the_first_to_the_second(float64: None) -> None:
    q, p = (torch.randn(5, 2, 3, 2) for _ in range(2))
    kl = F.gaussian_kl(q, p)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(as_normal(q), as_normal(p)).sum(-1))
    assert ((kl - F.gaussian_kl(p, q)).abs() > 1e-3).all()
    assert not F.gaussian_kl(q, q).any()


def test_balanced_gaussian_kl_moves_one_side_each(float64: None) -> None:
    q, p = (torch.randn(5, 2, 3, 2, requires_grad=True) for _ in range(2))
    ours = F.balanced_gaussian_kl(q, p)
    for value, moved, still in ((ours[0], p, q), (ours[1], q, p)):
        expected = torch.distributions.kl_divergence(as_normal(q), as_normal(p)).sum(-1)
        torch.testing.assert_close(value, expected)
        weight = torch.randn_like(value)
        grad, none = grads((weight * value).sum(), [moved, still])
        (slow,) = grads((weight * expected).sum(), [moved])
        torch.testing.assert_close(grad, slow)
        assert grad.all() and not none.any()


def test_gaussian_kl_is_computed_in_float32_and_bounds_nothing() -> None:
    q, p = (torch.randn(50, 3, 2).bfloat16() for _ in range(2))
    kl = F.gaussian_kl(q, p)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, F.gaussian_kl(q.double(), p.double()).float())
    # Sharp and far off: a large number that still says where to go.
    p = torch.tensor([[0.0, -5.0]], requires_grad=True)
    kl = F.gaussian_kl(torch.tensor([[1e3, -4.0]]), p)
    (grad,) = grads(kl, [p])
    assert kl.isfinite() and grad.isfinite().all() and (grad < 0).all()


def slow_lambda_return(
    reward: list[float], continuation: list[float], next_value: list[float], gamma: float, lmbda: float
) -> list[float]:
    """The recursion as it is written; next_value[t] is V(s_{t+1})."""

    def returned(t: int) -> float:
        if t == len(reward):
            return next_value[-1]
        return reward[t] + gamma * continuation[t] * ((1 - lmbda) * next_value[t] + lmbda * returned(t + 1))

    return [returned(t) for t in range(len(reward))]


@pytest.mark.parametrize(("gamma", "lmbda"), [(0.985, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_lambda_return(float64: None, gamma: float, lmbda: float) -> None:
    reward, next_value, continuation = torch.randn(3, 2, 7), torch.randn(3, 2, 7), torch.rand(3, 2, 7)
    returns = F.lambda_return(reward, continuation, next_value, gamma, lmbda)
    for index in itertools.product(range(3), range(2)):
        rows = (x[index].tolist() for x in (reward, continuation, next_value))
        assert returns[index].tolist() == pytest.approx(slow_lambda_return(*rows, gamma, lmbda), rel=1e-9)


def test_lambda_return_agrees_with_torchrl(float64: None) -> None:
    reward, next_value = torch.randn(4, 9), torch.randn(4, 9)
    terminated = torch.rand(4, 9) < 0.2
    done = torch.zeros(4, 9, 1, dtype=torch.bool)
    done[:, -1] = True
    theirs = td_lambda_return_estimate(
        0.9,
        0.8,
        next_value.unsqueeze(-1),
        reward.unsqueeze(-1),
        done | terminated.unsqueeze(-1),
        terminated.unsqueeze(-1),
    )
    ours = F.lambda_return(reward, (~terminated).double(), next_value, 0.9, 0.8)
    torch.testing.assert_close(ours, theirs.squeeze(-1))


@pytest.mark.parametrize("factor", [1.0, 7.5, 1e-12])
def test_sample_index_has_the_right_frequencies(factor: float) -> None:
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5]])
    draws = F.sample_index((factor * probs).expand(40_000, 2, 3))
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


def test_masked_mean_takes_no_part_of_what_is_masked() -> None:
    value = torch.randn(3, 4, 2, requires_grad=True)
    mask = torch.rand(3, 4, 2) < 0.5
    kept = [value[i].item() for i in itertools.product(range(3), range(4), range(2)) if mask[i]]
    mean = F.masked_mean(value, mask)
    assert mean.item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    (grad,) = torch.autograd.grad(mean, value)
    assert not grad[~mask].any() and grad[mask].all()
    spoilt = torch.where(mask, value, torch.nan)
    assert F.masked_mean(spoilt, mask).item() == pytest.approx(mean.item())
    assert F.masked_mean(value, torch.zeros_like(mask)).item() == 0.0
    assert F.masked_mean(value, None).item() == pytest.approx(value.mean().item())


def test_per_agent_mean_against_loops() -> None:
    value, weight = torch.randn(3, 4, 2, 5, dtype=torch.float64), torch.rand(3, 4, 2, dtype=torch.float64)
    valid = torch.rand(3, 4, 2) < 0.5
    places = list(itertools.product(range(3), range(4)))
    by_count, by_weight = F.per_agent_mean(value, weight, valid), F.per_agent_mean(value, weight)
    for n, d in itertools.product(range(2), range(5)):
        total = sum(float(value[b, t, n, d] * weight[b, t, n]) for b, t in places if valid[b, t, n])
        assert float(by_count[n, d]) == pytest.approx(total / max(1, sum(bool(valid[b, t, n]) for b, t in places)))
        total = sum(float(value[b, t, n, d] * weight[b, t, n]) for b, t in places)
        assert float(by_weight[n, d]) == pytest.approx(total / sum(float(weight[b, t, n]) for b, t in places))
    spoilt = torch.where(valid.unsqueeze(-1), value, torch.nan)
    torch.testing.assert_close(F.per_agent_mean(spoilt, weight, valid), by_count)


def test_clip_grad_norm_per_agent() -> None:
    torch.manual_seed(1)
    parameters = [torch.zeros(3, 4, 2, requires_grad=True), torch.zeros(3, 5, requires_grad=True)]
    untouched = torch.zeros(3, 1, requires_grad=True)
    scale = torch.tensor([0.01, 1.0, 10.0])
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * scale.view(3, *[1] * (parameter.ndim - 1))
    before = [parameter.grad.clone() for parameter in parameters]
    norms = F.clip_grad_norm_per_agent_([*parameters, untouched], max_norm=0.5)
    for n in range(3):
        norm = math.sqrt(sum(float(grad[n].square().sum()) for grad in before))
        assert float(norms[n]) == pytest.approx(norm, rel=1e-5)
        for parameter, grad in zip(parameters, before, strict=True):
            torch.testing.assert_close(parameter.grad[n], grad[n] * min(1.0, 0.5 / norm))
    assert untouched.grad is None
