"""Losses as TorchRL ``LossModule``s; they know keys, not classes."""

from matwm_rl.objectives.actor_critic import ActorLoss, CriticLoss
from matwm_rl.objectives.returns import LambdaReturn, ReturnScale
from matwm_rl.objectives.world_model import WorldModelLoss, WorldModelLossWeights

__all__ = ["ActorLoss", "CriticLoss", "LambdaReturn", "ReturnScale", "WorldModelLoss", "WorldModelLossWeights"]
