from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.modules import (
    CategoricalLatent,
    Dynamics,
    DynamicsLoss,
    GaussianLatent,
    Head,
    Imagination,
    LatentSpace,
    PriorDynamics,
    WorldModel,
    make_actor,
)
from matwm_rl.objectives import WorldModelLoss
from tests.helpers import COUNTS, GROUPS, LATENTS, grad_norm, grads, make_model, random_batch, random_latent, randomize

N = len(COUNTS)
SPACES = {"categorical": CategoricalLatent(3, 4), "gaussian": GaussianLatent(3)}


def make_dynamics(space: LatentSpace) -> PriorDynamics:
    return PriorDynamics(randomize(Head(8, space.dynamics_size, group_index=GROUPS, num_cells=8, depth=1)), space)


def slow_prior(space: LatentSpace, output: list[float], latent: list[float]) -> list[list[float]]:
    """Parameters ``[K][C]`` of one agent's next latent."""
    K = space.num_dims
    if isinstance(space, CategoricalLatent):
        C, rows = space.num_classes, []
        for k in range(K):
            exponentials = [math.exp(x) for x in output[k * C : (k + 1) * C]]
            rows.append([math.log(0.99 * x / sum(exponentials) + 0.01 / C) for x in exponentials])
        return rows
    assert isinstance(space, GaussianLatent)
    spreads = [math.log1p(math.exp(x)) for x in output[K:]]
    return [[latent[k] + 0.4 * output[k], math.log(0.2 * spreads[k] + 0.5 * space.width)] for k in range(K)]


def slow_kl(q: list[list[float]], p: list[list[float]], gaussian: bool) -> float:
    """KL(q || p) of one agent's latent, from parameters ``[K][C]``."""
    if not gaussian:
        return sum(math.exp(a) * (a - b) for q_k, p_k in zip(q, p, strict=True) for a, b in zip(q_k, p_k, strict=True))
    kl = 0.0
    for (mean_q, log_q), (mean_p, log_p) in zip(q, p, strict=True):
        kl += log_p - log_q + (math.exp(2 * log_q) + (mean_q - mean_p) ** 2) / (2 * math.exp(2 * log_p)) - 0.5
    return kl


@torch.no_grad()
@pytest.mark.parametrize("name", SPACES)
def test_the_loss_is_the_kl_of_posterior_and_prior(float64: None, name: str) -> None:
    space = SPACES[name]
    dynamics, hidden, latent = make_dynamics(space), torch.randn(N, 2, 5, 8), random_latent(space, N, 2, 5)
    posterior = space.posterior(torch.randn(N, 2, 5, space.encoder_size))
    loss = dynamics.loss(hidden, latent, posterior)
    output = dynamics.head(hidden)
    assert loss.prior is not None and loss.prior.shape == posterior.shape
    for n, b, t in itertools.product(range(N), range(2), range(5)):
        prior = slow_prior(space, output[n, b, t].tolist(), latent[n, b, t].tolist())
        for k in range(space.num_dims):
            assert loss.prior[n, b, t, k].tolist() == pytest.approx(prior[k], rel=1e-9)
        expected = slow_kl(posterior[n, b, t].tolist(), prior, name == "gaussian")
        for value in (loss.dynamics, loss.representation):
            assert float(value[n, b, t]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_one_loss_moves_the_prior_and_the_other_the_posterior(float64: None, name: str) -> None:
    """By as much as the KL divergence with the other side held fast does, by differences."""
    space = SPACES[name]
    dynamics, hidden, latent = make_dynamics(space), torch.randn(N, 4, 8), random_latent(space, N, 4)
    features = torch.randn(N, 4, space.encoder_size, requires_grad=True)
    weight = torch.randn(N, 4)
    loss = dynamics.loss(hidden, latent, space.posterior(features))
    own, other = (weight * loss.dynamics).sum(), (weight * loss.representation).sum()
    assert not grads(own, [features])[0].any() and all(grad.any() for grad in grads(own, dynamics.parameters()))
    assert grads(other, [features])[0].any() and not any(grad.any() for grad in grads(other, dynamics.parameters()))

    @torch.no_grad()
    def slope(moved: Tensor, direction: Tensor) -> float:
        """Of the weighted KL, as one tensor moves."""
        values = []
        for step in (1e-5, -1e-5):
            moved.add_(step * direction)
            values.append(float((weight * dynamics.loss(hidden, latent, space.posterior(features))[0]).sum()))
            moved.sub_(step * direction)
        return (values[0] - values[1]) / 2e-5

    bias = dynamics.head.output.bias
    for moved, of in ((bias, own), (features, other)):
        direction = torch.randn_like(moved)
        found = float((grads(of, [moved])[0] * direction).sum())
        assert found == pytest.approx(slope(moved, direction), rel=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_samples_are_of_the_prior_and_without_gradient(name: str) -> None:
    space = SPACES[name]
    dynamics, hidden, latent = make_dynamics(space), torch.randn(N, 1, 8), random_latent(space, N, 1)
    sample = dynamics.sample(hidden.expand(N, 20_000, 8), latent.expand(N, 20_000, -1))
    assert not sample.requires_grad
    prior = dynamics.loss(hidden, latent, space.posterior(torch.randn(N, 1, space.encoder_size))).prior
    assert prior is not None
    mean, deviation = moments(prior.detach())
    assert ((sample.mean(1) - mean.squeeze(1)).abs() < 5 * deviation.squeeze(1) / 20_000**0.5 + 1e-6).all()


def moments(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[..., Z]`` of z."""
    if parameters.shape[-1] == 2:
        mean, log_deviation = parameters.unbind(-1)
        return mean, log_deviation.exp()
    probs = parameters.exp().flatten(-2)
    return probs, (probs * (1 - probs)).sqrt()


def test_the_latent_space_is_the_world_models_and_not_registered_again() -> None:
    model = make_model()
    assert model.dynamics.space is model.latent
    assert not any(name.startswith("dynamics.space") for name, _ in model.named_modules())


# -- dynamics of a user ----------------------------------------------------------------------------------------------


class Regression(Dynamics):
    """Predicts the next latent's numbers, by squared error, and no distribution."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, latent_size)

    def loss(self, hidden: Tensor, latent: Tensor, posterior: Tensor) -> DynamicsLoss:
        target, predicted = posterior[..., 0], self.linear(hidden)
        return DynamicsLoss(
            (predicted - target.detach()).square().sum(-1), (predicted.detach() - target).square().sum(-1)
        )

    def sample(self, hidden: Tensor, latent: Tensor) -> Tensor:
        return self.linear(hidden).detach()


def with_regression() -> WorldModel:
    return make_model(latent="gaussian", parts={"dynamics": Regression(16, 4)}).eval()


def test_dynamics_of_a_user_are_trained(float64: None) -> None:
    model, batch = with_regression(), random_batch()
    out = model(batch.copy())
    assert keys.PRIOR not in model.out_keys and keys.PRIOR not in out.keys(True)
    losses = WorldModelLoss(model, free_nats=0.0)(batch)
    assert grad_norm(losses["loss_dynamics"], model.dynamics) > 0
    assert grad_norm(losses["loss_representation"], model.dynamics) == 0
    assert grad_norm(losses["loss_representation"], model.encoder) > 0
    # The same error in both, under their two weights; where the agent lives on.
    error = out[keys.DYNAMICS_KL].detach().squeeze(-1)
    counts = batch[keys.ALIVE] & batch[keys.NEXT_ALIVE]
    expected = float(error[counts].mean())
    assert losses["loss_dynamics"].item() == pytest.approx(0.5 * expected)
    assert losses["loss_representation"].item() == pytest.approx(0.1 * expected)


@torch.no_grad()
def test_dynamics_of_a_user_imagine(float64: None) -> None:
    model = with_regression()
    imagined = Imagination(model, make_actor(model), horizon=3)(random_batch(2, 4))
    reached = model.dynamics.linear(imagined["next", *keys.HIDDEN])
    torch.testing.assert_close(imagined["next", *keys.LATENT], reached)
    assert imagined[keys.REWARD].isfinite().all()


@pytest.mark.parametrize("latent", LATENTS)
def test_a_head_with_another_number_of_outputs_is_named(latent: str) -> None:
    model = make_model(latent=latent)
    model.dynamics.head = nn.Linear(model.transformer.features, 3)
    size = model.latent.dynamics_size
    message = rf"the dynamics predictor must give outputs of shape \[.*, {size}\], found \[.*, 3\]"
    with pytest.raises(ValueError, match=message):
        model(random_batch())
    with pytest.raises(ValueError, match=message):
        state, caches = model.start_from(random_batch(), horizon=1)
        model.step(state, torch.zeros(N, len(state.hidden[0]), dtype=torch.long), caches)
