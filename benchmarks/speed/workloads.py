"""What the speed benchmarks run: models of any number of agents, and replay of random episodes.

No script of its own: throughput.py, scaling.py and memory.py import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torchrl import torchrl_logger

from matwm_rl.action_space import DiscreteActions
from matwm_rl.data import Replay, ReplayConfig, make_replay
from matwm_rl.envs import AgentLayout
from matwm_rl.modules import ActorCriticConfig, WorldModel, WorldModelConfig, make_actor, make_critic
from matwm_rl.training import Learner, LearnerConfig

# TorchRL logs every storage that it allocates, which would clutter the progress lines.
torchrl_logger.setLevel("WARNING")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the workloads.

    The defaults are the paper's (Table C.6), with the observations and actions of simple_tag.

    Attributes:
        observation_size: entries of an agent's observation.
        num_actions: actions of an agent.
        starts: starts of imagination.
        context: steps of context before a start.
        horizon: imagined steps.
        sequences: of a world-model batch, over all agents.
        sequence_length: steps of a sequence.
        episode_length: steps of an episode.
        policy_context: steps of history that the acting policy sees.
        num_cells: width of actors and critics.
        model: fields of WorldModelConfig that differ from the paper's.
    """

    observation_size: int = 18
    num_actions: int = 5
    starts: int = 768
    context: int = 8
    horizon: int = 12
    sequences: int = 16
    sequence_length: int = 64
    episode_length: int = 25
    policy_context: int = 64
    num_cells: int = 512
    model: Mapping[str, Any] = field(default_factory=dict)


def model_config(sizes: Sizes) -> WorldModelConfig:
    """Return the paper's model, whose layers are all shared by all agents."""
    return WorldModelConfig(**sizes.model)


def make_learner(num_agents: int, sizes: Sizes, *, device: str = "cpu", **config: Any) -> Learner:
    """Initialise the models of ``num_agents`` agents and their optimizers.

    Args:
        num_agents: N.
        sizes: of the models, and the horizon.
        device: of the models.
        **config: fields of LearnerConfig.
    """
    names = [f"agent_{index}" for index in range(num_agents)]
    layout = AgentLayout(
        agent_names=names,
        group_map={"agent": names},
        group_index=[0] * num_agents,
        actions=DiscreteActions([sizes.num_actions] * num_agents),
        observation_shape=(sizes.observation_size,),
        observation_sizes=[sizes.observation_size] * num_agents,
        is_image=False,
        has_action_mask=False,
    )
    world_model = WorldModel.from_env(layout, model_config(sizes)).to(device)
    networks = ActorCriticConfig(num_cells=sizes.num_cells)
    actor, critic = (make(world_model, networks).to(device) for make in (make_actor, make_critic))
    # An update of the world model leaves it in evaluation mode, too: imagination uses no dropout.
    world_model.eval()
    return Learner(world_model, actor, critic, LearnerConfig(horizon=sizes.horizon, **config))


def random_replay(
    num_agents: int, sizes: Sizes, *, sequences_per_agent: int, starts_per_agent: int, device: str = "cpu"
) -> Replay:
    """Fill the replay of a training run with random episodes."""
    steps = max(20 * sizes.episode_length, 2 * sequences_per_agent * sizes.sequence_length, sizes.context + 1)
    config = ReplayConfig(
        capacity=steps,
        sequences=num_agents * sequences_per_agent,
        sequence_length=sizes.sequence_length,
        starts_per_agent=starts_per_agent,
        context_length=sizes.context,
    )
    replay = make_replay(num_agents, config, device=device, seed=0)
    replay.extend(random_rollout(steps, num_agents, sizes))
    return replay


def random_rollout(steps: int, num_agents: int, sizes: Sizes) -> TensorDict:
    """Return random numbers with the keys of a collected batch ``[steps]``; episodes end by a time limit."""
    observation = torch.randn(steps + 1, num_agents, sizes.observation_size)
    alive = torch.ones(steps, num_agents, dtype=torch.bool)
    done = (torch.arange(1, steps + 1) % sizes.episode_length == 0).unsqueeze(-1)
    agents = {
        "observation": observation[:-1],
        "action": torch.randint(sizes.num_actions, (steps, num_agents)),
        "action_mask": torch.ones(steps, num_agents, sizes.num_actions, dtype=torch.bool),
        "alive": alive,
    }
    following = {
        "agents": {"observation": observation[1:], "reward": torch.randn(steps, num_agents, 1), "alive": alive},
        "done": done,
        "terminated": torch.zeros_like(done),
    }
    return TensorDict({"agents": agents, "next": following}, batch_size=[steps])
