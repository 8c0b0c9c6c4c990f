"""The paper's encoder and decoder of vector observations: MLPs. Agent-major: ``[N, *batch, ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_ints
from matwm_rl.checks import check_type
from matwm_rl.functional import at_least_float32
from matwm_rl.modules.encoders.features import FourierFeatures
from matwm_rl.modules.latents import LatentSpace
from matwm_rl.modules.stacked import StackedLinear
from matwm_rl.modules.stacked_mlp import mlp
from matwm_rl.settings import Settings, setting


class MLPEncoder(nn.Module):
    """Vector observations to encoder features; the first layer is each group's own (docs/algorithm.md, World model).

    Args:
        observation_size: D, size of the zero-padded observation.
        out_features: ``encoder_size`` of the latent space.
        group_index: group of each of the N agents; all zeros for the paper's fully shared encoder.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        fourier_features: frequencies of :class:`FourierFeatures` before the first layer; 0 is the paper's.

    Examples:
        >>> import torch
        >>> MLPEncoder(4, 6, group_index=[0, 0, 1], num_cells=8, depth=2)(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        observation_size: int,
        out_features: int,
        *,
        group_index: Sequence[int],
        num_cells: int,
        depth: int,
        fourier_features: int = 0,
    ) -> None:
        super().__init__()
        check_ints(1, observation_size=observation_size, out_features=out_features, num_cells=num_cells, depth=depth)
        self.features = FourierFeatures(fourier_features)
        self.input = StackedLinear(observation_size * self.features.size_factor, num_cells, group_index)
        self.trunk = nn.Sequential(nn.LayerNorm(num_cells), nn.SiLU(), mlp(num_cells, num_cells, depth - 1))
        self.output = nn.Linear(num_cells, out_features)

    def forward(self, observation: Tensor) -> Tensor:
        """Encode ``[N, *batch, D]`` to ``[N, *batch, out_features]``."""
        check_type(observation, f"{type(self).__name__} reads 'observation'", torch.float32)
        return at_least_float32(self._encode(observation))

    def _encode(self, observation: Tensor) -> Tensor:
        features: Tensor = self.output(self.trunk(self.input(self.features(observation))))
        return features


class MLPDecoder(nn.Module):
    """Latents to vector observations; the mirror of :class:`MLPEncoder`. The last layer is each group's own.

    Args:
        latent_size: Z.
        observation_size: D, size of the zero-padded observation.
        group_index: group of each of the N agents.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.

    Examples:
        >>> import torch
        >>> MLPDecoder(6, 4, group_index=[0, 0, 1], num_cells=8, depth=2)(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self, latent_size: int, observation_size: int, *, group_index: Sequence[int], num_cells: int, depth: int
    ) -> None:
        super().__init__()
        check_ints(1, latent_size=latent_size, observation_size=observation_size, num_cells=num_cells, depth=depth)
        self.trunk = mlp(latent_size, num_cells, depth)
        self.output = StackedLinear(num_cells, observation_size, group_index)

    def forward(self, latent: Tensor) -> Tensor:
        """Decode ``[N, *batch, Z]`` to ``[N, *batch, D]``."""
        return at_least_float32(self._decode(latent))

    def _decode(self, latent: Tensor) -> Tensor:
        return self.output(self.trunk(latent))


@dataclass(kw_only=True)
class EncoderConfig(Settings):
    """Settings of encoder and decoder of vector observations. Subclass it for an encoder and decoder of your own.

    Attributes:
        linear: whether z holds coordinates of the observation. The dynamics predictor then gets a linear map beside its
            MLP, and the transformer ends without a layer norm, which is not linear.

    Examples:
        >>> from torch import nn
        >>> @dataclass(kw_only=True)
        ... class LinearConfig(EncoderConfig):
        ...     def build(self, observation_size, latent, *, group_index, num_cells):
        ...         encoder = nn.Linear(observation_size, latent.encoder_size)
        ...         return encoder, nn.Linear(latent.latent_size, observation_size)
        >>> from matwm_rl.modules import GaussianLatentConfig
        >>> LinearConfig().build(5, GaussianLatentConfig(num_dims=8).build(), group_index=[0, 0, 1], num_cells=16)[0]
        Linear(in_features=5, out_features=8, bias=True)
    """

    linear = False

    def build(
        self, observation_size: int, latent: LatentSpace, *, group_index: Sequence[int], num_cells: int
    ) -> tuple[nn.Module, nn.Module]:
        """Build the encoder and the decoder.

        Args:
            observation_size: D.
            latent: the latent space between them.
            group_index: group of each of the N agents.
            num_cells: width of the hidden layers.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class MLPEncoderConfig(EncoderConfig):
    """Settings of :class:`MLPEncoder` and :class:`MLPDecoder`; the default is the paper's (Table C.6).

    Attributes:
        depth: number of hidden layers.

    Examples:
        >>> MLPEncoderConfig().depth
        3
    """

    depth: int = setting(3, minimum=1)

    def build(
        self, observation_size: int, latent: LatentSpace, *, group_index: Sequence[int], num_cells: int
    ) -> tuple[nn.Module, nn.Module]:
        """Build the encoder and the decoder."""
        encoder = MLPEncoder(
            observation_size, latent.encoder_size, group_index=group_index, num_cells=num_cells, depth=self.depth
        )
        decoder = MLPDecoder(
            latent.latent_size, observation_size, group_index=group_index, num_cells=num_cells, depth=self.depth
        )
        return encoder, decoder
