"""Bonuses on what the actors do, against plain Python loops over starts, steps and agents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Distribution

from matwm_rl import keys
from matwm_rl.loss_functions import per_agent_mean
from matwm_rl.modules import ActorCriticConfig, make_actor
from matwm_rl.objectives import ActorLoss, MeanPolicyEntropy, Regularizer, Signalling
from tests.helpers import grads, make_model, random_imagined, randomize
from tests.objectives.helpers import H, N, S, imagined, make_actor_loss


def dist_and_weights(td: TensorDict) -> tuple[Distribution, Tensor, Tensor]:
    """What ActorLoss gives a bonus: the actors' distribution, the weights and which steps count."""
    with torch.no_grad():
        dist = make_actor_loss().actor_network.get_dist(td.clone())
    return dist, td[keys.WEIGHT].squeeze(-1), td[keys.ALIVE]


def slow_mean_policy_entropy(probs: Tensor, weight: Tensor, pairs: list[tuple[int, int]], n: int) -> float:
    """Of agent n over some starts and steps; 0 of none."""
    total = sum(float(weight[s, t, n]) for s, t in pairs)
    entropy = 0.0
    for a in range(probs.shape[-1]):
        mean = sum(float(weight[s, t, n] * probs[s, t, n, a]) for s, t in pairs) / total if pairs else 0.0
        entropy -= mean * math.log(mean) if mean else 0.0
    return entropy


def test_the_entropy_of_every_agents_mean_policy(float64: None) -> None:
    td = imagined()
    dist, weight, alive = dist_and_weights(td)
    bonus = MeanPolicyEntropy(0.3)(td, dist, weight, alive)
    assert bonus.shape == (N,)
    for n in range(N):
        pairs = [(s, t) for s, t in itertools.product(range(S), range(H)) if alive[s, t, n]]
        assert bonus[n].item() == pytest.approx(slow_mean_policy_entropy(dist.probs, weight, pairs, n), rel=1e-9)


def test_signalling_where_nothing_is_seen_to_change(float64: None) -> None:
    td = imagined()
    # About every second step of every agent changes nothing.
    moves = torch.rand(S, H, N) < 0.5
    steps = torch.where(moves.unsqueeze(-1), 0.6, 0.4) * torch.ones_like(td[keys.LATENT])
    td[keys.LATENT] = steps.cumsum(1)
    dist, weight, alive = dist_and_weights(td)
    bonus = Signalling(0.3, tolerance=0.5)(td, dist, weight, alive)
    assert bonus.shape == (N,) and bonus.abs().max() > 0.01
    for n in range(N):
        living = [(s, t) for s, t in itertools.product(range(S), range(H - 1)) if alive[s, t, n]]
        still = [(s, t) for s, t in living if not moves[s, t + 1, n]]
        spread = slow_mean_policy_entropy(dist.probs, weight, still, n)
        expected = 0.0
        for s, t in still:
            pairs = zip(dist.probs[s, t, n].tolist(), dist.probs[s, t + 1, n].tolist(), strict=True)
            told = 2 * spread + sum(after * math.log(max(now, 1e-8)) for now, after in pairs)
            expected += float(weight[s, t, n]) * told / len(living)
        assert bonus[n].item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_subtracts_every_bonus_with_its_weight(float64: None) -> None:
    bonuses = [MeanPolicyEntropy(0.3), Signalling(0.7, tolerance=100.0)]
    plain, with_bonuses = make_actor_loss(), make_actor_loss(regularizers=bonuses)
    with_bonuses.actor_network.load_state_dict(plain.actor_network.state_dict())
    td = imagined()
    with torch.no_grad():
        dist = plain.actor_network.get_dist(td.clone())
    values = [bonus(td, dist, td[keys.WEIGHT].squeeze(-1), td[keys.ALIVE]).sum() for bonus in bonuses]
    expected = plain(td)["loss_actor"] - 0.3 * values[0] - 0.7 * values[1]
    torch.testing.assert_close(with_bonuses(td)["loss_actor"], expected, rtol=1e-12, atol=0.0)
    assert keys.LATENT in with_bonuses.in_keys


def test_a_bonus_of_ones_own(float64: None) -> None:
    class FirstAction(Regularizer):
        in_keys = ["wanted"]

        def forward(self, tensordict: TensorDict, dist: Distribution, weight: Tensor, valid: Tensor) -> Tensor:
            return per_agent_mean(dist.probs[..., 0] * tensordict["wanted"].unsqueeze(-1), weight, valid)

    plain, with_bonus = make_actor_loss(), make_actor_loss(regularizers=[FirstAction(0.5)])
    with_bonus.actor_network.load_state_dict(plain.actor_network.state_dict())
    td = imagined()
    td["wanted"] = torch.randn(S, H)
    with torch.no_grad():
        probs = plain.actor_network.get_dist(td.clone()).probs
    bonus = 0.0
    for n in range(N):
        pairs = [(s, t) for s, t in itertools.product(range(S), range(H)) if td[keys.ALIVE][s, t, n]]
        for s, t in pairs:
            bonus += float(td[keys.WEIGHT][s, t, n] * td["wanted"][s, t] * probs[s, t, n, 0]) / len(pairs)
    assert "wanted" in with_bonus.in_keys
    expected = plain(td)["loss_actor"].item() - 0.5 * bonus
    assert with_bonus(td)["loss_actor"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanPolicyEntropy(-0.1), "coeff must be a number of at least 0, got -0.1"),
        (lambda: Signalling(float("nan")), "coeff must be a number of at least 0, got nan"),
        (lambda: Signalling(1.0, tolerance=-0.1), "tolerance must be a number of at least 0, got -0.1"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Regularizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bonus", [MeanPolicyEntropy(1.0), Signalling(1.0)], ids=lambda bonus: type(bonus).__name__)
def test_a_distribution_without_probabilities_is_refused(bonus: Regularizer) -> None:
    td = imagined()
    dist = torch.distributions.Normal(torch.zeros(S, H, N), 1.0)
    with pytest.raises(TypeError, match=f"{type(bonus).__name__} needs the probabilities of discrete actions"):
        bonus(td, dist, td[keys.WEIGHT].squeeze(-1), td[keys.ALIVE])


def test_the_mean_policys_entropy_lets_states_differ(float64: None) -> None:
    """Certain policies that differ between states have as much of it as one that is always at random; and no NaN."""
    loss, td = make_actor_loss(entropy_coeff=0.0, regularizers=[MeanPolicyEntropy(1.0)]), imagined(1, 2, deaths=False)
    td[keys.ACTION_MASK] = torch.zeros_like(td[keys.ACTION_MASK])
    td[keys.ACTION_MASK][0, 0, :, 0] = td[keys.ACTION_MASK][0, 1, :, 1] = True
    td[keys.ACTION][0, 0], td[keys.ACTION][0, 1] = 0, 1
    td[keys.WEIGHT][:] = 1.0
    td[keys.LAMBDA_RETURN] = td[keys.STATE_VALUE]
    out = loss(td)["loss_actor"]
    assert out.item() == pytest.approx(-N * math.log(2.0))
    assert all(gradient.isfinite().all() for gradient in grads(out, loss.actor_network_params.parameters()))


def test_signalling_leaves_agents_that_move_alone(float64: None) -> None:
    plain, with_bonus = make_actor_loss(), make_actor_loss(regularizers=[Signalling(0.3)])
    with_bonus.actor_network.load_state_dict(plain.actor_network.state_dict())
    td = imagined()
    without, with_it = (
        grads(loss(td)["loss_actor"], list(loss.actor_network_params.parameters())) for loss in (plain, with_bonus)
    )
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


@pytest.mark.parametrize("by", ["observation", "time"])
def test_only_what_is_seen_can_be_told(float64: None, by: str) -> None:
    """Sure of one action in half of the dreams and of another in the rest is best; taking turns is worst."""
    loss = make_actor_loss(entropy_coeff=0.0, regularizers=[Signalling(1.0)])
    td = imagined(2, 4, deaths=False)
    td[keys.LATENT] = torch.zeros_like(td[keys.LATENT])
    td[keys.WEIGHT][:] = 1.0
    td[keys.LAMBDA_RETURN] = td[keys.STATE_VALUE]
    action = torch.tensor([[0] * 4, [1] * 4] if by == "observation" else [[0, 1] * 2] * 2)
    td[keys.ACTION] = action.unsqueeze(-1).expand(2, 4, N).clone()
    td[keys.ACTION_MASK] = torch.nn.functional.one_hot(td[keys.ACTION], td[keys.ACTION_MASK].shape[-1]).bool()
    out = loss(td)["loss_actor"]
    surprise = 0.0 if by == "observation" else -math.log(1e-8)
    mean = 0.5 if by == "observation" else 2 / 3  # of three steps that have one after them
    spread = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
    assert out.item() == pytest.approx(N * (surprise - 2 * spread))
    assert all(gradient.isfinite().all() for gradient in grads(out, loss.actor_network_params.parameters()))


def test_actions_come_to_tell_what_is_seen() -> None:
    model = make_model(latent="gaussian")
    actor = randomize(make_actor(model, ActorCriticConfig(num_cells=32)))
    bonuses = [MeanPolicyEntropy(0.1), Signalling(1.0)]
    loss = ActorLoss(actor, num_agents=N, entropy_coeff=0.03, regularizers=bonuses)
    td = random_imagined(30, 4, model=model, deaths=False)
    observed = torch.arange(30) % 3
    observations = torch.randn(3, *td[keys.LATENT].shape[-2:])
    td[keys.LATENT] = observations[observed].unsqueeze(1).expand_as(td[keys.LATENT]).clone()
    for key in (keys.HIDDEN, keys.TEAMMATE_LOGITS):
        td[key] = td[key][:1, :1].expand_as(td[key]).clone()
    td[keys.ACTION_MASK][:] = True
    td[keys.LAMBDA_RETURN] = td[keys.STATE_VALUE]  # nothing else to learn
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(td)["loss_actor"].backward()
        optimizer.step()
    with torch.no_grad():
        probs = loss.actor_network.get_dist(td.clone()).probs
    seen = torch.stack([probs[observed == value].flatten(0, 1).mean(0) for value in range(3)])
    mean = seen.mean(0)
    information = (seen * (seen / mean).clamp(min=1e-8).log()).sum(-1).mean(0)
    # Of ln 3 = 1.10 for each; 0.64 where two observations share an action.
    assert (information > 1.0).all()
