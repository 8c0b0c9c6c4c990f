"""What the actors' and the critics' loss have in common: which agent's steps train which network."""

from __future__ import annotations

import pytest
import torch
from torchrl.objectives import SoftUpdate

from matwm_rl import keys
from matwm_rl.modules import STATE_KEYS, ActorCriticConfig, make_actor, make_critic
from matwm_rl.objectives import ActorLoss, CriticLoss
from tests.helpers import grads, make_model, randomize
from tests.objectives.helpers import N, imagined, make_actor_loss, make_critic_loss

GROUPS = (0, 1, 0)


@pytest.mark.parametrize("make", [make_actor_loss, make_critic_loss])
def test_agents_are_trained_in_isolation(make: type) -> None:
    loss, td = make(), imagined(deaths=False)
    params = [p for p in loss.parameters() if p.requires_grad]
    name = loss.out_keys[0]
    plain = grads(loss(td)[name], params)
    for n in range(N):
        # All that agent n saw, did and got is another; its gradient changes and nobody else's does.
        other = td.clone()
        fresh = imagined(deaths=False)
        for key in [*STATE_KEYS, keys.LAMBDA_RETURN, keys.STATE_VALUE, keys.WEIGHT]:
            # A latent of classes is no number to be made larger.
            other[key][:, :, n] = fresh[key][:, :, n] * (1 if key == keys.LATENT else 10)
        other_loss = make()
        other_loss.load_state_dict(loss.state_dict())
        if isinstance(loss, ActorLoss):
            other_loss.return_scale.seen.zero_()
        again = grads(other_loss(other)[name], [p for p in other_loss.parameters() if p.requires_grad])
        for g, h in zip(plain, again, strict=True):
            rest = [j for j in range(N) if j != n]
            torch.testing.assert_close(g[rest], h[rest])
            assert not torch.equal(g[n], h[n])


def make_pair(make: type) -> tuple[ActorLoss | CriticLoss, ActorLoss | CriticLoss]:
    """The loss of networks shared by group, and of networks of the agents' own with the same weights."""
    model = make_model(group_index=GROUPS)
    sizes = (ActorCriticConfig(num_cells=8, share_by_group=switch) for switch in (True, False))
    shared, own = (make(model, size) for size in sizes)
    losses = [ActorLoss(net, num_agents=N) if make is make_actor else CriticLoss(net) for net in (shared, own)]
    if make is make_critic:
        for loss in losses:
            # As the learner does; from here on the EMA copies are those of untrained critics, whose values are zero.
            SoftUpdate(loss, eps=0.98)
    randomize(shared)
    with torch.no_grad():
        for p, q in zip(own.parameters(), shared.parameters(), strict=True):
            p.copy_(q[list(GROUPS)])
    return losses[0], losses[1]


@pytest.mark.parametrize("make", [make_actor, make_critic])
def test_a_shared_network_learns_from_all_of_its_agents(float64: None, make: type) -> None:
    shared, own = make_pair(make)
    td, name = imagined(), shared.out_keys[0]
    params, own_params = ([p for p in loss.parameters() if p.requires_grad] for loss in (shared, own))
    loss, expected = shared(td)[name], own(td)[name]
    torch.testing.assert_close(loss, expected)
    for grad, alone in zip(grads(loss, params), grads(expected, own_params), strict=True):
        assert grad.shape[0] == 2 and alone.shape[0] == N
        for group in range(2):
            slow = sum(alone[n] for n in range(N) if GROUPS[n] == group)
            torch.testing.assert_close(grad[group], slow)
    # Where the dreams of one group are those of the dead, it learns nothing.
    td[keys.ALIVE] = torch.tensor([True, False, True]).expand_as(td[keys.ALIVE])
    for grad in grads(shared.eval()(td)[name], params):
        assert grad[0].any() and not grad[1].any()


def test_the_ema_of_a_shared_critic_follows_slowly() -> None:
    loss = make_pair(make_critic)[0]
    updater = SoftUpdate(loss, eps=0.9)
    trained = {name: p for name, p in loss.critic_network.named_parameters()}
    before = {name: p.detach().clone() for name, p in trained.items()}
    target = dict(loss.target_critic_network_params.flatten_keys(".").items())
    old = {name: target[name].detach().clone() for name in trained}
    randomize(loss.critic_network)
    updater.step()
    for name, p in trained.items():
        assert target[name].shape[0] == 2 and not torch.equal(p, before[name])
        torch.testing.assert_close(target[name].data, 0.9 * old[name] + 0.1 * p.data)


def test_losses_hold_and_train_their_own_parameters_alone() -> None:
    td = imagined(deaths=False)
    actor_loss, critic_loss = make_actor_loss(), make_critic_loss()
    for loss, network in ((actor_loss, "actor_network"), (critic_loss, "critic_network")):
        own = {id(p) for p in getattr(loss, network).parameters()}
        listed = list(loss.parameters())
        assert {id(p) for p in listed} == own and len(listed) == len(own)
        loss(td)[loss.out_keys[0]].backward()
        assert all(p.grad.any() for p in listed)
    trained = {p.data_ptr() for p in critic_loss.parameters()}
    for target in critic_loss.target_critic_network_params.values(True, True):
        assert target.grad is None and target.data_ptr() not in trained


@pytest.mark.parametrize("make", [make_actor_loss, make_critic_loss])
def test_weight_and_death_silence_steps(make: type) -> None:
    td = imagined(deaths=False)
    td[keys.WEIGHT][:, 2:] = 0.0
    td[keys.ALIVE][1] = False
    other = td.clone()
    fresh = imagined()
    for key in STATE_KEYS:
        other[key][:, 2:] = fresh[key][:, 2:]
        other[key][1] = fresh[key][1]
    loss = make()
    loss.eval()
    name = loss.out_keys[0]
    torch.testing.assert_close(loss(td)[name], loss(other)[name])
    for key in STATE_KEYS:
        again = other.clone()
        again[key][0, 0] = fresh[key][0, 0]
        assert not torch.equal(loss(td)[name], loss(again)[name]), key


@pytest.mark.parametrize("make", [make_actor_loss, make_critic_loss])
def test_an_agent_dead_in_every_start_gets_no_gradient_and_no_nan(make: type) -> None:
    loss, td = make(), imagined(deaths=False)
    td[keys.ALIVE][..., 1] = False
    for grad in grads(loss(td)[loss.out_keys[0]], [p for p in loss.parameters() if p.requires_grad]):
        assert grad.isfinite().all() and grad[0].any() and not grad[1].any()
