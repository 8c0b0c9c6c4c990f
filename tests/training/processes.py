"""What the processes of test_distributed.py do, in a module of its own that they can import."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Categorical

from matwm_rl import keys, presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import ActorCriticConfig, WorldModel, make_actor, make_critic
from matwm_rl.modules.encoders import CoordinateEncoderConfig
from matwm_rl.modules.latents import GaussianLatentConfig
from matwm_rl.objectives import Signalling
from matwm_rl.processes import learning_together
from matwm_rl.training import Learner, distribute
from tests.training.helpers import leaves

WORLD = 2
UPDATES = 10
# Each process has 14 slices and 14 starts of every agent, which make two equal minibatches. No other size is a multiple
# of 14, so that noise can be split.
PART = 14


def paper() -> presets.TrainConfig:
    """The paper's losses: REINFORCE, return scales, categorical codes."""
    return presets.tiny()


def vectors() -> presets.TrainConfig:
    """The losses of `vectors`: PPO in several epochs, standardised advantages, bonuses, norms of the world model."""
    small, cfg = presets.tiny(), presets.vectors()
    world_model = replace(
        cfg.world_model,
        hidden_size=32,
        num_heads=2,
        latent=GaussianLatentConfig(num_dims=4),
        encoder=CoordinateEncoderConfig(),
        teammate_hidden_size=16,
    )
    learner = replace(cfg.learner, horizon=3, agent_minibatches=2)
    return replace(
        cfg, env="mock", world_model=world_model, learner=learner, replay=small.replay, actor_critic=small.actor_critic
    )


CASES = {"paper": paper, "vectors": vectors}


def make_learner(cfg: presets.TrainConfig, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    world_model = WorldModel.from_env(make_env("mock", seed=0), cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (make_actor, make_critic))
    return Learner(world_model, actor, critic, cfg.learner)


def make_batches(cfg: presets.TrainConfig) -> list[tuple[list[TensorDictBase], list[TensorDictBase]]]:
    """Parts of world-model batches and of starts, for every update."""
    torch.manual_seed(0)
    agents = 3
    config = replace(cfg.replay, sequences=agents * PART, sequence_length=5, starts_per_agent=PART, context_length=2)
    replays = []
    for rank in range(WORLD):
        env = make_env("mock", seed=rank, num_envs=2, episode_length=9 + 4 * rank, death_step=3 + 4 * rank)
        replays.append(make_replay(agents, config, num_envs=2, seed=rank))
        replays[-1].extend(env.rollout(60, break_when_any_done=False))

    def parts(name: str) -> list[TensorDictBase]:
        samples = [getattr(replay, name).sample() for replay in replays]
        return [sample.apply(lambda x: x.double() if x.is_floating_point() else x) for sample in samples]

    return [(parts("sequences"), parts("starts")) for _ in range(UPDATES)]


@contextmanager
def noise_of_whole_batch(rank: int | None) -> Iterator[None]:
    """Draw the noise of the whole batch, of which a process takes its part; `None`: all of it."""
    draws = iter(range(1_000_000))

    def drawn_by(draw: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def draw_like(like: Tensor) -> Tensor:
            (dim,) = (dim for dim, size in enumerate(like.shape) if size % PART == 0)
            shape = list(like.shape)
            shape[dim] *= 1 if rank is None else WORLD
            noise = draw(shape, generator=torch.Generator().manual_seed(next(draws)), dtype=like.dtype)
            return noise if rank is None else noise.narrow(dim, rank * PART, PART)

        return draw_like

    before = torch.randn_like, torch.rand_like
    torch.randn_like, torch.rand_like = drawn_by(torch.randn), drawn_by(torch.rand)
    try:
        yield
    finally:
        torch.randn_like, torch.rand_like = before


def learn(learner: Learner, cfg: presets.TrainConfig, rank: int | None) -> dict[str, Any]:
    """Update several times, with one part of every batch or with the whole."""
    metrics, checksums = [], []
    with noise_of_whole_batch(rank):
        for update, parts in enumerate(make_batches(cfg)):
            sequences, starts = (torch.cat(part) if rank is None else part[rank] for part in parts)
            metrics.append(learner.update_world_model(sequences).to_dict())
            checksums.append(checksum(learner))
            metrics.append(learner.update_agents(starts, train_actors=update > 1).to_dict())
            checksums.append(checksum(learner))
    return {"state": learner.state_dict(), "metrics": metrics, "checksums": checksums}


def checksum(learner: Learner) -> int:
    """Return a number that differs if any bit of the state does."""
    tensors = [value.numpy().tobytes() for value in leaves(learner.state_dict()).values() if isinstance(value, Tensor)]
    return zlib.crc32(b"".join(tensors))


def run(rank: int, folder: str) -> None:
    """Do all tasks as one of the connected processes, and write what they return."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD)
    tasks: list[Callable[[int], Any]] = [learn_in_parts, fail_in_one, give_parts_of_other_sizes, signal, refuse, send]
    results = {task.__name__: task(rank) for task in tasks}
    dist.destroy_process_group()
    torch.save(results, Path(folder) / f"{rank}.pt")


def learn_in_parts(rank: int) -> dict[str, Any]:
    """Let both cases learn; the second process begins with other weights, and must not keep them."""
    return {name: learn(distribute(make_learner(case(), seed=rank)), case(), rank) for name, case in CASES.items()}


def fail_in_one(rank: int) -> tuple[list[str], bool, list[int]]:
    """Give the second process a number that is not finite.

    Return the errors, whether a weight has changed, and a number for the state after each.
    """
    learner = distribute(make_learner(vectors(), seed=rank))
    losses = nn.ModuleList([learner.world_model_loss, learner.actor_loss, learner.critic_loss])
    before, messages, checksums = [parameter.detach().clone() for parameter in losses.parameters()], [], []
    updates = (learner.update_world_model, learner.update_agents)
    for parts, update in zip(make_batches(vectors())[0], updates, strict=True):
        if rank == 1:
            parts[rank]["agents", "observation"].fill_(torch.nan)
        try:
            update(parts[rank])
        except FloatingPointError as error:
            messages.append(str(error))
        checksums.append(checksum(learner))
    return messages, not all(map(torch.equal, before, losses.parameters())), checksums


def give_parts_of_other_sizes(rank: int) -> list[str]:
    """Return what is said of parts of different sizes."""
    learner = distribute(make_learner(paper(), seed=rank))
    messages = []
    for parts, update in zip(
        make_batches(paper())[0], (learner.update_world_model, learner.update_agents), strict=True
    ):
        try:
            update(parts[rank][rank:])
        except ValueError as error:
            messages.append(str(error))
    return messages


def signal(rank: int | None) -> list[Tensor]:
    """Return the bonus on signalling and its gradient, of a part in which other shares of the steps are unchanged."""
    rand = partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent, weight, valid = rand(6, 4, 3, 2), rand(6, 4, 3), rand(6, 4, 3) < 0.8
    latent[1:4] = latent[1:4, :1]  # unchanged
    logits = rand(6, 4, 3, 5).requires_grad_()
    rows = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    batch = TensorDict({keys.LATENT: latent[rows]})
    with learning_together(None if rank is None else dist.group.WORLD):
        bonus = Signalling(1.0)(batch, Categorical(logits=logits[rows]), weight[rows], valid[rows]).sum()
    (gradient,) = torch.autograd.grad(bonus, logits)
    if rank is not None:
        dist.all_reduce(gradient)
        gradient /= WORLD
    return [bonus.detach(), gradient]


def refuse(rank: int) -> list[str]:
    """Return why learners of two processes cannot learn together."""
    gamma = replace(paper(), learner=replace(paper().learner, gamma=0.5 + rank / 4))
    cells = replace(paper(), actor_critic=ActorCriticConfig(num_cells=8 + rank))
    messages = []
    for cfg, seed in ((paper(), 0), (gamma, rank), (cells, rank)):
        try:
            distribute(make_learner(cfg, seed))
        except ValueError as error:
            messages.append(str(error))
    return messages


def send(rank: int) -> dict[str, Any]:
    """Return what is sent to begin with, and how the world model's parameters are listed."""
    learner = make_learner(vectors(), seed=rank)
    with patch.object(dist, "broadcast_object_list", wraps=dist.broadcast_object_list) as broadcast:
        distribute(learner)
    (sent,) = (call.args[0] for call in broadcast.call_args_list)
    optimizers = (learner.world_model_optimizer, learner.actor_optimizer, learner.critic_optimizer)
    listed = [parameter for optimizer in optimizers for parameter in optimizer.param_groups[0]["params"]]
    world_model = list(learner.world_model.parameters())
    networks = nn.ModuleList([learner.world_model, learner.actor, learner.critic, learner.critic])  # and its EMA copy
    return {
        "sent": len(pickle.dumps(sent)),
        "state": sum(entry.nbytes for network in networks for entry in network.state_dict().values()),
        "of the world model": sum(parameter.nbytes for parameter in world_model),
        "entries": len(leaves(sent)),
        "listed": [sum(one is other for other in listed) for one in world_model],
    }
