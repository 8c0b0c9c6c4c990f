"""The loss of the world model (docs/algorithm.md, World model)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrl.modules import SymExpTwoHot

from matwm_rl import keys
from matwm_rl.action_space import DiscreteActions
from matwm_rl.arguments import check_kinds, check_numbers
from matwm_rl.checks import read_entry, read_optional, read_output
from matwm_rl.functional import agents_first
from matwm_rl.loss_functions import balanced_kl, masked_means
from matwm_rl.objectives.common import KeyedLoss
from matwm_rl.settings import Settings, setting


@dataclass(kw_only=True)
class WorldModelLossWeights(Settings):
    """Weights of the terms; the defaults are the paper's: b1 = 0.5 for mask and dynamics, b2 = 0.1.

    Attributes:
        reconstruction: of L_rec, the squared error of the decoded observation.
        reward: of L_rew, the two-hot cross-entropy of the reward.
        continuation: of L_con, the binary cross-entropy of the continuation.
        teammate: of L_team, the negative log-likelihood of the others' actions.
        mask: b1 of L_mask, the binary cross-entropy of the legal actions.
        dynamics: b1 of L_dyn, the KL term that moves the prior.
        representation: b2 of L_rep, the KL term that moves the posterior.

    Examples:
        >>> WorldModelLossWeights(reward=50.0).dynamics
        0.5
    """

    reconstruction: float = setting(1.0, minimum=0)
    reward: float = setting(1.0, minimum=0)
    continuation: float = setting(1.0, minimum=0)
    teammate: float = setting(1.0, minimum=0)
    mask: float = setting(0.5, minimum=0)
    dynamics: float = setting(0.5, minimum=0)
    representation: float = setting(0.1, minimum=0)


class WorldModelLoss(KeyedLoss):
    """Loss of the shared world model, and the only loss that holds its parameters (docs/algorithm.md, World model).

    ``L = L_rec + L_rew + L_con + L_team + b1 (L_mask + L_dyn) + b2 L_rep``, each a mean over sequences, steps and
    living agents. No term asks for a prediction across the end of an episode. A truncated episode has c = 1; where the
    focal agent dies, c = 0. If the model has separate logits for the reward of an agent's last step, the reward loss
    uses them where c = 0, and the usual reward logits where c = 1; the KL terms then count only where c = 1.

    Args:
        world_model: any module with the keys of :class:`~matwm_rl.modules.WorldModel`. One that does not write
            ``("next", "agents", "dynamics_kl" | "representation_kl")`` must write posterior and prior as
            log-probabilities ``[..., K, C]``. If it has no attribute ``actions``, an
            :class:`~matwm_rl.action_space.ActionSpace`, its actions are taken to be discrete.
        two_hot: turns rewards into targets of the logits; by default ``world_model.two_hot``, else TorchRL's
            ``SymExpTwoHot``.
        weights: weights of the terms.
        free_nats: lower bound of each KL element, in nats.

    Keys read besides the world model's own: ``("agents", "teammate_action" | "alive" | "teammate_alive" |
    "action_mask")``, ``("next", "agents", "reward" | "terminated" | "alive")``. The alive entries are optional, the
    action mask is read where the model predicts one.

    Keys written: ``loss_reconstruction``, ``loss_reward``, ``loss_continuation``, ``loss_teammate``, ``loss_mask``
    (where predicted), ``loss_dynamics``, ``loss_representation``: weighted scalars, to be summed; and ``kl``, the
    unclamped KL in nats, for logs.

    Raises:
        KeyError: if an entry of the batch is missing, or one that the world model was to write.
        ValueError: if one has another shape, or ``free_nats`` is negative.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.data import add_agent_entries
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> env = make_env("mock", seed=0)
        >>> loss = WorldModelLoss(WorldModel.from_env(env, presets.tiny().world_model))
        >>> losses = loss(add_agent_entries(env.rollout(6, break_when_any_done=False)))
        >>> total = sum(value for key, value in losses.items() if key.startswith("loss_"))
        >>> total.backward()
    """

    @dataclass
    class _AcceptedKeys:
        observation: NestedKey = keys.OBSERVATION
        action_mask: NestedKey = keys.ACTION_MASK
        alive: NestedKey = keys.ALIVE
        next_alive: NestedKey = keys.NEXT_ALIVE
        teammate_action: NestedKey = keys.TEAMMATE_ACTION
        teammate_alive: NestedKey = keys.TEAMMATE_ALIVE
        reward: NestedKey = keys.REWARD
        terminated: NestedKey = keys.AGENT_TERMINATED
        reconstruction: NestedKey = keys.RECONSTRUCTION
        reward_logits: NestedKey = keys.REWARD_LOGITS
        end_reward_logits: NestedKey = keys.END_REWARD_LOGITS
        continuation_logits: NestedKey = keys.CONTINUATION_LOGITS
        mask_logits: NestedKey = keys.MASK_LOGITS
        teammate_logits: NestedKey = keys.TEAMMATE_LOGITS
        posterior: NestedKey = keys.POSTERIOR
        prior: NestedKey = keys.PRIOR
        dynamics_kl: NestedKey = keys.DYNAMICS_KL
        representation_kl: NestedKey = keys.REPRESENTATION_KL

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    world_model: TensorDictModuleBase

    def __init__(
        self,
        world_model: TensorDictModuleBase,
        *,
        two_hot: nn.Module | None = None,
        weights: WorldModelLossWeights | None = None,
        free_nats: float = 1.0,
    ) -> None:
        check_numbers(minimum=0, free_nats=free_nats)
        check_kinds(nn.Module, world_model=world_model)
        if weights is not None:
            check_kinds(WorldModelLossWeights, weights=weights)
        super().__init__()
        self.world_model = world_model
        self._hold_two_hot(two_hot or getattr(world_model, "two_hot", None) or SymExpTwoHot(), world_model)
        self.weights = weights or WorldModelLossWeights()
        self.free_nats = free_nats
        self._set_in_keys()

    @property
    def _predicts_mask(self) -> bool:
        return self.tensor_keys.mask_logits in self.world_model.out_keys

    def _read_keys(self) -> list[NestedKey]:
        k = self.tensor_keys
        mask = [k.action_mask] if self._predicts_mask else []
        read = [*mask, k.alive, k.next_alive, k.teammate_action, k.teammate_alive, k.reward, k.terminated]
        return list(dict.fromkeys([*self.world_model.in_keys, k.observation, *read]))

    def _written_keys(self) -> list[NestedKey]:
        terms = [name for name in asdict(self.weights) if name != "mask" or self._predicts_mask]
        return [*(f"loss_{name}" for name in terms), "kl"]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the weighted losses of a batch ``[*B, T]``.

        Norms of a world model in training mode take in the batch first.
        """
        k = self.tensor_keys
        self._take_in(tensordict)
        model = self.world_model(tensordict.copy())
        reward_logits = read_output(model, k.reward_logits, self.world_model, None)
        shape = reward_logits.shape[:-1]
        reward = read_entry(tensordict, k.reward, self, (*shape, 1))
        living = read_optional(tensordict, k.alive, self, shape)
        survives = read_optional(tensordict, k.next_alive, self, shape)
        alive = self._valid_mask(tensordict, k.alive, reward.squeeze(-1))
        ended = read_entry(tensordict, k.terminated, self, (*shape, 1)).squeeze(-1)
        if living is not None and survives is not None:
            ended = ended | (living & ~survives)
        reads_ends = k.end_reward_logits in self.world_model.out_keys
        if reads_ends:
            last = read_output(model, k.end_reward_logits, self.world_model, reward_logits.shape)
            reward_logits = torch.where(ended.unsqueeze(-1), last, reward_logits)
        errors = {
            "reconstruction": (self._reconstruction(model), alive),
            "reward": (self.two_hot.loss(reward_logits, reward), alive),
            "continuation": (self._continuation(model, ended), alive),
            "teammate": (self._teammate(model, shape), alive),
        }
        if self._predicts_mask:
            logits = read_output(model, k.mask_logits, self.world_model, (*shape, None))
            target = read_entry(tensordict, k.action_mask, self, logits.shape).to(logits)
            error = binary_cross_entropy_with_logits(logits, target, reduction="none")
            errors["mask"] = (error.sum(-1), alive)
        # A dying agent has no next observation. If last steps have a reward head of their own, the other head reads the
        # next latent of an episode that goes on, so only such steps train the dynamics.
        survived = alive if survives is None else alive & survives
        if reads_ends:
            survived = survived & ~ended
        dynamics, representation = self._kl(model, shape)
        errors["dynamics"] = (dynamics.clamp(min=self.free_nats), survived)
        errors["representation"] = (representation.clamp(min=self.free_nats), survived)
        errors["kl"] = (dynamics.detach(), survived)

        means, weights = masked_means(errors), asdict(self.weights)
        out = {f"loss_{name}": weights[name] * mean for name, mean in means.items() if name != "kl"}
        return self._written({**out, "kl": means["kl"]})

    def _take_in(self, tensordict: TensorDictBase) -> None:
        """Let the norms of a model in training take in the observations and rewards of living agents."""
        observation_norm = getattr(self.world_model, "observation_norm", None)
        reward_norm = getattr(self.two_hot, "norm", None)
        if not self.world_model.training or (observation_norm is None and reward_norm is None):
            return
        k = self.tensor_keys
        reward = read_entry(tensordict, k.reward, self).squeeze(-1)
        alive = self._valid_mask(tensordict, k.alive, reward)
        if reward_norm is not None:
            self.two_hot.update(reward, alive)
        if observation_norm is not None:
            observation_norm.update(agents_first(read_entry(tensordict, k.observation, self)), agents_first(alive, 0))

    def _kl(self, model: TensorDictBase, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """KL ``[*B, T, N]`` of posterior and prior, in nats: once to move the prior only, once the posterior only."""
        k, who = self.tensor_keys, self.world_model
        if k.dynamics_kl in who.out_keys:
            dynamics = read_output(model, k.dynamics_kl, who, (*shape, 1)).squeeze(-1)
            return dynamics, read_output(model, k.representation_kl, who, (*shape, 1)).squeeze(-1)
        posterior = read_output(model, k.posterior, who, (*shape, None, None))
        return balanced_kl(posterior, read_output(model, k.prior, who, posterior.shape))

    def _reconstruction(self, model: TensorDictBase) -> Tensor:
        """Squared error ``[*B, T, N]``, summed over the observation.

        It is in normalised units if the model normalises observations. Images count from 0 to 1.
        """
        k = self.tensor_keys
        target = model[k.observation]
        predicted = read_output(model, k.reconstruction, self.world_model, target.shape)
        target = target.float() / 255 if target.dtype == torch.uint8 else target
        error = predicted - target
        if (norm := getattr(self.world_model, "observation_norm", None)) is not None:
            error = error / norm.agent_scale
        return error.square().flatten(model[self.tensor_keys.reward].ndim - 1).sum(-1)

    def _continuation(self, model: TensorDictBase, ended: Tensor) -> Tensor:
        """Binary cross-entropy ``[*B, T, N]`` of c_t."""
        key = self.tensor_keys.continuation_logits
        logits = read_output(model, key, self.world_model, (*ended.shape, 1)).squeeze(-1)
        return binary_cross_entropy_with_logits(logits, (~ended).to(logits), reduction="none")

    def _teammate(self, model: TensorDictBase, shape: Sequence[int]) -> Tensor:
        """Negative log-likelihood ``[*B, T, N]`` of the others' actions at t, summed over the living others."""
        k = self.tensor_keys
        logits = read_output(model, k.teammate_logits, self.world_model, (*shape, None, None))
        if logits.shape[-2] == 0:
            return logits.new_zeros(logits.shape[:-2])
        actions = getattr(self.world_model, "actions", None) or DiscreteActions([logits.shape[-1]])
        action = read_entry(model, k.teammate_action, self, (*logits.shape[:-1], *actions.action_shape))
        error = actions.negative_log_likelihood(logits, action)
        if (alive := read_optional(model, k.teammate_alive, self, logits.shape[:-1])) is not None:
            error = torch.where(alive, error, 0.0)
        return error.sum(-1)
