"""The same policy in workers of a Ray cluster, and replay in one of its actors. One cluster serves all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tensordict import TensorDictBase
from torchrl.collectors.distributed import RayCollector

from matwm_rl import keys, presets
from matwm_rl.data import ReplayConfig, make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModelPolicy, make_critic
from matwm_rl.training import Learner, fail_with_workers, load_checkpoint, save_checkpoint
from tests.test_collectors import (
    Telling,
    assert_unbroken,
    episodes_of,
    first_with_same_memory,
    insist_on,
    insists_on,
    make_policy,
    make_small_replay,
)

WHOLE = {"trajs_per_batch": 1}
CAT = {"traj_format": "cat"}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def kill(collector: RayCollector) -> int:
    """Kill the last worker as the operating system would; return its pid."""
    pid: int = ray.get(collector.remote_collectors[-1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    return pid


@contextmanager
def collecting(make: list[Any], policy: WorldModelPolicy, **kwargs: Any) -> Iterator[RayCollector]:
    inner = {"auto_register_policy_transforms": True, **kwargs.pop("inner", {})}
    options = {"total_frames": 10**6, "collector_kwargs": inner, "remote_configs": {"num_cpus": 0}, **kwargs}
    collector = RayCollector(make, policy, **options)
    collector.update_policy_weights_()
    try:
        yield collector
    finally:
        collector.shutdown()


class Counted(Telling):
    """Counts how often it is pickled."""

    pickled = 0

    def __getstate__(self) -> dict[str, Any]:
        Counted.pickled += 1
        return self.__dict__.copy()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every tensor that is sent to a worker."""
    sizes: list[int] = []
    send = torch.distributed.ProcessGroupGloo.send

    def measured(group: Any, tensors: list[torch.Tensor], *args: Any) -> Any:
        sizes.extend(tensor.nbytes for tensor in tensors)
        return send(group, tensors, *args)

    monkeypatch.setattr(torch.distributed.ProcessGroupGloo, "send", measured)
    return sizes


def test_workers_in_step_with_batched_environments(sent: list[int]) -> None:
    make = partial(make_env, "vmas/simple_tag", num_envs=3, max_steps=7)
    env = make()
    policy = make_policy(env, hidden_size=128)
    policy.__class__ = Counted
    weights = sum(tensor.nbytes for tensor in [*policy.parameters(), *policy.buffers()])
    assert weights < len(ray.cloudpickle.dumps(policy)) < 1.2 * weights
    Counted.pickled = 0
    replay = make_small_replay(env, num_envs=6)
    workers = [partial(make, seed=seed) for seed in (1, 2)]
    with collecting(workers, policy, sync=True, frames_per_batch=30) as collector:
        # The world model goes to every worker once, and so do its weights with every synchronisation. With the first of
        # them TorchRL 0.14.1 connects, and sends them twice.
        assert Counted.pickled == 2
        assert sum(sent) == 2 * 2 * weights
        batches = iter(collector)
        first = next(batches)
        assert first.batch_size == (2, 3, 5)
        assert not torch.equal(first[0][keys.OBSERVATION], first[1][keys.OBSERVATION])
        assert (first["sharing"] == torch.tensor(first_with_same_memory(policy))).all()
        replay.extend(first)
        for action in (1, 2):
            sent.clear()
            insist_on(policy, action)
            collector.update_policy_weights_()
            assert sum(sent) == 2 * weights
            data = next(batches)
            assert (data[keys.ACTION] == action).all()
            replay.extend(data)
        with pytest.raises(RuntimeError) as error, fail_with_workers(collector.remote_collectors):
            pid = kill(collector)
            next(batches)
        assert f"pid: {pid}" in str(error.value)
    assert Counted.pickled == 2
    assert replay.env_steps == 90
    assert_unbroken(replay)


@pytest.mark.slow
def test_workers_at_their_own_pace() -> None:
    # The length of an episode tells whose it is.
    make = [partial(make_env, "mock", episode_length=length) for length in (4, 6)]
    env = make[0]()
    policy = make_policy(env)
    replay = make_small_replay(env)
    acting: dict[int, list[bool]] = {4: [], 6: []}
    kwargs = {"frames_per_batch": 6, "update_after_each_batch": True, "inner": CAT, **WHOLE}
    with collecting(make, policy, **kwargs) as collector:
        for data in collector:
            replay.extend(data)
            for episode in episodes_of(data):
                acting[len(episode)].append(bool(insists_on(episode, 1).all()))
            # Both have begun; what is changed now, a worker hears of when it has delivered its next batch.
            if all(acting.values()):
                insist_on(policy, 1)
            if all(heard[-1:] == [True] for heard in acting.values()):
                break
            assert replay.env_steps < 100
        # Where its weights are being sent, the error would be of a broken connection.
        with pytest.raises(RuntimeError) as error, fail_with_workers(collector.remote_collectors):
            pid = kill(collector)
            collector.update_policy_weights_()
        assert f"pid: {pid}" in str(error.value)
    assert not any(heard[0] for heard in acting.values())
    assert all(heard == sorted(heard) for heard in acting.values())
    assert_unbroken(replay)


@pytest.mark.slow
def test_workers_fill_replay_in_an_actor(tmp_path: Path) -> None:
    make = [partial(make_env, "mock", episode_length=length) for length in (4, 6)]
    env = make[0]()
    policy = make_policy(env)
    config = ReplayConfig(capacity=600, sequences=6, sequence_length=8, starts_per_agent=4, context_length=2)
    replay = make_replay(env.num_agents, config, seed=0, remote_config={"num_cpus": 0})
    assert not replay.can_sample and not replay.starts.can_sample() and replay.env_steps == len(replay) == 0
    with collecting(make, policy, frames_per_batch=6, replay_buffer=replay.sequences, **WHOLE) as collector:
        for nothing in collector:
            assert nothing is None
            if replay.env_steps >= 60:
                break
    assert replay.can_sample and replay.starts.can_sample()
    assert len(replay) == replay.env_steps <= replay.capacity == 600
    # Here is the same state, so that the same batches follow.
    here = make_replay(env.num_agents, config)
    here.load_state_dict(replay.state_dict())
    for buffer, same in ((replay.sequences, here.sequences), (replay.starts, here.starts)):
        assert_equal(buffer.sample(), same.sample())
    assert_unbroken(here)

    cfg, model = presets.tiny(), policy.world_model
    learner = Learner(model, policy.actor, make_critic(model), cfg.learner)
    steps = replay.env_steps
    save_checkpoint(tmp_path, learner=learner, replay=replay, env_steps=steps)
    expected = replay.starts.sample()
    replay.extend(env.rollout(8, break_when_any_done=False))
    assert load_checkpoint(tmp_path, learner=learner, replay=replay)["env_steps"] == steps == len(replay)
    assert_equal(replay.starts.sample(), expected)
    with pytest.raises(ValueError, match="replay was built with num_envs=1"):
        replay.extend(make_env("mock", num_envs=2).rollout(3))
    replay.sequences.shutdown()


def assert_equal(one: TensorDictBase, other: TensorDictBase) -> None:
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key in one.keys(True, True):
        assert torch.equal(one[key], other[key]), key
