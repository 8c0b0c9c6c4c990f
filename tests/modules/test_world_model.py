from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from matwm_rl import keys
from matwm_rl.modules import CategoricalLatent, Latent, State, WorldModel, heads
from matwm_rl.modules import transformer as transformer_module
from matwm_rl.objectives import WorldModelLoss
from tests.helpers import (
    COUNTS,
    EXACT,
    GROUPS,
    LATENTS,
    SIZE,
    grads,
    make_model,
    mock_env,
    random_batch,
    random_latent,
    total,
)

N = len(COUNTS)
OUTPUTS = [
    keys.LATENT,
    keys.HIDDEN,
    keys.TEAMMATE_LOGITS,
    keys.RECONSTRUCTION,
    keys.MASK_LOGITS,
    keys.POSTERIOR,
    keys.PRIOR,
    keys.REWARD_LOGITS,
    keys.CONTINUATION_LOGITS,
]
NOT_OF_THE_SUCCESSOR = [key for key in OUTPUTS if key != keys.POSTERIOR]


def run(model: WorldModel, batch: TensorDict) -> TensorDict:
    """The sequence pass, with the same draws of the latents at every call."""
    torch.manual_seed(3)
    return model(batch.copy())


def episodes(done: Tensor) -> list[tuple[int, int]]:
    """Half-open ranges of a slice's episodes."""
    ends = [t + 1 for t in range(len(done)) if done[t] or t == len(done) - 1]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def numbers(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A part that reads latents, given their numbers alone: it must take the product."""
    return lambda latent, *rest: part(Latent(latent), *rest)


def for_agent(part: Callable[..., Tensor], n: int, *inputs: Tensor) -> Tensor:
    """What a part gives agent n for ``[T, F]``, all others getting zeros."""
    stacked = [x.new_zeros(N, *x.shape) for x in inputs]
    for zeros, x in zip(stacked, inputs, strict=True):
        zeros[n] = x
    return part(*stacked)[n]


def alone(model: WorldModel, n: int, agents: TensorDict, latent: Tensor) -> dict[str, Tensor]:
    """One agent's one episode by itself: no masks, no padding, no other sequences. ``latent`` are the drawn z."""
    length = latent.shape[0]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    tokens = for_agent(numbers(model.action_mixer), n, latent, agents["agents", "action"])
    hidden = model.transformer(tokens.unsqueeze(0), causal)[0]
    assert model.teammates is not None and model.action_mask is not None
    teammates = model.teammates(Latent(latent.expand(N, 1, *latent.shape)), causal)[n, 0]
    successor = for_agent(model.encoder, n, agents["next", "agents", "observation"])
    return {
        "hidden": torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]]),
        "teammate_logits": teammates,
        "reconstruction": for_agent(model.decoder, n, latent),
        "mask_logits": for_agent(model.action_mask, n, latent),
        "posterior": model.latent.posterior(successor),
        "prior": model.latent.prior(for_agent(model.dynamics, n, hidden), Latent(latent)),
        "reward_logits": for_agent(model.reward, n, hidden),
        "continuation_logits": for_agent(model.continuation, n, hidden),
    }


def moments(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[..., Z]`` of z."""
    if parameters.shape[-1] == 2:
        mean, log_deviation = parameters.unbind(-1)
        return mean, log_deviation.exp()
    probs = parameters.exp().flatten(-2)
    return probs, (probs * (1 - probs)).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("group_index", [GROUPS, (0, 0, 0)])
def test_sequence_pass_is_every_agents_every_episode_alone(float64: None, latent: str, group_index: list[int]) -> None:
    model = make_model(latent=latent, group_index=group_index)
    batch = random_batch(3, 8)
    out = run(model, batch)
    for b, n in itertools.product(range(3), range(N)):
        for begin, end in episodes(batch["next", "agents", "done"][b, :, n, 0]):
            rows = batch[b, begin:end].apply(lambda x, n=n: x[:, n], batch_size=[end - begin])
            expected = alone(model, n, rows, out[keys.LATENT][b, begin:end, n])
            for key in NOT_OF_THE_SUCCESSOR[1:] + [keys.POSTERIOR]:
                # Rotary angles are float32 and positions differ.
                torch.testing.assert_close(
                    out[key][b, begin:end, n],
                    expected[key[-1]],
                    rtol=1e-5,
                    atol=1e-6,
                    msg=lambda m, key=key: f"{key}: {m}",
                )


@torch.no_grad()
@pytest.mark.parametrize("latent", ["categorical", "gaussian"])
def test_latents_are_drawn_from_the_posterior_of_the_current_observation(latent: str) -> None:
    model, batch = make_model(latent=latent), random_batch(1, 1)
    many = batch.expand(4000, 1).contiguous()
    drawn = run(model, many)[keys.LATENT].mean(0)[0]
    for n in range(N):
        features = for_agent(model.encoder, n, batch[keys.OBSERVATION][0, :, n])
        mean, deviation = moments(model.latent.posterior(features))
        assert ((drawn[n] - mean.flatten()).abs() < 5 * deviation.flatten() / 4000**0.5).all()


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
def test_reward_may_be_read_from_the_next_latent(float64: None, latent: str) -> None:
    model, batch = make_model(reward_input="next_latent", latent=latent).eval(), random_batch(2, 6)
    out = run(model, batch)
    for b, n in itertools.product(range(2), range(N)):
        features = for_agent(model.encoder, n, batch[keys.NEXT_OBSERVATION][b, :, n])
        expected = for_agent(model.reward, n, model.latent.sample_posterior(features).value)
        torch.testing.assert_close(out[keys.REWARD_LOGITS][b, :, n], expected)


@torch.no_grad()
def test_reward_may_be_read_from_the_next_observation(float64: None) -> None:
    """In training from o_{t+1} itself, which at an episode's end is the true final observation."""
    done = torch.zeros(2, 6, N, dtype=torch.bool)
    done[:, 2] = True
    options = {"latent": "fsq", "fourier_features": 2}
    model, batch = make_model(reward_input="next_observation", **options), random_batch(2, 6, done=done)
    out = run(model, batch)
    for b, n in itertools.product(range(2), range(N)):
        expected = for_agent(model.reward, n, batch[keys.NEXT_OBSERVATION][b, :, n])
        torch.testing.assert_close(out[keys.REWARD_LOGITS][b, :, n], expected)
    # What follows the reset is another observation; the step before it does not read that.
    assert (batch[keys.OBSERVATION][:, 3] != batch[keys.NEXT_OBSERVATION][:, 2]).all()
    changed = batch.clone()
    changed[keys.OBSERVATION] += 1.0
    changed[keys.ACTION] = (changed[keys.ACTION] + 1) % 3
    assert torch.equal(run(model, changed)[keys.REWARD_LOGITS], out[keys.REWARD_LOGITS])
    changed[keys.NEXT_OBSERVATION][:, 2] += 1.0
    differs = (run(model, changed)[keys.REWARD_LOGITS] != out[keys.REWARD_LOGITS]).any(-1)
    assert differs[:, 2].all() and not differs[:, [0, 1, 3, 4, 5]].any()


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
@pytest.mark.parametrize("reencode", [False, True])
def test_in_imagination_the_next_observation_is_the_decoded_latent(float64: None, reencode: bool, latent: str) -> None:
    model = make_model(latent=latent, reward_input="next_observation", reencode=reencode)
    reached = State(random_latent(model.latent, N, 50), torch.randn(N, 50, 16), torch.randn(N, 50, N - 1, 4))
    reward, continuation = model.outcome(reached)
    for n in range(N):
        observation = for_agent(model.decoder, n, reached.latent.value[n])
        goes_on = model.two_hot.decode(for_agent(model.reward, n, observation))
        ends = model.two_hot.decode(for_agent(model.end_reward, n, reached.hidden[n]))
        probability = for_agent(model.continuation, n, reached.hidden[n]).squeeze(-1).sigmoid()
        torch.testing.assert_close(reward[n], probability * goes_on + (1 - probability) * ends)
        torch.testing.assert_close(continuation[n], probability)
    assert (reward.std(1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
def test_any_number_of_batch_dimensions(latent: str) -> None:
    model, batch = make_model(latent=latent).eval(), random_batch(6, 5)
    out = run(model, batch)
    for shaped, back in ((batch.reshape(2, 3, 5), (6, 5)), (batch[0], (1, 5))):
        again = run(model, shaped)
        for key in OUTPUTS:
            flat = again[key].reshape(*back, *again[key].shape[shaped.ndim :])
            torch.testing.assert_close(flat, out[key][: back[0]])


@torch.no_grad()
def test_nothing_before_a_reset_has_an_influence_after_it() -> None:
    done = torch.zeros(2, 8, N, dtype=torch.bool)
    done[0, 3], done[1, 5, 0], done[1, 2, 1:] = True, True, True
    model, batch = make_model(), random_batch(2, 8, done=done)
    other = random_batch(2, 8, done=done)
    before = done.flip(1).cumsum(1).flip(1) > 0
    mixed = batch.apply(lambda x, y: torch.where(before.view(*before.shape, *[1] * (x.ndim - 3)), y, x), other)
    out, again = run(model, batch), run(model, mixed)
    for key in OUTPUTS:
        assert torch.equal(out[key][~before], again[key][~before]), key
        assert not torch.equal(out[key][before], again[key][before]), key
    starts = torch.zeros_like(done)
    starts[:, 0] = True
    starts[:, 1:] = done[:, :-1]
    assert not out[keys.HIDDEN][starts].any()
    assert out[keys.HIDDEN][~starts].any(-1).all()


def test_no_gradient_crosses_a_reset() -> None:
    done = torch.zeros(2, 7, N, dtype=torch.bool)
    done[:, 3] = True
    model, batch = make_model(), random_batch(2, 7, done=done)
    observation = batch[keys.OBSERVATION].requires_grad_()
    out = run(model, batch)
    after = sum(out[key][:, 4:].exp().clamp(max=100.0).sum() for key in OUTPUTS)
    (grad,) = grads(after, [observation])
    assert not grad[:, :4].any() and grad[:, 4:].any()
    before = sum(out[key][:, :4].exp().clamp(max=100.0).sum() for key in OUTPUTS)
    (grad,) = grads(before, [observation])
    assert not grad[:, 4:].any() and grad[:, :4].any()


@torch.no_grad()
def test_successor_of_the_last_step_is_the_true_final_observation() -> None:
    done = torch.zeros(2, 6, N, dtype=torch.bool)
    done[:, 2] = True
    model, batch = make_model(), random_batch(2, 6, done=done)
    out = run(model, batch)
    for t in (2, 5):
        # t = 2 ends an episode, t = 5 the slice.
        changed = batch.clone()
        changed[keys.NEXT_OBSERVATION][:, t] += 1.0
        again = run(model, changed)
        assert (out[keys.POSTERIOR][:, t] != again[keys.POSTERIOR][:, t]).flatten(2).any(-1).all()
        again[keys.POSTERIOR][:, t] = out[keys.POSTERIOR][:, t]
        for key in OUTPUTS:
            assert torch.equal(out[key], again[key]), key
    changed = batch.clone()
    changed[keys.OBSERVATION][:, 3] += 1.0
    assert torch.equal(run(model, changed)[keys.POSTERIOR][:, 2], out[keys.POSTERIOR][:, 2])


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
def test_a_step_sees_the_present_and_the_past_alone(latent: str) -> None:
    done = torch.zeros(2, 6, N, dtype=torch.bool)
    model, batch = make_model(latent=latent, num_classes=32), random_batch(2, 6, done=done)
    out = run(model, batch)
    changed = batch.clone()
    changed[keys.OBSERVATION][:, 3] += 1.0
    changed[keys.NEXT_OBSERVATION][:, 2] += 1.0
    again = run(model, changed)
    for key in OUTPUTS:
        differs = (out[key] != again[key]).flatten(3).any(-1)
        first = {keys.POSTERIOR: 2, keys.HIDDEN: 4}.get(key, 3)
        assert not differs[:, :first].any() and differs[:, first].all(), key
    changed = batch.clone()
    changed[keys.ACTION][:, 3] = (changed[keys.ACTION][:, 3] + 1) % 3
    again = run(model, changed)
    for key, first in ((keys.HIDDEN, 4), (keys.PRIOR, 3), (keys.REWARD_LOGITS, 3), (keys.CONTINUATION_LOGITS, 3)):
        differs = (out[key] != again[key]).flatten(3).any(-1)
        assert not differs[:, :first].any() and differs[:, first:].all(), key
    for key in (keys.LATENT, keys.TEAMMATE_LOGITS, keys.MASK_LOGITS, keys.RECONSTRUCTION, keys.POSTERIOR):
        assert torch.equal(out[key], again[key]), key


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 8])
def test_the_number_of_successors_encoded_apart_changes_nothing(float64: None, length: int) -> None:
    """Few ends or many: those that are encoded without need must come out as they were."""
    for done in (torch.zeros(3, length, N, dtype=torch.bool), None, torch.ones(3, length, N, dtype=torch.bool)):
        model, batch = make_model(), random_batch(3, length, done=done)
        out = run(model, batch)
        encoded: list[int] = []
        handle = model.encoder.register_forward_pre_hook(lambda _, x, seen=encoded: seen.append(x[0].shape[1]))
        model.successors = 3 * length
        again = run(model, batch)
        handle.remove()
        assert encoded == [2 * 3 * length]
        for key in OUTPUTS:
            torch.testing.assert_close(again[key], out[key], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_few_successors_are_encoded_apart_where_few_are_needed() -> None:
    model, batch = make_model(), random_batch(2, 20, done=torch.zeros(2, 20, N, dtype=torch.bool))
    encoded: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, x: encoded.append(x[0].shape[1]))
    model(batch)
    # The slices' two ends, and at most seven more so that shapes are few.
    assert 2 * 20 + 2 <= encoded[0] <= 2 * 20 + 9


@pytest.mark.parametrize("frozen_encoder", [False, True])
def test_training_by_look_ups_is_training_by_products(
    float64: None, monkeypatch: pytest.MonkeyPatch, frozen_encoder: bool
) -> None:
    model, batch = make_model(), random_batch(deaths=False)
    model.encoder.requires_grad_(not frozen_encoder)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    looked_up: list[str] = []
    for name, layer in (("mixer", model.action_mixer.latent), ("teammates", model.teammates.input)):

        def counted(ones: Tensor, name: str = name, look_up: Callable[[Tensor], Tensor] = layer.from_ones) -> Tensor:
            looked_up.append(name)
            return look_up(ones)

        monkeypatch.setattr(layer, "from_ones", counted)

    def losses_and_gradients() -> tuple[TensorDict, list[Tensor]]:
        torch.manual_seed(3)
        losses = WorldModelLoss(model, free_nats=0.0)(batch)
        return losses, grads(total(losses), parameters.values())

    losses, gradients = losses_and_gradients()
    # The mixer passes gradients on to the encoder, where one is trained.
    assert looked_up == (["mixer", "teammates"] if frozen_encoder else ["teammates"])
    monkeypatch.setattr(heads, "read_latent", lambda layer, latent: layer(latent.value))
    expected_losses, expected = losses_and_gradients()
    assert len(looked_up) == (2 if frozen_encoder else 1)
    for key in losses.keys():
        torch.testing.assert_close(losses[key], expected_losses[key])
    for name, gradient, product in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, product, msg=lambda m, name=name: f"{name}: {m}")
        assert gradient.any(), name


def prefill_and_step(
    model: WorldModel, latent: Latent, action: Tensor, valid: Tensor, C: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[State], Tensor]:
    """States s_C, s_{C+1}, ... and rewards, with the given latents in place of imagined ones."""
    H = latent.value.shape[2] - 1 - C
    state, context = model.prefill(latent[:, :, : C + 1], action[:, :, :C], valid, H)
    states, rewards = [state], []
    for t in range(C, C + H):
        monkeypatch.setattr(model.latent, "sample_prior", lambda output, z, t=t: latent[:, :, t + 1])
        states.append(model.step(states[-1], action[:, :, t], context))
        rewards.append(model.outcome(states[-1])[0])
    return states, torch.stack(rewards, -1)


@torch.no_grad()
@pytest.mark.parametrize("code", ["categorical", "gaussian"])
@pytest.mark.parametrize("in_cache", [transformer_module.IN_CACHE, 0], ids=["small", "large"])
@pytest.mark.parametrize(("context", "end"), [(0, None), (1, None), (1, 0), (4, None), (4, 0), (4, 2), (4, 3)], ids=str)
def test_prefill_and_steps_equal_the_sequence_pass(
    float64: None, context: int, end: int | None, in_cache: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_module, "IN_CACHE", in_cache)
    T, C = 9, context
    done = torch.zeros(3, T, N, dtype=torch.bool)
    if end is not None:
        done[:, end] = True
    model, batch = make_model(latent=code), random_batch(3, T, done=done)
    out = run(model, batch)
    latent, action = Latent(out[keys.LATENT].permute(2, 0, 1, 3)), batch[keys.ACTION].permute(2, 0, 1)
    # With their ones, as the encoder gives them.
    latent = model.latent.from_code(model.latent.to_code(latent))
    assert torch.equal(latent.value.permute(1, 2, 0, 3), out[keys.LATENT])
    valid = torch.arange(C) > (-1 if end is None else end)
    states, rewards = prefill_and_step(model, latent, action, valid.expand(N, 3, C), C, monkeypatch)
    assert len(states) == T - C
    for t, state in enumerate(states, C):
        for key, value in (
            (keys.LATENT, state.latent.value),
            (keys.HIDDEN, state.hidden),
            (keys.TEAMMATE_LOGITS, state.teammate_logits),
        ):
            torch.testing.assert_close(value, out[key][:, t].movedim(1, 0), rtol=1e-9, atol=1e-9)
    decoded = model.two_hot.decode(out[keys.REWARD_LOGITS][:, C : T - 1]).permute(2, 0, 1)
    torch.testing.assert_close(rewards, decoded, rtol=1e-7, atol=1e-7)
    starts = end is not None and end == C - 1 or C == 0
    assert bool(states[0].hidden.any()) is not starts


@torch.no_grad()
@pytest.mark.parametrize("invalid", [1, 2, 4])
def test_context_before_the_episode_has_no_influence(monkeypatch: pytest.MonkeyPatch, invalid: int) -> None:
    model, C = make_model(), 4
    value, action = torch.randn(N, 3, 7, 20), torch.randint(3, (N, 3, 6))
    valid = (torch.arange(C) > invalid - 1).expand(N, 3, C)
    states, rewards = prefill_and_step(model, Latent(value), action, valid, C, monkeypatch)
    value, action = value.clone(), action.clone()
    value[:, :, :invalid] = 50 * torch.randn(N, 3, invalid, 20)
    action[:, :, :invalid] = 2 - action[:, :, :invalid]
    again, rewards_again = prefill_and_step(model, Latent(value), action, valid, C, monkeypatch)
    for one, other in zip(states, again, strict=True):
        assert torch.equal(one.hidden, other.hidden)
        assert torch.equal(one.teammate_logits, other.teammate_logits)
    assert torch.equal(rewards, rewards_again)
    value[:, :, invalid] = torch.randn(N, 3, 20)
    assert not torch.equal(prefill_and_step(model, Latent(value), action, valid, C, monkeypatch)[1], rewards)


@torch.no_grad()
@pytest.mark.parametrize("code", ["categorical", "gaussian"])
def test_step_decodes_reward_and_continuation_and_samples_the_prior(float64: None, code: str) -> None:
    model = make_model(latent=code)
    latent, action = random_latent(model.latent, N, 1, 3), torch.zeros(N, 2000, 2, dtype=torch.long)
    many = model.latent.from_code(model.latent.to_code(latent).expand(N, 2000, 3, -1))
    valid = torch.ones(N, 2000, 2, dtype=torch.bool)
    state, context = model.prefill(many, action, valid, horizon=1)
    reached = model.step(state, action[..., 0], context)
    reward, continuation = model.outcome(reached)
    whole = torch.ones(3, 3, dtype=torch.bool).tril()
    tokens = model.action_mixer(Latent(latent.value), torch.zeros(N, 1, 3, dtype=torch.long))
    hidden = model.transformer(tokens.flatten(0, 1), whole)[:, -1].unsqueeze(1)
    torch.testing.assert_close(reached.hidden[:, :1], hidden)
    torch.testing.assert_close(continuation[:, :1], model.continuation(hidden).squeeze(-1).sigmoid())
    torch.testing.assert_close(reward[:, :1], model.two_hot.decode(model.reward(hidden)))
    mean, deviation = moments(model.latent.prior(model.dynamics(hidden), latent[:, :, -1]))
    assert ((reached.latent.value.mean(1) - mean.squeeze(1)).abs() < 5 * deviation.squeeze(1) / 2000**0.5).all()


@torch.no_grad()
@pytest.mark.parametrize("reward_input", ["hidden", "next_latent", "next_observation"])
def test_outcome_of_many_steps_at_once_is_that_of_each(float64: None, reward_input: str) -> None:
    model = make_model(latent="fsq", reward_input=reward_input)
    states = [
        State(random_latent(model.latent, N, 5), torch.randn(N, 5, 16), torch.randn(N, 5, N - 1, 4)) for _ in range(3)
    ]
    whole = model.outcome(State.stack(states, 2))
    for t, state in enumerate(states):
        for one, other in zip(whole, model.outcome(state), strict=True):
            assert other.shape == (N, 5)
            torch.testing.assert_close(one[:, :, t], other)


@pytest.mark.parametrize("latent", LATENTS)
def test_states_are_stacked_indexed_and_named_as_one(latent: str) -> None:
    model = make_model(latent=latent)
    states = [
        State(random_latent(model.latent, N, 5), torch.randn(N, 5, 16), torch.randn(N, 5, N - 1, 4)) for _ in range(3)
    ]
    whole = State.stack(states, 2)
    entries = whole.entries()
    assert set(entries) == set(model.state_keys)
    assert (keys.LATENT_ONES in entries) is (latent == "categorical")
    for t, state in enumerate(states):
        for key, value in state.entries().items():
            # TorchRL's layout: agents behind the batch.
            assert value.shape[:2] == (5, N)
            assert torch.equal(entries[key][:, t], value)
            assert torch.equal(whole[:, :, t].entries()[key], value)
            assert torch.equal(whole[:, :, t:].entries()[key][:, 0], value)
    n, s = 1, 3
    assert torch.equal(entries[keys.LATENT][s, 0, n], states[0].latent.value[n, s])
    assert torch.equal(entries[keys.HIDDEN][s, 0, n], states[0].hidden[n, s])
    assert torch.equal(entries[keys.TEAMMATE_LOGITS][s, 0, n], states[0].teammate_logits[n, s])
    rows, fresh = torch.tensor([True, False, False, True, False]), states[1][:, [2, 4]]
    before = states[0].entries()
    for key, value in states[0].graft(rows, fresh).entries().items():
        assert torch.equal(value[rows], fresh.entries()[key])
        assert torch.equal(value[~rows], before[key][~rows])
        # A copy: what was given out before stays what it was.
        assert torch.equal(states[0].entries()[key], before[key]) and not torch.equal(value, before[key])


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
@pytest.mark.parametrize("reencode", [False, True])
def test_imagined_latents_are_encoded_again_if_wanted(
    monkeypatch: pytest.MonkeyPatch, reencode: bool, latent: str
) -> None:
    """Drawn code by code, a latent may be one that no observation has; the reward must not be read from it."""
    model = make_model(latent=latent, reward_input="next_latent", reencode=reencode).eval()
    drawn = random_latent(model.latent, len(COUNTS), 50)
    again = model.encode(model.decode(drawn))
    assert not torch.equal(drawn.value, again.value)
    monkeypatch.setattr(model.latent, "sample_prior", lambda output, latent: drawn)
    action = torch.zeros(len(COUNTS), 50, dtype=torch.long)
    no_context = torch.zeros(len(COUNTS), 50, 0, dtype=torch.long)
    state, context = model.prefill(Latent(drawn.value.unsqueeze(2)), no_context, no_context.bool(), horizon=1)
    reached = model.step(state, action, context)
    expected = (again if reencode else drawn).value
    assert torch.equal(reached.latent.value, expected)
    monkeypatch.setattr(
        model.continuation, "forward", lambda hidden: hidden.new_full((*hidden.shape[:-1], 1), torch.inf)
    )
    torch.testing.assert_close(model.outcome(reached)[0], model.two_hot.decode(model.reward(expected)))


def test_predicted_mask_is_thresholded_and_leaves_an_action() -> None:
    model = make_model()
    latent = 3 * torch.randn(N, 500, 20)
    legal, logits = model.legal_actions(Latent(latent)), model.action_mask(latent)
    assert legal.shape == (N, 500, max(COUNTS)) and legal.any(-1).all()
    for n, count in enumerate(COUNTS):
        assert not legal[n, :, count:].any()
        own, predicted = legal[n, :, :count], logits[n, :, :count]
        some = (predicted > 0).any(-1)
        assert torch.equal(own[some], predicted[some] > 0)
        assert torch.equal(own[~some].int().argmax(-1), predicted[~some].argmax(-1))
        assert (own[~some].sum(-1) == 1).all()
    assert (legal.sum(-1) == 1).any() and not (logits > 0).any(-1).all()


@torch.no_grad()
def test_without_mask_predictor_every_own_action_is_legal() -> None:
    model = make_model(predict_mask=False)
    assert model.action_mask is None
    assert torch.equal(model.legal_actions(Latent(torch.zeros(N, 2, 20)))[:, 0], model.legal)
    assert model.legal.sum(-1).tolist() == list(COUNTS)
    assert keys.MASK_LOGITS not in run(model, random_batch()).keys(True)


# -- switches --------------------------------------------------------------------------------------------------------


def test_predict_mask_follows_the_environment_unless_told() -> None:
    assert make_model(has_action_mask=True).action_mask is not None
    assert make_model(has_action_mask=False).action_mask is None
    assert make_model(has_action_mask=False, predict_mask=True).action_mask is not None


def test_from_env_learns_the_mask_of_an_environment_that_has_one() -> None:
    assert WorldModel.from_env(mock_env(), hidden_size=16, num_heads=2).action_mask is not None


def test_from_env_fits_the_environment() -> None:
    env = mock_env()
    model = WorldModel.from_env(env, hidden_size=16, num_heads=2)
    assert model.legal.sum(-1).tolist() == env.layout.action_counts
    assert model.encoder.input.weight.shape == (1, SIZE, 16)
    assert WorldModel.from_env(env, group_layers=True).encoder.input.weight.shape == (2, SIZE, 512)
    assert isinstance(model.latent, CategoricalLatent) and model.latent.latent_size == 32 * 32
    with pytest.raises(AttributeError, match="wrap it"):
        WorldModel.from_env(torch.nn.Module())


@torch.no_grad()
def test_without_teammate_predictor() -> None:
    model = make_model(teammate_predictor=False)
    out = run(model, random_batch())
    assert out[keys.TEAMMATE_LOGITS].shape == (3, 7, N, 0, max(COUNTS))
    assert not any("teammates" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_action_scaling_alone_tells_who_is_focal() -> None:
    batch = random_batch(action_counts=(3, 3, 3), done=torch.zeros(3, 7, N, dtype=torch.bool))
    alike = batch.apply(lambda x: x[:, :, :1].expand_as(x).contiguous())
    for scaling in (True, False):
        options = {"action_counts": (3, 3, 3), "group_index": (0, 0, 0), "latent": "fsq"}
        model = make_model(**options, action_scaling=scaling)
        prior = run(model, alike)[keys.PRIOR]
        assert torch.allclose(prior[:, :, 0], prior[:, :, 1], atol=1e-5) is not scaling


def test_group_layers() -> None:
    own, shared = (
        {name for name, p in make_model(group_layers=switch).named_parameters() if p.ndim == 3 and p.shape[0] == 2}
        for switch in (True, False)
    )
    heads = ("decoder", "dynamics", "reward", "continuation", "action_mask", "teammates")
    assert own == {"encoder.input.weight", *(f"{name}.output.weight" for name in heads)}
    assert not shared


def test_one_agent() -> None:
    model = make_model(action_counts=(3,), group_index=(0,))
    assert model.teammates is None
    out = run(model, random_batch(action_counts=(3,)))
    assert out[keys.TEAMMATE_LOGITS].shape == (3, 7, 1, 0, 3)
    assert out[keys.PRIOR].shape == (3, 7, 1, 4, 5)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("num_agents", [1, 3])
def test_images(num_agents: int, latent: str) -> None:
    counts, shape = COUNTS[:num_agents], (3, 32, 32)
    model = make_model(counts, GROUPS[:num_agents], shape, channels=4, latent=latent)
    batch = random_batch(2, 4, action_counts=counts, observation_shape=shape)
    out = run(model, batch)
    assert out[keys.RECONSTRUCTION].shape == (2, 4, num_agents, *shape)
    done = batch[keys.AGENT_DONE][..., 0]
    images = batch[keys.NEXT_OBSERVATION].movedim(2, 0)
    posterior = model.latent.posterior(model.encoder(images)).movedim(0, 2)
    torch.testing.assert_close(out[keys.POSTERIOR], posterior, rtol=1e-4, atol=1e-4)
    assert done.any()


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [keys.OBSERVATION, keys.ACTION, keys.NEXT_OBSERVATION, keys.AGENT_DONE])
def test_missing_entry_is_named(key: tuple[str, ...]) -> None:
    with pytest.raises(KeyError, match=f"WorldModel reads .*{key[-1]}.*missing.*to_focal"):
        make_model()(random_batch().exclude(key))


def test_wrong_number_of_agents_is_named() -> None:
    with pytest.raises(ValueError, match=r"'observation'\) of shape \[3, 7, 3, 5\], found \[3, 7, 2, 5\]"):
        make_model()(random_batch(action_counts=(4, 4)))


@pytest.mark.parametrize(("part", "outputs"), [("dynamics", "20"), ("reward", "255"), ("continuation", "1")])
def test_a_head_with_another_number_of_outputs_is_named(part: str, outputs: str) -> None:
    model = make_model()
    setattr(model, part, torch.nn.Linear(model.transformer.features, 3))
    message = rf"world model's {part} head must give outputs of shape \[.*, {outputs}\], found \[.*, 3\]"
    with pytest.raises(ValueError, match=message):
        model(random_batch())
    with pytest.raises(ValueError, match=message):
        state, context = model.start_from(random_batch(), horizon=1)
        model.outcome(model.step(state, torch.zeros(N, len(state.hidden[0]), dtype=torch.long), context))


@pytest.mark.parametrize("part", ["action_mask", "end_reward"])
def test_parts_that_write_entries_of_their_own_stay_or_stay_away(part: str) -> None:
    for model in (make_model(reward_input="next_latent"), make_model(has_action_mask=False)):
        now = getattr(model, part)
        setattr(model, part, None if now is None else torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match=f"`{part}` decides what the model writes"):
            setattr(model, part, torch.nn.Linear(1, 1) if now is None else None)


def test_parts_that_do_not_fit_are_named() -> None:
    parts = dict(encoder=None, latent=make_model().latent, decoder=None, action_mixer=None, transformer=None)
    parts |= dict(dynamics=None, reward=None, continuation=None, two_hot=None, observation_shape=(SIZE,))
    legal = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"reward_input must be one of \('hidden', .*, got 'next_latnt'"):
        WorldModel(**parts, legal=legal, reward_input="next_latnt")
    with pytest.raises(ValueError, match=r"group for each of 3 agents, got \[0, 1\]"):
        WorldModel(**parts, legal=legal, group_index=[0, 1])
