from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from matwm_rl.modules import CNNDecoder, CNNEncoder, FourierFeatures, MLPDecoder, MLPEncoder
from tests.helpers import grads

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
