"""Losses as TorchRL ``LossModule`` modules; they know keys, not classes."""

from matwm_rl.objectives.actor import ActorLoss, ActorLossConfig, Advantage, PolicyObjective
from matwm_rl.objectives.critic import CriticLoss
from matwm_rl.objectives.regularizers import MeanPolicyEntropy, Regularizer, Signalling
from matwm_rl.objectives.returns import LambdaReturn, ReturnScale
from matwm_rl.objectives.world_model import WorldModelLoss, WorldModelLossWeights

__all__ = [
    "ActorLoss",
    "ActorLossConfig",
    "Advantage",
    "CriticLoss",
    "LambdaReturn",
    "MeanPolicyEntropy",
    "PolicyObjective",
    "Regularizer",
    "ReturnScale",
    "Signalling",
    "WorldModelLoss",
    "WorldModelLossWeights",
]
