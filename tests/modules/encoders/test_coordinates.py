"""Encoder and decoder that start as copies of the coordinates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from matwm_rl.modules import (
    CategoricalLatent,
    CoordinateDecoder,
    CoordinateEncoder,
    CoordinateEncoderConfig,
    GaussianLatent,
)
from tests.helpers import randomize

LAYOUTS = [
    pytest.param([0, 0, 0], 4, 4, id="one copy, one group"),
    pytest.param([0, 0, 1], 3, 12, id="four copies, unequal groups"),
    pytest.param([0, 1, 2], 5, 13, id="two copies and three free dimensions"),
    pytest.param([0, 1, 0], 1, 7, id="one coordinate"),
]


def make_pair(
    groups: list[int], coordinates: int, dims: int, scale: float = 1.0
) -> tuple[CoordinateEncoder, CoordinateDecoder]:
    sizes = {"group_index": groups, "num_cells": 16, "depth": 2, "scale": scale}
    encoder = CoordinateEncoder(coordinates, dims, fourier_features=2, **sizes)
    return encoder, CoordinateDecoder(dims, coordinates, **sizes)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(("groups", "coordinates", "dims"), LAYOUTS)
def test_every_copy_is_the_scaled_coordinate_and_the_decoder_its_inverse(
    groups: list[int], coordinates: int, dims: int, scale: float
) -> None:
    encoder, decoder = make_pair(groups, coordinates, dims, scale)
    observation = 10 * torch.randn(3, 50, coordinates)
    features = encoder(observation)
    copies = dims // coordinates
    for c in range(copies):
        # Powers of two: exact.
        assert torch.equal(features[..., c * coordinates : (c + 1) * coordinates], scale * observation)
    assert not features[..., copies * coordinates :].any()
    torch.testing.assert_close(decoder(features), observation)


@torch.no_grad()
@pytest.mark.parametrize(("groups", "coordinates", "dims"), LAYOUTS)
def test_what_is_uncertain_of_one_coordinate_does_not_move_the_others(
    groups: list[int], coordinates: int, dims: int
) -> None:
    """Which holds for dimensions of z that are drawn independently, since each is one coordinate's alone."""
    _, decoder = make_pair(groups, coordinates, dims)
    z = torch.randn(3, 1, dims).expand(-1, 200, -1)
    for d in range(dims):
        drawn = z.clone()
        drawn[..., d] = torch.randn(3, 200)
        spread = decoder(drawn).std(1)
        free = d >= dims // coordinates * coordinates
        own = torch.zeros(coordinates, dtype=torch.bool) if free else torch.arange(coordinates) == d % coordinates
        assert (spread[:, own] > 0.5 / (dims // coordinates)).all()
        assert (spread[:, ~own] < 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_each_groups_own_linear_map_is_added(kind: str) -> None:
    groups = [0, 0, 1]
    net = randomize(make_pair(groups, 4, 6)[kind == "decoder"])
    x = torch.randn(3, 5, 2, net.skip.weight.shape[1])
    difference = net(x)
    skip, net.skip = net.skip, nn.Module()
    net.skip.forward = lambda x: 0.0
    difference = difference - net(x)
    for agent, group in enumerate(groups):
        torch.testing.assert_close(difference[agent], x[agent] @ skip.weight[group] + skip.bias[group])


def test_everything_learns_from_this_start() -> None:
    """The MLPs add nothing at first; one step later gradients reach all of their layers, and the free dimensions."""
    encoder, decoder = make_pair([0, 0, 1], 3, 8)
    space = GaussianLatent(8, width=0.5)
    observation = torch.randn(3, 50, 3)
    parameters = [*encoder.named_parameters(), *decoder.named_parameters()]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=0.5)
    losses = []
    for _ in range(30):
        loss = (decoder(space.sample_posterior(encoder(observation))) - observation).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) == 1:
            assert encoder.output.weight.grad.any() and decoder.output.weight.grad.any()
        optimizer.step()
    idle = [name for name, p in parameters if not p.grad.any()]
    assert not idle
    assert encoder.skip.weight.grad[..., 6:].any() and decoder.skip.weight.grad[:, 6:].any()
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_more_coordinates_than_dimensions_start_at_random() -> None:
    encoder, decoder = make_pair([0, 0, 1], 5, 4)
    for parameter in (*encoder.output.parameters(), *decoder.output.parameters(), encoder.skip.weight):
        assert parameter.all()
    fitting, _ = make_pair([0, 0, 1], 4, 4)
    assert not fitting.output.weight.any() and not fitting.output.bias.any() and not fitting.skip.bias.any()


@torch.no_grad()
def test_the_config_builds_a_pair_for_latents_that_are_numbers() -> None:
    config, sizes = CoordinateEncoderConfig(depth=1, fourier_features=3), {"group_index": [0, 1], "num_cells": 8}
    space = GaussianLatent(10)
    encoder, decoder = config.build(5, space, **sizes)
    assert encoder.input.weight.shape == (2, 5 * 7, 8)
    assert [sum(isinstance(m, nn.LayerNorm) for m in net.modules()) for net in (encoder, decoder)] == [1, 1]
    observation = 10 * torch.randn(2, 4000, 5)
    torch.testing.assert_close(decoder(space.eval().sample_posterior(encoder(observation))), observation)
    # While training, no further off than the noise of the mean of two copies.
    error = decoder(space.train().sample_posterior(encoder(observation))) - observation
    assert error.square().mean().sqrt().item() == pytest.approx(space.width / 2**0.5, rel=0.05)
    # Where the latent holds coordinates in another scale, both ends know it.
    space.coordinate_scale = 0.25
    encoder, decoder = config.build(5, space.eval(), **sizes)
    assert torch.equal(encoder(observation)[..., :5], 0.25 * observation)
    torch.testing.assert_close(decoder(encoder(observation)), observation)
    with pytest.raises(ValueError, match="CategoricalLatent holds no numbers: take a GaussianLatent, or MLPEncoderC"):
        config.build(5, CategoricalLatent(3, 4), **sizes)
