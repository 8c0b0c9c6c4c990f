"""The verbs of acting and imagining: prefill, step, outcome, legal actions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matwm_rl import keys
from matwm_rl.modules import STATE_KEYS, HiddenRewardConfig, ObservationRewardConfig, RewardConfig, State, WorldModel
from matwm_rl.modules import transformer as transformer_module
from tests.helpers import COUNTS, LATENTS, make_model, random_batch, random_latent
from tests.modules.test_dynamics import moments

N = len(COUNTS)


def prefill_and_step(
    model: WorldModel, latent: Tensor, action: Tensor, valid: Tensor, C: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[State], Tensor]:
    """States s_C, s_{C+1}, ... and rewards, with the given latents in place of imagined ones."""
    H = latent.shape[2] - 1 - C
    state, caches = model.prefill(latent[:, :, : C + 1], action[:, :, :C], valid, H)
    states, rewards = [state], []
    for t in range(C, C + H):
        monkeypatch.setattr(model.dynamics, "sample", lambda hidden, z, t=t: latent[:, :, t + 1])
        states.append(model.step(states[-1], action[:, :, t], caches))
        rewards.append(model.predict_outcome(states[-2], action[:, :, t], states[-1])[0])
    return states, torch.stack(rewards, -1)


@torch.no_grad()
@pytest.mark.parametrize("space", LATENTS)
@pytest.mark.parametrize("in_cache", [transformer_module.IN_CACHE, 0], ids=["small", "large"])
@pytest.mark.parametrize(("context", "end"), [(0, None), (1, None), (1, 0), (4, None), (4, 0), (4, 2), (4, 3)], ids=str)
def test_prefill_and_steps_equal_the_sequence_pass(
    float64: None, context: int, end: int | None, in_cache: int, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_module, "IN_CACHE", in_cache)
    T, C = 9, context
    done = torch.zeros(3, T, N, dtype=torch.bool)
    if end is not None:
        done[:, end] = True
    model, batch = make_model(latent=space), random_batch(3, T, done=done)
    out = model(batch.copy())
    latent, action = out[keys.LATENT].permute(2, 0, 1, 3), batch[keys.ACTION].permute(2, 0, 1)
    valid = torch.arange(C) > (-1 if end is None else end)
    states, rewards = prefill_and_step(model, latent, action, valid.expand(N, 3, C), C, monkeypatch)
    assert len(states) == T - C
    for t, state in enumerate(states, C):
        for key, value in state.entries().items():
            torch.testing.assert_close(value, out[key][:, t], rtol=1e-9, atol=1e-9)
    decoded = model.two_hot.decode(out[keys.REWARD_LOGITS][:, C : T - 1]).permute(2, 0, 1)
    torch.testing.assert_close(rewards, decoded, rtol=1e-7, atol=1e-7)
    starts = end is not None and end == C - 1 or C == 0
    assert bool(states[0].hidden.any()) is not starts


@torch.no_grad()
@pytest.mark.parametrize("invalid", [1, 2, 4])
def test_context_before_the_episode_has_no_influence(monkeypatch: pytest.MonkeyPatch, invalid: int) -> None:
    model, C = make_model(latent="gaussian"), 4
    latent, action = torch.randn(N, 3, 7, 4), torch.randint(3, (N, 3, 6))
    valid = (torch.arange(C) > invalid - 1).expand(N, 3, C)
    states, rewards = prefill_and_step(model, latent, action, valid, C, monkeypatch)
    latent, action = latent.clone(), action.clone()
    latent[:, :, :invalid] = 50 * torch.randn(N, 3, invalid, 4)
    action[:, :, :invalid] = 2 - action[:, :, :invalid]
    again, rewards_again = prefill_and_step(model, latent, action, valid, C, monkeypatch)
    for one, other in zip(states, again, strict=True):
        assert torch.equal(one.hidden, other.hidden)
        assert torch.equal(one.teammate_logits, other.teammate_logits)
    assert torch.equal(rewards, rewards_again)
    latent[:, :, invalid] = torch.randn(N, 3, 4)
    assert not torch.equal(prefill_and_step(model, latent, action, valid, C, monkeypatch)[1], rewards)


@torch.no_grad()
@pytest.mark.parametrize("end", [None, 0, 2])
def test_starts_are_encoded_and_prefilled_in_their_own_episodes(float64: None, end: int | None) -> None:
    """The last state is that of the sequence pass; any number of batch dimensions becomes one."""
    done = torch.zeros(6, 4, N, dtype=torch.bool)
    if end is not None:
        done[:, end, 1] = True
    model, starts = make_model(latent="gaussian").eval(), random_batch(6, 4, done=done)
    real = model(starts.copy())
    for shaped in (starts, starts.reshape(2, 3, 4)):
        state, caches = model.start_from(shaped, horizon=2)
        for key, value in state.entries().items():
            torch.testing.assert_close(value, real[key][:, -1], rtol=1e-9, atol=1e-9)
        assert caches.sequence.length == 3 and caches.sequence.key.shape[1] == 5
    assert state.hidden.flatten(1).any(1).tolist() == [True, end != 2, True]
    with pytest.raises(ValueError, match=r"\[\*S, context \+ 1\]"):
        model.start_from(starts[0])


@torch.no_grad()
@pytest.mark.parametrize("space", LATENTS)
def test_step_decodes_reward_and_continuation_and_samples_the_prior(float64: None, space: str) -> None:
    model = make_model(latent=space)
    latent, action = random_latent(model.latent, N, 1, 3), torch.zeros(N, 2000, 2, dtype=torch.long)
    valid = torch.ones(N, 2000, 2, dtype=torch.bool)
    state, caches = model.prefill(latent.expand(N, 2000, 3, -1), action, valid, horizon=1)
    reached = model.step(state, action[..., 0], caches)
    reward, continuation = model.predict_outcome(state, action[..., 0], reached)
    whole = torch.ones(3, 3, dtype=torch.bool).tril()
    tokens = model.action_mixer(latent, torch.zeros(N, 1, 3, dtype=torch.long))
    hidden = model.transformer(tokens.flatten(0, 1), whole)[:, -1].unsqueeze(1)
    torch.testing.assert_close(reached.hidden[:, :1], hidden)
    torch.testing.assert_close(continuation[:, :1], model.continuation(hidden).squeeze(-1).sigmoid())
    torch.testing.assert_close(reward[:, :1], model.two_hot.decode(model.reward.head(hidden)))
    mean, deviation = moments(model.latent.prior(model.dynamics.head(hidden), latent[:, :, -1]))
    assert ((reached.latent.mean(1) - mean.squeeze(1)).abs() < 5 * deviation.squeeze(1) / 2000**0.5).all()


@torch.no_grad()
@pytest.mark.parametrize("reward", [HiddenRewardConfig(), ObservationRewardConfig()], ids=["hidden", "observation"])
def test_outcome_of_many_steps_at_once_is_that_of_each(float64: None, reward: RewardConfig) -> None:
    model = make_model(reward=reward)
    states = [
        State(random_latent(model.latent, N, 5), torch.randn(N, 5, 16), torch.randn(N, 5, N - 1, 4)) for _ in range(4)
    ]
    actions = torch.randint(3, (N, 5, 3))
    whole = model.predict_outcome(State.stack(states[:-1], 2), actions, State.stack(states[1:], 2))
    for t, (state, following) in enumerate(zip(states, states[1:], strict=False)):
        for one, other in zip(whole, model.predict_outcome(state, actions[:, :, t], following), strict=True):
            assert other.shape == (N, 5)
            torch.testing.assert_close(one[:, :, t], other)


@torch.no_grad()
@pytest.mark.parametrize("reencode", [False, True])
def test_imagined_latents_are_encoded_again_if_wanted(monkeypatch: pytest.MonkeyPatch, reencode: bool) -> None:
    """Drawn dimension by dimension, a latent may be one that no observation has."""
    model = make_model(latent="gaussian", reencode=reencode).eval()
    drawn = random_latent(model.latent, N, 50)
    again = model.encode(model.decode(drawn))
    assert not torch.equal(drawn, again)
    monkeypatch.setattr(model.dynamics, "sample", lambda hidden, latent: drawn)
    state, caches = model.start_from(random_batch(50, 1), horizon=1)
    reached = model.step(state, torch.zeros(N, 50, dtype=torch.long), caches)
    assert torch.equal(reached.latent, again if reencode else drawn)
    # Teammates are predicted from what the actors will see.
    assert model.teammates is not None
    valid = torch.ones(2, 2, dtype=torch.bool).tril()
    whole = model.teammates(torch.stack([state.latent, reached.latent], 2), valid)
    torch.testing.assert_close(reached.teammate_logits, whole[:, :, -1])


@torch.no_grad()
def test_predicted_mask_is_thresholded_and_leaves_an_action() -> None:
    model = make_model(latent="gaussian")
    latent = 3 * torch.randn(N, 500, 4)
    legal, logits = model.legal_actions(latent), model.action_mask(latent)
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
    model = make_model(has_action_mask=False)
    assert torch.equal(model.legal_actions(torch.zeros(N, 2, 20))[:, 0], model.legal)
    assert model.legal.sum(-1).tolist() == list(COUNTS)
    assert keys.MASK_LOGITS not in model(random_batch()).keys(True)


@torch.no_grad()
def test_without_teammate_predictor_states_have_no_place_for_them() -> None:
    model = make_model(teammate_predictor=False)
    state, caches = model.start_from(random_batch(5, 3), horizon=1)
    reached = model.step(state, torch.zeros(N, 5, dtype=torch.long), caches)
    for each in (state, reached):
        assert list(each.entries()) == STATE_KEYS
        assert each.teammate_logits.shape == (N, 5, 0, max(COUNTS))
