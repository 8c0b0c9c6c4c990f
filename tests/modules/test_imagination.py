from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.modules import (
    STATE_KEYS,
    ActorCriticConfig,
    CoordinateEncoderConfig,
    Imagination,
    ObservationRewardConfig,
    WorldModel,
    make_actor,
)
from matwm_rl.modules import transformer as transformer_module
from tests.helpers import COUNTS, LATENTS, make_model, mock_replay, random_batch, randomize

N, S, C, H = len(COUNTS), 6, 3, 4


def make_exact() -> WorldModel:
    """A model that encodes without chance, so that two passes over the same data agree."""
    return make_model(latent="gaussian").eval()


def make_imagination(model: WorldModel | None = None, horizon: int = H, **kwargs: str) -> Imagination:
    model = make_exact() if model is None else model
    return Imagination(model, randomize(make_actor(model, ActorCriticConfig(num_cells=8))), horizon=horizon, **kwargs)


def starts(end: int | None = None, **kwargs: object) -> TensorDict:
    """Contexts of C steps and the start; ``end`` is the step that an episode ends with."""
    done = torch.zeros(S, C + 1, len(kwargs.get("action_counts", COUNTS)), dtype=torch.bool)
    if end is not None:
        done[:, end] = True
    return random_batch(S, C + 1, done=done, **kwargs)


def dream(imagination: Imagination, td: TensorDict) -> TensorDict:
    torch.manual_seed(7)
    return imagination(td.clone())


@pytest.mark.parametrize("latent", LATENTS)
def test_layout(latent: str) -> None:
    model = make_model(latent=latent)
    imagination = make_imagination(model)
    imagined = dream(imagination, starts())
    assert imagined.batch_size == (S, H)
    assert imagined[keys.REWARD].shape == imagined[keys.CONTINUATION].shape == (S, H, N, 1)
    assert imagined[keys.ACTION].shape == imagined[keys.ALIVE].shape == (S, H, N)
    assert set(imagination.out_keys) == set(imagined.keys(True, True))
    for key in STATE_KEYS:
        assert torch.equal(imagined["next", *key][:, :-1], imagined[key][:, 1:])
    assert ((imagined[keys.CONTINUATION] > 0) & (imagined[keys.CONTINUATION] < 1)).all()


def test_no_gradient_flows_through_the_rollout() -> None:
    td = starts()
    td[keys.OBSERVATION].requires_grad_()
    imagined = make_imagination()(td)
    assert not any(value.requires_grad for value in imagined.values(True, True))


@torch.no_grad()
@pytest.mark.parametrize("end", [None, 0, 1, 2])
def test_dreams_start_from_the_state_of_the_sequence_pass(end: int | None) -> None:
    imagination, td = make_imagination(make_exact()), starts(end)
    imagined = dream(imagination, td)
    real = imagination.world_model(td.clone())
    for key in STATE_KEYS:
        torch.testing.assert_close(imagined[key][:, 0], real[key][:, -1], rtol=1e-4, atol=1e-5)
    assert bool(imagined[keys.HIDDEN][:, 0].any()) is (end != C - 1)


@torch.no_grad()
@pytest.mark.parametrize("end", [None, 0, 1, 2])
@pytest.mark.parametrize("in_cache", [transformer_module.IN_CACHE, 0], ids=["small", "large"])
def test_dreams_go_on_by_the_models_own_rules(
    float64: None, end: int | None, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Context and dream put together are one sequence, on which the parallel pass must agree."""
    monkeypatch.setattr(transformer_module, "IN_CACHE", in_cache)
    imagination, td = make_imagination(make_exact()), starts(end)
    model = imagination.world_model
    imagined = dream(imagination, td)
    first = 0 if end is None else end + 1
    context = model.encode(td[keys.OBSERVATION].permute(2, 0, 1, 3))[:, :, first:C]
    sequence = torch.cat([context, imagined[keys.LATENT].permute(2, 0, 1, 3)], 2)
    action = torch.cat([td[keys.ACTION][:, first:C], imagined[keys.ACTION]], 1).permute(2, 0, 1)
    length = sequence.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = model.transformer(model.action_mixer(sequence, action).flatten(0, 1), causal)
    hidden = hidden.view(N, S, -1, hidden.shape[-1])[:, :, -H:]
    teammates = model.teammates(sequence, causal)[:, :, -H:]
    expected = {
        ("next", *keys.HIDDEN): hidden,
        keys.REWARD: model.two_hot.decode(model.reward.head(hidden)).unsqueeze(-1),
        keys.CONTINUATION: model.continuation(hidden).sigmoid(),
        keys.TEAMMATE_LOGITS: teammates,
        keys.ACTION_MASK: torch.stack([model.legal_actions(sequence[:, :, t - H]) for t in range(H)], 2),
    }
    for key, value in expected.items():
        torch.testing.assert_close(imagined[key], value.permute(1, 2, 0, *range(3, value.ndim)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_actions_are_sampled_from_the_actor_under_the_predicted_mask() -> None:
    model = make_exact()
    imagination = make_imagination(model, horizon=1)
    one = starts()[:1]
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        imagined = dream(imagination, one.expand(3_000, C + 1))
    dist = imagination.actor.get_dist(imagined[:1].clone())
    mask = model.legal_actions(imagined[keys.LATENT][:1, 0].movedim(1, 0))[:, 0]
    for n in range(N):
        drawn = torch.bincount(imagined[keys.ACTION][:, 0, n], minlength=model.num_actions) / 3_000
        probs = dist.probs[0, 0, n] * mask[n]
        assert (drawn - probs / probs.sum()).abs().max() < 5 * 0.5 / math.sqrt(3_000)


@pytest.mark.parametrize("latent", LATENTS)
def test_illegal_actions_are_never_imagined(latent: str) -> None:
    model = make_model(latent=latent)
    imagined = dream(make_imagination(model), starts().expand(50, S, C + 1).reshape(-1, C + 1))
    mask = imagined[keys.ACTION_MASK]
    assert mask.gather(-1, imagined[keys.ACTION].unsqueeze(-1)).all()
    assert not (mask & ~model.legal).any() and not (mask == model.legal).all()


@torch.no_grad()
def test_what_lies_before_the_episode_has_no_influence() -> None:
    imagination, td = make_imagination(make_model()), starts(end=1)
    other = random_batch(S, C + 1, done=td[keys.AGENT_DONE][..., 0])
    imagined = dream(imagination, td)
    mixed = torch.cat([other[:, :2], td[:, 2:]], 1)
    again = dream(imagination, mixed)
    for key in imagination.out_keys:
        assert torch.equal(imagined[key], again[key]), key
    mixed[keys.ACTION][:, 2] = (mixed[keys.ACTION][:, 2] + 1) % 3
    assert not torch.equal(dream(imagination, mixed)[keys.HIDDEN], imagined[keys.HIDDEN])


@torch.no_grad()
def test_agents_do_not_meet() -> None:
    imagination, td = make_imagination(make_model()), starts()
    imagined = dream(imagination, td)
    for n in range(N):
        other = td.clone()
        other[keys.OBSERVATION][:, :, n] += 3.0
        other[keys.ACTION][:, :, n] = 2 - other[keys.ACTION][:, :, n].clamp(max=2)
        again = dream(imagination, other)
        rest = [j for j in range(N) if j != n]
        for key in imagination.out_keys:
            assert torch.equal(imagined[key][:, :, rest], again[key][:, :, rest]), key
        assert not torch.equal(imagined[keys.LATENT][:, :, n], again[keys.LATENT][:, :, n])


def test_dreams_of_the_dead_are_marked() -> None:
    td = starts()
    imagined = dream(make_imagination(), td)
    assert torch.equal(imagined[keys.ALIVE], td[keys.ALIVE][:, -1:].expand(S, H, N))
    assert dream(make_imagination(), td.exclude(keys.ALIVE))[keys.ALIVE].all()


@pytest.mark.parametrize("context", [0, 1, 5])
def test_replayed_starts_of_any_context(context: int) -> None:
    replay = mock_replay(context_length=context)
    assert dream(make_imagination(make_model()), replay.starts.sample()).batch_size == (4, H)


@pytest.mark.parametrize(
    "options",
    [
        {"action_counts": (3,), "group_index": (0,)},
        {"teammate_predictor": False},
        {"action_scaling": False, "group_layers": False, "has_action_mask": False},
        {"observation_shape": (3, 32, 32)},
        {"reward": ObservationRewardConfig(), "reward_interpolation": "symlog"},
        {
            "latent": "gaussian",
            "encoder": CoordinateEncoderConfig(),
            "reward": ObservationRewardConfig(),
            "reencode": True,
        },
    ],
    ids=str,
)
def test_switches(options: dict) -> None:
    model = make_model(**options)
    data = {key: options[key] for key in ("action_counts", "observation_shape") if key in options}
    imagined = dream(make_imagination(model), starts(end=1, **data))
    assert all(value.isfinite().all() for value in imagined.values(True, True))
    teammates = 0 if model.teammates is None else model.num_agents - 1
    assert imagined[keys.TEAMMATE_LOGITS].shape == (S, H, model.num_agents, teammates, model.num_actions)


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("in_cache", [transformer_module.IN_CACHE, 0], ids=["small", "large"])
def test_bfloat16_gives_float32_states_near_those_of_float32(
    latent: str, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_module, "IN_CACHE", in_cache)
    model, td = make_model(latent=latent), starts(end=0).expand(20, S, C + 1).reshape(-1, C + 1)
    precise = make_imagination(model)
    rough = Imagination(model, precise.actor, horizon=H, precision="bfloat16")
    products: list[torch.dtype] = []
    model.dynamics.head.trunk.register_forward_hook(lambda _module, _inputs, out: products.append(out.dtype))
    expected, imagined = dream(precise, td), dream(rough, td)
    assert products == [torch.float32] * H + [torch.bfloat16] * H
    for key, value in imagined.items(True, True):
        assert value.dtype == expected[key].dtype, key
        assert not value.is_floating_point() or value.dtype == torch.float32, key
        assert value.isfinite().all(), key
    # Draws differ where probabilities do, and dreams part from there on: compare those that have drawn alike so far.
    one, other = imagined[keys.LATENT][:, 0], expected[keys.LATENT][:, 0]
    same = (((one - other).abs() < 0.1) if latent == "gaussian" else (one == other)).all(-1)
    assert same.float().mean() > 0.8
    for key in (keys.HIDDEN, keys.TEAMMATE_LOGITS):
        one, other = (out[key][:, 0][same].clamp(min=-100.0) for out in (imagined, expected))
        error = (one - other).square().mean().sqrt() / other.square().mean().sqrt()
        assert 0 < error < 0.05, key
    same &= imagined[keys.ACTION][:, 0] == expected[keys.ACTION][:, 0]
    for key in (keys.CONTINUATION, ("next", *keys.HIDDEN)):
        one, other = imagined[key][:, 0][same], expected[key][:, 0][same]
        error = (one - other).square().mean().sqrt() / other.square().mean().sqrt()
        assert 0 < error < 0.05, key


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'half'"):
        make_imagination(precision="half")(starts())
    with pytest.raises(ValueError, match="horizon must be a positive integer, got 0"):
        make_imagination(horizon=0)
    with pytest.raises(ValueError, match=r"\[\*S, context \+ 1\]"):
        make_imagination()(starts()[0])
    with pytest.raises(ValueError, match=r"reads \('agents', 'alive'\) of shape"):
        make_imagination()(starts().set(keys.ALIVE, torch.ones(S, C + 1, dtype=torch.bool)))
