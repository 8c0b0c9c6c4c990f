"""Encoder and decoder of images (Table C.6). Agent-major: ``[N, *batch, ...]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_ints
from matwm_rl.functional import at_least_float32


def _check_image(shape: Sequence[int], depth: int, **sizes: int) -> None:
    check_ints(1, maximum=16, depth=depth)
    check_ints(1, **sizes)
    if len(shape) != 3 or min(shape) < 1 or shape[1] != shape[2] or shape[1] % 2**depth:
        raise ValueError(
            f"the CNN needs square images [channels, S, S] with S a multiple of {2**depth}, got {tuple(shape)}; "
            "set MultiAgentEnv(image_size=...)"
        )


class CNNEncoder(nn.Module):
    """Images to encoder features: ``depth`` convolutions of kernel 4, stride 2 (Table C.6), then a linear layer.

    Args:
        image_shape: ``[channels, S, S]``.
        out_features: ``encoder_size`` of the latent space.
        channels: channels of the first layer, doubled by each of the next.
        depth: number of convolutions.

    Examples:
        >>> encoder = CNNEncoder((3, 32, 32), 6, channels=4)
        >>> encoder(torch.zeros(2, 5, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 5, 6])
    """

    def __init__(self, image_shape: Sequence[int], out_features: int, *, channels: int = 32, depth: int = 4) -> None:
        super().__init__()
        _check_image(image_shape, depth, out_features=out_features, channels=channels)
        layers: list[nn.Module] = []
        size, width = image_shape[1], image_shape[0]
        for layer in range(depth):
            out = channels * 2**layer
            # Group norm with one group, where STORM has batch norm: batch statistics would mix the agents.
            layers += [nn.Conv2d(width, out, 4, stride=2, padding=1, bias=False), nn.GroupNorm(1, out), nn.ReLU()]
            size, width = size // 2, out
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Linear(width * size * size, out_features)

    def forward(self, observation: Tensor) -> Tensor:
        """``[N, *batch, C, S, S]`` uint8 (0 to 255) or float (0 to 1) to ``[N, *batch, out_features]``."""
        images = observation.flatten(0, -4)
        images = images.to(self.output.weight.dtype) / 255 if images.dtype == torch.uint8 else images
        features = at_least_float32(self.output(self.convolutions(images).flatten(1)))
        return features.unflatten(0, observation.shape[:-3])


class CNNDecoder(nn.Module):
    """Latent to images in [0, 1]; mirror of :class:`CNNEncoder` (docs/algorithm.md, World model).

    Args:
        latent_size: Z.
        image_shape: ``[channels, S, S]``.
        channels: channels before the last layer.
        depth: number of transposed convolutions.

    Examples:
        >>> CNNDecoder(6, (3, 32, 32), channels=4)(torch.zeros(2, 5, 6)).shape
        torch.Size([2, 5, 3, 32, 32])
    """

    def __init__(self, latent_size: int, image_shape: Sequence[int], *, channels: int = 32, depth: int = 4) -> None:
        super().__init__()
        _check_image(image_shape, depth, latent_size=latent_size, channels=channels)
        self.size = image_shape[1] // 2**depth
        self.width = channels * 2 ** (depth - 1)
        self.input = nn.Linear(latent_size, self.width * self.size**2)
        layers: list[nn.Module] = []
        width = self.width
        for _ in range(depth - 1):
            layers += [nn.GroupNorm(1, width), nn.ReLU(), nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1)]
            width //= 2
        layers += [nn.GroupNorm(1, width), nn.ReLU(), nn.ConvTranspose2d(width, image_shape[0], 4, 2, padding=1)]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        """``[N, *batch, Z] -> [N, *batch, C, S, S]``."""
        images = self.input(latent).flatten(0, -2).unflatten(-1, (self.width, self.size, self.size))
        return at_least_float32(self.convolutions(images)).unflatten(0, latent.shape[:-1])
