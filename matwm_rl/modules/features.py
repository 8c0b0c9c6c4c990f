"""The world model's state as features for model-free agents, in TorchRL's own pipelines."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform

from matwm_rl import keys
from matwm_rl.modules.state_estimator import HISTORY_KEYS, PolicyConfig, StateEstimator
from matwm_rl.modules.world_model import WorldModel


class WorldModelFeatures(Transform):
    """A transform of the environment that adds s_t of every agent to its observation.

    Any policy, value network and loss can then read what the world model knows of the present observation and of the
    episode so far; values bootstrap from the features under ``"next"``. :class:`StateEstimator` computes them, without
    gradient. Put the model in ``eval`` mode. Features of stored steps are those of the model as it was when they were
    collected.

    The environment also carries the history of the episode, under ``"history"``: leave it out of what is stored,
    ``batch.exclude("history", ("next", "history"))``.

    Args:
        world_model: the shared world model.
        history_length: W, steps of history that are seen at most.

    Keys read: ``("agents", "observation" | "action")``, optional ``("agents", "alive")``.
    Keys written, at every reset and under ``"next"`` at every step: ``("agents", "latent" | "hidden" |
    "teammate_logits")`` and ``("history", "code" | "action" | "length")``.

    Raises:
        ValueError: if ``history_length`` is below 1, or an entry has another shape.
        KeyError: if an entry is missing.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model).eval()
        >>> env = env.append_transform(WorldModelFeatures(world_model))
        >>> rollout = env.rollout(3)
        >>> rollout["agents", "latent"].shape, rollout["next", "agents", "hidden"].shape
        (torch.Size([3, 3, 16]), torch.Size([3, 3, 32]))
    """

    def __init__(self, world_model: WorldModel, *, history_length: int = PolicyConfig.history_length) -> None:
        estimator = StateEstimator(world_model, history_length=history_length)
        in_keys = [keys.OBSERVATION, keys.ACTION, keys.ALIVE]
        super().__init__(in_keys=in_keys, out_keys=[*estimator.out_keys, *HISTORY_KEYS])
        self.estimator = estimator

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the features and the history."""
        return self._add(observation_spec, {**self._feature_specs(), **self.estimator.history_specs()})

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Add the history to what a step reads."""
        state_spec = input_spec["full_state_spec"]
        if state_spec is None:
            state_spec = Composite(shape=input_spec.shape, device=input_spec.device)
        input_spec["full_state_spec"] = self._add(state_spec, self.estimator.history_specs())
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
            keys.LATENT: (model.num_agents, model.latent.latent_size),
            keys.HIDDEN: (model.num_agents, model.transformer.features),
            keys.TEAMMATE_LOGITS: (model.num_agents, others, model.actions.num_parameters),
        }
        return {key: Unbounded(shape, dtype=torch.float32) for key, shape in shapes.items()}

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        # Of environments that are not reset, TorchRL keeps what they had.
        for key, spec in self.estimator.history_specs().items():
            zeros = torch.zeros((*tensordict_reset.batch_size, *spec.shape), dtype=spec.dtype)
            tensordict_reset.set(key, zeros.to(tensordict_reset.get(keys.OBSERVATION).device))
        return self.estimator(tensordict_reset)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        step = tensordict.select(keys.ACTION, keys.ALIVE, *self.out_keys, strict=False)
        return self.estimator(next_tensordict.update(self.estimator.remember(step).get("next")))
