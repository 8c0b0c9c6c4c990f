"""Actor and critic losses against plain Python loops over starts, steps and agents, and where their gradients go."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from matwm_rl import keys
from matwm_rl.modules import make_actor, make_critic
from matwm_rl.objectives import ActorLoss, CriticLoss
from tests.helpers import COUNTS, grads, make_model, random_imagined, randomize, read_keys
from tests.modules.test_two_hot import slow_decode, slow_encode
from tests.objectives.test_returns import slow_quantile

N, S, H = len(COUNTS), 4, 5


def make_actor_loss(**kwargs: float) -> ActorLoss:
    actor = randomize(make_actor(make_model(), num_cells=8))
    return ActorLoss(actor, num_agents=N, **kwargs)


def make_critic_loss() -> CriticLoss:
    loss = CriticLoss(randomize(make_critic(make_model(), num_cells=8)))
    # As the learner does; from here on the EMA copy lags behind.
    SoftUpdate(loss, eps=0.98)
    randomize(loss.critic_network)
    return loss


def imagined(S: int = S, H: int = H, **kwargs: bool) -> TensorDict:
    return random_imagined(S, H, model=make_model(), **kwargs)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def slow_actor_loss(loss: ActorLoss, td: TensorDict, entropy_coeff: float, center: bool = False) -> float:
    """Section 5, one step of one agent at a time; returns are scaled by their own percentiles."""
    with torch.no_grad():
        logits = loss.actor_network(td.clone())[keys.LOGITS]
    total = 0.0
    for n in range(N):
        alive = [s for s in range(S) if td[keys.ALIVE][s, 0, n]]
        if not alive:
            continue
        returns = [float(td[keys.LAMBDA_RETURN][s, t, n]) for s, t in itertools.product(alive, range(H))]
        scale = max(1.0, slow_quantile(returns, 0.95) - slow_quantile(returns, 0.05))
        agent = mean = 0.0
        if center:
            pairs = [(float(td[keys.WEIGHT][s, t, n]), s, t) for s, t in itertools.product(alive, range(H))]
            mean = sum(w * float(td[keys.LAMBDA_RETURN][s, t, n] - td[keys.STATE_VALUE][s, t, n]) for w, s, t in pairs)
            mean /= scale * sum(w for w, _, _ in pairs)
        for s, t in itertools.product(alive, range(H)):
            legal = [a for a in range(logits.shape[-1]) if td[keys.ACTION_MASK][s, t, n, a]]
            log_probs = dict(zip(legal, log_softmax([float(logits[s, t, n, a]) for a in legal]), strict=True))
            advantage = float(td[keys.LAMBDA_RETURN][s, t, n] - td[keys.STATE_VALUE][s, t, n]) / scale - mean
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


def test_centred_advantages_have_mean_zero_for_every_agent(float64: None) -> None:
    loss, td = make_actor_loss(entropy_coeff=0.01, center_advantage=True), imagined()
    expected = slow_actor_loss(loss, td, 0.01, center=True)
    assert loss(td)["loss_actor"].item() == pytest.approx(expected, rel=1e-9)
    # One sign of all advantages, as with a critic that lags behind, changes nothing.
    td[keys.STATE_VALUE] -= 100.0
    assert loss.eval()(td)["loss_actor"].item() == pytest.approx(expected, rel=1e-9)


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
    """PPO's clipped surrogate where log-probabilities are given: at the old policy, and at 4.5 times more or less."""
    loss, td = make_actor_loss(entropy_coeff=0.01, standardize_advantage=True, clip_epsilon=0.2), imagined()
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


def test_the_entropy_of_every_agents_mean_policy(float64: None) -> None:
    plain, with_bonus = make_actor_loss(), make_actor_loss(mean_policy_entropy_coeff=0.3)
    with_bonus.actor_network.load_state_dict(plain.actor_network.state_dict())
    td = imagined()
    with torch.no_grad():
        probs = plain.actor_network.get_dist(td.clone()).probs
    bonus = 0.0
    for n in range(N):
        pairs = [(s, t) for s, t in itertools.product(range(S), range(H)) if td[keys.ALIVE][s, t, n]]
        total = sum(float(td[keys.WEIGHT][s, t, n]) for s, t in pairs)
        for a in range(probs.shape[-1]):
            mean = sum(float(td[keys.WEIGHT][s, t, n] * probs[s, t, n, a]) for s, t in pairs) / total
            bonus -= 0.3 * mean * math.log(mean) if mean else 0.0
    expected = plain(td)["loss_actor"].item() - bonus
    assert with_bonus(td)["loss_actor"].item() == pytest.approx(expected, rel=1e-9)


def test_the_mean_policys_entropy_lets_states_differ(float64: None) -> None:
    """Certain policies that differ between states have as much of it as one that is always at random; and no NaN."""
    loss, td = make_actor_loss(entropy_coeff=0.0, mean_policy_entropy_coeff=1.0), imagined(1, 2, deaths=False)
    td[keys.ACTION_MASK] = torch.zeros_like(td[keys.ACTION_MASK])
    td[keys.ACTION_MASK][0, 0, :, 0] = td[keys.ACTION_MASK][0, 1, :, 1] = True
    td[keys.ACTION][0, 0], td[keys.ACTION][0, 1] = 0, 1
    td[keys.WEIGHT][:] = 1.0
    td[keys.LAMBDA_RETURN] = td[keys.STATE_VALUE]
    out = loss(td)["loss_actor"]
    assert out.item() == pytest.approx(-N * math.log(2.0))
    assert all(gradient.isfinite().all() for gradient in grads(out, loss.actor_network_params.parameters()))


def test_signalling_where_nothing_is_seen_to_change(float64: None) -> None:
    plain, with_bonus = make_actor_loss(), make_actor_loss(signalling_coeff=0.3, signalling_tolerance=0.5)
    with_bonus.actor_network.load_state_dict(plain.actor_network.state_dict())
    td = imagined()
    # About every second step of every agent changes nothing.
    moves = torch.rand(S, H, N) < 0.5
    steps = torch.where(moves.unsqueeze(-1), 0.6, 0.4) * torch.ones_like(td[keys.LATENT])
    td[keys.LATENT] = steps.cumsum(1)
    with torch.no_grad():
        probs = plain.actor_network.get_dist(td.clone()).probs
    bonus = 0.0
    for n in range(N):
        living = [(s, t) for s, t in itertools.product(range(S), range(H - 1)) if td[keys.ALIVE][s, t, n]]
        still = [(s, t) for s, t in living if not moves[s, t + 1, n]]
        total = sum(float(td[keys.WEIGHT][s, t, n]) for s, t in still)
        mean = [
            sum(float(td[keys.WEIGHT][s, t, n] * probs[s, t, n, a]) for s, t in still) / total if still else 0.0
            for a in range(probs.shape[-1])
        ]
        spread = -sum(p * math.log(p) for p in mean if p)
        for s, t in still:
            pairs = [(float(probs[s, t, n, a]), float(probs[s, t + 1, n, a])) for a in range(probs.shape[-1])]
            told = 2 * spread + sum(after * math.log(max(now, 1e-8)) for now, after in pairs)
            bonus += 0.3 * float(td[keys.WEIGHT][s, t, n]) * told / len(living)
    expected = plain(td)["loss_actor"].item() - bonus
    assert abs(bonus) > 0.01
    assert with_bonus(td)["loss_actor"].item() == pytest.approx(expected, rel=1e-9)


def test_signalling_leaves_agents_that_move_alone(float64: None) -> None:
    plain, with_bonus = make_actor_loss(), make_actor_loss(signalling_coeff=0.3)
    with_bonus.actor_network.load_state_dict(plain.actor_network.state_dict())
    td = imagined()
    without, with_it = (
        grads(loss(td)["loss_actor"], list(loss.actor_network_params.parameters())) for loss in (plain, with_bonus)
    )
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


@pytest.mark.parametrize("by", ["observation", "time"])
def test_only_what_is_seen_can_be_told(float64: None, by: str) -> None:
    """Sure of one action in half of the dreams and of another in the rest is best; taking turns is worst."""
    loss = make_actor_loss(entropy_coeff=0.0, signalling_coeff=1.0)
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
    torch.manual_seed(0)
    model = make_model(latent="fsq")
    actor = randomize(make_actor(model, num_cells=32))
    loss = ActorLoss(actor, num_agents=N, entropy_coeff=0.03, mean_policy_entropy_coeff=0.1, signalling_coeff=1.0)
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


def test_the_clipped_gradient_starts_as_the_policy_gradient(float64: None) -> None:
    loss, td = make_actor_loss(standardize_advantage=True), imagined()
    parameters = list(loss.actor_network_params.parameters())
    plain = grads(loss(td)["loss_actor"], parameters)
    with torch.no_grad():
        td[keys.ACTION_LOG_PROB] = loss.actor_network.get_dist(td.clone()).log_prob(td[keys.ACTION])
    for clipped, gradient in zip(grads(loss(td)["loss_actor"], parameters), plain, strict=True):
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
    slow_critic = make_critic(make_model(), num_cells=8)
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
        for key in [*read_keys(make_model()), keys.LAMBDA_RETURN, keys.STATE_VALUE, keys.WEIGHT]:
            # Positions of ones are no numbers to be made larger.
            other[key][:, :, n] = fresh[key][:, :, n] * (10 if fresh[key].is_floating_point() else 1)
        other_loss = make()
        other_loss.load_state_dict(loss.state_dict())
        if isinstance(loss, ActorLoss):
            other_loss.return_scale.seen.zero_()
        again = grads(other_loss(other)[name], [p for p in other_loss.parameters() if p.requires_grad])
        for g, h in zip(plain, again, strict=True):
            rest = [j for j in range(N) if j != n]
            torch.testing.assert_close(g[rest], h[rest])
            assert not torch.equal(g[n], h[n])


GROUPS = (0, 1, 0)


def make_pair(make: type) -> tuple[ActorLoss | CriticLoss, ActorLoss | CriticLoss]:
    """The loss of networks shared by group, and of networks of the agents' own with the same weights."""
    model = make_model(group_index=GROUPS)
    shared, own = (make(model, num_cells=8, share_by_group=switch) for switch in (True, False))
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
    read = read_keys(make_model())
    for key in read:
        other[key][:, 2:] = fresh[key][:, 2:]
        other[key][1] = fresh[key][1]
    loss = make()
    loss.eval()
    name = loss.out_keys[0]
    torch.testing.assert_close(loss(td)[name], loss(other)[name])
    for key in read:
        again = other.clone()
        again[key][0, 0] = fresh[key][0, 0]
        assert not torch.equal(loss(td)[name], loss(again)[name]), key


@pytest.mark.parametrize("make", [make_actor_loss, make_critic_loss])
def test_an_agent_dead_in_every_start_gets_no_gradient_and_no_nan(make: type) -> None:
    loss, td = make(), imagined(deaths=False)
    td[keys.ALIVE][..., 1] = False
    for grad in grads(loss(td)[loss.out_keys[0]], [p for p in loss.parameters() if p.requires_grad]):
        assert grad.isfinite().all() and grad[0].any() and not grad[1].any()
