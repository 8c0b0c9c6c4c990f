from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from matwm_rl.functional import balanced_kl
from matwm_rl.modules import CategoricalLatent, FSQLatent, Latent, LatentCode, StackedLinear, make_latent, read_latent
from tests.helpers import grads, random_latent


def slow_unimix(logits: list[float], share: float) -> list[float]:
    exponentials = [math.exp(x) for x in logits]
    return [(1 - share) * x / sum(exponentials) + share / len(logits) for x in exponentials]


def sides(code: CategoricalLatent, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of features and prior of the dynamics predictor's output: categoricals treat both alike."""
    return code.posterior(logits), code.prior(logits, random_latent(code, *logits.shape[:-1]))


@pytest.mark.parametrize("side", [0, 1], ids=["posterior", "prior"])
def test_categorical_mixes_one_percent_uniform_into_both_sides(float64: None, side: int) -> None:
    code = CategoricalLatent(3, 4)
    features = 5 * torch.randn(6, 12)
    log_probs = sides(code, features)[side]
    assert log_probs.shape == (6, 3, 4)
    for b, k in itertools.product(range(6), range(3)):
        expected = slow_unimix(features[b, 4 * k : 4 * k + 4].tolist(), 0.01)
        assert log_probs[b, k].exp().tolist() == pytest.approx(expected, rel=1e-9)
    extreme = sides(code, torch.tensor([1e4, 0.0, 0.0, 0.0] * 3))[side]
    assert extreme.exp().min() == pytest.approx(0.01 / 4)


def test_categorical_sample_is_one_hot_and_straight_through(float64: None) -> None:
    code = CategoricalLatent(3, 4)
    features = torch.randn(6, 12, requires_grad=True)
    latent = code.sample_posterior(features)
    z = latent.value
    blocks = z.detach().unflatten(-1, (3, 4))
    torch.testing.assert_close(blocks.sum(-1), torch.ones(6, 3))
    torch.testing.assert_close(blocks.amax(-1), torch.ones(6, 3))
    for b, k in itertools.product(range(6), range(3)):
        assert int(latent.ones[b, k]) == 4 * k + int(blocks[b, k].argmax())
    weight = torch.randn_like(z)
    (grad,) = torch.autograd.grad((weight * z).sum(), features)
    (expected,) = torch.autograd.grad((weight * code.posterior(features).exp().flatten(-2)).sum(), features)
    torch.testing.assert_close(grad, expected)
    assert grad.any()


def test_categorical_samples_follow_the_posterior() -> None:
    code = CategoricalLatent(2, 3)
    features = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 0.0])
    z = code.sample_posterior(features.expand(20_000, -1)).value
    deviation = (z.mean(0).unflatten(0, (2, 3)) - code.posterior(features).exp()).abs().max()
    assert deviation < 5 * 0.5 / math.sqrt(20_000)


CODES = [CategoricalLatent(3, 4), FSQLatent(3, 4), FSQLatent(3, 5)]


@pytest.mark.parametrize("code", CODES)
def test_indices_and_vectors_are_inverse(code: LatentCode) -> None:
    index = torch.randint(code.num_classes, (50, 3))
    z = code.from_code(index)
    assert z.value.shape == (50, code.latent_size)
    assert torch.equal(code.to_code(z), index)
    # From the numbers alone, too.
    assert torch.equal(code.to_code(Latent(z.value)), index)
    encoded = code.sample_posterior(2 * torch.randn(50, code.encoder_size))
    again = code.from_code(code.to_code(encoded))
    torch.testing.assert_close(again.value, encoded.value)
    assert (again.ones is None) is (encoded.ones is None) is not code.multi_hot
    if code.multi_hot:
        assert torch.equal(again.ones, encoded.ones)


@pytest.mark.parametrize("code", CODES)
def test_ones_say_where_a_multi_hot_latent_is_not_zero(code: LatentCode) -> None:
    output = torch.randn(50, code.dynamics_size)
    for latent in (
        code.sample_posterior(torch.randn(50, code.encoder_size)),
        code.sample_posterior(torch.randn(50, code.encoder_size, requires_grad=True)),
        code.sample_prior(output, random_latent(code, 50)),
        random_latent(code, 50),
    ):
        if not code.multi_hot:
            assert latent.ones is None
            continue
        assert latent.ones.dtype == torch.int64
        for b in range(50):
            assert latent.value[b].detach().nonzero().flatten().tolist() == latent.ones[b].tolist()
            assert (latent.value[b, latent.ones[b]] == 1).all()


@pytest.mark.parametrize("code", CODES)
def test_latents_are_indexed_stacked_and_detached_as_one(code: LatentCode) -> None:
    latent = random_latent(code, 2, 3, 4)

    def same(one: Latent, index: Tensor) -> bool:
        """Whether numbers and ones both say what ``index`` says."""
        return torch.equal(one.value, code.from_code(index).value) and torch.equal(code.to_code(one), index)

    index = code.to_code(latent)
    assert same(latent[:, 1], index[:, 1]) and same(latent[:, :, -1], index[:, :, -1])
    assert same(latent[:, :, 1:], index[:, :, 1:]) and same(latent[0], index[0])
    assert same(Latent.stack([latent[:, :, t] for t in range(4)], 2), index)
    assert same(Latent.stack([latent, latent], 0), torch.stack([index, index]))
    learnt = Latent(latent.value.clone().requires_grad_(), latent.ones)
    assert not learnt.detach().value.requires_grad and learnt.value.requires_grad
    assert same(learnt.detach(), index)


def test_a_first_layer_reads_a_multi_hot_latent_by_look_up_or_by_product(
    float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, layer = CategoricalLatent(3, 4), StackedLinear(12, 5, [0])
    looked_up: list[Tensor] = []
    look_up = layer.from_ones
    monkeypatch.setattr(layer, "from_ones", lambda ones: looked_up.append(ones) or look_up(ones))
    latent = random_latent(code, 3, 7)
    out = read_latent(layer, latent)
    torch.testing.assert_close(out, layer(latent.value))
    assert len(looked_up) == 1
    # Numbers have no rows, and gradients to the encoder pass through the product alone.
    other = torch.randn(3, 7, 12)
    torch.testing.assert_close(read_latent(layer, Latent(other)), layer(other))
    features = torch.randn(3, 7, 12, requires_grad=True)
    drawn = code.sample_posterior(features)
    out = read_latent(layer, drawn)
    torch.testing.assert_close(out, layer(drawn.value))
    assert len(looked_up) == 1
    weight = torch.randn_like(out)
    (grad,) = grads((weight * out).sum(), [features])
    (expected,) = grads((weight @ layer.weight[0].T * code.posterior(features).exp().flatten(-2)).sum(), [features])
    torch.testing.assert_close(grad, expected)
    assert grad.any()
    # Without gradient, the same latents are looked up.
    torch.testing.assert_close(read_latent(layer, drawn.detach()), out)
    assert len(looked_up) == 2


@pytest.mark.parametrize("code", CODES)
def test_distributions_are_normalised_and_finite(code: LatentCode) -> None:
    for log_probs in (
        code.posterior(100 * torch.randn(20, code.encoder_size)),
        code.prior(
            100 * torch.randn(20, code.dynamics_size), code.sample_posterior(torch.randn(20, code.encoder_size))
        ),
    ):
        assert log_probs.shape == (20, 3, code.num_classes)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(20, 3))
    assert code.posterior(100 * torch.randn(20, code.encoder_size)).isfinite().all()


@pytest.mark.parametrize("code", CODES)
def test_prior_is_sampled_from_what_the_loss_sees(code: LatentCode) -> None:
    index = torch.randint(code.num_classes, (3,))
    output, latent = torch.randn(code.dynamics_size), code.from_code(index)
    many = code.sample_prior(output.expand(20_000, -1), code.from_code(index.expand(20_000, -1)))
    drawn = torch.nn.functional.one_hot(code.to_code(many), code.num_classes).float().mean(0)
    assert (drawn - code.prior(output, latent).exp()).abs().max() < 5 * 0.5 / math.sqrt(20_000)


def test_fsq_takes_the_nearest_level_straight_through(float64: None) -> None:
    code = FSQLatent(3, 5)
    levels = [-1.0, -0.5, 0.0, 0.5, 1.0]
    features = torch.randn(40, 3, requires_grad=True)
    z = code.sample_posterior(features).value
    assert torch.equal(code.sample_posterior(features.detach()).value, z)
    for value, x in zip(z.flatten().tolist(), features.flatten().tolist(), strict=True):
        assert value == pytest.approx(min(levels, key=lambda level: abs(level - math.tanh(x))), abs=1e-9)
    (grad,) = torch.autograd.grad(z.sum(), features)
    torch.testing.assert_close(grad, 1 - features.detach().tanh().square())


def slow_bell(centre: float, classes: int, width: float) -> list[float]:
    """Over levels; ``centre`` counts from -1, the first level, to 1, the last."""
    position = (centre + 1) / 2 * (classes - 1)
    bells = [math.exp(max(-30.0, -0.5 * ((position - c) / width) ** 2)) for c in range(classes)]
    return [bell / sum(bells) for bell in bells]


def test_fsq_posterior_is_a_bell_around_the_value(float64: None) -> None:
    code = FSQLatent(2, 6, width=0.7)
    features = torch.randn(10, 2)
    probs = code.posterior(features).exp()
    taken = code.to_code(code.sample_posterior(features))
    for b, k in itertools.product(range(10), range(2)):
        assert probs[b, k].tolist() == pytest.approx(slow_bell(math.tanh(float(features[b, k])), 6, 0.7), rel=1e-6)
        assert int(probs[b, k].argmax()) == int(taken[b, k])


def test_fsq_prior_is_a_bell_moved_on_from_the_present_latent(float64: None) -> None:
    code = FSQLatent(2, 6, width=0.7)
    output, latent = 0.5 * torch.randn(10, code.dynamics_size), code.sample_posterior(torch.randn(10, 2))
    probs = code.prior(output, latent).exp()
    for b, k in itertools.product(range(10), range(2)):
        width = math.log1p(math.exp(float(output[b, 2 + k]))) + 0.35
        expected = slow_bell(float(latent.value[b, k] + output[b, k]), 6, width)
        assert probs[b, k].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("distance", [2, 5, 9])
def test_fsq_prior_is_drawn_to_a_posterior_at_any_distance(distance: int) -> None:
    """A confident and wrong prior must be moved, and widened until it is right."""
    code = FSQLatent(1, 16)
    seen = code.from_code(torch.tensor([[3 + distance]])).value.clamp(-0.999, 0.999).atanh()
    output = torch.tensor([[0.0, -4.0]], requires_grad=True)
    log_probs = code.prior(output, code.from_code(torch.tensor([[3]])))
    balanced_kl(code.posterior(seen), log_probs)[0].sum().backward()
    movement, width = output.grad[0].tolist()
    assert movement < -1e-2 and width < -1e-2


def test_make_latent() -> None:
    assert isinstance(make_latent("fsq", 2, 3), FSQLatent)
    assert isinstance(make_latent("categorical", 2, 3), CategoricalLatent)
    with pytest.raises(ValueError, match="choose one of"):
        make_latent("gaussian", 2, 3)
    with pytest.raises(ValueError, match=">= 2 classes"):
        make_latent("fsq", 2, 1)


def test_prior_samples_carry_no_gradient() -> None:
    for code in CODES:
        output = torch.randn(4, code.dynamics_size, requires_grad=True)
        latent = code.sample_posterior(torch.randn(4, code.encoder_size, requires_grad=True))
        before = output.detach().clone(), latent.value.detach().clone()
        assert not code.sample_prior(output, latent).value.requires_grad
        assert torch.equal(output.detach(), before[0]) and torch.equal(latent.value.detach(), before[1])


def test_fsq_prior_far_beyond_the_levels_is_drawn_at_the_nearest() -> None:
    """No likeliest level lies near such a centre: the draw must neither overflow nor vanish."""
    code = FSQLatent(2, 6)
    for movement, level in ((1e3, 5), (-1e3, 0)):
        output = torch.tensor([movement, movement, -20.0, -20.0]).expand(500, -1)
        drawn = code.to_code(code.sample_prior(output, random_latent(code, 500)))
        assert (drawn == level).all()
