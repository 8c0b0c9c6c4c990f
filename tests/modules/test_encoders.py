from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from matwm_rl.modules import (
    CNNDecoder,
    CNNEncoder,
    FourierFeatures,
    FSQLatent,
    Latent,
    MLPDecoder,
    MLPEncoder,
    ObservationHead,
    PointDistances,
)
from tests.helpers import grads, randomize

GROUPS = [0, 0, 1]


def make(kind: str, groups: list[int]) -> tuple[nn.Module, torch.Tensor]:
    if kind == "encoder":
        return MLPEncoder(4, 6, group_index=groups, num_cells=8), torch.randn(3, 5, 2, 4)
    return MLPDecoder(6, 4, group_index=groups, num_cells=8), torch.randn(3, 5, 2, 6)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_only_the_outer_layer_is_each_groups_own(kind: str) -> None:
    net, x = make(kind, GROUPS)
    outer = net.input if kind == "encoder" else net.output
    out = net(x)
    assert outer.weight.shape[0] == 2
    for agent, group in enumerate(GROUPS):
        for name, parameter in net.named_parameters():
            (grad,) = grads(out[agent].square().sum(), [parameter])
            if parameter is outer.weight or parameter is outer.bias:
                assert grad[group].any() and not grad[1 - group].any()
            else:
                assert grad.any(), name


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_linear_skip_adds_each_groups_own_linear_map(kind: str) -> None:
    make_net = MLPEncoder if kind == "encoder" else MLPDecoder
    net, x = make_net(4, 6, group_index=GROUPS, num_cells=8, linear_skip=True), torch.randn(3, 5, 2, 4)
    with torch.no_grad():
        difference = net(x)
        skip, net.skip = net.skip, None
        difference = difference - net(x)
    for agent, group in enumerate(GROUPS):
        expected = x[agent] @ skip.weight[group] + skip.bias[group]
        torch.testing.assert_close(difference[agent], expected)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_one_group_is_the_papers_fully_shared_model(kind: str) -> None:
    net, x = make(kind, [0, 0, 0])
    same = x[:1].expand_as(x)
    out = net(same)
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(out[0], out[2])


@pytest.mark.parametrize("num_frequencies", [0, 3])
def test_fourier_features_are_sines_and_cosines_of_wavelengths_4_2_1(float64: None, num_frequencies: int) -> None:
    x = torch.randn(5, 2)
    out = FourierFeatures(num_frequencies)(x)
    angles = [
        [2 * math.pi * float(x[b, d]) / 2.0 ** (2 - k) for d, k in itertools.product(range(2), range(num_frequencies))]
        for b in range(5)
    ]
    for b, row in enumerate(angles):
        expected = [*x[b].tolist(), *map(math.sin, row), *map(math.cos, row)]
        assert out[b].tolist() == pytest.approx(expected, abs=1e-12)
    encoder = MLPEncoder(2, 6, group_index=GROUPS, num_cells=8, fourier_features=num_frequencies)
    assert encoder(torch.randn(3, 5, 2)).shape == (3, 5, 6)


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_counts_hidden_layers(depth: int) -> None:
    for net in (
        MLPEncoder(4, 6, group_index=GROUPS, num_cells=8, depth=depth),
        MLPDecoder(6, 4, group_index=GROUPS, num_cells=8, depth=depth),
    ):
        assert sum(isinstance(module, nn.LayerNorm) for module in net.modules()) == depth


# -- coordinate code -------------------------------------------------------------------------------------------------

LAYOUTS = [
    pytest.param([0, 0, 0], 4, 4, id="one copy, one group"),
    pytest.param([0, 0, 1], 3, 12, id="four copies, unequal groups"),
    pytest.param([0, 1, 2], 5, 13, id="two copies and three free dimensions"),
    pytest.param([0, 1, 0], 1, 7, id="one coordinate"),
]


SCALE = 0.35


class CoordinateCode:
    """Encoder, FSQ code and decoder at their start."""

    def __init__(self, groups: list[int], coordinates: int, dims: int, levels: int = 32) -> None:
        sizes = {"group_index": groups, "num_cells": 16, "linear_skip": True}
        self.spacing = 2 / (levels - 1)
        self.code = FSQLatent(dims, levels)
        self.encoder = MLPEncoder(coordinates, dims, fourier_features=2, **sizes)
        self.decoder = MLPDecoder(dims, coordinates, **sizes)
        self.encoder.start_as_coordinates(SCALE, self.spacing)
        self.decoder.start_as_coordinates(SCALE)

    def encode(self, observation: Tensor) -> Latent:
        return self.code.sample_posterior(self.encoder(observation))

    def decode(self, latent: Latent) -> Tensor:
        return self.decoder(latent.value)


@torch.no_grad()
@pytest.mark.parametrize("levels", [8, 15, 32])
@pytest.mark.parametrize(("groups", "coordinates", "dims"), LAYOUTS)
def test_a_coordinate_code_reconstructs_to_half_a_level_at_its_start(
    groups: list[int], coordinates: int, dims: int, levels: int
) -> None:
    code = CoordinateCode(groups, coordinates, dims, levels)
    observation = 4 * torch.rand(3, 500, coordinates) - 2
    rebuilt = code.decode(code.encode(observation))
    # What tanh bends: 14% at the ends of the range, 1% at 0.5.
    bent = (SCALE * observation).tanh() / SCALE
    assert ((bent - observation).abs() < 0.14 * observation.abs()).all()
    # Half a level of rounding, and the little by which the copies, shifted against each other, differ in the bend.
    half = code.spacing / 2 / SCALE
    assert ((rebuilt - bent).abs() <= half * (1 + code.spacing)).all()
    assert (rebuilt - bent).abs().max() > 0.1 * half


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(("groups", "coordinates", "dims"), LAYOUTS)
def test_without_levels_every_copy_is_the_scaled_coordinate(
    groups: list[int], coordinates: int, dims: int, scale: float
) -> None:
    code = CoordinateCode(groups, coordinates, dims)
    code.encoder.start_as_coordinates(scale)
    code.decoder.start_as_coordinates(scale)
    observation = 10 * torch.randn(3, 50, coordinates)
    features = code.encoder(observation)
    copies = dims // coordinates
    for c in range(copies):
        own = features[..., c * coordinates : (c + 1) * coordinates]
        torch.testing.assert_close(own, scale * observation)
    assert not features[..., copies * coordinates :].any()
    torch.testing.assert_close(code.decoder(features), observation)


@torch.no_grad()
def test_more_copies_of_a_coordinate_are_finer_than_one() -> None:
    observation = (2 * torch.rand(1, 2000, 4) - 1).expand(3, -1, -1)
    errors = []
    for copies in (1, 2, 4, 8):
        code = CoordinateCode([0, 0, 1], 4, 4 * copies)
        bent = (SCALE * observation).tanh() / SCALE
        errors.append(float((code.decode(code.encode(observation)) - bent).square().mean().sqrt()))
    # Uniform within one level; and within half, a quarter, an eighth of it where the copies divide it evenly.
    assert errors[0] == pytest.approx(code.spacing / SCALE / math.sqrt(12), rel=0.05)
    for one, twice in itertools.pairwise(errors):
        assert twice < 0.75 * one


@torch.no_grad()
@pytest.mark.parametrize(("groups", "coordinates", "dims"), LAYOUTS)
def test_a_coordinate_has_code_dimensions_of_its_own_at_the_start(
    groups: list[int], coordinates: int, dims: int
) -> None:
    code = CoordinateCode(groups, coordinates, dims)
    observation = torch.randn(3, 20, coordinates)
    latent = code.encode(observation).value
    taken = torch.zeros(dims, dtype=torch.int)
    for d in range(coordinates):
        other = observation.clone()
        other[..., d] += 1.5 * other[..., d].sign()
        own = (code.encode(other).value != latent).flatten(0, 1).any(0)
        assert own.sum() == dims // coordinates
        taken += own
        # And back: nothing of another coordinate's is read.
        rebuilt = code.decode(Latent(torch.where(own, latent, torch.rand_like(latent))))[..., d]
        torch.testing.assert_close(rebuilt, code.decode(Latent(latent))[..., d])
    assert taken.max() == 1
    assert (taken == 0).sum() == dims % coordinates


def test_a_coordinate_code_is_a_start_from_which_everything_learns() -> None:
    """The MLPs add nothing at first; one step later gradients reach all of their layers, and the free dimensions."""
    code = CoordinateCode([0, 0, 1], 3, 8)
    observation = torch.randn(3, 50, 3)
    parameters = [*code.encoder.named_parameters(), *code.decoder.named_parameters()]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=0.1)
    losses = []
    for _ in range(30):
        loss = (code.decode(code.encode(observation)) - observation).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) == 1:
            assert code.encoder.output.weight.grad.any() and code.decoder.output.weight.grad.any()
        optimizer.step()
    idle = [name for name, p in parameters if not p.grad.any()]
    assert not idle
    assert code.encoder.skip.weight.grad[..., 6:].any() and code.decoder.skip.weight.grad[:, 6:].any()
    assert losses[-1] < 0.8 * losses[0]


def test_what_has_no_place_for_a_coordinate_code_is_told() -> None:
    sizes = {"group_index": GROUPS, "num_cells": 8}
    with pytest.raises(ValueError, match="MLPEncoder has no linear skip.*linear_skip=True"):
        MLPEncoder(4, 6, **sizes).start_as_coordinates(1.0)
    with pytest.raises(ValueError, match="MLPDecoder has no linear skip.*linear_skip=True"):
        MLPDecoder(6, 4, **sizes).start_as_coordinates(1.0)
    with pytest.raises(ValueError, match="4 coordinates do not fit into 3"):
        MLPEncoder(4, 3, linear_skip=True, **sizes).start_as_coordinates(1.0)
    with pytest.raises(ValueError, match="4 coordinates do not fit into 3"):
        MLPDecoder(3, 4, linear_skip=True, **sizes).start_as_coordinates(1.0)


# -- observation head ------------------------------------------------------------------------------------------------


def test_an_observation_head_has_its_outer_layers_per_group() -> None:
    head = randomize(ObservationHead(4, 6, group_index=GROUPS, num_cells=8, fourier_features=2))
    out = head(torch.randn(3, 5, 2, 4))
    assert out.shape == (3, 5, 2, 6)
    outer = {"input.weight", "input.bias", "output.weight", "output.bias"}
    for agent, group in enumerate(GROUPS):
        for name, parameter in head.named_parameters():
            (grad,) = grads(out[agent].square().sum(), [parameter])
            if name in outer:
                assert parameter.shape[0] == 2
                assert grad[group].any() and not grad[1 - group].any(), name
            else:
                assert grad.any(), name


def test_an_observation_head_starts_at_zero_and_counts_its_layers() -> None:
    for depth in (1, 3):
        head = ObservationHead(4, 6, group_index=GROUPS, num_cells=8, depth=depth)
        assert sum(isinstance(module, nn.LayerNorm) for module in head.modules()) == depth
        assert not head(torch.randn(3, 5, 4)).any()


@torch.no_grad()
@pytest.mark.parametrize("observation_size,size", [(6, 2), (7, 2), (5, 3), (3, 1), (2, 4)])
def test_point_distances_are_those_of_every_two_points_and_from_zero(observation_size: int, size: int) -> None:
    distances, observation = PointDistances(observation_size, size=size), torch.randn(3, 5, observation_size)
    out = distances(observation)
    assert out.shape == (3, 5, distances.num_distances)
    for index in itertools.product(range(3), range(5)):
        values = observation[index].tolist()
        points = [values[start : start + size] for start in range(0, observation_size, size)]
        points[-1] += [0.0] * (size - len(points[-1]))
        expected = [math.dist(a, b) for a, b in itertools.combinations([*points, [0.0] * size], 2)]
        assert out[index].tolist() == pytest.approx(expected, abs=2e-3)


def test_distances_of_points_that_meet_have_a_slope() -> None:
    observation = torch.zeros(4, requires_grad=True)
    (slope,) = grads(PointDistances(4, size=2)(observation).sum(), [observation])
    assert slope.isfinite().all()
    with pytest.raises(ValueError, match="1 or more coordinates, got 0"):
        PointDistances(4, size=0)


def test_an_observation_head_with_points_reads_coordinates_and_distances(float64: None) -> None:
    head = randomize(ObservationHead(4, 2, group_index=[0, 1], num_cells=8, fourier_features=1, point_size=2))
    observation = torch.randn(2, 5, 4)
    distance = PointDistances(4, size=2)(observation)
    angle = 0.5 * math.pi * distance
    features = torch.cat([observation, distance, angle.sin(), angle.cos()], -1)
    torch.testing.assert_close(head(observation), head.output(head.trunk(head.input(features))))
    # A shift of everything keeps the distances between points, and only those.
    moved = PointDistances(4, size=2)(observation + 1.0)
    torch.testing.assert_close(moved[..., 0], distance[..., 0])
    assert not torch.allclose(moved[..., 1:], distance[..., 1:])


def test_an_observation_head_tells_fine_differences_by_its_fourier_features(float64: None) -> None:
    head = randomize(ObservationHead(1, 2, group_index=[0, 1], num_cells=8, fourier_features=3))
    x = torch.randn(2, 5, 1)
    for n in range(2):
        features = head.features(x[n]) @ head.input.weight[n] + head.input.bias[n]
        expected = head.trunk(features) @ head.output.weight[n] + head.output.bias[n]
        torch.testing.assert_close(head(x)[n], expected)
    assert head.input.weight.shape == (2, 7, 8)


# -- images ----------------------------------------------------------------------------------------------------------


def test_cnn_reads_uint8_as_numbers_from_0_to_1() -> None:
    encoder = CNNEncoder((3, 32, 32), 6, channels=4)
    image = torch.randint(256, (2, 5, 3, 32, 32), dtype=torch.uint8)
    out = encoder(image)
    assert out.shape == (2, 5, 6)
    torch.testing.assert_close(out, encoder(image.float() / 255))


def test_cnn_ties_no_images_to_each_other() -> None:
    encoder = CNNEncoder((1, 16, 16), 6, channels=4)
    image = torch.rand(2, 3, 1, 16, 16)
    alone = torch.stack([encoder(image[n : n + 1, b : b + 1])[0, 0] for n in range(2) for b in range(3)])
    torch.testing.assert_close(encoder(image).flatten(0, 1), alone, rtol=1e-4, atol=1e-5)


def test_cnn_decoder_mirrors_the_encoder() -> None:
    decoder = CNNDecoder(6, (3, 32, 32), channels=4)
    assert decoder(torch.randn(2, 5, 4, 6)).shape == (2, 5, 4, 3, 32, 32)
    kernels = [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.kernel_size, m.stride) for m in kernels] == [((4, 4), (2, 2))] * 4


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 32, 64), (32, 32)])
@pytest.mark.parametrize("make", [lambda s: CNNEncoder(s, 6), lambda s: CNNDecoder(6, s)])
def test_unfit_images_are_refused(shape: tuple[int, ...], make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="image_size"):
        make(shape)
