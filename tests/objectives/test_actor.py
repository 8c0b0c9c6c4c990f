"""The actors' loss against plain Python loops over starts, steps and agents."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from matwm_rl import keys
from matwm_rl.objectives import ActorLoss
from tests.helpers import grads
from tests.objectives.helpers import H, N, S, imagined, log_softmax, make_actor_loss
from tests.objectives.test_returns import slow_quantile


def slow_actor_loss(loss: ActorLoss, td: TensorDict, entropy_coeff: float) -> float:
    """REINFORCE, one step of one agent at a time; returns are scaled by their own percentiles."""
    with torch.no_grad():
        logits = loss.actor_network(td.clone())[keys.LOGITS]
    total = 0.0
    for n in range(N):
        alive = [s for s in range(S) if td[keys.ALIVE][s, 0, n]]
        if not alive:
            continue
        returns = [float(td[keys.LAMBDA_RETURN][s, t, n]) for s, t in itertools.product(alive, range(H))]
        scale = max(1.0, slow_quantile(returns, 0.95) - slow_quantile(returns, 0.05))
        agent = 0.0
        for s, t in itertools.product(alive, range(H)):
            legal = [a for a in range(logits.shape[-1]) if td[keys.ACTION_MASK][s, t, n, a]]
            log_probs = dict(zip(legal, log_softmax([float(logits[s, t, n, a]) for a in legal]), strict=True))
            advantage = float(td[keys.LAMBDA_RETURN][s, t, n] - td[keys.STATE_VALUE][s, t, n]) / scale
            entropy = -sum(math.exp(p) * p for p in log_probs.values())
            step = -advantage * log_probs[int(td[keys.ACTION][s, t, n])] - entropy_coeff * entropy
            agent += float(td[keys.WEIGHT][s, t, n]) * step
        total += agent / (len(alive) * H)
    return total


@pytest.mark.parametrize("entropy_coeff", [3e-4, 0.5])
def test_actor_loss(float64: None, entropy_coeff: float) -> None:
    loss, td = make_actor_loss(entropy_coeff=entropy_coeff), imagined()
    expected = slow_actor_loss(loss, td, entropy_coeff)
    assert loss(td)["loss_actor"].item() == pytest.approx(expected, rel=1e-9)
    assert not td[keys.ALIVE].all()


def slow_standardized(td: TensorDict, n: int) -> dict[tuple[int, int], float]:
    """Advantages of one agent by start and step: weighted mean 0, standard deviation 1 unless it was below."""
    alive = [s for s in range(S) if td[keys.ALIVE][s, 0, n]]
    pairs = [(s, t) for s in alive for t in range(H)]
    raw = {(s, t): float(td[keys.LAMBDA_RETURN][s, t, n] - td[keys.STATE_VALUE][s, t, n]) for s, t in pairs}
    weight = {(s, t): float(td[keys.WEIGHT][s, t, n]) for s, t in pairs}
    mean = sum(weight[pair] * raw[pair] for pair in pairs) / sum(weight.values())
    variance = sum(weight[pair] * (raw[pair] - mean) ** 2 for pair in pairs) / sum(weight.values())
    return {pair: (raw[pair] - mean) / max(1.0, math.sqrt(variance)) for pair in pairs}


@pytest.mark.parametrize("size", [0.1, 10.0])
@pytest.mark.parametrize("old", [None, 0.0, 1.5, -1.5])
def test_standardized_and_clipped_loss(float64: None, size: float, old: float | None) -> None:
    """PPO's clipped surrogate at the old policy, and at 4.5 times more or less; REINFORCE where ``old`` is None."""
    objective = "reinforce" if old is None else "ppo"
    choices = {"advantage": "standardize", "objective": objective}
    loss, td = make_actor_loss(entropy_coeff=0.01, clip_epsilon=0.2, **choices), imagined()
    td[keys.LAMBDA_RETURN] = size * td[keys.LAMBDA_RETURN]
    td[keys.STATE_VALUE] = size * td[keys.STATE_VALUE]
    with torch.no_grad():
        dist = loss.actor_network.get_dist(td.clone())
        log_prob, entropy = dist.log_prob(td[keys.ACTION]), dist.entropy()
    if old is not None:
        td[keys.ACTION_LOG_PROB] = log_prob + old
    expected = 0.0
    for n in range(N):
        advantages = slow_standardized(td, n)
        for (s, t), advantage in advantages.items():
            gain = advantage * float(log_prob[s, t, n])
            if old is not None:
                ratio = math.exp(-old)
                gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            weight = float(td[keys.WEIGHT][s, t, n])
            expected -= weight * (gain + 0.01 * float(entropy[s, t, n])) / len(advantages)
    assert loss(td)["loss_actor"].item() == pytest.approx(expected, rel=1e-9)


def test_the_clipped_gradient_starts_as_the_policy_gradient(float64: None) -> None:
    reinforce, ppo = (make_actor_loss(advantage="standardize", objective=name) for name in ("reinforce", "ppo"))
    ppo.load_state_dict(reinforce.state_dict())
    td = imagined()
    with torch.no_grad():
        td[keys.ACTION_LOG_PROB] = reinforce.actor_network.get_dist(td.clone()).log_prob(td[keys.ACTION])
    plain, clipped_gradients = (
        grads(loss(td)["loss_actor"], loss.actor_network_params.parameters()) for loss in (reinforce, ppo)
    )
    for clipped, gradient in zip(clipped_gradients, plain, strict=True):
        torch.testing.assert_close(clipped, gradient)


def test_actor_gradient_is_the_policy_gradient(float64: None) -> None:
    """More of the action whose return beat the value, whatever the sign conventions along the way."""
    loss, td = make_actor_loss(entropy_coeff=0.0), imagined(1, 1, deaths=False)
    td[keys.ACTION_MASK][:] = True
    td[keys.ACTION][:] = 1
    td[keys.WEIGHT][:] = 1.0
    for advantage in (2.0, -2.0):
        td[keys.LAMBDA_RETURN] = td[keys.STATE_VALUE] + advantage
        dist = loss.actor_network.get_dist(td.clone())
        gradient = grads(loss(td)["loss_actor"], loss.actor_network_params.parameters())
        direction = grads(dist.log_prob(td[keys.ACTION]).sum(), loss.actor_network_params.parameters())
        for g, d in zip(gradient, direction, strict=True):
            torch.testing.assert_close(g, -advantage * d)


def test_actor_loss_takes_no_gradient_through_returns_values_or_scale() -> None:
    loss, td = make_actor_loss(), imagined()
    inputs = [td[key].requires_grad_() for key in (keys.LAMBDA_RETURN, keys.STATE_VALUE)]
    assert not any(grad.any() for grad in grads(loss(td)["loss_actor"], inputs))


def test_return_scale_moves_in_training_alone() -> None:
    loss, td = make_actor_loss(), imagined()
    loss.eval()
    loss(td)
    assert not loss.return_scale.seen.any()
    loss.train()
    out = loss(td)
    assert loss.return_scale.seen.all()
    assert torch.equal(out["return_scale"], loss.return_scale.scale())


def test_the_objective_is_chosen_and_not_read_off_the_batch() -> None:
    """Log-probabilities in the batch do not turn REINFORCE into PPO, and PPO says that it needs them."""
    reinforce, ppo = (make_actor_loss(objective=name) for name in ("reinforce", "ppo"))
    td = imagined()
    plain = reinforce.eval()(td)
    td[keys.ACTION_LOG_PROB] = -torch.rand(S, H, N)
    assert torch.equal(reinforce(td)["loss_actor"], plain["loss_actor"])
    assert keys.ACTION_LOG_PROB in ppo.in_keys and keys.ACTION_LOG_PROB not in reinforce.in_keys
    with pytest.raises(KeyError, match=r"'action_log_prob'.*PPO needs the log-probabilities"):
        ppo(td.exclude(keys.ACTION_LOG_PROB))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"objective": "a2c"}, "objective must be 'reinforce' or 'ppo', got 'a2c'"),
        ({"advantage": "center"}, "advantage must be 'return_scale' or 'standardize', got 'center'"),
        ({"clip_epsilon": -0.2}, "clip_epsilon must be a number of at least 0, got -0.2"),
    ],
    ids=str,
)
def test_choices_that_there_are_not_are_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_actor_loss(**choice)
