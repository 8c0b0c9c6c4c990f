"""Networks: the world model and its parts, actors and critics, acting, imagination."""

from matwm_rl.modules.actor_critic import ActorCriticConfig, StateMLP, make_actor, make_critic
from matwm_rl.modules.builder import WorldModelConfig, build_parts
from matwm_rl.modules.dynamics import Dynamics, DynamicsLoss, PriorDynamics
from matwm_rl.modules.encoders import (
    CNNDecoder,
    CNNEncoder,
    CoordinateDecoder,
    CoordinateEncoder,
    CoordinateEncoderConfig,
    EncoderConfig,
    FourierFeatures,
    MLPDecoder,
    MLPEncoder,
    MLPEncoderConfig,
    PointDistances,
)
from matwm_rl.modules.features import WorldModelFeatures
from matwm_rl.modules.heads import ActionMixer, Head
from matwm_rl.modules.imagination import Imagination
from matwm_rl.modules.latents import (
    CategoricalLatent,
    CategoricalLatentConfig,
    GaussianLatent,
    GaussianLatentConfig,
    LatentConfig,
    LatentSpace,
)
from matwm_rl.modules.policy import WorldModelPolicy
from matwm_rl.modules.reward import (
    HiddenReward,
    HiddenRewardConfig,
    ObservationReward,
    ObservationRewardConfig,
    RewardConfig,
    RewardHead,
    Transition,
)
from matwm_rl.modules.rollout import Rollout
from matwm_rl.modules.running_norm import RunningNorm
from matwm_rl.modules.stacked import LatentLinear, StackedLinear
from matwm_rl.modules.stacked_mlp import StackedMLP, StackedNormSiLU
from matwm_rl.modules.state import STATE_KEYS, Caches, State
from matwm_rl.modules.state_estimator import HISTORY_KEYS, PolicyConfig, StateEstimator
from matwm_rl.modules.teammates import TeammatePredictor, TeammatePredictorBase
from matwm_rl.modules.transformer import KVCache, Transformer
from matwm_rl.modules.two_hot import Interpolation, TwoHot
from matwm_rl.modules.world_model import WorldModel

__all__ = [
    "HISTORY_KEYS",
    "STATE_KEYS",
    "ActionMixer",
    "ActorCriticConfig",
    "CNNDecoder",
    "CNNEncoder",
    "Caches",
    "CategoricalLatent",
    "CategoricalLatentConfig",
    "CoordinateDecoder",
    "CoordinateEncoder",
    "CoordinateEncoderConfig",
    "Dynamics",
    "DynamicsLoss",
    "EncoderConfig",
    "FourierFeatures",
    "GaussianLatent",
    "GaussianLatentConfig",
    "Head",
    "HiddenReward",
    "HiddenRewardConfig",
    "Imagination",
    "Interpolation",
    "KVCache",
    "LatentConfig",
    "LatentLinear",
    "LatentSpace",
    "MLPDecoder",
    "MLPEncoder",
    "MLPEncoderConfig",
    "ObservationReward",
    "ObservationRewardConfig",
    "PointDistances",
    "PolicyConfig",
    "PriorDynamics",
    "RewardConfig",
    "RewardHead",
    "Rollout",
    "RunningNorm",
    "StackedLinear",
    "StackedMLP",
    "StackedNormSiLU",
    "State",
    "StateEstimator",
    "StateMLP",
    "TeammatePredictor",
    "TeammatePredictorBase",
    "Transformer",
    "Transition",
    "TwoHot",
    "WorldModel",
    "WorldModelConfig",
    "WorldModelFeatures",
    "WorldModelPolicy",
    "build_parts",
    "make_actor",
    "make_critic",
]
