from __future__ import annotations

import math

import pytest
import torch
from torchrl.modules import SymExpTwoHot
from torchrl.modules.functional import symexp, symlog
from torchrl.objectives import two_hot_cross_entropy

from matwm_rl.modules import TwoHot
from tests.helpers import grads

TARGETS = [0.0, 0.03, -0.7, 1.0, 10.0, -250.0, 4e7, 1e12, -1e12]


def slow_symlog(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


def slow_symexp(x: float) -> float:
    return math.copysign(math.expm1(abs(x)), x)


def slow_encode(target: float, bins: int, interpolation: str, limit: float = 20.0) -> list[float]:
    """Two-hot by search: the two neighbours share the target by distance, in raw or in symlog space."""
    grid = [-limit + 2 * limit * i / (bins - 1) for i in range(bins)]
    if interpolation == "raw":
        grid, x = [slow_symexp(g) for g in grid], target
    else:
        x = slow_symlog(target)
    x = min(max(x, grid[0]), grid[-1])
    probs = [0.0] * bins
    for i in range(bins - 1):
        if grid[i] <= x <= grid[i + 1]:
            share = (x - grid[i]) / (grid[i + 1] - grid[i])
            probs[i], probs[i + 1] = 1 - share, share
            break
    return probs


def slow_decode(logits: list[float], interpolation: str, limit: float = 20.0) -> float:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    grid = [-limit + 2 * limit * i / (len(logits) - 1) for i in range(len(logits))]
    grid = [slow_symexp(g) for g in grid] if interpolation == "raw" else grid
    mean = sum(w * g for w, g in zip(weights, grid, strict=True)) / sum(weights)
    return mean if interpolation == "raw" else slow_symexp(mean)


@pytest.mark.parametrize("interpolation", ["raw", "symlog"])
@pytest.mark.parametrize("bins", [255, 41])
def test_encode_loss_and_decode(float64: None, interpolation: str, bins: int) -> None:
    two_hot = TwoHot(bins, interpolation=interpolation)
    logits = torch.randn(len(TARGETS), bins)
    target = torch.tensor(TARGETS)
    encoded, loss, decoded = two_hot.encode(target), two_hot.loss(logits, target), two_hot.decode(logits)
    log_probs = logits.log_softmax(-1)
    for i, value in enumerate(TARGETS):
        expected = slow_encode(value, bins, interpolation)
        assert encoded[i].tolist() == pytest.approx(expected, abs=1e-9)
        cross_entropy = -sum(p * float(log_probs[i, c]) for c, p in enumerate(expected))
        assert float(loss[i]) == pytest.approx(cross_entropy, rel=1e-8)
        assert float(decoded[i]) == pytest.approx(slow_decode(logits[i].tolist(), interpolation), rel=1e-6)
    # A trailing dimension of one, as rewards have it, changes nothing.
    torch.testing.assert_close(two_hot.loss(logits, target.unsqueeze(-1)), loss)
    assert torch.equal(two_hot(logits), decoded.unsqueeze(-1))


@pytest.mark.parametrize("interpolation", ["raw", "symlog"])
def test_decoding_inverts_encoding(float64: None, interpolation: str) -> None:
    two_hot = TwoHot(interpolation=interpolation)
    target = torch.tensor(TARGETS[:-2])
    torch.testing.assert_close(two_hot.decode(two_hot.encode(target).log()), target, rtol=1e-6, atol=1e-9)


def test_only_raw_interpolation_decodes_a_mixture_to_its_mean(float64: None) -> None:
    rare = torch.tensor([10.0] + [0.0] * 9)
    decoded = {
        name: float(two_hot.decode(two_hot.encode(rare).mean(0).log()))
        for name, two_hot in (("raw", TwoHot()), ("symlog", TwoHot(interpolation="symlog")))
    }
    assert decoded["raw"] == pytest.approx(1.0)
    assert decoded["symlog"] == pytest.approx(0.27, abs=0.01)


def test_raw_form_is_torchrls_which_the_critic_loss_uses() -> None:
    ours, theirs = TwoHot(), SymExpTwoHot()
    torch.testing.assert_close(ours.bins, theirs.bins, rtol=1e-5, atol=1e-6)
    logits, target = torch.randn(20, 255), 100 * torch.randn(20)
    torch.testing.assert_close(ours.loss(logits, target), theirs.loss(logits, target), rtol=1e-4, atol=1e-5)


def all_kinds_of_targets(two_hot: TwoHot) -> torch.Tensor:
    """Between bins, exactly on bins, on and beyond the first and the last."""
    bins = two_hot.bins if two_hot.interpolation == "raw" else symexp(two_hot.bins)
    return torch.cat([torch.tensor(TARGETS), 100 * torch.randn(20), bins])


@pytest.mark.parametrize("interpolation", ["raw", "symlog"])
@pytest.mark.parametrize("bins", [2, 41, 255])
def test_loss_over_two_bins_is_torchrls_over_all(float64: None, interpolation: str, bins: int) -> None:
    two_hot = TwoHot(bins, interpolation=interpolation)
    target = all_kinds_of_targets(two_hot)
    logits = (3 * torch.randn(len(target), bins)).requires_grad_()
    theirs = two_hot_cross_entropy(logits, target if interpolation == "raw" else symlog(target), two_hot.bins)
    loss = two_hot.loss(logits, target)
    torch.testing.assert_close(loss, theirs)
    weight = torch.randn_like(loss)
    (grad,), (expected,) = (grads((weight * value).sum(), [logits]) for value in (loss, theirs))
    torch.testing.assert_close(grad, expected)
    assert grad.any(-1).all()


@pytest.mark.parametrize("interpolation", ["raw", "symlog"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (1,), (4, 1)], ids=str)
def test_loss_of_any_batch_with_or_without_a_trailing_one(
    float64: None, interpolation: str, shape: tuple[int, ...]
) -> None:
    two_hot = TwoHot(41, interpolation=interpolation)
    logits, target = torch.randn(*shape, 41), 30 * torch.randn(shape)
    loss = two_hot.loss(logits, target)
    assert loss.shape == shape
    torch.testing.assert_close(two_hot.loss(logits, target.unsqueeze(-1)), loss)
    expected = -(two_hot.encode(target) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss, expected)
    # Strided, as entries of a rollout are.
    if len(shape) == 2:
        torch.testing.assert_close(two_hot.loss(logits.transpose(0, 1), target.T), loss.T)


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (4, 2), (1, 4)], ids=str)
def test_targets_that_fit_no_logits_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        TwoHot(41).loss(torch.randn(4, 41), torch.randn(shape))


def test_zero_logits_are_zero_and_bins_stay_out_of_checkpoints() -> None:
    for interpolation in ("raw", "symlog"):
        two_hot = TwoHot(interpolation=interpolation)
        assert float(two_hot.decode(torch.zeros(255))) == pytest.approx(0.0, abs=1e-5)
        assert not two_hot.state_dict()


def test_unknown_interpolation() -> None:
    with pytest.raises(ValueError, match="'raw' or 'symlog'"):
        TwoHot(interpolation="linear")
