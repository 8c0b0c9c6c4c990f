"""What wrong inputs are given to: constructors and functions with arguments that are right, batches, environments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import gymnasium.spaces as sp
import numpy as np
import torch
from pettingzoo import ParallelEnv
from tensordict import NestedKey, TensorDictBase
from torchrl.envs.libs.pettingzoo import PettingZooWrapper

import matwm_rl as mw
from matwm_rl import presets
from matwm_rl.action_space import DiscreteActions
from matwm_rl.data import FocalSlices, UniformSliceSampler
from matwm_rl.envs import MockEnv, MultiAgentEnv
from matwm_rl.evaluation import CrossPlay, RandomActions, RunLog, evaluate
from matwm_rl.modules import (
    CategoricalLatent,
    FourierFeatures,
    GaussianLatent,
    Head,
    LatentLinear,
    MLPDecoder,
    MLPEncoder,
    ObservationReward,
    PointDistances,
    StackedLinear,
    StackedMLP,
    StackedNormSiLU,
    StateEstimator,
    Transformer,
    TwoHot,
)
from matwm_rl.objectives import MeanPolicyEntropy, ReturnScale, Signalling
from matwm_rl.training import prepare_process

SETTINGS = presets.tiny()


@dataclass
class Target:
    """A callable, arguments that are right, and the kinds of those that are made wrong; ``"?None"``: may be None."""

    call: Callable[..., Any]
    right: dict[str, Any]
    kinds: dict[str, str]
    allowed: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def make(self, **wrong: Any) -> Any:
        return self.call(**{**self.right, **wrong})

    def allows(self, name: str, value: Any) -> bool:
        return isinstance(value, str) and value in self.allowed.get(name, ())


@cache
def env() -> Any:
    return mw.make_env("mock", seed=0)


@cache
def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    model = mw.WorldModel.from_env(env(), SETTINGS.world_model)
    actor, critic = (make(model, SETTINGS.actor_critic) for make in (mw.make_actor, mw.make_critic))
    return {"world_model": model, "actor": actor, "critic": critic}


NETS = networks()
MODEL, ACTOR, CRITIC = NETS.values()
SIZES = {"num_cells": "size", "depth": "size"}
CELLS = {"num_cells": 8, "depth": 1}

TARGETS = [
    Target(CategoricalLatent, {"num_dims": 2, "num_classes": 3}, dict.fromkeys(("num_dims", "num_classes"), "size")),
    Target(CategoricalLatent, {"num_dims": 2, "num_classes": 3}, {"unimix": "share"}),
    Target(GaussianLatent, {"num_dims": 2}, {"num_dims": "size", "width": "positive", "step_scale": "positive"}),
    Target(
        Transformer,
        {"features": 8, "num_layers": 1, "num_heads": 2},
        {"features": "size", "num_layers": "size", "num_heads": "size", "dropout": "share", "final_norm": "switch"},
    ),
    Target(
        TwoHot,
        {},
        {"num_bins": "size", "limit": "positive", "interpolation": "choice"},
        {"interpolation": ("raw", "symlog")},
    ),
    Target(
        StackedLinear,
        {"in_features": 3, "out_features": 2, "stack_index": [0, 1]},
        {"in_features": "size", "out_features": "size", "stack_index": "index", "zero_init": "switch"},
    ),
    Target(StackedNormSiLU, {"features": 3, "stack_index": [0]}, {"features": "size", "stack_index": "index"}),
    Target(
        StackedMLP,
        {"in_features": 3, "out_features": 2, "stack_index": [0], **CELLS},
        {"in_features": "size", "out_features": "size", "num_cells": "size", "depth": "count", "stack_index": "index"},
    ),
    Target(
        LatentLinear,
        {"latent_size": 6, "out_features": 2, "stack_index": [0], "num_classes": 3},
        {"latent_size": "size", "num_classes": "size?None", "extra_features": "count"},
    ),
    Target(
        Head,
        {"in_features": 3, "out_features": 2, "group_index": [0], **CELLS},
        {"in_features": "size", "num_cells": "size", "depth": "count", "zero_init": "switch", "linear_skip": "switch"},
    ),
    Target(
        MLPEncoder,
        {"observation_size": 3, "out_features": 2, "group_index": [0], **CELLS},
        {"observation_size": "size", "out_features": "size", **SIZES},
    ),
    Target(
        MLPDecoder,
        {"latent_size": 3, "observation_size": 2, "group_index": [0], **CELLS},
        {"observation_size": "size", "latent_size": "size", **SIZES},
    ),
    Target(
        ObservationReward,
        {
            "observation_size": 4,
            "num_bins": 5,
            "actions": DiscreteActions([2]),
            "group_index": [0],
            "fourier_features": 0,
            "point_size": 2,
            **CELLS,
        },
        {"observation_size": "size", "num_bins": "size", "point_size": "count", **SIZES},
    ),
    Target(FourierFeatures, {}, {"num_frequencies": "count"}),
    Target(PointDistances, {"observation_size": 4, "size": 2}, {"observation_size": "size", "size": "size"}),
    Target(StateEstimator, {"world_model": MODEL}, {"world_model": "object", "history_length": "size"}),
    Target(mw.WorldModelPolicy, {"world_model": MODEL, "actor": ACTOR}, {"history_length": "size"}),
    Target(
        mw.Imagination,
        {"world_model": MODEL, "actor": ACTOR, "horizon": 3},
        {"world_model": "object", "horizon": "size", "precision": "choice"},
        {"precision": ("float32", "bfloat16")},
    ),
    Target(mw.make_actor, {"world_model": MODEL}, {"world_model": "object"}),
    Target(mw.make_critic, {"world_model": MODEL}, {"world_model": "object"}),
    Target(mw.make_actor, {"world_model": MODEL}, {"config": "object?None"}),
    Target(mw.Learner, NETS, {"world_model": "object", "actor": "object", "critic": "object", "config": "object?None"}),
    Target(mw.LambdaReturn, {"critic": CRITIC}, {"critic": "object", "gamma": "share", "lmbda": "share"}),
    Target(mw.CriticLoss, {"critic_network": CRITIC}, {"critic_network": "object"}),
    Target(
        mw.ActorLoss,
        {"actor_network": ACTOR, "num_agents": 3},
        {
            "num_agents": "size",
            "entropy_coeff": "weight",
            "advantage": "choice",
            "objective": "choice",
            "regularizers": "choice",
            "clip_epsilon": "weight",
        },
        {"advantage": ("return_scale", "standardize"), "objective": ("ppo", "reinforce")},
    ),
    Target(
        mw.WorldModelLoss,
        {"world_model": MODEL},
        {"world_model": "object", "free_nats": "weight", "weights": "object?None"},
    ),
    Target(MeanPolicyEntropy, {}, {"coeff": "weight"}),
    Target(Signalling, {"coeff": 1.0}, {"coeff": "weight", "tolerance": "weight"}),
    Target(ReturnScale, {"num_agents": 2}, {"num_agents": "size", "decay": "share"}),
    Target(mw.RecencySliceSampler, {"slice_len": 3}, {"slice_len": "size", "decay": "share", "num_shares": "size"}),
    Target(
        UniformSliceSampler, {"slice_len": 3}, {"slice_len": "size", "num_shares": "size", "generator": "object?None"}
    ),
    Target(FocalSlices, {"num_agents": 3}, {"num_agents": "size", "num_envs": "size?None"}),
    Target(
        mw.make_replay,
        {"num_agents": 3, "config": SETTINGS.replay},
        {"num_agents": "size", "config": "object?None", "num_envs": "size", "device": "text", "seed": "count?None"},
    ),
    Target(DiscreteActions, {}, {"counts": "index"}),
    Target(
        MockEnv,
        {},
        {"episode_length": "size", "death_step": "size?None", "ending": "choice"},
        {"ending": ("truncate", "terminate", "alternate")},
    ),
    Target(
        mw.make_env,
        {"name": "mock"},
        {"name": "text", "num_envs": "size", "seed": "count?None", "parallel": "switch", "image_size": "size"},
    ),
    Target(mw.MultiAgentEnv, {}, {"env": "object"}),
    Target(mw.MultiAgentEnv, {"env": MockEnv()}, {"image_size": "size"}),
    Target(evaluate, {"env": env(), "policy": RandomActions()}, {"episodes": "size"}),
    Target(
        CrossPlay,
        {"policy": RandomActions(), "opponents": RandomActions(), "layout": env().layout, "groups": ["prey"]},
        {"policy": "object", "opponents": "object", "layout": "object"},
    ),
    Target(
        RunLog,
        {"run_dir": tempfile.gettempdir(), "total_steps": 3, "progress": False, "logger": None},
        {"total_steps": "size", "progress": "switch", "logger": "choice?None", "resume_from": "count?None"},
    ),
    Target(
        prepare_process,
        {"num_threads": 1},
        {"num_threads": "size", "matmul_precision": "choice"},
        {"matmul_precision": ("highest", "high", "medium")},
    ),
]


@dataclass
class Batch:
    """What reads batches, batches that are right, and the entries that it reads."""

    name: str
    reader: Callable[[TensorDictBase], Any]
    make: Callable[[], TensorDictBase]
    keys: list[NestedKey]
    optional: tuple[NestedKey, ...] = ()


def loose(data: TensorDictBase) -> Callable[[], TensorDictBase]:
    """Make copies whose groups take entries of any number of agents, as wrong data has."""

    def make() -> TensorDictBase:
        copy = data.clone()
        for group in (copy.get("agents"), copy.get(("next", "agents"), None), copy.get("history", None)):
            if group is not None:
                group.batch_size = data.batch_size
        return copy

    return make


@cache
def BATCHES() -> list[Batch]:  # noqa: N802
    plain = env().rollout(12, break_when_any_done=False)
    focal = mw.add_agent_entries(plain).reshape(2, 6).contiguous()
    imagination = mw.Imagination(MODEL, ACTOR, horizon=3)
    returns = mw.LambdaReturn(CRITIC)
    policy = mw.WorldModelPolicy(MODEL, ACTOR, history_length=4)
    acting = mw.make_env("mock", seed=0, num_envs=2).append_transform(policy.make_tensordict_primer()).reset()
    dreams = returns(imagination(focal)).contiguous()
    loss, actor_loss, critic_loss = mw.WorldModelLoss(MODEL), mw.ActorLoss(ACTOR, num_agents=3), mw.CriticLoss(CRITIC)

    def extend(data: TensorDictBase) -> None:
        replay = mw.make_replay(3, SETTINGS.replay)
        replay.extend(plain)
        replay.extend(data)

    alive: tuple[NestedKey, ...] = (("agents", "alive"), ("next", "agents", "alive"), ("agents", "teammate_alive"))
    read: list[NestedKey] = [key for key in loss.in_keys if key in focal.keys(True)]
    model_keys: list[NestedKey] = [key for key in MODEL.in_keys if key in focal.keys(True)]
    mask: NestedKey = ("agents", "action_mask")
    return [
        Batch("WorldModel", MODEL, loose(focal), model_keys),
        Batch("WorldModelLoss", loss, loose(focal), read, alive),
        Batch("Imagination", imagination, loose(focal), list(imagination.in_keys), alive),
        Batch("LambdaReturn", returns, loose(dreams), list(returns.in_keys)),
        Batch("ActorLoss", actor_loss, loose(dreams), list(actor_loss.in_keys), (*alive, mask)),
        Batch(
            "CriticLoss", critic_loss, loose(dreams), [k for k in critic_loss.in_keys if k in dreams.keys(True)], alive
        ),
        Batch(
            "WorldModelPolicy", policy, loose(acting), [key for key in policy.in_keys if key != mw.keys.ALIVE]
        ),  # optional
        Batch("Replay", extend, loose(plain), list(mw.data.REPLAY_KEYS)),
    ]


@dataclass
class Environment:
    """An environment that is made wrong by a value."""

    name: str
    kind: str
    make: Callable[[Any], Any]
    is_bad: Callable[[Any], bool] = lambda value: True


def _no_family(value: Any) -> bool:
    return not (isinstance(value, str) and value.partition("/")[0] in ("mock", "mpe2", "vmas", "butterfly"))


class Game(ParallelEnv):
    """A PettingZoo environment of two agents; what the second one is given in the third step may be wrong."""

    metadata = {"name": "game"}
    possible_agents = ["a_0", "a_1"]
    box = sp.Box(-9, 9, (3,), np.float32)

    def __init__(self, **wrong: Any) -> None:
        self.wrong = wrong

    def observation_space(self, agent: str) -> Any:
        return sp.Dict({"observation": self.box, "action_mask": sp.Box(0, 1, (3,), np.int8)})

    def action_space(self, agent: str) -> Any:
        return sp.Discrete(3)

    def _given(self, what: str, right: Any) -> dict[str, Any]:
        return {"a_0": right, "a_1": self.wrong.get(what, right) if self.steps == 3 else right}

    def _observe(self) -> dict[str, Any]:
        observations, masks = self._given("observation", np.zeros(3)), self._given("mask", np.ones(3))
        return {name: {"observation": observations[name], "action_mask": masks[name]} for name in observations}

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.steps, self.agents = 0, list(self.possible_agents)
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        flags = dict.fromkeys(self.agents, False)
        return self._observe(), self._given("reward", 1.0), flags, flags, {agent: {} for agent in self.agents}


def play(**wrong: Any) -> Any:
    """Play a game in which something is wrong."""
    return MultiAgentEnv(PettingZooWrapper(Game(**wrong), use_mask=True, done_on_any=False)).rollout(4)


def _no_single_number(value: Any) -> bool:
    return not isinstance(value, bool) and not (isinstance(value, list) and len(value) == 1)


ENVIRONMENTS = [
    Environment("reward", "real", lambda value: play(reward=value), _no_single_number),
    Environment("observation", "real", lambda value: play(observation=value)),
    Environment("mask", "real", lambda value: play(mask=value)),
    Environment("name", "text", mw.make_env),
    Environment("environment", "choice", lambda value: mw.make_env(f"x{value}"), _no_family),
    Environment("episode_length", "size", lambda value: mw.make_env("mock", episode_length=value)),
    Environment("batch_size", "size", lambda value: MockEnv(batch_size=[2, value])),
]
