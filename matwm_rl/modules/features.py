"""The world model's state as features for model-free agents, in TorchRL's own pipelines."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

from matwm_rl import keys
from matwm_rl.modules.state_estimator import CONTEXT_KEYS, StateEstimator
from matwm_rl.modules.world_model import WorldModel


class WorldModelFeatures(Transform):
    """A transform of the environment that writes s_t (section 3) of every agent beside its observation.

    Any policy, value network and loss can then read what the world model knows of the present observation and of the
    episode so far; values bootstrap from the features under ``"next"``. :class:`StateEstimator` computes them, without
    gradient. Put the model in ``eval`` mode. Features of stored steps are those of the model as it was when they were
    collected.

    The environment also carries the context of the episode, under ``"context"``: leave it out of what is stored,
    ``batch.exclude("context", ("next", "context"))``.

    Args:
        world_model: the shared world model.
        context_length: steps of history that are seen at most.

    Keys read: ``("agents", "observation" | "action")``.
    Keys written, at every reset and under ``"next"`` at every step: ``("agents", "latent" | "hidden" |
    "teammate_logits")``, of a multi-hot code ``("agents", "latent_ones")`` too, and
    ``("context", "code" | "action" | "length")``.

    Raises:
        ValueError: if ``context_length`` is below 1, or an entry has another shape.
        KeyError: if an entry is missing.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4).eval()
        >>> env = env.append_transform(WorldModelFeatures(world_model))
        >>> rollout = env.rollout(3)
        >>> rollout["agents", "latent"].shape, rollout["next", "agents", "hidden"].shape
        (torch.Size([3, 3, 16]), torch.Size([3, 3, 32]))
    """

    def __init__(self, world_model: WorldModel, *, context_length: int = 16) -> None:
        estimator = StateEstimator(world_model, context_length=context_length)
        super().__init__(in_keys=[keys.OBSERVATION, keys.ACTION], out_keys=[*estimator.out_keys, *CONTEXT_KEYS])
        self.estimator = estimator

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the features and the context."""
        return self._add(observation_spec, {**self._feature_specs(), **self.estimator.context_specs()})

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Add the context to what a step reads."""
        state_spec = input_spec["full_state_spec"]
        if state_spec is None:
            state_spec = Composite(shape=input_spec.shape, device=input_spec.device)
        input_spec["full_state_spec"] = self._add(state_spec, self.estimator.context_specs())
        return input_spec

    @staticmethod
    def _add(specs: Composite, new: dict[NestedKey, Unbounded]) -> Composite:
        for key, spec in new.items():
            specs[key] = spec.expand(*specs.shape, *spec.shape).to(specs.device)
        return specs

    def _feature_specs(self) -> dict[NestedKey, Unbounded]:
        model = self.estimator.world_model
        others = 0 if model.teammates is None else model.num_agents - 1
        shapes: dict[NestedKey, tuple[int, ...]] = {
            keys.LATENT: (model.latent.latent_size,),
            keys.HIDDEN: (model.transformer.features,),
            keys.TEAMMATE_LOGITS: (others, model.num_actions),
            keys.LATENT_ONES: (model.latent.num_dims,),
        }
        dtypes = {keys.LATENT_ONES: torch.int64}
        return {
            key: Unbounded((model.num_agents, *shapes[key]), dtype=dtypes.get(key, torch.float32))
            for key in model.state_keys
        }

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        # Of environments that are not reset, TorchRL keeps what they had.
        for key, spec in self.estimator.context_specs().items():
            zeros = torch.zeros((*tensordict_reset.batch_size, *spec.shape), dtype=spec.dtype)
            tensordict_reset.set(key, zeros.to(tensordict_reset.get(keys.OBSERVATION).device))
        return self.estimator(tensordict_reset)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        step = tensordict.select(keys.ACTION, *self.out_keys)
        return self.estimator(next_tensordict.update(self.estimator.remember(step).get("next")))
