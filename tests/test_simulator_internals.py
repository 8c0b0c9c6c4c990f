"""These fail when a new release of TorchRL or VMAS changes the attributes that the library relies upon."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchrl.envs import PettingZooWrapper
from torchrl.envs.libs.vmas import VmasEnv
from torchrl.envs.model_based import ModelBasedEnvBase

from matwm_rl.torchrl_internals import lock_batch, simulator, vmas_random_state


def vmas_env(seed: int = 0) -> VmasEnv:
    return VmasEnv("simple_tag", num_envs=2, continuous_actions=False, max_steps=3, seed=seed)


def test_the_simulator_behind_pettingzoo() -> None:
    from mpe2 import simple_tag_v3

    raw = simple_tag_v3.parallel_env(render_mode="rgb_array")
    env = PettingZooWrapper(raw, use_mask=True)
    assert simulator(env) is raw
    env.reset()
    assert simulator(env).agents == raw.possible_agents and simulator(env).render_mode == "rgb_array"


def test_the_simulator_behind_vmas() -> None:
    env = vmas_env()
    raw = simulator(env)
    env.step(env.rand_action(env.reset()))
    assert raw.max_steps == 3
    assert raw.steps.tolist() == [1, 1]
    assert raw.scenario.done().tolist() == [False, False]


def test_vmas_has_one_random_state() -> None:
    first, second = vmas_env(), vmas_env()
    state = vmas_random_state(first)
    assert vmas_random_state(second) is state
    current = (torch.random.get_rng_state(), np.random.get_state(), random.getstate())
    assert [type(part) for part in state] == [type(part) for part in current]

    def start() -> torch.Tensor:
        return first.reset()["agent", "observation"]

    kept = list(state)
    expected = start()
    assert not torch.equal(start(), expected)
    state[:] = kept
    assert torch.equal(start(), expected), "changed in place, it decides what is drawn next"


def test_a_batch_is_locked() -> None:
    class Model(ModelBasedEnvBase):
        def _reset(self, tensordict: object, **kwargs: object) -> None: ...

    env = Model(torch.nn.Identity(), batch_size=[2])
    assert not env.batch_locked
    with pytest.raises(RuntimeError):
        env.batch_locked = True
    lock_batch(env)
    assert env.batch_locked
