"""Latent spaces: what lies between the encoder and everything else. Exchangeable, behind one interface."""

from matwm_rl.modules.latents.base import LatentConfig, LatentSpace
from matwm_rl.modules.latents.categorical import CategoricalLatent, CategoricalLatentConfig
from matwm_rl.modules.latents.gaussian import GaussianLatent, GaussianLatentConfig

__all__ = [
    "CategoricalLatent",
    "CategoricalLatentConfig",
    "GaussianLatent",
    "GaussianLatentConfig",
    "LatentConfig",
    "LatentSpace",
]
