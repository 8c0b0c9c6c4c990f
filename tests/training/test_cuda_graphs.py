"""On a GPU, updates that are CUDA graphs learn what the same updates learn without graphs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, make_actor, make_critic
from matwm_rl.training import Learner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_batches(cfg: presets.TrainConfig, count: int) -> list:
    replay = make_replay(3, replace(cfg.replay, capacity=1000), num_envs=2, seed=0)
    replay.extend(make_env("mock", seed=0, num_envs=2).rollout(200, break_when_any_done=False))
    return [(replay.sequences.sample().cuda(), replay.starts.sample().cuda()) for _ in range(count)]


def make_learner(cfg: presets.TrainConfig, cuda_graphs: bool) -> Learner:
    torch.manual_seed(0)
    world_model = WorldModel.from_env(make_env("mock", seed=0), cfg.world_model).cuda()
    actor, critic = (make(world_model, cfg.actor_critic).cuda() for make in (make_actor, make_critic))
    return Learner(world_model, actor, critic, replace(cfg.learner, cuda_graphs=cuda_graphs))


def learn(learner: Learner, batches: list, critics_first: int = 4) -> None:
    for sequences, starts in batches:
        torch.cuda.manual_seed(learner.updates)
        learner.update_world_model(sequences)
        torch.cuda.manual_seed(100 + learner.updates)
        learner.update_agents(starts, train_actors=learner.updates >= critics_first)


def largest_difference(first: Learner, second: Learner) -> float:
    pairs = zip(first.world_model_loss.parameters(), second.world_model_loss.parameters(), strict=True)
    networks = [*pairs, *zip(first.actor.parameters(), second.actor.parameters(), strict=True)]
    networks += zip(first.critic.parameters(), second.critic.parameters(), strict=True)
    return max(float((one - other).abs().max()) for one, other in networks)


@pytest.mark.parametrize("preset", ["vectors", "tiny"])
def test_graphs_learn_what_eager_updates_learn(preset: str) -> None:
    cfg = presets.PRESETS[preset]()
    cfg = replace(cfg, learner=replace(cfg.learner, lr_decay_updates=3))
    batches = make_batches(cfg, 12)
    eager, graphed = (make_learner(cfg, cuda_graphs) for cuda_graphs in (False, True))
    moved = make_learner(cfg, cuda_graphs=False)
    for learner in (eager, graphed):
        learn(learner, batches)
    assert graphed.captures_graphs and not eager.captures_graphs
    assert largest_difference(eager, graphed) < 0.02 * largest_difference(moved, graphed)


def test_a_loaded_state_is_what_the_next_graphs_go_on_from() -> None:
    cfg = presets.vectors()
    batches = make_batches(cfg, 12)
    through, loaded = (make_learner(cfg, cuda_graphs=True) for _ in range(2))
    learn(loaded, batches)  # its graphs are captured
    learn(through, batches[:6])
    loaded.load_state_dict(deepcopy(through.state_dict()))
    learn(through, batches[6:])
    learn(loaded, batches[6:])
    assert largest_difference(through, loaded) < 1e-3
