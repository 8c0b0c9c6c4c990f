"""The parallel pass of training."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from matwm_rl import keys
from matwm_rl.modules import LatentLinear, Transition, WorldModel, stacked
from matwm_rl.objectives import WorldModelLoss
from tests.helpers import COUNTS, GROUPS, LATENTS, grads, make_model, random_batch, total
from tests.modules.test_dynamics import moments, slow_kl

N = len(COUNTS)
OUTPUTS: list[NestedKey] = [
    keys.LATENT,
    keys.HIDDEN,
    keys.TEAMMATE_LOGITS,
    keys.RECONSTRUCTION,
    keys.MASK_LOGITS,
    keys.POSTERIOR,
    keys.PRIOR,
    keys.DYNAMICS_KL,
    keys.REPRESENTATION_KL,
    keys.REWARD_LOGITS,
    keys.CONTINUATION_LOGITS,
]
OF_THE_SUCCESSOR: list[NestedKey] = [keys.POSTERIOR, keys.DYNAMICS_KL, keys.REPRESENTATION_KL]


def run(model: WorldModel, batch: TensorDict) -> TensorDict:
    """The sequence pass, with the same draws of the latents at every call."""
    torch.manual_seed(3)
    return model(batch.copy())


def episodes(done: Tensor) -> list[tuple[int, int]]:
    """Half-open ranges of a slice's episodes."""
    ends = [t + 1 for t in range(len(done)) if done[t] or t == len(done) - 1]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def for_agent(part: Callable[..., Tensor], n: int, *inputs: Tensor) -> Tensor:
    """What a part gives agent n for ``[T, F]``, all others getting zeros, by products instead of look-ups."""
    stacked = [x.new_zeros(N, *x.shape) for x in inputs]
    for zeros, x in zip(stacked, inputs, strict=True):
        zeros[n] = x
    return part(*(x.requires_grad_(x.is_floating_point()) for x in stacked))[n].detach()


def alone(model: WorldModel, n: int, agents: TensorDict, latent: Tensor) -> dict[str, Tensor]:
    """One agent's one episode by itself: no masks, no padding, no other sequences. ``latent`` are the drawn z."""
    length = latent.shape[0]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    action = agents["agents", "action"]
    tokens = for_agent(model.action_mixer, n, latent, action)
    hidden = model.transformer(tokens.unsqueeze(0), causal)[0]
    assert model.teammates is not None and model.action_mask is not None
    teammates = model.teammates(latent.expand(N, 1, *latent.shape), causal)[n, 0]
    posterior = model.latent.posterior(for_agent(model.encoder, n, agents["next", "agents", "observation"]))
    prior = model.latent.prior(for_agent(model.dynamics.head, n, hidden), latent)
    gaussian = model.latent.num_classes is None
    kl = [[slow_kl(q, p, gaussian)] for q, p in zip(posterior.tolist(), prior.tolist(), strict=True)]
    return {
        "hidden": torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]]),
        "teammate_logits": teammates,
        "reconstruction": for_agent(model.decoder, n, latent),
        "mask_logits": for_agent(model.action_mask, n, latent),
        "posterior": posterior,
        "prior": prior,
        "dynamics_kl": torch.tensor(kl),
        "representation_kl": torch.tensor(kl),
        "reward_logits": for_agent(lambda h: model.reward(Transition(h, h, h, None, None, None)), n, hidden),
        "continuation_logits": for_agent(model.continuation, n, hidden),
    }


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("group_index", [GROUPS, (0, 0, 0)])
def test_sequence_pass_is_every_agents_every_episode_alone(float64: None, latent: str, group_index: list[int]) -> None:
    model = make_model(latent=latent, group_index=group_index)
    batch = random_batch(3, 8)
    out = run(model, batch)
    assert set(model.out_keys) == set(OUTPUTS)
    for b, n in itertools.product(range(3), range(N)):
        for begin, end in episodes(batch["next", "agents", "done"][b, :, n, 0]):
            rows = batch[b, begin:end].apply(lambda x, n=n: x[:, n], batch_size=[end - begin])
            expected = alone(model, n, rows, out[keys.LATENT][b, begin:end, n])
            for key in OUTPUTS[1:]:
                # Rotary angles are float32 and positions differ.
                torch.testing.assert_close(
                    out[key][b, begin:end, n],
                    expected[key[-1]],
                    rtol=1e-5,
                    atol=1e-6,
                    msg=lambda m, key=key: f"{key}: {m}",
                )


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
def test_latents_are_drawn_from_the_posterior_of_the_current_observation(latent: str) -> None:
    model, batch = make_model(latent=latent), random_batch(1, 1)
    many = batch.expand(4000, 1).contiguous()
    drawn = run(model, many)[keys.LATENT].mean(0)[0]
    for n in range(N):
        features = for_agent(model.encoder, n, batch[keys.OBSERVATION][0, :, n])
        mean, deviation = moments(model.latent.posterior(features))
        assert ((drawn[n] - mean.flatten()).abs() < 5 * deviation.flatten() / 4000**0.5).all()


@torch.no_grad()
def test_any_number_of_batch_dimensions() -> None:
    model, batch = make_model(latent="gaussian").eval(), random_batch(6, 5)
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
        for key in OF_THE_SUCCESSOR:
            again[key][:, t] = out[key][:, t]
        for key in OUTPUTS:
            assert torch.equal(out[key], again[key]), key
    changed = batch.clone()
    changed[keys.OBSERVATION][:, 3] += 1.0
    assert torch.equal(run(model, changed)[keys.POSTERIOR][:, 2], out[keys.POSTERIOR][:, 2])


@torch.no_grad()
def test_a_step_sees_the_present_and_the_past_alone() -> None:
    done = torch.zeros(2, 6, N, dtype=torch.bool)
    model, batch = make_model(latent="gaussian"), random_batch(2, 6, done=done)
    out = run(model, batch)
    changed = batch.clone()
    changed[keys.OBSERVATION][:, 3] += 1.0
    changed[keys.NEXT_OBSERVATION][:, 2] += 1.0
    again = run(model, changed)
    for key in OUTPUTS:
        differs = (out[key] != again[key]).flatten(3).any(-1)
        first = {**dict.fromkeys(OF_THE_SUCCESSOR, 2), keys.HIDDEN: 4}.get(key, 3)
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
        model.max_boundaries = 3 * length
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
    looked_up: list[LatentLinear] = []
    look_up = LatentLinear.forward_multi_hot

    def counted(layer: LatentLinear, *inputs: Tensor | None) -> Tensor:
        looked_up.append(layer)
        return look_up(layer, *inputs)

    monkeypatch.setattr(LatentLinear, "forward_multi_hot", counted)

    def losses_and_gradients() -> tuple[TensorDict, list[Tensor]]:
        torch.manual_seed(3)
        losses = WorldModelLoss(model, free_nats=0.0)(batch)
        return losses, grads(total(losses), parameters.values())

    losses, gradients = losses_and_gradients()
    # The mixer passes gradients on to the encoder, where one is trained.
    expected_layers = [model.action_mixer.latent, model.teammates.input][0 if frozen_encoder else 1 :]
    assert looked_up == expected_layers
    monkeypatch.setattr(stacked, "may_need_gradient", lambda latent: True)
    expected_losses, expected = losses_and_gradients()
    assert looked_up == expected_layers
    for key in losses.keys():
        torch.testing.assert_close(losses[key], expected_losses[key])
    for name, gradient, product in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, product, msg=lambda m, name=name: f"{name}: {m}")
        assert gradient.any(), name


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [keys.OBSERVATION, keys.ACTION, keys.NEXT_OBSERVATION, keys.AGENT_DONE])
def test_missing_entry_is_named(key: tuple[str, ...]) -> None:
    with pytest.raises(KeyError, match=f"WorldModel reads .*{key[-1]}.*missing.*add_agent_entries"):
        make_model()(random_batch().exclude(key))


def test_wrong_number_of_agents_is_named() -> None:
    with pytest.raises(ValueError, match=r"'observation'\) of shape \[3, 7, 3, 5\], found \[3, 7, 2, 5\]"):
        make_model()(random_batch(action_counts=(4, 4)))


def test_a_single_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequences of batch size \[\*B, T\], got .* of a single step"):
        make_model()(random_batch()[0, 0])


def test_a_continuation_head_with_another_number_of_outputs_is_named() -> None:
    model = make_model()
    model.continuation = torch.nn.Linear(model.transformer.features, 3)
    with pytest.raises(ValueError, match=r"the continuation head must give logits of shape \[.*, 1\], found \[.*, 3\]"):
        model(random_batch())
