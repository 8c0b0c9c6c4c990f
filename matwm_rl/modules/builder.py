"""Sizes and switches of the world model, and the builder of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from matwm_rl.arguments import check_kinds
from matwm_rl.modules.dynamics import Dynamics, PriorDynamics
from matwm_rl.modules.encoders import CNNDecoder, CNNEncoder, EncoderConfig, MLPEncoderConfig
from matwm_rl.modules.heads import ActionMixer, Head
from matwm_rl.modules.latents import CategoricalLatentConfig, LatentConfig, LatentSpace
from matwm_rl.modules.reward import HiddenRewardConfig, RewardConfig, RewardHead
from matwm_rl.modules.running_norm import RunningNorm
from matwm_rl.modules.teammates import TeammatePredictor, TeammatePredictorBase
from matwm_rl.modules.transformer import Transformer
from matwm_rl.modules.two_hot import Interpolation, TwoHot
from matwm_rl.settings import Settings, setting

PARTS = (
    "latent",
    "encoder",
    "decoder",
    "two_hot",
    "reward",
    "teammates",
    "action_mixer",
    "transformer",
    "dynamics",
    "end_reward",
    "continuation",
    "action_mask",
    "observation_norm",
)
"""Names of the parts that may be given, in the order in which they are built (and their weights drawn)."""


@dataclass(kw_only=True)
class WorldModelConfig(Settings):
    """Sizes and switches of :meth:`WorldModel.from_env <matwm_rl.modules.WorldModel.from_env>`.

    The defaults are the paper's (Table C.6). "Ours" marks what goes beyond the paper (docs/presets.md says why).

    Attributes:
        hidden_size: F, width of the transformers and of all MLPs.
        num_layers: blocks of each transformer.
        num_heads: attention heads of each transformer.
        dropout: dropout of the transformers.
        latent: kind and sizes of the latent space.
        encoder: kind and sizes of encoder and decoder of vector observations. Images have the paper's CNN.
        head_depth: hidden layers of the heads.
        reward: kind and sizes of the reward head.
        reward_interpolation: of rewards, and of the values of :func:`~matwm_rl.modules.make_critic`; see
            :class:`~matwm_rl.modules.TwoHot`.
        reencode: decode and encode imagined latents of vector observations again (ours). The dimensions of a sample are
            drawn independently; a policy finds combinations that no observation has, and for which the reward head
            predicts rewards that do not exist.
        normalize: normalise vector observations and rewards by their running mean and spread (ours), see
            :class:`~matwm_rl.modules.RunningNorm`, so that no setting depends on an environment's units.
        group_layers: give each group of unlike agents its own first encoder layer and its own last layers (ours).
        teammate_predictor: switch of the paper's ablation (Table 5).
        teammate_hidden_size: width of the teammate predictor; ``None``: that of the world model.
        action_scaling: switch of the paper's ablation (Table 5).

    Raises:
        ValueError: if a number is out of range, or a width is no multiple of ``2 * num_heads``.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import GaussianLatentConfig, WorldModel
        >>> config = WorldModelConfig(hidden_size=32, num_heads=2, latent=GaussianLatentConfig(num_dims=8))
        >>> WorldModel.from_env(make_env("mock"), config).latent
        GaussianLatent()
    """

    hidden_size: int = setting(512, minimum=1)
    num_layers: int = setting(2, minimum=1)
    num_heads: int = setting(8, minimum=1)
    dropout: float = setting(0.1, minimum=0, below=1)
    latent: LatentConfig = field(default_factory=CategoricalLatentConfig)
    encoder: EncoderConfig = field(default_factory=MLPEncoderConfig)
    head_depth: int = setting(2, minimum=0)
    reward: RewardConfig = field(default_factory=HiddenRewardConfig)
    reward_interpolation: Interpolation = Interpolation.symlog
    reencode: bool = False
    normalize: bool = False
    group_layers: bool = False
    teammate_predictor: bool = True
    teammate_hidden_size: int | None = setting(None, minimum=1)
    action_scaling: bool = True

    def check(self) -> None:
        """Refuse widths that the attention heads do not divide."""
        for name in ("hidden_size", "teammate_hidden_size"):
            width = getattr(self, name)
            if width is not None and width % (2 * self.num_heads):
                raise ValueError(
                    f"WorldModelConfig.{name} must be a multiple of 2 * num_heads, {2 * self.num_heads}, got {width}"
                )


def build_parts(layout: Any, config: WorldModelConfig, **given: Any) -> dict[str, Any]:
    """Build the parts of a world model: the keyword arguments of :class:`~matwm_rl.modules.WorldModel`.

    Args:
        layout: who the agents are; read are ``observation_shape``, ``actions``, ``group_index`` and
            ``has_action_mask`` of an :class:`~matwm_rl.envs.AgentLayout`.
        config: sizes and switches.
        **given: objects that take the place of parts, by their names (:data:`PARTS`). The others are built to fit them.

    Raises:
        TypeError: if there is no part of a name.
        ValueError: if sizes and switches do not fit each other, or the observations.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import GaussianLatent
        >>> config = presets.tiny().world_model
        >>> parts = build_parts(make_env("mock").layout, config, latent=GaussianLatent(6))
        >>> parts["encoder"].output.out_features
        6
    """
    if unknown := sorted(set(given) - set(PARTS)):
        raise TypeError(f"the world model has no parts {unknown}; its parts are {list(PARTS)}")

    check_kinds(WorldModelConfig, config=config)
    config.check()

    def part(name: str, build: Callable[[], Any]) -> Any:
        return given[name] if name in given else build()

    shape, actions = tuple(layout.observation_shape), layout.actions
    image, width = len(shape) == 3, config.hidden_size
    # Images have one common layout, so their agents are alike for the encoder whatever their groups.
    groups = list(layout.group_index) if config.group_layers and not image else [0] * actions.num_agents
    linear = config.encoder.linear and not image
    head = partial(Head, group_index=groups, num_cells=width, depth=config.head_depth)
    depth, heads, dropout = config.num_layers, config.num_heads, config.dropout

    latent = part("latent", config.latent.build)
    size, classes = latent.latent_size, latent.num_classes
    both = {"encoder": given.get("encoder"), "decoder": given.get("decoder")}
    if None in both.values():
        if image:
            built: tuple[nn.Module, nn.Module] = CNNEncoder(shape, latent.encoder_size), CNNDecoder(size, shape)
        else:
            built = config.encoder.build(shape[0], latent, group_index=groups, num_cells=width)
        both = {name: made if both[name] is None else both[name] for name, made in zip(both, built, strict=True)}
    members = list(layout.group_index)

    def build_two_hot() -> TwoHot:
        norm = RunningNorm(1, group_index=members) if config.normalize else None
        return TwoHot(interpolation=config.reward_interpolation, norm=norm)

    def build_observation_norm() -> RunningNorm | None:
        if image or not config.normalize:
            return None
        # The coordinates of an arena from -1 to 1 have this spread. Widths and wavelengths are made for such.
        return RunningNorm(shape[0], group_index=members, spread=0.75)

    two_hot = part("two_hot", build_two_hot)
    bins = two_hot.num_bins
    others = {"actions": actions, "group_index": groups, "depth": config.head_depth}
    reward = part("reward", lambda: config.reward.build(shape, width, bins, **others))

    def build_teammates() -> nn.Module | None:
        if not config.teammate_predictor or actions.num_agents == 1:
            return None
        features = config.teammate_hidden_size or width
        return TeammatePredictor(
            size,
            actions=actions,
            num_classes=classes,
            group_index=groups,
            features=features,
            num_layers=depth,
            num_heads=heads,
            dropout=dropout,
        )

    return {
        "actions": actions,
        "observation_shape": shape,
        "group_index": members,
        "reencode": config.reencode and not image,
        "observation_norm": part("observation_norm", build_observation_norm),
        **both,
        "latent": latent,
        "two_hot": two_hot,
        "reward": reward,
        "teammates": part("teammates", build_teammates),
        "action_mixer": part(
            "action_mixer",
            lambda: ActionMixer(size, width, actions=actions, num_classes=classes, scaled=config.action_scaling),
        ),
        "transformer": part(
            "transformer",
            lambda: Transformer(width, num_layers=depth, num_heads=heads, dropout=dropout, final_norm=not linear),
        ),
        "dynamics": part(
            "dynamics", lambda: PriorDynamics(head(width, latent.dynamics_size, linear_skip=linear), latent)
        ),
        "end_reward": part("end_reward", lambda: head(width, bins, zero_init=True) if reward.reads_successor else None),
        "continuation": part("continuation", lambda: head(width, 1)),
        "action_mask": part("action_mask", lambda: head(size, actions.num_actions) if layout.has_action_mask else None),
    }


def check_parts(model: Any) -> None:
    """Check that the parts of a model (:data:`PARTS`) are of their interfaces.

    Raises:
        TypeError: if one is not.
    """
    kinds = {"latent": LatentSpace, "dynamics": Dynamics, "reward": RewardHead, "teammates": TeammatePredictorBase}
    kinds |= {"transformer": Transformer, "two_hot": TwoHot, "observation_norm": RunningNorm}
    for name in PARTS:
        part, kind = getattr(model, name), kinds.get(name, nn.Module)
        absent = part is None and name in ("teammates", "action_mask", "end_reward", "observation_norm")
        if not absent and not isinstance(part, kind):
            raise TypeError(f"{name} must be a {kind.__name__} (subclass it), got a {type(part).__name__}")
