"""Products in bfloat16; what lasts stays float32."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from matwm_rl.training.learner import Learner
from tests.helpers import LATENTS, make_learner, make_model, mock_replay, random_batch
from tests.training.helpers import OPTIONS, changed_parts, learn_from, leaves, snapshot, update


def make_pair(latent: str) -> tuple[Learner, Learner]:
    """The same networks, updated in float32 and in bfloat16."""
    torch.manual_seed(1)
    pair = [make_learner(make_model(latent=latent, normalize=True), precision=name) for name in ("float32", "bfloat16")]
    pair[1].load_state_dict(snapshot(pair[0]))
    return pair[0], pair[1]


def assert_near(rough: TensorDict, precise: TensorDict, relative: float) -> None:
    """Alike, but not the same: the products were taken in another precision."""
    losses = [key for key in precise.keys() if key.startswith("loss_")]
    assert losses and set(rough.keys()) == set(precise.keys())
    for key in losses:
        assert rough[key].dtype == torch.float32
        assert rough[key].item() == pytest.approx(precise[key].item(), rel=relative, abs=1e-3), key
    assert any(rough[key].item() != precise[key].item() for key in losses)


@pytest.mark.parametrize("latent", LATENTS)
def test_losses_in_bfloat16_are_near_those_in_float32(latent: str) -> None:
    precise, rough = make_pair(latent)
    sequences, starts = random_batch(40, 8), random_batch(60, 4)
    metrics = []
    for learner in (precise, rough):
        torch.manual_seed(5)
        metrics.append(learner.update_world_model(sequences))
    assert_near(metrics[1], metrics[0], 0.03)
    imagined = precise.imagination(starts)
    metrics = [learn_from(learner, imagined.clone()) for learner in (precise, rough)]
    assert_near(metrics[1], metrics[0], 0.03)


@pytest.mark.parametrize("latent", LATENTS)
def test_a_whole_update_in_bfloat16_keeps_everything_that_lasts_in_float32(latent: str) -> None:
    _, learner = make_pair(latent)
    replay = mock_replay()
    products: set[tuple[str, bool, torch.dtype]] = set()
    linears = {
        "transformer": learner.world_model.transformer.blocks[0].qkv,
        "actor": learner.actor[0].module.rest[-1],
        "critic": learner.critic[0].module.rest[-1],
    }
    for name, linear in linears.items():
        linear.register_forward_hook(
            lambda _module, _inputs, out, name=name: products.add((name, torch.is_grad_enabled(), out.dtype))
        )
    before = snapshot(learner)
    for _ in range(2):
        metrics = update(learner, replay)
    # Both where they are trained and where they dream, act in dreams and evaluate them.
    assert products == {(name, grad, torch.bfloat16) for name in linears for grad in (True, False)}
    parts = {"world_model", "actor", "critic", "target_critic", "return_scale"}
    assert parts <= changed_parts(learner, before)
    for path, value in leaves(learner.state_dict()).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert value.dtype == torch.float32 and value.isfinite().all(), path
    for key, value in metrics.items():
        assert value.dtype == torch.float32 and value.isfinite().all(), key


@pytest.mark.parametrize("latent", LATENTS)
def test_in_bfloat16_too_every_parameter_is_trained(latent: str) -> None:
    """Weights cast for a pass without gradient must not stand in for those of the pass that trains them."""
    learner = make_learner(make_model(latent=latent), precision="bfloat16", **OPTIONS)
    learner.world_model_loss.free_nats = 0.0
    replay = mock_replay()
    learner.update_world_model(replay.sequences.sample())
    learner.update_agents(replay.starts.sample())
    for name in ("world_model", "actor", "critic"):
        parameters = getattr(learner, name).named_parameters()
        idle = [path for path, p in parameters if p.grad is None or not p.grad.any() or p.grad.dtype != torch.float32]
        assert not idle, name


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="'float32' or 'bfloat16', got 'float16'"):
        make_learner(precision="float16").update_world_model(random_batch())
