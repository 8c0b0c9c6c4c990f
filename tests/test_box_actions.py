"""Continuous actions: their distribution against slow float64 numbers, their space, and their linear maps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import truncnorm
from torch import Tensor
from torchrl.modules import TruncatedNormal

from matwm_rl.action_distribution import BoxDistribution, box_parameters
from matwm_rl.action_space import ActionSpace
from matwm_rl.box_actions import ActionVectors, BoxActions
from tests.helpers import BOXES, grads

# Locations near, at and away from the bounds; scales from the least to the largest.
RAW = [(x, y) for x in (-20.0, -1.5, 0.0, 0.3, 20.0) for y in (-20.0, -3.0, 0.0, 20.0)]
ACTIONS = (-1.0, -0.999, -0.3, 0.0, 0.7, 1.0)


def one_number(x: float, y: float, dtype: torch.dtype = torch.float64) -> BoxDistribution:
    return BoxDistribution(logits=torch.tensor([x, y], dtype=dtype), mask=torch.tensor([True]))


def parameters_of(x: float, y: float) -> tuple[float, float]:
    return math.tanh(x), 0.1 + 0.9 / (1 + math.exp(-(y + 2)))


def slow_log_density(x: float, y: float, action: float) -> float:
    loc, scale = parameters_of(x, y)

    def cdf(bound: float) -> float:
        return 0.5 * (1 + math.erf((bound - loc) / scale / math.sqrt(2)))

    normal = math.exp(-0.5 * ((action - loc) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
    return (math.log(normal) if normal else -0.5 * ((action - loc) / scale) ** 2 - math.log(scale)) - math.log(
        cdf(1.0) - cdf(-1.0)
    )


@pytest.mark.parametrize(("x", "y"), RAW)
def test_densities_entropies_and_means_in_float64(x: float, y: float) -> None:
    dist, (loc, scale) = one_number(x, y), parameters_of(x, y)
    for action in ACTIONS:
        found = dist.log_prob(torch.tensor([action], dtype=torch.float64)).item()
        assert found == pytest.approx(slow_log_density(x, y, action), rel=1e-9, abs=1e-12), action
    slow = truncnorm((-1 - loc) / scale, (1 - loc) / scale, loc=loc, scale=scale)
    assert dist.entropy().item() == pytest.approx(slow.entropy(), rel=1e-7, abs=1e-7)
    assert dist.mean.item() == pytest.approx(slow.mean(), abs=1e-9)
    points = [loc] if abs(loc) < 1 else None
    total, _ = quad(lambda a: math.exp(slow_log_density(x, y, a)), -1, 1, points=points)
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("x", "y"), RAW)
def test_gradients_are_finite_and_right_at_the_bounds_too(x: float, y: float) -> None:
    for action in ACTIONS:
        raw = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
        dist = BoxDistribution(logits=raw, mask=torch.tensor([True]))
        (grad,) = torch.autograd.grad(dist.log_prob(torch.tensor([action], dtype=torch.float64)) + dist.entropy(), raw)

        def value(x: float, y: float, action: float = action) -> float:
            return slow_log_density(x, y, action) + one_number(x, y).entropy().item()

        step = 1e-5
        expected = [(value(x + step, y) - value(x - step, y)) / (2 * step)]
        expected.append((value(x, y + step) - value(x, y - step)) / (2 * step))
        assert grad.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        single = torch.tensor([x, y], requires_grad=True)
        dist = BoxDistribution(logits=single, mask=torch.tensor([True]))
        (found,) = torch.autograd.grad(dist.log_prob(torch.tensor([action])) + dist.entropy(), single)
        assert found.isfinite().all() and found.tolist() == pytest.approx(expected, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(("x", "y"), [(-20.0, -20.0), (0.3, -1.0), (20.0, 20.0)])
def test_draws_follow_the_distribution(x: float, y: float) -> None:
    drawn, (loc, scale) = one_number(x, y, torch.float32).sample((20_000,)).squeeze(-1).double(), parameters_of(x, y)
    assert (drawn.abs() <= 1).all()
    slow = truncnorm((-1 - loc) / scale, (1 - loc) / scale, loc=loc, scale=scale)
    for quantile in (0.05, 0.5, 0.95):
        share = (drawn <= slow.ppf(quantile)).double().mean().item()
        assert share == pytest.approx(quantile, abs=5 * 0.5 / math.sqrt(20_000))


def test_it_is_torchrls_where_that_one_is_exact() -> None:
    raw, action = torch.randn(7, 4, dtype=torch.float64), 1.8 * torch.rand(7, 2, dtype=torch.float64) - 0.9
    ours = BoxDistribution(logits=raw, mask=torch.ones(7, 2, dtype=torch.bool))
    theirs = TruncatedNormal(*box_parameters(raw))
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), rtol=1e-4, atol=1e-4)


def test_numbers_outside_of_the_mask_are_zero_certain_and_without_gradient() -> None:
    raw = torch.randn(6, 4, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [False, False]]).repeat(2, 1)
    dist = BoxDistribution(logits=raw, mask=mask)
    for action in (dist.sample(), dist.mode, dist.mean, dist.sample((5,))):
        assert not action[..., ~mask].any() and action[..., mask].all()
    action = dist.sample()
    own = torch.stack(
        [
            BoxDistribution(logits=raw[:, [i, 2 + i]], mask=torch.ones(6, 1).bool()).log_prob(action[:, [i]])
            for i in (0, 1)
        ],
        -1,
    )
    torch.testing.assert_close(dist.log_prob(action), (own * mask).sum(-1))
    assert dist.log_prob(action)[2] == dist.entropy()[2] == 0
    (grad,) = grads(dist.log_prob(action).sum() + dist.entropy().sum(), [raw])
    assert torch.equal(grad != 0, torch.cat([mask, mask], -1))
    with pytest.raises(ValueError, match="action_mask"):
        BoxDistribution(logits=raw, mask=mask[:, :1])
    with pytest.raises(ValueError, match="is read of shape"):
        dist.log_prob(action[:, :1])
    with pytest.raises(TypeError, match="a box agent's action is read as torch.float32, found torch.int64"):
        dist.log_prob(action.long())


def test_space_pads_and_knows_its_bounds() -> None:
    assert (BOXES.num_agents, BOXES.num_actions, BOXES.num_parameters, BOXES.action_shape) == (3, 2, 4, (2,))
    assert BOXES.legal().tolist() == [[True, True], [True, True], [True, False]]
    assert ActionSpace.from_dict(BOXES.to_dict()) == BOXES
    spec = BOXES.spec([5])
    drawn = spec.rand()
    assert spec.shape == (5, 3, 2) and spec.is_in(drawn) and not drawn[:, 2, 1].any()
    assert BOXES.problem(drawn) is None and BOXES.problem(BOXES.random(BOXES.legal().expand(5, 3, 2))) is None
    drawn = BOXES.random(BOXES.legal().expand(2_000, 3, 2))
    assert drawn.min() < -0.99 and drawn.max() > 0.99 and abs(drawn.mean().item()) < 0.05


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (torch.zeros(3, dtype=torch.long), "expected a vector of 2 numbers for each of 3 agents"),
        (torch.zeros(3, 2, dtype=torch.long), "torch.int64; expected a vector"),
        (torch.zeros(2, 2), r"shape \[2, 2\]"),
        (torch.tensor([[0.0, 0.0], [0.0, 1.01], [0.0, 0.0]]), r"\[0.0, 1.00\d*\] of agent 1; expected numbers from -1"),
        (torch.tensor([[0.0, 0.0], [0.0, torch.nan], [0.0, 0.0]]), r"nan\] of agent 1; expected numbers"),
        (torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.5]]), "of agent 2, which has 1 numbers; the rest must be 0"),
    ],
)
def test_wrong_actions_are_described(action: Tensor, message: str) -> None:
    problem = BOXES.problem(action)
    assert problem is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


@pytest.mark.parametrize(
    "bounds", [([], []), ([[]], [[]]), ([[0.0]], [[0.0]]), ([[-math.inf]], [[1.0]]), ([[0.0]], [[1.0, 1.0]])]
)
def test_bounds_must_be_finite_and_apart(bounds: tuple[list[list[float]], list[list[float]]]) -> None:
    with pytest.raises(ValueError, match="bounds"):
        BoxActions(*bounds)


def test_predictions_of_missing_numbers_count_as_certain() -> None:
    raw = torch.randn(3, 7, 4)
    masked = BOXES.mask_parameters(raw, BOXES.legal().unsqueeze(1))
    action = BOXES.random(BOXES.legal().unsqueeze(1).expand(3, 7, 2))
    found = BOXES.negative_log_likelihood(masked, action)
    for agent, step in itertools.product(range(3), range(7)):
        own = [
            slow_log_density(*raw[agent, step, [i, 2 + i]].tolist(), float(action[agent, step, i]))
            for i in range(BOXES.sizes[agent])
        ]
        assert found[agent, step].item() == pytest.approx(-sum(own), rel=1e-3, abs=1e-4)
    features = BOXES.features(masked)
    loc, scale = box_parameters(raw)
    torch.testing.assert_close(features[:2], torch.cat([loc, scale], -1)[:2])
    assert not features[2, :, 1].any() and not features[2, :, 3].any() and (features.abs() <= 1).all()
    assert torch.equal(BOXES.mode(masked), loc * BOXES.legal().unsqueeze(1))


def test_a_missing_number_adds_nothing_to_the_best_constant_prediction() -> None:
    action = BOXES.random(BOXES.legal().expand(2_000, 3, 2))
    constant = BOXES.mask_parameters(BOXES.fit_constant(action, torch.ones(2_000, 3, dtype=torch.bool)), BOXES.legal())
    error = BOXES.negative_log_likelihood(constant.expand(2_000, 3, 4), action).mean(0)
    torch.testing.assert_close(error, torch.tensor([2.0, 2.0, 1.0]) * math.log(2), rtol=0, atol=0.05)


def test_no_constant_prediction_is_better_than_the_fitted_one() -> None:
    action = torch.cat([(0.5 * torch.randn(400, 1) + 0.4).clamp(-1, 1), 0.1 * torch.rand(400, 1) - 1], -1)
    mask = torch.rand(400) < 0.7
    fitted = BOXES.fit_constant(action, mask)
    assert fitted.shape == (4,)

    def mean_error(parameters: Tensor) -> Tensor:
        return BOXES.negative_log_likelihood(parameters.expand(400, 4), action)[mask].mean()

    best = fitted.clone().requires_grad_()
    optimizer = torch.optim.Adam([best], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        mean_error(best).backward()
        optimizer.step()
    assert mean_error(fitted) < mean_error(best) + 0.03


@pytest.mark.parametrize("scaled", [True, False])
def test_embedding_is_each_agents_own_affine_map(float64: None, scaled: bool) -> None:
    vectors = ActionVectors(3, 2, 8, scaled=scaled)
    assert vectors.weight.shape == (3 if scaled else 1, 2, 8)
    action = torch.rand(3, 5, 4, 2)
    out = vectors(action)
    for i, b, t in itertools.product(range(3), range(5), range(4)):
        row = i if scaled else 0
        torch.testing.assert_close(out[i, b, t], action[i, b, t] @ vectors.weight[row] + vectors.bias[row])
    with pytest.raises(TypeError, match="as torch.float32, found torch.int64"):
        vectors(action.long())
    with pytest.raises(ValueError, match="actions are read of shape"):
        vectors(action[:2])
