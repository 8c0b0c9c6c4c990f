"""Encoders and decoders between observations and the latent code: MLPs for vectors, CNNs for images.

All are agent-major: observations ``[N, *batch, ...]``, features ``[N, *batch, F]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matwm_rl.functional import at_least_float32
from matwm_rl.modules.stacked import StackedLinear, mlp


class FourierFeatures(nn.Module):
    r"""Append sines and cosines of every coordinate: ``[..., D] -> [..., (2 K + 1) D]`` (arXiv:2006.10739).

    With wavelengths 4, 2, 1, ... Networks on raw coordinates learn fine structure slowly; on simple_tag these features
    halve the updates until the model knows when two agents touch.

    Args:
        num_frequencies: K; 0 passes the coordinates through.

    Examples:
        >>> FourierFeatures(2)(torch.zeros(3, 4)).shape
        torch.Size([3, 20])
    """

    frequency: Tensor

    def __init__(self, num_frequencies: int) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.size_factor = 2 * num_frequencies + 1
        self.register_buffer("frequency", 0.5 * math.pi * 2.0 ** torch.arange(num_frequencies), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if not self.num_frequencies:
            return x
        angle = (x.unsqueeze(-1) * self.frequency).flatten(-2)
        return torch.cat([x, angle.sin(), angle.cos()], -1)


class PointDistances(nn.Module):
    r"""Distances between the points of an observation (ours): ``[..., D] -> [..., P (P + 1) / 2]``.

    Every ``size`` neighbouring coordinates are read as a point (or a velocity, or a way from one point to another), P
    of them; the last is filled up with zeros. Given are the distances of every two, and of each from zero. What
    physical tasks reward is mostly how near things are: on coordinates a network learns that by heart for the places it
    has seen, on distances it learns it for all places.

    Args:
        observation_size: D.
        size: coordinates of a point, 2 in the plane.

    Attributes:
        num_distances: size of the output.

    Raises:
        ValueError: if ``size`` is not positive.

    Examples:
        >>> PointDistances(4, size=2)(torch.tensor([3.0, 4.0, 3.0, 0.0]))
        tensor([4., 5., 3.])
    """

    first: Tensor
    second: Tensor

    def __init__(self, observation_size: int, *, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a point has 1 or more coordinates, got {size}")
        self.size, self.missing = size, -observation_size % size
        with_zero = (observation_size + self.missing) // size + 1
        first, second = torch.triu_indices(with_zero, with_zero, 1)
        self.num_distances = len(first)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def forward(self, observation: Tensor) -> Tensor:
        """See the class."""
        points = nn.functional.pad(observation, (0, self.missing + self.size)).unflatten(-1, (-1, self.size))
        # Not quite zero where two points meet: the slope of the root is infinite there.
        return ((points[..., self.first, :] - points[..., self.second, :]).square().sum(-1) + 1e-6).sqrt()


class MLPEncoder(nn.Module):
    """Vector observations to encoder features; the first layer is each group's own (section 2, unlike agents).

    Args:
        observation_size: size of the zero-padded observation.
        out_features: ``encoder_size`` of the latent code.
        group_index: group of each of the N agents; all zeros for the paper's fully shared encoder.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        fourier_features: frequencies of :class:`FourierFeatures` before the first layer; 0 is the paper's.
        linear_skip: add a linear map of the observation (each group's own) to the output; see also
            :meth:`start_as_coordinates`.

    Examples:
        >>> MLPEncoder(4, 6, group_index=[0, 0, 1], num_cells=8)(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        observation_size: int,
        out_features: int,
        *,
        group_index: Sequence[int],
        num_cells: int = 512,
        depth: int = 3,
        fourier_features: int = 0,
        linear_skip: bool = False,
    ) -> None:
        super().__init__()
        self.features = FourierFeatures(fourier_features)
        self.input = StackedLinear(observation_size * self.features.size_factor, num_cells, group_index)
        self.trunk = nn.Sequential(nn.LayerNorm(num_cells), nn.SiLU(), mlp(num_cells, num_cells, depth - 1))
        self.output = nn.Linear(num_cells, out_features)
        self.skip = StackedLinear(observation_size, out_features, group_index) if linear_skip else None

    @torch.no_grad()
    def start_as_coordinates(self, scale: float, spacing: float = 0.0) -> None:
        """Start with a code in which every coordinate has features of its own, copies of it, and the MLP adds nothing.

        Args:
            scale: factor on the coordinates.
            spacing: of the code's levels, if it has any. The copies are shifted against each other by parts of it, so
                that together they tell values apart that one copy would round to the same level.

        Raises:
            ValueError: without linear skip, or with fewer features than coordinates.
        """
        skip = _skip_of(self)
        _, size, features = skip.weight.shape
        skip.weight.copy_(scale * _coordinates(size, features))
        copies = features // size
        shift = ((torch.arange(copies) + 0.5) / copies - 0.5) * spacing
        skip.bias.zero_()[:, : copies * size] = shift.repeat_interleave(size)
        self.output.weight.zero_()
        self.output.bias.zero_()

    def forward(self, observation: Tensor) -> Tensor:
        """``[N, *batch, D] -> [N, *batch, out_features]``."""
        out = self.output(self.trunk(self.input(self.features(observation))))
        return at_least_float32(out if self.skip is None else out + self.skip(observation))


class MLPDecoder(nn.Module):
    """Latent to vector observations; mirror of :class:`MLPEncoder` (section 2), the last layer is each group's own.

    Args:
        latent_size: Z.
        observation_size: size of the zero-padded observation.
        group_index: group of each of the N agents.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        linear_skip: add a linear map of the latent (each group's own) to the output; see also
            :meth:`start_as_coordinates`.

    Examples:
        >>> MLPDecoder(6, 4, group_index=[0, 0, 1], num_cells=8)(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        latent_size: int,
        observation_size: int,
        *,
        group_index: Sequence[int],
        num_cells: int = 512,
        depth: int = 3,
        linear_skip: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = mlp(latent_size, num_cells, depth)
        self.output = StackedLinear(num_cells, observation_size, group_index)
        self.skip = StackedLinear(latent_size, observation_size, group_index) if linear_skip else None

    @torch.no_grad()
    def start_as_coordinates(self, scale: float) -> None:
        """Start by reading the code of :meth:`MLPEncoder.start_as_coordinates`; the MLP adds nothing.

        Args:
            scale: factor on the coordinates in the code.

        Raises:
            ValueError: without linear skip, or with fewer latent features than coordinates.
        """
        skip = _skip_of(self)
        _, features, size = skip.weight.shape
        skip.weight.copy_(_coordinates(size, features).T / (scale * (features // size)))
        skip.bias.zero_()
        self.output.weight.zero_()
        self.output.bias.zero_()

    def forward(self, latent: Tensor) -> Tensor:
        """``[N, *batch, Z] -> [N, *batch, D]``."""
        out = self.output(self.trunk(latent))
        return at_least_float32(out if self.skip is None else out + self.skip(latent))


def _coordinates(observation_size: int, features: int) -> Tensor:
    """``[D, Z]``: 1 where a code dimension is a coordinate's own, ``Z // D`` for each; the rest is free."""
    copies = features // observation_size
    if not copies:
        raise ValueError(f"{observation_size} coordinates do not fit into {features} code dimensions")
    own = torch.eye(observation_size).repeat(1, copies)
    return torch.cat([own, own.new_zeros(observation_size, features - own.shape[1])], 1)


def _skip_of(module: MLPEncoder | MLPDecoder) -> StackedLinear:
    if module.skip is None:
        raise ValueError(f"{type(module).__name__} has no linear skip to start from; build it with linear_skip=True")
    return module.skip


class ObservationHead(nn.Module):
    """Predicts something of the observation itself (ours); the first and the last layer are each group's own.

    Args:
        observation_size: size of the zero-padded observation.
        out_features: number of outputs; they start at zero.
        group_index: group of each of the N agents.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        fourier_features: frequencies of :class:`FourierFeatures` before the first layer.
        point_size: with 1 or more, :class:`PointDistances` of points with so many coordinates stand beside the
            coordinates, and have the Fourier features in their place.

    Examples:
        >>> ObservationHead(4, 6, group_index=[0, 0, 1], num_cells=8)(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        observation_size: int,
        out_features: int,
        *,
        group_index: Sequence[int],
        num_cells: int = 512,
        depth: int = 2,
        fourier_features: int = 0,
        point_size: int = 0,
    ) -> None:
        super().__init__()
        self.features = FourierFeatures(fourier_features)
        self.distances = PointDistances(observation_size, size=point_size) if point_size else None
        size = observation_size if self.distances is None else self.distances.num_distances
        features = size * self.features.size_factor + (0 if self.distances is None else observation_size)
        self.input = StackedLinear(features, num_cells, group_index)
        self.trunk = nn.Sequential(nn.LayerNorm(num_cells), nn.SiLU(), mlp(num_cells, num_cells, depth - 1))
        self.output = StackedLinear(num_cells, out_features, group_index, zero_init=True)

    def forward(self, observation: Tensor) -> Tensor:
        """``[N, *batch, D] -> [N, *batch, out_features]``."""
        if self.distances is None:
            features = self.features(observation)
        else:
            features = torch.cat([observation, self.features(self.distances(observation))], -1)
        return at_least_float32(self.output(self.trunk(self.input(features))))


def _check_image(shape: Sequence[int], depth: int) -> None:
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2**depth:
        raise ValueError(
            f"the CNN wants square images [channels, S, S] with S a multiple of {2**depth}, got {tuple(shape)}; "
            "set MultiAgentEnv(image_size=...)"
        )


class CNNEncoder(nn.Module):
    """Images to encoder features: ``depth`` convolutions of kernel 4, stride 2 (Table C.6), then a linear layer.

    Args:
        image_shape: ``[channels, S, S]``.
        out_features: ``encoder_size`` of the latent code.
        channels: channels of the first layer, doubled by each of the next.
        depth: number of convolutions.

    Examples:
        >>> encoder = CNNEncoder((3, 32, 32), 6, channels=4)
        >>> encoder(torch.zeros(2, 5, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 5, 6])
    """

    def __init__(self, image_shape: Sequence[int], out_features: int, *, channels: int = 32, depth: int = 4) -> None:
        super().__init__()
        _check_image(image_shape, depth)
        layers: list[nn.Module] = []
        size, width = image_shape[1], image_shape[0]
        for layer in range(depth):
            out = channels * 2**layer
            # One group, not STORM's batch norm: batch statistics would tie agents and elements to each other.
            layers += [nn.Conv2d(width, out, 4, stride=2, padding=1, bias=False), nn.GroupNorm(1, out), nn.ReLU()]
            size, width = size // 2, out
        self.convolutions = nn.Sequential(*layers)
        self.output = nn.Linear(width * size * size, out_features)

    def forward(self, observation: Tensor) -> Tensor:
        """``[N, *batch, C, S, S]`` uint8 (0 to 255) or float (0 to 1) to ``[N, *batch, out_features]``."""
        images = observation.flatten(0, -4)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        features = at_least_float32(self.output(self.convolutions(images).flatten(1)))
        return features.unflatten(0, observation.shape[:-3])


class CNNDecoder(nn.Module):
    """Latent to images in [0, 1]; mirror of :class:`CNNEncoder` (section 2).

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
        _check_image(image_shape, depth)
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
