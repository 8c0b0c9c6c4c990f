from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from matwm_rl.functional import balanced_kl
from matwm_rl.modules import (
    CategoricalLatent,
    DiscreteLatent,
    FSQLatent,
    GaussianLatent,
    Latent,
    LatentCode,
    StackedLinear,
    make_latent,
    read_latent,
)
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


DISCRETE = [CategoricalLatent(3, 4), FSQLatent(3, 4), FSQLatent(3, 5)]
CODES = [*DISCRETE, GaussianLatent(3), GaussianLatent(3).eval()]


def mode(code: LatentCode) -> str:
    return f"{type(code).__name__}{'' if code.training else ' eval'}"


def kept(code: LatentCode, latent: Latent) -> Latent:
    """What is left of a latent that was stored."""
    stored = code.to_code(latent).to(code.code_dtype)
    assert stored.shape[-1] == code.num_dims
    return code.from_code(stored)


@pytest.mark.parametrize("code", CODES, ids=mode)
def test_a_stored_latent_is_the_same(code: LatentCode) -> None:
    drawn = code.sample_prior(torch.randn(50, code.dynamics_size), random_latent(code, 50))
    for z in (random_latent(code, 50), drawn, code.sample_posterior(torch.randn(50, code.encoder_size))):
        assert z.value.shape == (50, code.latent_size)
        torch.testing.assert_close(kept(code, z).value, z.value)
        assert code.multi_hot is (z.ones is not None)
        if z.ones is not None:
            assert torch.equal(kept(code, z).ones, z.ones)
    assert torch.equal(kept(code, drawn).value, drawn.value)


@pytest.mark.parametrize("code", DISCRETE)
def test_indices_and_vectors_are_inverse(code: DiscreteLatent) -> None:
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


@pytest.mark.parametrize("code", CODES, ids=mode)
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


@pytest.mark.parametrize("code", CODES, ids=mode)
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


@pytest.mark.parametrize("code", DISCRETE)
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


@pytest.mark.parametrize("code", DISCRETE)
def test_prior_is_sampled_from_what_the_loss_sees(code: LatentCode) -> None:
    index = torch.randint(code.num_classes, (3,))
    output, latent = torch.randn(code.dynamics_size), code.from_code(index)
    parameters = code.prior(output, latent)
    for many in (
        code.sample_prior(output.expand(20_000, -1), code.from_code(index.expand(20_000, -1))),
        code.draw(parameters.expand(20_000, -1, -1)),
    ):
        drawn = torch.nn.functional.one_hot(code.to_code(many), code.num_classes).float().mean(0)
        assert (drawn - parameters.exp()).abs().max() < 5 * 0.5 / math.sqrt(20_000)


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
    assert isinstance(make_latent("gaussian", 2, 1), GaussianLatent)
    assert [make_latent(kind, 2, 3, width=0.7).width for kind in ("fsq", "gaussian")] == [0.7, 0.7]
    with pytest.raises(ValueError, match=r"'normal'; choose one of .*'gaussian'"):
        make_latent("normal", 2, 3)
    with pytest.raises(ValueError, match=">= 2 classes, got 1"):
        make_latent("fsq", 2, 1)
    with pytest.raises(ValueError, match=">= 1 dimension, got 0"):
        make_latent("gaussian", 0, 1)
    with pytest.raises(ValueError, match=r"no width, got 0\.7"):
        make_latent("categorical", 2, 3, width=0.7)
    for kind in ("fsq", "gaussian"):
        with pytest.raises(ValueError, match=r"width of a latent code must be positive, got 0\.0"):
            make_latent(kind, 2, 3, width=0.0)
    with pytest.raises(ValueError, match="step_scale of a latent code must be positive, got -1"):
        GaussianLatent(2, step_scale=-1)


def test_prior_samples_carry_no_gradient() -> None:
    for code in CODES:
        output = torch.randn(4, code.dynamics_size, requires_grad=True)
        latent = code.sample_posterior(torch.randn(4, code.encoder_size, requires_grad=True))
        before = output.detach().clone(), latent.value.detach().clone()
        assert not code.sample_prior(output, latent).value.requires_grad
        assert not code.draw(code.prior(output, latent)).value.requires_grad
        assert torch.equal(output.detach(), before[0]) and torch.equal(latent.value.detach(), before[1])


def test_fsq_prior_far_beyond_the_levels_is_drawn_at_the_nearest() -> None:
    """No likeliest level lies near such a centre: the draw must neither overflow nor vanish."""
    code = FSQLatent(2, 6)
    for movement, level in ((1e3, 5), (-1e3, 0)):
        output = torch.tensor([movement, movement, -20.0, -20.0]).expand(500, -1)
        drawn = code.to_code(code.sample_prior(output, random_latent(code, 500)))
        assert (drawn == level).all()


# -- Gaussians -------------------------------------------------------------------------------------------------------


def test_gaussian_posterior_is_equally_wide_around_every_value(float64: None) -> None:
    code = GaussianLatent(3, width=0.1)
    features = 10 * torch.randn(7, 3)
    mean, log_deviation = code.posterior(features).unbind(-1)
    assert torch.equal(mean, features)
    assert log_deviation.exp().flatten().tolist() == pytest.approx([0.1] * 21, rel=1e-12)


def test_gaussian_draws_while_training_and_takes_the_mean_otherwise() -> None:
    code = GaussianLatent(2, width=0.1)
    features = torch.tensor([3.0, -50.0], requires_grad=True)
    z = code.sample_posterior(features.expand(20_000, -1)).value
    noise = (z - features).detach() / 0.1
    assert noise.mean(0).abs().max() < 5 / math.sqrt(20_000)
    assert noise.std(0).tolist() == pytest.approx([1.0, 1.0], abs=5 / math.sqrt(2 * 20_000))
    # Reparameterised: the features move what is drawn.
    (grad,) = grads(z.sum(), [features])
    assert grad.tolist() == [20_000.0] * 2
    code.eval()
    assert torch.equal(code.sample_posterior(features).value, features)


def test_gaussian_prior_moves_on_from_the_present_latent(float64: None) -> None:
    code = GaussianLatent(2, width=0.1, step_scale=0.3, spread_scale=0.7)
    output, latent = torch.randn(10, code.dynamics_size), random_latent(code, 10)
    prior = code.prior(output, latent)
    assert prior.shape == (10, 2, 2)
    for b, k in itertools.product(range(10), range(2)):
        mean, log_deviation = prior[b, k].tolist()
        assert mean == pytest.approx(float(latent.value[b, k]) + 0.3 * float(output[b, k]))
        spread = math.log1p(math.exp(float(output[b, 2 + k])))
        assert math.exp(log_deviation) == pytest.approx(0.7 * spread + 0.05)


def test_gaussian_prior_is_sampled_from_what_the_loss_sees() -> None:
    code = GaussianLatent(3)
    output, latent = torch.randn(code.dynamics_size), random_latent(code)
    prior = code.prior(output, latent)
    mean, deviation = prior[:, 0], prior[:, 1].exp()
    many = Latent(latent.value.expand(20_000, -1))
    for drawn in (code.sample_prior(output.expand(20_000, -1), many), code.draw(prior.expand(20_000, -1, -1))):
        noise = (drawn.value - mean) / deviation
        assert noise.mean(0).abs().max() < 5 / math.sqrt(20_000)
        assert (noise.std(0) - 1).abs().max() < 5 / math.sqrt(2 * 20_000)
        # Independent of each other.
        assert (noise.T.corrcoef() - torch.eye(3)).abs().max() < 5 / math.sqrt(20_000)


def test_gaussian_prior_has_a_smallest_width_and_stays_finite_far_out() -> None:
    code = GaussianLatent(2)
    features = torch.tensor([-1e3, 1e3], requires_grad=True)
    for raw, deviation in ((-1e4, 0.01), (1e4, 2e3)):
        output = torch.tensor([1e3, -1e3, raw, raw], requires_grad=True)
        prior = code.prior(output, random_latent(code))
        assert prior[:, 1].exp().tolist() == pytest.approx([deviation] * 2, rel=1e-3)
        assert code.draw(prior).value.isfinite().all()
        for kl in code.balanced_kl(code.posterior(features), prior):
            assert kl.isfinite() and all(grad.isfinite().all() for grad in grads(kl, [output, features]))


@pytest.mark.parametrize("distance", [0.1, 1.0, 1e3])
def test_gaussian_prior_is_drawn_to_a_posterior_at_any_distance(distance: float) -> None:
    """A confident and wrong prior must be moved, and widened until it is right."""
    code = GaussianLatent(1)
    output = torch.tensor([[0.0, -4.0]], requires_grad=True)
    prior = code.prior(output, Latent(torch.zeros(1, 1)))
    code.balanced_kl(code.posterior(torch.full((1, 1), distance)), prior)[0].sum().backward()
    movement, width = output.grad[0].tolist()
    assert movement < -1e-2 and width < -1e-2


def test_gaussian_is_computed_in_float32_whatever_precision_its_inputs_have() -> None:
    code = GaussianLatent(3)
    features, output = torch.randn(5, 3).bfloat16(), torch.randn(5, 6).bfloat16()
    z = code.sample_posterior(features)
    prior = code.prior(output, z)
    values = [z.value, prior, code.posterior(features), code.sample_prior(output, z).value]
    values += [code.draw(prior.bfloat16()).value, *code.balanced_kl(code.posterior(features).bfloat16(), prior)]
    assert {value.dtype for value in values} == {torch.float32}
    # Noise far below bfloat16's spacing at these values.
    assert (z.value != z.value.bfloat16()).any()
