from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch.nn.functional import layer_norm, silu
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MaskedCategorical

from matwm_rl import keys
from matwm_rl.action_distribution import ActionDistribution
from matwm_rl.action_space import DiscreteActions
from matwm_rl.modules import (
    STATE_KEYS,
    ActorCriticConfig,
    LatentLinear,
    StackedLinear,
    StateMLP,
    TwoHot,
    make_actor,
    make_critic,
)
from matwm_rl.modules.actor_critic import check_actor, read_action
from tests.helpers import COUNTS, LATENTS, grads, make_model, random_imagined, randomize

N = len(COUNTS)
SMALL, SHARED = (ActorCriticConfig(num_cells=8, share_by_group=shared) for shared in (False, True))


def slow_state_mlp(net: StateMLP, n: int, state: torch.Tensor) -> torch.Tensor:
    """Agent n's own network on ``[size]``."""
    layers = [module for module in net.modules() if not list(module.children())]
    for layer in layers:
        if isinstance(layer, StackedLinear):
            state = state @ layer.weight[n] + layer.bias[n]
        else:
            state = silu(layer_norm(state, state.shape, layer.weight[n], layer.bias[n]))
    return state


def of_state(net: TensorDictSequential, td: TensorDict) -> torch.Tensor:
    """Logits of an actor or a critic."""
    return net[0](td.clone())[net[0].out_keys[0]]


@pytest.mark.parametrize("latent", LATENTS)
def test_each_agent_has_its_own_network_on_all_of_its_own_state(float64: None, latent: str) -> None:
    model = make_model(latent=latent)
    actor = randomize(make_actor(model, SMALL))
    td = random_imagined(model=model)
    logits = actor.get_dist(td.clone()) and actor(td.clone())[keys.LOGITS]
    net = actor[0].module
    for s, h, n in itertools.product(range(4), range(5), range(N)):
        latent, hidden, teammates = (td[key][s, h, n] for key in STATE_KEYS)
        state = torch.cat([latent, hidden, teammates.softmax(-1).flatten()])
        torch.testing.assert_close(logits[s, h, n], slow_state_mlp(net, n, state))


@pytest.mark.parametrize("num_agents", [1, 3])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_latents_are_looked_up_without_gradient_and_multiplied_with_one(
    float64: None, num_agents: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(COUNTS[:num_agents], [0] * num_agents)
    net = randomize(make_actor(model, ActorCriticConfig(num_cells=8, depth=depth)))[0].module
    td = random_imagined(model=model)
    looked_up: list[LatentLinear] = []
    look_up = LatentLinear.forward_multi_hot

    def counted(layer: LatentLinear, *inputs: torch.Tensor | None) -> torch.Tensor:
        looked_up.append(layer)
        return look_up(layer, *inputs)

    monkeypatch.setattr(LatentLinear, "forward_multi_hot", counted)
    fast = net(*(td[key] for key in STATE_KEYS))
    assert looked_up == [net.input]
    dense = net(*(td[key].requires_grad_() for key in STATE_KEYS))
    assert looked_up == [net.input]
    torch.testing.assert_close(fast, dense)
    weight = torch.randn_like(fast)
    for one, other in zip(*(grads((weight * out).sum(), net.parameters()) for out in (fast, dense)), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other)
    # And what wants a gradient gets it.
    assert all(grad.any() for grad in grads((weight * dense).sum(), [td[key] for key in STATE_KEYS[:2]]))


@pytest.mark.parametrize("make", [make_actor, make_critic])
def test_the_whole_state_is_read_and_nothing_else(make: type) -> None:
    model = make_model()
    net = randomize(make(model, SMALL))
    td = random_imagined(model=model)
    expected = net(td.clone())[net.out_keys[0]]
    assert set(STATE_KEYS) <= set(net.in_keys) <= {*STATE_KEYS, keys.ACTION_MASK}
    for key in STATE_KEYS:
        other = td.clone()
        other[key] = td[key].flip(0)
        assert not torch.equal(net(other)[net.out_keys[0]], expected), key
    # Everything else may be left out.
    assert torch.equal(net(td.select(*net.in_keys))[net.out_keys[0]], expected)


@pytest.mark.parametrize("make", [make_actor, make_critic])
@pytest.mark.parametrize("latent", LATENTS)
def test_an_agents_output_and_parameters_are_its_own(make: type, latent: str) -> None:
    model = make_model(latent=latent)
    net = randomize(make(model, SMALL))
    td = random_imagined(model=model)
    looked_up = of_state(net, td)
    inputs = [td[key].requires_grad_() for key in STATE_KEYS]
    out = of_state(net, td)
    for n in range(N):
        loss = out[..., n, :].square().sum()
        for grad in grads(loss, inputs):
            own = grad[:, :, n].flatten(2)
            assert own.abs().sum(-1).all()
            assert not grad[:, :, :n].any() and not grad[:, :, n + 1 :].any()
        for grad in grads(loss, net.parameters()):
            assert grad[n].any() and not grad[:n].any() and not grad[n + 1 :].any()
        # A look-up has no gradient to z: what changes with z shows who reads it.
        for key in STATE_KEYS:
            other = td.detach().clone()
            other[key][:, :, n] = random_imagined(model=model)[key][:, :, n]
            differs = (of_state(net, other) != looked_up).any(-1)
            assert differs[:, :, n].all() and differs.sum() == differs[:, :, n].sum(), key


def test_actor_samples_legal_actions_by_their_probabilities() -> None:
    model = make_model()
    actor = randomize(make_actor(model, SMALL))
    td = random_imagined(1, 1, model=model).expand(20_000, 1).clone()
    with set_exploration_type(ExplorationType.RANDOM):
        out = actor(td)
    mask, logits = td[keys.ACTION_MASK][0, 0], out[keys.LOGITS][0, 0].detach()
    for n in range(N):
        drawn = torch.bincount(out[keys.ACTION][:, 0, n], minlength=model.num_actions) / 20_000
        weights = [math.exp(float(x)) if legal else 0.0 for x, legal in zip(logits[n], mask[n], strict=True)]
        probs = torch.tensor(weights) / sum(weights)
        assert (drawn - probs).abs().max() < 5 * 0.5 / math.sqrt(20_000)
        assert not drawn[~mask[n]].any()


def test_deterministic_actor_takes_the_likeliest_legal_action() -> None:
    model = make_model()
    actor = randomize(make_actor(model, SMALL))
    td = random_imagined(20, model=model)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out = actor(td.clone())
    best = out[keys.LOGITS].masked_fill(~td[keys.ACTION_MASK], -torch.inf).argmax(-1)
    assert torch.equal(out[keys.ACTION], best)


def test_actions_are_drawn_by_their_probabilities_in_any_shape() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5], [3.0, 0.0, 0.0, 0.0], [1e4, 2e4, -1e4, 0.0]])
    mask = torch.tensor([[True, True, False, True], [False, True, True, True], [True, False, True, False]])
    ours, theirs = (make(logits=logits, mask=mask) for make in (ActionDistribution, MaskedCategorical))
    for shape in ((), (7,), (2, 7)):
        assert ours.sample(shape).shape == (*shape, 3) and ours.sample(torch.Size(shape)).dtype == torch.int64
    drawn = torch.nn.functional.one_hot(ours.sample((20_000,)), 4).float().mean(0)
    expected = torch.tensor(
        [
            [x / (1 + math.e + math.e**0.5) for x in (1.0, math.e, 0.0, math.e**0.5)],
            [0.0, 1 / 3, 1 / 3, 1 / 3],
            [1.0, 0.0, 0.0, 0.0],
        ]
    )
    assert (drawn - expected).abs().max() < 5 * 0.5 / math.sqrt(20_000)
    assert not drawn[~mask].any()
    # All else is TorchRL's.
    action = ours.sample()
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode, theirs.mode)


def test_one_legal_action_is_certain_with_finite_gradients() -> None:
    model = make_model()
    actor = randomize(make_actor(model, SMALL))
    td = random_imagined(model=model)
    td[keys.ACTION_MASK] = torch.arange(model.num_actions).expand_as(td[keys.ACTION_MASK]) == 2
    dist = actor.get_dist(td)
    log_prob, entropy = dist.log_prob(torch.full((4, 5, N), 2)), dist.entropy()
    torch.testing.assert_close(log_prob, torch.zeros_like(log_prob))
    torch.testing.assert_close(entropy, torch.zeros_like(entropy))
    for grad in grads(log_prob.sum() + entropy.sum(), actor.parameters()):
        assert grad.isfinite().all()


@pytest.mark.parametrize("interpolation", ["raw", "symlog"])
def test_critic_decodes_its_logits(interpolation: str) -> None:
    model, two_hot = make_model(), TwoHot(interpolation=interpolation)
    critic = randomize(make_critic(model, SMALL, two_hot=two_hot))
    out = critic(random_imagined(model=model))
    assert out[keys.STATE_VALUE_LOGITS].shape == (4, 5, N, 255)
    torch.testing.assert_close(out[keys.STATE_VALUE], two_hot.decode(out[keys.STATE_VALUE_LOGITS]).unsqueeze(-1))


@pytest.mark.parametrize("interpolation", ["raw", "symlog"])
def test_values_are_coded_as_the_world_models_rewards(interpolation: str) -> None:
    model = make_model(reward_interpolation=interpolation)
    out = randomize(make_critic(model, SMALL))(random_imagined(model=model))
    expected = TwoHot(interpolation=interpolation).decode(out[keys.STATE_VALUE_LOGITS])
    torch.testing.assert_close(out[keys.STATE_VALUE].squeeze(-1), expected)


def test_untrained_policy_is_uniform_and_value_zero() -> None:
    model = make_model()
    td = random_imagined(model=model)
    td = make_critic(model, SMALL)(make_actor(model, SMALL)(td))
    assert not td[keys.LOGITS].any()
    assert td[keys.STATE_VALUE].abs().max() < 1e-4


# -- shared by group -------------------------------------------------------------------------------------------------

GROUPINGS = [(0, 0, 1), (0, 1, 0), (0, 0, 0), (0, 1, 2)]


@pytest.mark.parametrize("make", [make_actor, make_critic])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("group_index", GROUPINGS, ids=str)
def test_agents_of_a_group_do_the_same_in_the_same_state(make: type, latent: str, group_index: tuple[int, ...]) -> None:
    model = make_model(group_index=group_index, latent=latent)
    net = randomize(make(model, SHARED))
    assert all(p.shape[0] == len(set(group_index)) for p in net.parameters())
    td = random_imagined(model=model)
    for key in STATE_KEYS:
        td[key] = td[key][:, :, :1].expand_as(td[key]).contiguous()
    out = of_state(net, td)
    for n, m in itertools.combinations(range(N), 2):
        same = torch.isclose(out[..., n, :], out[..., m, :], rtol=1e-4, atol=1e-6).all(-1)
        assert same.all() if group_index[n] == group_index[m] else not same.any()


@pytest.mark.parametrize("make", [make_actor, make_critic])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("group_index", GROUPINGS, ids=str)
def test_a_shared_networks_gradient_is_the_sum_over_its_agents(
    float64: None, make: type, latent: str, group_index: tuple[int, ...]
) -> None:
    """Against one agent, one state at a time, each agent through the network of its group."""
    model = make_model(group_index=group_index, latent=latent)
    net = randomize(make(model, SHARED))
    td, parameters = random_imagined(2, 3, model=model), list(net.parameters())
    out = of_state(net, td)
    weight = torch.randn_like(out)
    expected = [torch.zeros_like(p) for p in parameters]
    for s, h, n in itertools.product(range(2), range(3), range(N)):
        latent_value, hidden, teammates = (td[key][s, h, n] for key in STATE_KEYS)
        state = torch.cat([latent_value, hidden, teammates.softmax(-1).flatten()])
        alone = slow_state_mlp(net[0].module, group_index[n], state)
        torch.testing.assert_close(out[s, h, n], alone)
        for sum_, grad in zip(expected, grads((weight[s, h, n] * alone).sum(), parameters), strict=True):
            sum_ += grad
    for grad, slow in zip(grads((weight * out).sum(), parameters), expected, strict=True):
        assert grad.flatten(1).any(1).all()
        torch.testing.assert_close(grad, slow)
    for n, own in enumerate(group_index):
        for grad in grads((weight * out)[..., n, :].sum(), parameters):
            assert grad[own].any() and not grad[:own].any() and not grad[own + 1 :].any()


@pytest.mark.parametrize("make", [make_actor, make_critic])
def test_a_shared_network_is_as_large_for_any_number_of_agents_alike(make: type) -> None:
    sizes = []
    for num_agents in (2, 5):
        model = make_model([4] * num_agents, [0] * num_agents, teammate_predictor=False)
        sizes.append(sum(p.numel() for p in make(model, SHARED).parameters()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("make", [make_actor, make_critic])
@pytest.mark.parametrize("switches", [{"teammate_predictor": False}, {}, {"latent": "gaussian"}])
def test_networks_hold_nothing_of_the_world_model(make: type, switches: dict) -> None:
    model = make_model(**switches)
    net = make(model, SMALL)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in model.parameters()}
    assert all(p.shape[0] == N for p in net.parameters())
    assert net(random_imagined(model=model))[net.out_keys[0]].shape[:3] == (4, 5, N)


# -- actors of a user ------------------------------------------------------------------------------------------------


def test_an_actor_that_reads_or_writes_something_else_is_named() -> None:
    def module(in_keys: list, out_keys: list) -> TensorDictModule:
        return TensorDictModule(torch.nn.Identity(), in_keys=in_keys, out_keys=out_keys)

    check_actor(module(STATE_KEYS, [keys.ACTION]))
    check_actor(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"the actor, a TensorDictModule, reads \[\('agents', 'observation'\)\]"):
        check_actor(module([keys.OBSERVATION], [keys.ACTION]))
    with pytest.raises(ValueError, match=r"the actor, a TensorDictModule, must write \[\('agents', 'action'\)\]"):
        check_actor(module(STATE_KEYS, [keys.LOGITS]))


def test_actions_of_another_shape_or_type_are_named() -> None:
    actor, actions = torch.nn.Identity(), DiscreteActions(list(COUNTS))

    def read(action: torch.Tensor | None) -> torch.Tensor:
        td = TensorDict({} if action is None else {keys.ACTION: action}, batch_size=[5])
        return read_action(td, actor, actions, [5])

    action = torch.randint(3, (5, N))
    assert torch.equal(read(action), action)
    with pytest.raises(KeyError, match=r"Identity must write \('agents', 'action'\), which is missing"):
        read(None)
    with pytest.raises(ValueError, match=r"of shape \[5, 3\], found \[5, 3, 4\].*of one-hot actions write argmax"):
        read(torch.zeros(5, N, 4))
    with pytest.raises(ValueError, match=r"Identity must write \('agents', 'action'\) as torch.int64, found torch.fl"):
        read(action.float())
