"""Features of vector observations that networks read beside the coordinates (ours)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_ints

MAX_DISTANCES = 1000
"""Distances that a reward head reads at most; 88 coordinates in the plane have 990. Their number grows as D squared."""
MAX_FREQUENCIES = 24
"""Each is twice the one before; beyond these a coordinate's sines are but the rounding of its float32."""


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
        check_ints(0, maximum=MAX_FREQUENCIES, num_frequencies=num_frequencies)
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

    Every ``size`` neighbouring coordinates are read as a point (or a velocity, or the vector between two points).
    There are P points; the last one is padded with zeros. The output holds the distance between every two points, and
    of every point from zero. Rewards of physical tasks mostly depend on how near things are. A network that reads
    coordinates memorises this for the places that it has seen; one that reads distances learns it for all places.

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
        check_ints(1, observation_size=observation_size, size=size)
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
