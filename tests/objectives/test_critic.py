"""The critics' loss against plain Python loops over starts, steps and agents, and its EMA copy."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from matwm_rl import keys
from matwm_rl.modules import make_critic
from matwm_rl.objectives import CriticLoss
from tests.helpers import make_model, randomize
from tests.modules.test_two_hot import slow_decode, slow_encode
from tests.objectives.helpers import SMALL, H, N, S, imagined, log_softmax, make_critic_loss


def slow_critic_loss(loss: CriticLoss, td: TensorDict, slow_value: torch.Tensor) -> float:
    with torch.no_grad():
        logits = loss.critic_network(td.clone())[keys.STATE_VALUE_LOGITS]
    total = 0.0
    for n in range(N):
        alive = [s for s in range(S) if td[keys.ALIVE][s, 0, n]]
        agent = 0.0
        for s, t in itertools.product(alive, range(H)):
            log_probs = log_softmax(logits[s, t, n].tolist())
            for target in (float(td[keys.LAMBDA_RETURN][s, t, n]), float(slow_value[s, t, n])):
                two_hot = slow_encode(target, 255, "raw")
                cross_entropy = -sum(p * q for p, q in zip(two_hot, log_probs, strict=True))
                agent += float(td[keys.WEIGHT][s, t, n]) * cross_entropy
        total += agent / max(1, len(alive) * H)
    return total


def test_critic_loss(float64: None) -> None:
    loss, td = make_critic_loss(), imagined()
    slow_critic = make_critic(make_model(), SMALL)
    ema = loss.target_critic_network_params.flatten_keys(".").to_dict()
    slow_critic.load_state_dict({name: ema[name] for name in slow_critic.state_dict()})
    with torch.no_grad():
        slow_logits = slow_critic(td.clone())[keys.STATE_VALUE_LOGITS]
    slow_value = torch.empty(S, H, N)
    for index in itertools.product(range(S), range(H), range(N)):
        slow_value[index] = slow_decode(slow_logits[index].tolist(), "raw")
    assert not torch.allclose(slow_value, loss.critic_network(td.clone())[keys.STATE_VALUE][..., 0])
    out = loss(td)
    assert out["loss_critic"].item() == pytest.approx(slow_critic_loss(loss, td, slow_value), rel=1e-6)
    assert out["value"].item() == pytest.approx(slow_value[td[keys.ALIVE]].mean().item(), rel=1e-6)
    # Given with the batch, it is not computed again.
    td[keys.SLOW_VALUE] = loss.slow_value(td) + 1.0
    torch.testing.assert_close(td[keys.SLOW_VALUE].squeeze(-1) - 1.0, slow_value)
    expected = slow_critic_loss(loss, td, slow_value + 1.0)
    assert loss(td)["loss_critic"].item() == pytest.approx(expected, rel=1e-6)


def test_ema_critic_follows_slowly() -> None:
    loss = make_critic_loss()
    # The copy starts equal.
    updater = SoftUpdate(loss, eps=0.98)
    source = dict(loss.critic_network_params.flatten_keys(".").items())
    before = {name: value.clone() for name, value in source.items()}
    randomize(loss.critic_network)
    updater.step()
    for name, target in loss.target_critic_network_params.flatten_keys(".").items():
        if target.is_floating_point():
            torch.testing.assert_close(target.data, 0.98 * before[name] + 0.02 * source[name].data)
        else:
            # Where each agent's weights start.
            assert torch.equal(target, before[name])
