from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from matwm_rl.modules import (
    CategoricalLatent,
    CoordinateDecoder,
    CoordinateEncoder,
    EncoderConfig,
    FourierFeatures,
    GaussianLatent,
    LatentSpace,
    MLPDecoder,
    MLPEncoder,
    MLPEncoderConfig,
)
from tests.helpers import grads

GROUPS = [0, 0, 1]


def make(kind: str, groups: list[int]) -> tuple[nn.Module, Tensor]:
    if kind == "encoder":
        return MLPEncoder(4, 6, group_index=groups, num_cells=8, depth=3), torch.randn(3, 5, 2, 4)
    return MLPDecoder(6, 4, group_index=groups, num_cells=8, depth=3), torch.randn(3, 5, 2, 6)


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
def test_one_group_is_the_papers_fully_shared_model(kind: str) -> None:
    net, x = make(kind, [0, 0, 0])
    out = net(x[:1].expand_as(x))
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(out[0], out[2])


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_counts_hidden_layers(depth: int) -> None:
    sizes = {"group_index": GROUPS, "num_cells": 8, "depth": depth}
    for net in (MLPEncoder(4, 6, **sizes), MLPDecoder(6, 4, **sizes)):
        assert sum(isinstance(module, nn.LayerNorm) for module in net.modules()) == depth


def test_the_encoder_reads_fourier_features_if_it_has_any(float64: None) -> None:
    net = MLPEncoder(2, 6, group_index=GROUPS, num_cells=8, depth=1, fourier_features=3)
    x = torch.randn(3, 5, 2)
    for agent, group in enumerate(GROUPS):
        first = FourierFeatures(3)(x[agent]) @ net.input.weight[group] + net.input.bias[group]
        torch.testing.assert_close(net(x)[agent], net.output(net.trunk(first)))


@pytest.mark.parametrize("latent", [CategoricalLatent(3, 4), GaussianLatent(3)], ids=["categorical", "gaussian"])
def test_the_config_builds_a_pair_around_a_latent_space(latent: LatentSpace) -> None:
    encoder, decoder = MLPEncoderConfig(depth=2).build(5, latent, group_index=GROUPS, num_cells=8)
    assert isinstance(encoder, MLPEncoder) and not isinstance(encoder, CoordinateEncoder)
    assert isinstance(decoder, MLPDecoder) and not isinstance(decoder, CoordinateDecoder)
    z = latent.sample_posterior(encoder(torch.randn(3, 7, 5)))
    assert decoder(z).shape == (3, 7, 5)
    # The paper's encoder reads the coordinates alone.
    assert encoder.input.weight.shape == (2, 5, 8)
    with pytest.raises(NotImplementedError):
        EncoderConfig().build(5, latent, group_index=GROUPS, num_cells=8)
