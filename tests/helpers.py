"""Small models and random batches that many tests start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from matwm_rl.action_space import ActionSpace, DiscreteActions
from matwm_rl.box_actions import BoxActions
from matwm_rl.data import Replay, ReplayConfig, make_replay
from matwm_rl.envs import AgentLayout, MultiAgentEnv, make_env
from matwm_rl.modules import (
    ActorCriticConfig,
    CategoricalLatentConfig,
    GaussianLatentConfig,
    LatentConfig,
    LatentSpace,
    WorldModel,
    WorldModelConfig,
    make_actor,
    make_critic,
)
from matwm_rl.training.config import LearnerConfig
from matwm_rl.training.learner import Learner

COUNTS, GROUPS, SIZE = (4, 4, 3), (0, 0, 1), 5
"""The mock environment's agents: two hunters with 4 actions, one prey with 3, observations padded to 5."""
BOXES = BoxActions(low=[[-1.0, -1.0], [-1.0, -1.0], [0.0]], high=[[1.0, 1.0], [1.0, 1.0], [2.0]])
"""The same agents' actions with ``make_env("mock", continuous=True)``."""
LATENTS: dict[str, LatentConfig] = {
    "categorical": CategoricalLatentConfig(num_dims=4, num_classes=5),
    "gaussian": GaussianLatentConfig(num_dims=4),
}
"""Every latent space, small. In ``eval`` mode "gaussian" encodes without chance, so that two passes agree."""

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "latent": LATENTS["categorical"],
    "dropout": 0.0,
    "group_layers": True,
    "reward_interpolation": "raw",
}

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def randomize(module: M, scale: float = 0.2) -> M:
    """Add noise to all parameters: layers that start at zero would hide what flows through them."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return module


def make_layout(
    action_counts: Sequence[int] = COUNTS,
    group_index: Sequence[int] = GROUPS,
    observation_shape: Sequence[int] = (SIZE,),
    has_action_mask: bool = True,
    actions: ActionSpace | None = None,
) -> AgentLayout:
    """The mock environment's agents, or others; ``actions`` in place of ``action_counts``."""
    actions = DiscreteActions(list(action_counts)) if actions is None else actions
    names = [f"agent_{n}" for n in range(actions.num_agents)]
    groups = {f"group_{g}": [n for n, own in zip(names, group_index, strict=True) if own == g] for g in group_index}
    size = torch.Size(observation_shape).numel()
    return AgentLayout(
        agent_names=names,
        group_map=groups,
        group_index=list(group_index),
        actions=actions,
        observation_shape=tuple(observation_shape),
        observation_sizes=[size] * len(names),
        is_image=len(observation_shape) == 3,
        has_action_mask=has_action_mask and actions.has_probs,
    )


def make_model(
    action_counts: Sequence[int] = COUNTS,
    group_index: Sequence[int] = GROUPS,
    observation_shape: Sequence[int] = (SIZE,),
    has_action_mask: bool = True,
    parts: Mapping[str, Any] | None = None,
    actions: ActionSpace | None = None,
    **overrides: Any,
) -> WorldModel:
    """A small model; ``latent`` may be a name of :data:`LATENTS`."""
    if isinstance(latent := overrides.get("latent"), str):
        overrides["latent"] = LATENTS[latent]
    layout = make_layout(action_counts, group_index, observation_shape, has_action_mask, actions)
    return randomize(WorldModel.from_env(layout, WorldModelConfig(**(SMALL | overrides)), **(parts or {})))


def make_learner(world_model: WorldModel | None = None, *, share_by_group: bool = False, **config: Any) -> Learner:
    model = make_model() if world_model is None else world_model
    sizes = ActorCriticConfig(num_cells=8, share_by_group=share_by_group)
    actor, critic = (randomize(make(model, sizes)) for make in (make_actor, make_critic))
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
    boxes: BoxActions | None = None,
) -> TensorDict:
    """A batch [B, T]: random, but with successors that agree inside episodes and differ at their ends.

    Args:
        B: sequences.
        T: steps.
        action_counts: of each agent.
        observation_shape: of one agent; images are uint8.
        done: bool [B, T, N]; random by default, each agent's own, as its slices are its own.
        deaths: whether agents are dead at random steps.
        boxes: continuous actions in place of ``action_counts``.
    """
    action_counts = action_counts if boxes is None else boxes.sizes
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
        if boxes is not None:
            return boxes.random(torch.arange(A).expand(B, T, len(counts), A) < torch.tensor(list(counts)).unsqueeze(-1))
        return torch.stack([torch.randint(count, (B, T)) for count in counts], -1)

    observation = observe()
    alive = torch.rand(B, T, N) < 0.8 if deaths else torch.ones(B, T, N, dtype=torch.bool)
    survives = torch.rand(B, T, N) < 0.8 if deaths else alive
    action = act(action_counts)
    mask = (torch.rand(B, T, N, A) < 0.6) & (torch.arange(A) < torch.tensor(list(action_counts)).unsqueeze(-1))
    if boxes is None:
        mask.scatter_(-1, action.unsqueeze(-1), True)
    else:
        mask = boxes.legal().expand(B, T, N, A)
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


def random_latent(space: LatentSpace, *shape: int) -> Tensor:
    """Latents that a space can have."""
    shape = (*shape, space.num_dims)
    classes = space.num_classes
    return space.from_code(torch.randn(shape) if classes is None else torch.randint(classes, shape))


def random_imagined(S: int = 4, H: int = 5, *, model: WorldModel, deaths: bool = True) -> TensorDict:
    """What Imagination and LambdaReturn give, [S, H], with random numbers in it."""
    N, A, discrete = model.num_agents, model.num_actions, model.actions.has_probs
    teammates = 0 if model.teammates is None else N - 1

    def state() -> dict[str, Tensor]:
        return {
            "latent": random_latent(model.latent, S, H, N),
            "hidden": torch.randn(S, H, N, model.transformer.features),
            "teammate_logits": torch.randn(S, H, N, teammates, model.actions.num_parameters),
        }

    mask = ((torch.rand(S, H, N, A) < 0.6) & model.legal) if discrete else model.legal.expand(S, H, N, A).clone()
    mask[..., 0] = True
    agents = {
        **state(),
        "action_mask": mask,
        "action": model.actions.random(mask),
        "alive": (torch.rand(S, 1, N) < 0.7).expand(S, H, N) if deaths else torch.ones(S, H, N, dtype=torch.bool),
        "state_value": 5 * torch.randn(S, H, N, 1),
        "lambda_return": 5 * torch.randn(S, H, N, 1),
        "weight": torch.rand(S, H, N, 1),
    }
    after = {**state(), "reward": torch.randn(S, H, N, 1), "continuation": torch.rand(S, H, N, 1)}
    return TensorDict({"agents": agents, "next": {"agents": after}}, batch_size=[S, H])


def mock_env(**kwargs: Any) -> MultiAgentEnv:
    return make_env("mock", **({"seed": 0} | kwargs))


def mock_replay(steps: int = 60, env: MultiAgentEnv | None = None, **config: Any) -> Replay:
    sizes = {"capacity": 200, "sequence_length": 8, "sequences": 6, "starts_per_agent": 4, "context_length": 3}
    replay = make_replay(3, ReplayConfig(**(sizes | config)), seed=0)
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
