"""Sizes and switches of the world model, and the parts that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from matwm_rl.modules.encoders import CNNDecoder, CNNEncoder, MLPDecoder, MLPEncoder, ObservationHead
from matwm_rl.modules.heads import ActionMixer, Head, TeammatePredictor
from matwm_rl.modules.latent import make_latent
from matwm_rl.modules.transformer import Transformer
from matwm_rl.modules.two_hot import TwoHot

REWARD_INPUTS = ("hidden", "next_latent", "next_observation")


@dataclass(kw_only=True)
class WorldModelConfig:
    """Sizes and switches of :meth:`WorldModel.from_layout`; the defaults are the paper's (Table C.6).

    Attributes:
        hidden_size: width of the transformers and of all MLPs.
        num_layers: blocks of each transformer.
        num_heads: attention heads of each transformer.
        dropout: dropout of the transformers.
        latent: ``"categorical"`` (the paper's), ``"fsq"`` (finer, for vector observations) or ``"gaussian"`` (numbers
            without rounding; the finest for vector observations, and the fastest).
        num_dims: K, code dimensions.
        num_classes: C, classes (levels) per code dimension; ``"gaussian"`` has none and ignores it.
        latent_width: standard deviation of the posterior, in levels for ``"fsq"``, in z's own units for ``"gaussian"``;
            ``None``: the code's own default.
        encoder_depth: hidden layers of the MLP encoder and decoder, and of a reward predictor that reads observations.
        fourier_features: frequencies of the sines and cosines of vector observations that the encoder also reads
            (ours); 0 is the paper's.
        head_depth: hidden layers of the other heads.
        channels: channels of the first convolution, for images.
        reward_input: what the reward predictor reads: ``"hidden"`` (h_t, the paper's), ``"next_latent"`` (z_{t+1}) or
            ``"next_observation"`` (o_{t+1} itself in training, z_{t+1} decoded in imagination; for vectors), with the
            encoder's Fourier features. An agent that dies has no successor: where the reward is not read from h_t, that
            of an agent's last step has a head of its own, which reads h_t.
        point_size: how many neighbouring coordinates of vector observations make a point (ours), 2 in the plane: a
            reward predictor of the ``"next_observation"`` then also reads
            :class:`~matwm_rl.modules.encoders.PointDistances`; 0: none.
        reencode: imagined latents of vector observations are decoded and encoded again (ours), so that they stay codes
            of observations. The dimensions of a sample are drawn independently; a policy finds combinations that no
            observation has, and for which the reward predictor dreams up rewards.
        reward_interpolation: of rewards, and of the values of :func:`~matwm_rl.modules.make_critic`; see
            :class:`~matwm_rl.modules.TwoHot`.
        group_layers: own first encoder layer and own last layers per group of unlike agents (ours); off = the paper's.
        linear_skips: linear maps beside the MLPs of vector encoder, decoder and dynamics predictor (ours), so that what
            is nearly linear, such as positions that move on, need not be learnt by them; the sequence model then ends
            without a layer norm, which is not linear. Off = the paper's.
        coordinate_code: start these linear maps so that every coordinate has code dimensions of its own (ours), as many
            as there are for each. Then nothing has to be learnt to reconstruct, and what is uncertain of one coordinate
            does not blur the others when the dimensions of z_{t+1} are drawn independently.
        teammate_predictor: switch of the paper's ablation.
        teammate_hidden_size: width of the teammate predictor; ``None``: that of the world model.
        action_scaling: switch of the paper's ablation.
        predict_mask: whether to learn the legal-action mask; ``None``: if the environment has one.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> config = WorldModelConfig(hidden_size=32, num_heads=2, latent="gaussian", num_dims=8)
        >>> WorldModel.from_env(make_env("mock"), config).latent
        GaussianLatent()
    """

    hidden_size: int = 512
    num_layers: int = 2
    num_heads: int = 8
    dropout: float = 0.1
    latent: str = "categorical"
    num_dims: int = 32
    num_classes: int = 32
    latent_width: float | None = None
    encoder_depth: int = 3
    fourier_features: int = 0
    head_depth: int = 2
    channels: int = 32
    reward_input: str = "hidden"
    point_size: int = 0
    reencode: bool = False
    reward_interpolation: str = "symlog"
    group_layers: bool = False
    linear_skips: bool = False
    coordinate_code: bool = False
    teammate_predictor: bool = True
    teammate_hidden_size: int | None = None
    action_scaling: bool = True
    predict_mask: bool | None = None

    @classmethod
    def small(cls, **overrides: Any) -> WorldModelConfig:
        """What learns vector observations in minutes on one core, with the switches beyond the paper that help there.

        Args:
            **overrides: entries that go before these.

        Examples:
            >>> config = WorldModelConfig.small(num_layers=2)
            >>> config.latent, config.hidden_size, config.num_layers
            ('gaussian', 128, 2)
        """
        entries: dict[str, Any] = {
            "hidden_size": 128,
            "num_layers": 1,
            "num_heads": 4,
            "dropout": 0.0,
            "latent": "gaussian",
            "num_dims": 64,
            "encoder_depth": 2,
            "head_depth": 1,
            "fourier_features": 4,
            "linear_skips": True,
            "coordinate_code": True,
            "reward_input": "next_observation",
            "point_size": 2,
            "reencode": True,
            "reward_interpolation": "raw",
            "group_layers": True,
            "teammate_hidden_size": 64,
        }
        return cls(**(entries | overrides))


def build_parts(
    cfg: WorldModelConfig,
    observation_shape: Sequence[int],
    action_counts: Sequence[int],
    group_index: Sequence[int],
    has_action_mask: bool,
) -> dict[str, Any]:
    """The parts of a :class:`~matwm_rl.modules.WorldModel`, by the names of its arguments.

    Args:
        cfg: sizes and switches.
        observation_shape: ``[D]`` or ``[channels, S, S]``, after padding.
        action_counts: number of actions of each agent.
        group_index: group of each agent.
        has_action_mask: whether legal actions change from step to step.

    Raises:
        ValueError: if sizes and switches do not fit each other, or the observations.
    """
    image = len(observation_shape) == 3
    if cfg.reward_input not in REWARD_INPUTS:
        raise ValueError(f"reward_input must be one of {REWARD_INPUTS}, got {cfg.reward_input!r}")
    if image and cfg.reward_input == "next_observation":
        raise ValueError("reward_input 'next_observation' is for vectors; for images take 'hidden' or 'next_latent'")
    if cfg.point_size and cfg.reward_input != "next_observation":
        raise ValueError(
            f"point_size {cfg.point_size} is for the reward_input 'next_observation', got {cfg.reward_input!r}"
        )
    latent = make_latent(cfg.latent, cfg.num_dims, cfg.num_classes, cfg.latent_width)
    if cfg.coordinate_code and (latent.coordinate_scale is None or not cfg.linear_skips):
        raise ValueError(
            "coordinate_code needs linear_skips and latent 'fsq' or 'gaussian', "
            f"got {cfg.linear_skips} and {cfg.latent!r}"
        )
    num_agents, num_actions = len(action_counts), max(action_counts)
    # Images have one common layout, so their agents are alike for the encoder whatever their groups.
    groups = list(group_index) if cfg.group_layers and not image else [0] * num_agents
    size, width = latent.latent_size, cfg.hidden_size
    encoder: nn.Module
    decoder: nn.Module
    if image:
        encoder = CNNEncoder(observation_shape, latent.encoder_size, channels=cfg.channels)
        decoder = CNNDecoder(size, observation_shape, channels=cfg.channels)
    else:
        encoder = MLPEncoder(
            observation_shape[0],
            latent.encoder_size,
            group_index=groups,
            num_cells=width,
            depth=cfg.encoder_depth,
            fourier_features=cfg.fourier_features,
            linear_skip=cfg.linear_skips,
        )
        decoder = MLPDecoder(
            size,
            observation_shape[0],
            group_index=groups,
            num_cells=width,
            depth=cfg.encoder_depth,
            linear_skip=cfg.linear_skips,
        )
        # With fewer code dimensions than coordinates there is none for each: then both start at random.
        scale = latent.coordinate_scale if cfg.coordinate_code else None
        if scale is not None and observation_shape[0] <= cfg.num_dims:
            encoder.start_as_coordinates(scale, latent.spacing)
            decoder.start_as_coordinates(scale)
    head = partial(Head, group_index=groups, num_cells=width, depth=cfg.head_depth)
    two_hot = TwoHot(interpolation=cfg.reward_interpolation)
    reward: nn.Module
    if cfg.reward_input == "next_observation":
        reward = ObservationHead(
            observation_shape[0],
            two_hot.num_bins,
            group_index=groups,
            num_cells=width,
            depth=cfg.encoder_depth,
            fourier_features=cfg.fourier_features,
            point_size=cfg.point_size,
        )
    else:
        reward = head(width if cfg.reward_input == "hidden" else size, two_hot.num_bins, zero_init=True)
    teammates = TeammatePredictor(
        size,
        action_counts=action_counts,
        group_index=groups,
        features=cfg.teammate_hidden_size or width,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        dropout=cfg.dropout,
    )
    predict_mask = has_action_mask if cfg.predict_mask is None else cfg.predict_mask
    return {
        "encoder": encoder,
        "latent": latent,
        "decoder": decoder,
        "action_mixer": ActionMixer(size, width, action_counts=action_counts, scaled=cfg.action_scaling),
        "transformer": Transformer(
            width,
            num_layers=cfg.num_layers,
            num_heads=cfg.num_heads,
            dropout=cfg.dropout,
            final_norm=not cfg.linear_skips,
        ),
        "dynamics": head(width, latent.dynamics_size, linear_skip=cfg.linear_skips),
        "reward": reward,
        "end_reward": None if cfg.reward_input == "hidden" else head(width, two_hot.num_bins, zero_init=True),
        "reward_input": cfg.reward_input,
        "reencode": cfg.reencode and not image,
        "continuation": head(width, 1),
        "two_hot": two_hot,
        "action_mask": head(size, num_actions) if predict_mask else None,
        "teammates": teammates if cfg.teammate_predictor and num_agents > 1 else None,
        "legal": torch.arange(num_actions) < torch.tensor(list(action_counts)).unsqueeze(-1),
        "group_index": list(group_index),
        "observation_shape": tuple(observation_shape),
    }
