"""What the switches of the configuration build, and which of them do not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from matwm_rl.modules import FSQLatent, ObservationHead, WorldModel, WorldModelConfig
from tests.helpers import COUNTS, EXACT, GROUPS, SMALL, grads

COORDINATES: dict[str, Any] = {"latent": "fsq", "linear_skips": True, "coordinate_code": True, "num_classes": 32}


def build(size: int = 5, group_index: tuple[int, ...] = GROUPS, **overrides: Any) -> WorldModel:
    """A model as it starts."""
    torch.manual_seed(0)
    return WorldModel.from_layout(
        observation_shape=[size],
        action_counts=COUNTS,
        group_index=group_index,
        config=WorldModelConfig(**(SMALL | overrides)),
    )


# -- coordinate code -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("group_index", [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 2)])
@pytest.mark.parametrize("group_layers", [True, False])
@pytest.mark.parametrize(("size", "num_dims"), [(4, 4), (5, 15), (5, 18)])
def test_a_model_with_a_coordinate_code_knows_its_observations_from_the_start(
    group_index: tuple[int, ...], group_layers: bool, size: int, num_dims: int
) -> None:
    options = {**COORDINATES, "num_dims": num_dims, "group_layers": group_layers, "fourier_features": 2}
    model = build(size, group_index, **options)
    observation = 4 * torch.rand(len(COUNTS), 300, size) - 2
    # Entries that only other agents use are zeros.
    observation[-1, :, size - 2 :] = 0.0
    rebuilt = model.decode(model.encode(observation))
    level = 2 / 31 / FSQLatent.coordinate_scale
    assert ((rebuilt - observation).abs() <= 0.14 * observation.abs() + 0.55 * level).all()
    # Shifted against each other by parts of one level.
    copies = num_dims // size
    shifts = model.encoder.skip.bias[:, : copies * size].unflatten(1, (copies, size))
    torch.testing.assert_close(shifts.diff(dim=1), torch.full_like(shifts[:, 1:], 2 / 31 / copies))
    chance = build(size, group_index, **{**options, "coordinate_code": False})
    assert (chance.decode(chance.encode(observation)) - observation).abs().mean() > 3 * level


@torch.no_grad()
@pytest.mark.parametrize("group_index", [(0, 0, 0), (0, 1, 2)])
@pytest.mark.parametrize(("size", "num_dims"), [(4, 4), (5, 15), (5, 18)])
def test_a_gaussian_code_holds_the_coordinates_themselves(
    group_index: tuple[int, ...], size: int, num_dims: int
) -> None:
    options = {**COORDINATES, "latent": "gaussian", "num_dims": num_dims, "fourier_features": 2}
    model = build(size, group_index, **options).eval()
    observation = 10 * torch.randn(len(COUNTS), 300, size)
    latent = model.encode(observation)
    torch.testing.assert_close(model.decode(latent), observation, rtol=1e-5, atol=1e-5)
    copies = num_dims // size
    for copy in latent.value[..., : copies * size].unflatten(-1, (copies, size)).unbind(-2):
        torch.testing.assert_close(copy, observation)
    # While training, no further off than the noise of their mean.
    rebuilt = model.train().decode(model.encode(observation))
    error = (rebuilt - observation).square().mean().sqrt()
    assert error.item() == pytest.approx(0.02 / copies**0.5, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
def test_what_is_uncertain_of_one_coordinate_does_not_move_the_others(latent: str) -> None:
    model = build(**COORDINATES | {"latent": latent}, num_dims=10).eval()
    observation = (2 * torch.rand(len(COUNTS), 1, 5) - 1).expand(-1, 4000, -1)
    index = model.latent.to_code(model.encode(observation))
    for d in range(5):
        drawn = index.clone()
        # The two dimensions of coordinate d; all others stay.
        own = torch.randint(32, (len(COUNTS), 4000, 2))
        drawn[..., [d, d + 5]] = own if latent == "fsq" else torch.randn(own.shape)
        spread = model.decode(model.latent.from_code(drawn)).std(1)
        assert (spread[:, d] > 0.5).all()
        assert (spread[:, [e for e in range(5) if e != d]] < 1e-5).all()


def test_more_coordinates_than_code_dimensions_leave_the_ordinary_start() -> None:
    crowded, ordinary = (build(5, **{**COORDINATES, "num_dims": 4, "coordinate_code": on}) for on in (True, False))
    for (name, one), other in zip(crowded.state_dict().items(), ordinary.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    fitting, ordinary = (build(4, **{**COORDINATES, "num_dims": 4, "coordinate_code": on}) for on in (True, False))
    differ = {
        name for name, value in fitting.state_dict().items() if not torch.equal(value, ordinary.state_dict()[name])
    }
    skips = {f"{part}.{end}" for part in ("encoder.skip", "decoder.skip") for end in ("weight", "bias")}
    zeroed = {f"{part}.{end}" for part in ("encoder.output", "decoder.output") for end in ("weight", "bias")}
    assert differ == skips | zeroed


@pytest.mark.parametrize("wrong", [{"latent": "categorical"}, {"linear_skips": False}], ids=str)
def test_a_coordinate_code_needs_numbers_and_linear_skips(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs linear_skips and latent 'fsq' or 'gaussian', got \w+ and '\w+'"):
        build(**(COORDINATES | wrong))


# -- latent code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent", "default"), [("fsq", 0.25), ("gaussian", 0.02)])
def test_the_width_of_the_posterior(latent: str, default: float) -> None:
    assert build(latent=latent).latent.width == default
    assert build(latent=latent, latent_width=0.5).latent.width == 0.5


def test_a_gaussian_code_has_no_classes() -> None:
    one, other = (build(latent="gaussian", num_classes=classes) for classes in (1, 99))
    for (name, value), same in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, same), name


# -- reward of the next observation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group_layers", [True, False])
def test_the_reward_of_the_next_observation_has_a_head_with_the_encoders_features(group_layers: bool) -> None:
    model = build(reward_input="next_observation", fourier_features=3, encoder_depth=2, group_layers=group_layers)
    head = model.reward
    assert isinstance(head, ObservationHead)
    assert head.input.weight.shape == model.encoder.input.weight.shape == (2 if group_layers else 1, 5 * 7, 16)
    assert head.output.weight.shape[0] == (2 if group_layers else 1)
    # Nothing is predicted before anything is learnt, and then every layer learns.
    reward = model.two_hot.decode(head(torch.randn(len(COUNTS), 7, 5)))
    assert reward.abs().max() < 1e-4
    (grad,) = grads(_surprise(head), [head.output.weight])
    assert grad.any()


def _surprise(head: ObservationHead) -> Tensor:
    """Cross-entropy with the first class."""
    return -head(torch.randn(len(COUNTS), 7, 5)).log_softmax(-1)[..., 0].mean()


def test_an_unknown_reward_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"'next_latent', 'next_observation'\), got 'observation'"):
        build(reward_input="observation")


def test_points_are_for_the_reward_of_the_next_observation() -> None:
    model = build(reward_input="next_observation", point_size=2)
    assert model.reward.distances.size == 2
    with pytest.raises(ValueError, match="point_size 2 is for the reward_input 'next_observation', got 'hidden'"):
        build(reward_input="hidden", point_size=2)


def test_images_have_no_reward_of_the_next_observation() -> None:
    with pytest.raises(ValueError, match="is for vectors; for images take 'hidden' or 'next_latent'"):
        WorldModel.from_layout(
            observation_shape=[3, 32, 32],
            action_counts=COUNTS,
            group_index=GROUPS,
            config=WorldModelConfig(**SMALL, reward_input="next_observation"),
        )


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_layers", [True, False])
def test_the_model_knows_the_groups_of_its_agents(group_layers: bool) -> None:
    """Whether or not its own layers follow them: actors may be shared by group in either case."""
    assert build(group_index=(0, 1, 1), group_layers=group_layers).group_index == [0, 1, 1]
    with pytest.raises(ValueError, match=r"each of 3 agents, got \[0, 1\]"):
        build(group_index=(0, 1), group_layers=group_layers)
