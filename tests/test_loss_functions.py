"""Every formula of the losses against plain Python arithmetic, element by element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import td_lambda_return_estimate

from matwm_rl import loss_functions as F
from tests.helpers import grads


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
