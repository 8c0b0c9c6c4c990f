"""Encoders and decoders between observations and latents: MLPs for vectors, CNNs for images."""

from matwm_rl.modules.encoders.cnn import CNNDecoder, CNNEncoder
from matwm_rl.modules.encoders.coordinates import CoordinateDecoder, CoordinateEncoder, CoordinateEncoderConfig
from matwm_rl.modules.encoders.features import FourierFeatures, PointDistances
from matwm_rl.modules.encoders.mlp import EncoderConfig, MLPDecoder, MLPEncoder, MLPEncoderConfig

__all__ = [
    "CNNDecoder",
    "CNNEncoder",
    "CoordinateDecoder",
    "CoordinateEncoder",
    "CoordinateEncoderConfig",
    "EncoderConfig",
    "FourierFeatures",
    "MLPDecoder",
    "MLPEncoder",
    "MLPEncoderConfig",
    "PointDistances",
]
