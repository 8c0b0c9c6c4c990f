"""Small models and random batches that many tests start from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.data import Replay, make_replay
from matwm_rl.envs import MultiAgentEnv, make_env
from matwm_rl.modules import DiscreteLatent, Latent, LatentCode, WorldModel, WorldModelConfig, make_actor, make_critic
from matwm_rl.training.learner import Learner, LearnerConfig

COUNTS, GROUPS, SIZE = (4, 4, 3), (0, 0, 1), 5
"""The mock environment's agents: two hunters with 4 actions, one prey with 3, observations padded to 5."""
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "num_dims": 4,
    "num_classes": 5,
    "dropout": 0.0,
    "group_layers": True,
    "reward_interpolation": "raw",
}

LATENTS = ["categorical", "fsq", "gaussian"]
"""Names of all latent codes."""
EXACT = ["fsq", "gaussian"]
"""Those that in ``eval`` mode encode without chance, so that two passes over the same data agree."""

STATE_KEYS: list[NestedKey] = [keys.LATENT, keys.HIDDEN, keys.TEAMMATE_LOGITS]
"""Of s_t = (z_t, h_t, p_t)."""

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def randomize(module: M, scale: float = 0.2) -> M:
    """Add noise to all parameters: layers that start at zero would hide what flows through them."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return module


def make_model(
    action_counts: Sequence[int] = COUNTS,
    group_index: Sequence[int] = GROUPS,
    observation_shape: Sequence[int] = (SIZE,),
    has_action_mask: bool = True,
    **overrides: Any,
) -> WorldModel:
    config = WorldModelConfig(**(SMALL | overrides))
    return randomize(
        WorldModel.from_layout(
            observation_shape=observation_shape,
            action_counts=action_counts,
            group_index=group_index,
            has_action_mask=has_action_mask,
            config=config,
        )
    )


def make_learner(world_model: WorldModel | None = None, *, share_by_group: bool = False, **config: Any) -> Learner:
    model = make_model() if world_model is None else world_model
    actor, critic = (
        randomize(make(model, num_cells=8, share_by_group=share_by_group)) for make in (make_actor, make_critic)
    )
    return Learner(model, actor, critic, LearnerConfig(**({"horizon": 3} | config)))


def others(agent: int, num_agents: int) -> list[int]:
    return [n for n in range(num_agents) if n != agent]


def random_batch(
    B: int = 3,
    T: int = 7,
    *,
    action_counts: Sequence[int] = COUNTS,
    observation_shape: Sequence[int] = (SIZE,),
    done: Tensor | None = None,
    deaths: bool = True,
) -> TensorDict:
    """A focal batch [B, T]: random, but with successors that agree inside episodes and differ at their ends.

    Args:
        B: sequences.
        T: steps.
        action_counts: of each agent.
        observation_shape: of one agent; images are uint8.
        done: bool [B, T, N]; random by default, each agent's own, as its slices are its own.
        deaths: whether agents are dead at random steps.
    """
    N, A = len(action_counts), max(action_counts)
    done = torch.rand(B, T, N) < 0.25 if done is None else done
    last = done.clone()
    last[:, -1] = True

    def following(value: Tensor, apart: Tensor) -> Tensor:
        inner = last.view(*last.shape, *[1] * (value.ndim - 3))
        return torch.where(inner, apart, value.roll(-1, 1))

    def observe() -> Tensor:
        if len(observation_shape) == 3:
            return torch.randint(256, (B, T, N, *observation_shape), dtype=torch.uint8)
        return torch.randn(B, T, N, *observation_shape)

    def act(counts: Sequence[int]) -> Tensor:
        return torch.stack([torch.randint(count, (B, T)) for count in counts], -1)

    observation = observe()
    alive = torch.rand(B, T, N) < 0.8 if deaths else torch.ones(B, T, N, dtype=torch.bool)
    survives = torch.rand(B, T, N) < 0.8 if deaths else alive
    action = act(action_counts)
    mask = (torch.rand(B, T, N, A) < 0.6) & (torch.arange(A) < torch.tensor(list(action_counts)).unsqueeze(-1))
    mask.scatter_(-1, action.unsqueeze(-1), True)
    teammates = [act([action_counts[j] for j in others(i, N)]) for i in range(N)] if N > 1 else []
    agents = {
        "observation": observation,
        "action": action,
        "action_mask": mask,
        "alive": alive,
        "teammate_action": torch.stack(teammates, 2) if N > 1 else torch.zeros(B, T, 1, 0, dtype=torch.long),
        "teammate_alive": torch.rand(B, T, N, N - 1) < (0.8 if deaths else 2.0),
    }
    after = {
        "observation": following(observation, observe()),
        "alive": following(alive, survives),
        "reward": 5 * torch.randn(B, T, N, 1),
        "done": done.unsqueeze(-1),
        "terminated": (done & (torch.rand(B, T, N) < 0.5)).unsqueeze(-1),
    }
    return TensorDict({"agents": agents, "next": {"agents": after}}, batch_size=[B, T])


def random_latent(code: LatentCode, *shape: int) -> Latent:
    """Latents that a code can have."""
    shape = (*shape, code.num_dims)
    discrete = isinstance(code, DiscreteLatent)
    return code.from_code(torch.randint(code.num_classes, shape) if discrete else torch.randn(shape))


def read_keys(model: WorldModel) -> list[NestedKey]:
    """What actors and critics read of s_t: of a multi-hot latent the positions of its ones."""
    return [keys.LATENT_ONES if model.latent.multi_hot else keys.LATENT, keys.HIDDEN, keys.TEAMMATE_LOGITS]


def random_imagined(S: int = 4, H: int = 5, *, model: WorldModel, deaths: bool = True) -> TensorDict:
    """What Imagination and LambdaReturn give, [S, H], with random numbers in it."""
    N, A = model.num_agents, model.num_actions
    teammates = 0 if model.teammates is None else N - 1

    def state() -> dict[str, Tensor]:
        latent = random_latent(model.latent, S, H, N)
        return {
            "latent": latent.value,
            **({} if latent.ones is None else {"latent_ones": latent.ones}),
            "hidden": torch.randn(S, H, N, model.transformer.features),
            "teammate_logits": torch.randn(S, H, N, teammates, A),
        }

    mask = (torch.rand(S, H, N, A) < 0.6) & model.legal
    mask[..., 0] = True
    agents = {
        **state(),
        "action_mask": mask,
        "action": torch.distributions.Categorical(mask.float()).sample(),
        "alive": (torch.rand(S, 1, N) < 0.7).expand(S, H, N) if deaths else torch.ones(S, H, N, dtype=torch.bool),
        "state_value": 5 * torch.randn(S, H, N, 1),
        "lambda_return": 5 * torch.randn(S, H, N, 1),
        "weight": torch.rand(S, H, N, 1),
    }
    after = {**state(), "reward": torch.randn(S, H, N, 1), "continuation": torch.rand(S, H, N, 1)}
    return TensorDict({"agents": agents, "next": {"agents": after}}, batch_size=[S, H])


def mock_env(**kwargs: Any) -> MultiAgentEnv:
    return make_env("mock", **({"seed": 0} | kwargs))


def mock_replay(steps: int = 60, env: MultiAgentEnv | None = None, **kwargs: Any) -> Replay:
    options = {"sequence_length": 8, "sequences_per_agent": 2, "starts_per_agent": 4, "context_length": 3, "seed": 0}
    replay = make_replay(capacity=200, num_agents=3, **(options | kwargs))
    env = mock_env() if env is None else env
    replay.extend(env.rollout(steps, break_when_any_done=False))
    return replay


def total(losses: TensorDictBase) -> Tensor:
    """Sum of all losses, as the learner does it."""
    return torch.stack([value for key, value in losses.items() if key.startswith("loss_")]).sum()


def grads(loss: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of a loss, zeros where the graph does not reach; the graph is kept."""
    parameters = list(parameters)
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)) if parameters else []


def grad_norm(loss: Tensor, module: nn.Module) -> float:
    return sum(float(grad.square().sum()) for grad in grads(loss, module.parameters())) ** 0.5
