"""An encoder that starts by copying coordinates into the latent (ours). Agent-major: ``[N, *batch, ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matwm_rl.arguments import check_numbers
from matwm_rl.modules.encoders.features import MAX_FREQUENCIES
from matwm_rl.modules.encoders.mlp import EncoderConfig, MLPDecoder, MLPEncoder
from matwm_rl.modules.latents import LatentSpace
from matwm_rl.modules.stacked import StackedLinear
from matwm_rl.settings import setting


class CoordinateEncoder(MLPEncoder):
    """An :class:`MLPEncoder` beside a linear map, which starts as copies of the coordinates (ours).

    At the start every coordinate has latent dimensions of its own, as many as there are for each, and the MLP adds
    nothing. So nothing has to be learnt to reconstruct, and an uncertain coordinate does not blur the others when the
    dimensions of z_{t+1} are drawn independently. Where the latent has fewer dimensions than the observation has
    coordinates, both start at random.

    Args:
        observation_size: D.
        out_features: ``encoder_size`` of the latent space.
        group_index: group of each of the N agents; each group has its own linear map.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        fourier_features: frequencies of :class:`FourierFeatures` before the MLP.
        scale: factor on the coordinates in the latent.

    Examples:
        >>> encoder = CoordinateEncoder(
        ...     2, 4, group_index=[0], num_cells=8, depth=1, fourier_features=0, scale=1.0
        ... )
        >>> encoder(torch.tensor([[3.0, 5.0]]))
        tensor([[3., 5., 3., 5.]], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        observation_size: int,
        out_features: int,
        *,
        group_index: Sequence[int],
        num_cells: int,
        depth: int,
        fourier_features: int,
        scale: float,
    ) -> None:
        super().__init__(
            observation_size,
            out_features,
            group_index=group_index,
            num_cells=num_cells,
            depth=depth,
            fourier_features=fourier_features,
        )
        check_numbers(above=0, scale=scale)
        self.skip = StackedLinear(observation_size, out_features, group_index)
        if observation_size <= out_features:
            with torch.no_grad():
                self.skip.weight.copy_(scale * _copies(observation_size, out_features))
                for parameter in (self.skip.bias, self.output.weight, self.output.bias):
                    parameter.zero_()

    def _encode(self, observation: Tensor) -> Tensor:
        return super()._encode(observation) + self.skip(observation)


class CoordinateDecoder(MLPDecoder):
    """An :class:`MLPDecoder` beside a linear map, which starts as the inverse of :class:`CoordinateEncoder`'s (ours).

    Args:
        latent_size: Z.
        observation_size: D.
        group_index: group of each of the N agents.
        num_cells: width of the hidden layers.
        depth: number of hidden layers.
        scale: factor on the coordinates in the latent.

    Examples:
        >>> decoder = CoordinateDecoder(4, 2, group_index=[0], num_cells=8, depth=1, scale=1.0)
        >>> decoder(torch.tensor([[3.0, 5.0, 3.0, 5.0]]))
        tensor([[3., 5.]], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        latent_size: int,
        observation_size: int,
        *,
        group_index: Sequence[int],
        num_cells: int,
        depth: int,
        scale: float,
    ) -> None:
        super().__init__(latent_size, observation_size, group_index=group_index, num_cells=num_cells, depth=depth)
        check_numbers(above=0, scale=scale)
        self.skip = StackedLinear(latent_size, observation_size, group_index)
        if observation_size <= latent_size:
            with torch.no_grad():
                copies = latent_size // observation_size
                self.skip.weight.copy_(_copies(observation_size, latent_size).T / (scale * copies))
                for parameter in (self.skip.bias, self.output.weight, self.output.bias):
                    parameter.zero_()

    def _decode(self, latent: Tensor) -> Tensor:
        return super()._decode(latent) + self.skip(latent)


def _copies(observation_size: int, features: int) -> Tensor:
    """Build ``[D, Z]``: 1 where a latent dimension is a copy of a coordinate, ``Z // D`` for each; the rest is free."""
    own = torch.eye(observation_size).repeat(1, features // observation_size)
    return torch.cat([own, own.new_zeros(observation_size, features - own.shape[1])], 1)


@dataclass(kw_only=True)
class CoordinateEncoderConfig(EncoderConfig):
    """Settings of :class:`CoordinateEncoder` and :class:`CoordinateDecoder`.

    Attributes:
        depth: number of hidden layers.
        fourier_features: frequencies of the sines and cosines that the MLP also reads.

    Raises:
        ValueError: by :meth:`build`, if the dimensions of the latent are no numbers.

    Examples:
        >>> from matwm_rl.modules import GaussianLatentConfig
        >>> latent = GaussianLatentConfig(num_dims=8).build()
        >>> encoder, decoder = CoordinateEncoderConfig().build(2, latent, group_index=[0], num_cells=8)
        >>> decoder(encoder(torch.tensor([[3.0, 5.0]])))
        tensor([[3., 5.]], grad_fn=<AddBackward0>)
    """

    linear = True
    depth: int = setting(2, minimum=1)
    fourier_features: int = setting(4, minimum=0, maximum=MAX_FREQUENCIES)

    def build(
        self, observation_size: int, latent: LatentSpace, *, group_index: Sequence[int], num_cells: int
    ) -> tuple[nn.Module, nn.Module]:
        """Build the encoder and the decoder."""
        scale = latent.coordinate_scale
        if scale is None:
            raise ValueError(
                f"CoordinateEncoderConfig copies coordinates into the latent, and {type(latent).__name__} holds no "
                "numbers: take a GaussianLatent, or MLPEncoderConfig"
            )
        encoder = CoordinateEncoder(
            observation_size,
            latent.encoder_size,
            group_index=group_index,
            num_cells=num_cells,
            depth=self.depth,
            fourier_features=self.fourier_features,
            scale=scale,
        )
        decoder = CoordinateDecoder(
            latent.latent_size,
            observation_size,
            group_index=group_index,
            num_cells=num_cells,
            depth=self.depth,
            scale=scale,
        )
        return encoder, decoder
