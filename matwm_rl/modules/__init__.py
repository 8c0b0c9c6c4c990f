"""Networks: the world model and its parts, actors and critics, acting, imagination."""

from matwm_rl.modules.actor_critic import ActionDistribution, StateMLP, make_actor, make_critic
from matwm_rl.modules.encoders import (
    CNNDecoder,
    CNNEncoder,
    FourierFeatures,
    MLPDecoder,
    MLPEncoder,
    ObservationHead,
    PointDistances,
)
from matwm_rl.modules.exploration import RandomEpisodes
from matwm_rl.modules.heads import ActionMixer, Head, TeammatePredictor
from matwm_rl.modules.imagination import Imagination
from matwm_rl.modules.latent import (
    CategoricalLatent,
    DiscreteLatent,
    FSQLatent,
    GaussianLatent,
    Latent,
    LatentCode,
    make_latent,
    read_latent,
)
from matwm_rl.modules.policy import CONTEXT_KEYS, WorldModelPolicy
from matwm_rl.modules.stacked import StackedLinear, StackedMLP, StackedNormSiLU
from matwm_rl.modules.transformer import KVCache, Transformer
from matwm_rl.modules.two_hot import TwoHot
from matwm_rl.modules.world_model import Context, State, WorldModel
from matwm_rl.modules.world_model_config import WorldModelConfig

__all__ = [
    "CONTEXT_KEYS",
    "ActionDistribution",
    "ActionMixer",
    "CNNDecoder",
    "CNNEncoder",
    "CategoricalLatent",
    "Context",
    "DiscreteLatent",
    "FSQLatent",
    "FourierFeatures",
    "GaussianLatent",
    "Head",
    "Imagination",
    "KVCache",
    "Latent",
    "LatentCode",
    "MLPDecoder",
    "MLPEncoder",
    "ObservationHead",
    "PointDistances",
    "RandomEpisodes",
    "StackedLinear",
    "StackedMLP",
    "StackedNormSiLU",
    "State",
    "StateMLP",
    "TeammatePredictor",
    "Transformer",
    "TwoHot",
    "WorldModel",
    "WorldModelConfig",
    "WorldModelPolicy",
    "make_actor",
    "make_critic",
    "make_latent",
    "read_latent",
]
