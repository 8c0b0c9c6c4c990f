"""Defects of earlier implementations, continued: targets of the losses, and loops in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matwm_rl import keys
from matwm_rl.modules import ActorCriticConfig
from matwm_rl.objectives import CriticLoss, WorldModelLoss
from tests.helpers import (
    COUNTS,
    grads,
    make_learner,
    make_model,
    random_batch,
    random_imagined,
    total,
)
from tests.test_known_defects import outputs_of

N = len(COUNTS)
SMALL = ActorCriticConfig(num_cells=8)


# Defect: two-hot targets are turned back into hard bins by argmax.


def assert_two_soft_bins(gradient: Tensor, logits: Tensor, target: Tensor, bins: Tensor) -> None:
    """The gradient of a cross-entropy is softmax minus target, up to a factor per element."""
    probs = logits.softmax(-1)
    flat = zip(gradient.flatten(0, -2), probs.flatten(0, -2), target.flatten().tolist(), strict=True)
    for g, p, x in flat:
        upper = int((bins <= x).sum())
        share = float((x - bins[upper - 1]) / (bins[upper] - bins[upper - 1]))
        expected = p.clone()
        expected[upper - 1] -= 1 - share
        expected[upper] -= share
        torch.testing.assert_close(g / g.abs().sum(), expected / expected.abs().sum(), rtol=1e-4, atol=1e-6)
        assert 0.05 < share < 0.95 and g[upper - 1] < 0 and g[upper] < 0


def between_bins(bins: Tensor, *shape: int) -> Tensor:
    lower = torch.randint(110, 140, shape)
    share = 0.2 + 0.6 * torch.rand(shape)
    return bins[lower] + share * (bins[lower + 1] - bins[lower])


def test_reward_targets_stay_soft(float64: None) -> None:
    model, batch = make_model(), random_batch(2, 3, deaths=False)
    batch[keys.REWARD] = between_bins(model.two_hot.bins, 2, 3, N, 1)
    with outputs_of(model.reward) as outputs:
        losses = WorldModelLoss(model)(batch)
    (gradient,) = grads(losses["loss_reward"], outputs)
    assert_two_soft_bins(gradient, outputs[0].detach(), batch[keys.REWARD].movedim(2, 0), model.two_hot.bins)


def test_value_targets_stay_soft(float64: None) -> None:
    learner = make_learner()
    loss: CriticLoss = learner.critic_loss
    td = random_imagined(2, 3, model=learner.world_model, deaths=False)
    td[keys.LAMBDA_RETURN] = between_bins(loss.two_hot.bins, 2, 3, N, 1)
    td[keys.WEIGHT][:] = 1.0
    network = loss.critic_network[0].module
    with outputs_of(network) as outputs:
        value = loss(td)["loss_critic"]
    (gradient,) = grads(value, outputs[:1])
    logits, slow_logits = outputs[0].detach(), outputs[1]
    # Two targets, of equal weight: take the EMA copy's part out.
    probs = logits.softmax(-1)
    slow_target = loss.two_hot.encode(loss.two_hot.decode(slow_logits))
    from_returns = gradient * gradient.shape[0] * gradient.shape[1] - (probs - slow_target)
    assert_two_soft_bins(from_returns, logits, td[keys.LAMBDA_RETURN], loss.two_hot.bins)


# Defect: Python loops over batch, time and agents in the losses.


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(B: int, T: int, num_agents: int) -> dict[str, int]:
    """Tensor operations, forward and backward, of every loss."""
    counts, groups = [4] * num_agents, [0] * num_agents
    learner = make_learner(make_model(counts, groups))
    batch = random_batch(B, T, action_counts=counts, deaths=False)
    imagined = random_imagined(B, T, model=learner.world_model, deaths=False)
    counted = {}
    for name, data in (("world_model", batch), ("actor", imagined), ("critic", imagined)):
        with CountOperations() as counter:
            total(getattr(learner, f"{name}_loss")(data)).backward()
        counted[name] = counter.count
    with CountOperations() as counter:
        learner.returns(random_imagined(B, 3, model=learner.world_model))
    return counted | {"returns": counter.count}


def test_losses_have_no_loops_over_batch_time_or_agents() -> None:
    small = operations(2, 3, 2)
    for bigger in ((22, 3, 2), (2, 23, 2), (2, 3, 12)):
        # A few more to copy what lies in memory in another order; a loop would add twenty, and more for the gradient.
        for name, count in operations(*bigger).items():
            assert count <= small[name] + 8, (name, bigger)
