from __future__ import annotations

import itertools
import math

import pytest
import torch

from matwm_rl.modules import FourierFeatures, PointDistances
from tests.helpers import grads


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
    with pytest.raises(ValueError, match="size must be a positive integer, got 0"):
        PointDistances(4, size=0)
