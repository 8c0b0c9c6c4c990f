"""The world-model loss against plain Python loops over sequences, steps and agents, and where its gradients go."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.modules import SymExpTwoHot

from matwm_rl import keys
from matwm_rl.data import add_agent_entries
from matwm_rl.loss_functions import categorical_kl
from matwm_rl.modules import (
    CoordinateEncoderConfig,
    EncoderConfig,
    GaussianLatent,
    GaussianLatentConfig,
    HiddenRewardConfig,
    MLPEncoderConfig,
    ObservationRewardConfig,
    RewardConfig,
    WorldModel,
)
from matwm_rl.objectives import WorldModelLoss, WorldModelLossWeights
from tests.helpers import COUNTS, LATENTS, grad_norm, grads, make_model, mock_env, others, random_batch, total
from tests.modules.test_two_hot import slow_encode

N = len(COUNTS)
TERMS = ["reconstruction", "reward", "continuation", "teammate", "mask", "dynamics", "representation"]


def losses_of(model: WorldModel, batch: TensorDict, **kwargs: object) -> TensorDict:
    torch.manual_seed(3)
    return WorldModelLoss(model, **kwargs)(batch)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def cross_entropy(logit: float, target: bool) -> float:
    """Of a Bernoulli."""
    probability = 1 / (1 + math.exp(-logit))
    return -math.log(probability if target else 1 - probability)


def slow_kl(log_q: Tensor, log_p: Tensor) -> float:
    pairs = zip(log_q.flatten().tolist(), log_p.flatten().tolist(), strict=True)
    return sum(math.exp(q) * (q - p) for q, p in pairs)


def slow_gaussian_kl(q: Tensor, p: Tensor) -> float:
    kl = 0.0
    for (mean_q, log_q), (mean_p, log_p) in zip(q.tolist(), p.tolist(), strict=True):
        squares = math.exp(2 * log_q) + (mean_q - mean_p) ** 2
        kl += log_p - log_q + squares / (2 * math.exp(2 * log_p)) - 0.5
    return kl


def slow_losses(model: WorldModel, batch: TensorDict, free_nats: float = 1.0) -> dict[str, float]:
    """The loss, one step of one agent at a time. Terms are unweighted; ``kl`` is unclamped."""
    torch.manual_seed(3)
    with torch.no_grad():
        out = model(batch.copy())
    sums = dict.fromkeys([*TERMS, "kl"], 0.0)
    alive_steps = survived_steps = 0
    B, T = batch.shape
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        if not batch[keys.ALIVE][b, t, n]:
            continue
        alive_steps += 1

        def at(key: tuple[str, ...], b: int = b, t: int = t, n: int = n) -> Tensor:
            return out[key][b, t, n]

        observed, rebuilt = at(keys.OBSERVATION).flatten().tolist(), at(keys.RECONSTRUCTION).flatten().tolist()
        sums["reconstruction"] += sum((x - y) ** 2 for x, y in zip(observed, rebuilt, strict=True))

        target = slow_encode(float(at(keys.REWARD)), 255, model.two_hot.interpolation)
        ends = bool(at(keys.AGENT_TERMINATED)) or not bool(at(keys.NEXT_ALIVE))
        apart = ends and model.reward.reads_successor
        log_probs = log_softmax(at(keys.END_REWARD_LOGITS if apart else keys.REWARD_LOGITS).tolist())
        sums["reward"] -= sum(p * q for p, q in zip(target, log_probs, strict=True))

        sums["continuation"] += cross_entropy(float(at(keys.CONTINUATION_LOGITS)), not ends)

        for place, j in enumerate(others(n, N)):
            if at(keys.TEAMMATE_ALIVE)[place]:
                # The teammate has COUNTS[j] actions; what lies behind is padding and must have no weight.
                log_probs = log_softmax(at(keys.TEAMMATE_LOGITS)[place, : COUNTS[j]].tolist())
                sums["teammate"] -= log_probs[int(at(keys.TEAMMATE_ACTION)[place])]

        pairs = zip(at(keys.MASK_LOGITS).tolist(), at(keys.ACTION_MASK).tolist(), strict=True)
        sums["mask"] += sum(cross_entropy(logit, legal) for logit, legal in pairs)

        if at(keys.NEXT_ALIVE) and not apart:
            survived_steps += 1
            slow = slow_gaussian_kl if isinstance(model.latent, GaussianLatent) else slow_kl
            kl = slow(at(keys.POSTERIOR), at(keys.PRIOR))
            sums["kl"] += kl
            sums["dynamics"] += max(free_nats, kl)
            sums["representation"] += max(free_nats, kl)
    steps = {name: survived_steps if name in ("kl", "dynamics", "representation") else alive_steps for name in sums}
    return {name: value / steps[name] for name, value in sums.items()}


@pytest.mark.parametrize(
    ("interpolation", "reward"), [("raw", HiddenRewardConfig()), ("symlog", ObservationRewardConfig())], ids=repr
)
@pytest.mark.parametrize(
    ("latent", "free_nats"),
    # Of the Gaussian latent's KL, which is larger, some elements lie on either side of 40.
    [("categorical", 0.0), ("categorical", 1.0), ("categorical", 2.0), ("gaussian", 0.0), ("gaussian", 40.0)],
)
def test_every_term_is_that_of_slow_loops(
    float64: None, interpolation: str, reward: RewardConfig, latent: str, free_nats: float
) -> None:
    switches = {"reward_interpolation": interpolation, "reward": reward, "latent": latent}
    model, batch = make_model(**switches), random_batch(3, 6)
    weights = WorldModelLossWeights()
    losses = losses_of(model, batch, free_nats=free_nats)
    expected = slow_losses(model, batch, free_nats)
    for name in TERMS:
        assert losses[f"loss_{name}"].item() == pytest.approx(getattr(weights, name) * expected[name], rel=1e-7), name
    assert losses["kl"].item() == pytest.approx(expected["kl"], rel=1e-7)
    assert {"loss_" + name for name in TERMS} | {"kl"} == set(losses.keys())


def test_weights_are_the_papers() -> None:
    weights = WorldModelLossWeights()
    assert (weights.mask, weights.dynamics, weights.representation) == (0.5, 0.5, 0.1)
    assert weights.reconstruction == weights.reward == weights.continuation == weights.teammate == 1.0


def test_weights_scale_their_terms_alone() -> None:
    model, batch = make_model(), random_batch()
    plain = losses_of(model, batch)
    for name in TERMS:
        scaled = losses_of(model, batch, weights=WorldModelLossWeights(**{name: 7.0}))
        for other in TERMS:
            factor = 7.0 / getattr(WorldModelLossWeights(), name) if other == name else 1.0
            torch.testing.assert_close(scaled[f"loss_{other}"], factor * plain[f"loss_{other}"])


def test_images_are_reconstructed_as_numbers_from_0_to_1() -> None:
    model = make_model(observation_shape=(3, 32, 32))
    batch = random_batch(2, 3, observation_shape=(3, 32, 32))
    torch.manual_seed(3)
    rebuilt = model(batch.copy())[keys.RECONSTRUCTION].detach()
    error = 0.0
    for index in itertools.product(range(2), range(3), range(N)):
        if batch[keys.ALIVE][index]:
            error += float((rebuilt[index] - batch[keys.OBSERVATION][index] / 255.0).square().sum())
    expected = error / int(batch[keys.ALIVE].sum())
    assert losses_of(model, batch)["loss_reconstruction"].item() == pytest.approx(expected, rel=1e-5)


def test_without_alive_entries_everybody_lives() -> None:
    model, batch = make_model(), random_batch(deaths=False)
    bare = batch.exclude(keys.ALIVE, keys.NEXT_ALIVE, keys.TEAMMATE_ALIVE)
    for one, other in zip(losses_of(model, batch).values(), losses_of(model, bare).values(), strict=True):
        torch.testing.assert_close(one, other)


# -- what counts -----------------------------------------------------------------------------------------------------


def changed(batch: TensorDict, key: tuple[str, ...], where: Tensor, value: object) -> TensorDict:
    batch = batch.clone()
    batch[key][where] = value
    return batch


@pytest.mark.parametrize("latent", LATENTS)
def test_dead_agents_and_dead_teammates_count_for_nothing(latent: str) -> None:
    model, batch = make_model(latent=latent), random_batch(done=torch.zeros(3, 7, N, dtype=torch.bool))
    losses = losses_of(model, batch)
    dead = ~batch[keys.ALIVE]
    assert dead.any()
    for key, value in ((keys.REWARD, 1e3), (keys.AGENT_TERMINATED, True), (keys.TEAMMATE_ACTION, 0)):
        again = losses_of(model, changed(batch, key, dead, value))
        torch.testing.assert_close(total(again), total(losses))
        assert not torch.equal(total(losses_of(model, changed(batch, key, ~dead, value))), total(losses))
    again = losses_of(model, changed(batch, keys.TEAMMATE_ACTION, ~batch[keys.TEAMMATE_ALIVE], 0))
    torch.testing.assert_close(again["loss_teammate"], losses["loss_teammate"])
    # Nothing is learnt of how the corpse of an agent looks.
    last = torch.zeros_like(dead)
    last[:, -1] = True
    lost = ~batch[keys.NEXT_ALIVE] & last
    assert lost.any()
    again = losses_of(model, changed(batch, keys.NEXT_OBSERVATION, lost, 1e3))
    torch.testing.assert_close(total(again), total(losses))


def test_truncation_goes_on_termination_and_death_end() -> None:
    """Through the real pipeline: the same episodes, ended by a time limit or by a termination."""
    model = make_model()
    means = {}
    for ending in ("truncate", "terminate"):
        rollout = mock_env(ending=ending, death_step=3, episode_length=6).rollout(24, break_when_any_done=False)
        batch = add_agent_entries(rollout).unsqueeze(0)
        torch.manual_seed(3)
        logits = model(batch.copy())[keys.CONTINUATION_LOGITS][0, ..., 0].detach()
        error, steps = 0.0, 0
        for t, n in itertools.product(range(24), range(N)):
            if n == 1 and t % 6 >= 3:
                continue
            over = (n == 1 and t % 6 == 2) or (ending == "terminate" and t % 6 == 5)
            error, steps = error + cross_entropy(float(logits[t, n]), not over), steps + 1
        means[ending] = losses_of(model, batch)["loss_continuation"].item()
        assert means[ending] == pytest.approx(error / steps, rel=1e-5)
    assert means["truncate"] != means["terminate"]


# -- gradients -------------------------------------------------------------------------------------------------------

PARTS = {
    "reconstruction": {"encoder", "decoder"},
    "reward": {"encoder", "action_mixer", "transformer", "reward"},
    "continuation": {"encoder", "action_mixer", "transformer", "continuation"},
    "teammate": {"teammates"},
    "mask": {"encoder", "action_mask"},
    "dynamics": {"encoder", "action_mixer", "transformer", "dynamics"},
    "representation": {"encoder"},
}


@pytest.mark.parametrize("latent", LATENTS)
def test_each_term_trains_its_parts(latent: str) -> None:
    model = make_model(latent=latent)
    losses = losses_of(model, random_batch(), free_nats=0.0)
    names = {name for name, child in model.named_children() if list(child.parameters())}
    for term, parts in PARTS.items():
        trained = {name for name in names if grad_norm(losses[f"loss_{term}"], getattr(model, name)) > 0}
        assert trained == parts, term
    assert set().union(*PARTS.values()) == names


def test_the_reward_of_the_next_observation_trains_its_head_alone() -> None:
    switches = {"latent": GaussianLatentConfig(num_dims=12), "encoder": CoordinateEncoderConfig()}
    model, batch = make_model(reward=ObservationRewardConfig(), **switches), random_batch()
    ended = batch[keys.AGENT_TERMINATED].squeeze(-1) | (batch[keys.ALIVE] & ~batch[keys.NEXT_ALIVE])
    assert ended.any()
    loss = losses_of(model, batch)["loss_reward"]
    assert all(grad.any() for grad in grads(loss, [*model.reward.parameters(), *model.end_reward.parameters()]))
    # Its own, of steps that were not an agent's last; those have a head that reads h_t.
    batch[keys.ALIVE] &= ~ended
    loss = losses_of(model, batch)["loss_reward"]
    trained = {name for name, child in model.named_children() if grad_norm(loss, child) > 0}
    assert trained == {"reward"}
    assert all(grad.any() for grad in grads(loss, model.reward.parameters()))


@pytest.mark.parametrize("latent", LATENTS)
def test_dynamics_term_moves_the_prior_and_representation_term_the_posterior(latent: str) -> None:
    """One step per sequence: the present observation enters through the prior, the next through the posterior."""
    model, batch = make_model(latent=latent), random_batch(4, 1)
    present, following = (batch[key].requires_grad_() for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION))
    losses = losses_of(model, batch, free_nats=0.0)
    through_prior, through_posterior = grads(losses["loss_dynamics"], [present, following])
    assert through_prior.any() and not through_posterior.any()
    through_prior, through_posterior = grads(losses["loss_representation"], [present, following])
    assert not through_prior.any() and through_posterior.any()


@pytest.mark.parametrize("latent", LATENTS)
def test_inside_a_slice_too_the_dynamics_term_leaves_the_posterior_alone(latent: str) -> None:
    model, batch = make_model(latent=latent), random_batch(4, 3, done=torch.zeros(4, 3, N, dtype=torch.bool))
    observation = batch[keys.OBSERVATION].requires_grad_()
    out = model(batch)
    dynamics, representation = model.latent.balanced_kl(out[keys.POSTERIOR][:, 0], out[keys.PRIOR][:, 0])
    (grad,) = grads(dynamics.sum(), [observation])
    assert grad[:, 0].any() and not grad[:, 1:].any()
    (grad,) = grads(representation.sum(), [observation])
    assert grad[:, 1].any() and not grad[:, 0].any() and not grad[:, 2:].any()


def test_free_bits_stop_the_gradient() -> None:
    model = make_model()
    losses = losses_of(model, random_batch(), free_nats=1e6)
    for term in ("dynamics", "representation"):
        assert grad_norm(losses[f"loss_{term}"], model) == 0.0


def test_free_bits_stop_the_gradient_of_each_element_apart(float64: None) -> None:
    model, batch = make_model(), random_batch(deaths=False)
    torch.manual_seed(3)
    out = model(batch.copy())
    kl = categorical_kl(out[keys.POSTERIOR].detach(), out[keys.PRIOR])
    free_nats = kl.mean().item()
    expected = 0.5 * kl[kl > free_nats].sum() / kl.numel()
    parameters = list(model.parameters())
    losses = losses_of(model, batch, free_nats=free_nats)
    for grad, slow in zip(grads(losses["loss_dynamics"], parameters), grads(expected, parameters), strict=True):
        torch.testing.assert_close(grad, slow)


@pytest.mark.parametrize(
    ("latent", "encoder"),
    [("categorical", MLPEncoderConfig()), ("gaussian", MLPEncoderConfig()), ("gaussian", CoordinateEncoderConfig())],
    ids=str,
)
def test_observations_far_out_break_nothing(latent: str, encoder: EncoderConfig) -> None:
    model, batch = make_model(latent=latent, encoder=encoder), random_batch()
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        batch[key] *= 1e3
    losses = losses_of(model, batch)
    assert all(value.isfinite().all() for value in losses.values())
    assert all(grad.isfinite().all() for grad in grads(total(losses), model.parameters()))


# -- any module with the right keys ----------------------------------------------------------------------------------


def test_losses_accept_any_module_with_the_keys() -> None:
    batch = random_batch(deaths=False)
    outputs = [keys.RECONSTRUCTION, keys.REWARD_LOGITS, keys.CONTINUATION_LOGITS, keys.TEAMMATE_LOGITS]
    weight = torch.nn.Parameter(torch.zeros(()))

    def predict(observation: Tensor) -> tuple[Tensor, ...]:
        log_probs = (weight + torch.zeros(3, 7, N, 2, 3)).log_softmax(-1)
        teammates = 50.0 * torch.nn.functional.one_hot(batch[keys.TEAMMATE_ACTION], max(COUNTS))
        return (
            observation,
            weight + torch.zeros(3, 7, N, 255),
            weight + torch.zeros(3, 7, N, 1),
            teammates,
            log_probs,
            log_probs,
        )

    world_model = TensorDictModule(predict, in_keys=[keys.OBSERVATION], out_keys=[*outputs, keys.POSTERIOR, keys.PRIOR])
    loss = WorldModelLoss(world_model)
    assert isinstance(loss.two_hot, SymExpTwoHot)
    losses = loss(batch)
    assert losses["loss_reconstruction"].item() == 0.0
    assert losses["loss_teammate"].item() == pytest.approx(0.0, abs=1e-6)
    assert losses["loss_reward"].item() == pytest.approx(math.log(255), rel=1e-5)
    assert losses["loss_continuation"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert losses["kl"].item() == 0.0 and losses["loss_dynamics"].item() == 0.5
    assert "loss_mask" not in losses.keys()
