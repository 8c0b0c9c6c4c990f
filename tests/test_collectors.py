"""One policy object for every collector of TorchRL: in this process, in workers in step, in workers at their own pace.

Workers take seconds to start, so that there are few tests here, and each looks at much.
"""

from __future__ import annotations

import multiprocessing.reduction
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, Transform, TransformedEnv
from torchrl.weight_update import MultiProcessWeightSyncScheme

from matwm_rl import keys, presets
from matwm_rl.data import Replay, ReplayConfig, make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import ActorCriticConfig, StackedLinear, WorldModel, WorldModelPolicy, make_actor

MAX_STEPS = 7


class Telling(WorldModelPolicy):
    """Also writes, wherever it acts, which of its tensors share memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.out_keys = [*self.out_keys, "sharing"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        sharing = torch.tensor(first_with_same_memory(self))
        return super().forward(tensordict).set("sharing", sharing.expand(*tensordict.batch_size, -1))


def first_with_same_memory(module: nn.Module) -> list[int]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    addresses = [tensor.data_ptr() for _, tensor in named]
    return [addresses.index(address) for address in addresses]


def make_policy(env: EnvBase, hidden_size: int = 32) -> Telling:
    model = WorldModel.from_env(env, replace(presets.tiny().world_model, hidden_size=hidden_size))
    return Telling(model, make_actor(model, ActorCriticConfig(num_cells=16)), history_length=4)


@torch.no_grad()
def insist_on(policy: WorldModelPolicy, action: int) -> None:
    """A change of weights that shows in what agents do."""
    *_, last = (module for module in policy.actor.modules() if isinstance(module, StackedLinear))
    last.bias.zero_()[:, action] = 100


def insists_on(data: TensorDictBase, action: int) -> torch.Tensor:
    logits = data[keys.LOGITS]
    return logits[..., action] - logits[..., 0] > 50


@contextmanager
def collecting(make: EnvBase | list[Callable[[], EnvBase]], policy: nn.Module, **kwargs: Any) -> Iterator[Collector]:
    workers = {"num_collectors": len(make)} if isinstance(make, list) else {}
    options = {"total_frames": -1, "auto_register_policy_transforms": True, **workers, **kwargs}
    collector = Collector(make, policy, **options)
    try:
        yield collector
    finally:
        # Processes left behind would keep a failed test from ending.
        collector.shutdown()


def make_small_replay(env: EnvBase, num_envs: int = 1) -> Replay:
    config = ReplayConfig(capacity=600, sequences=6, sequence_length=8, starts_per_agent=4, context_length=2)
    return make_replay(env.layout.num_agents, config, num_envs=num_envs, seed=0)


def assert_unbroken(replay: Replay) -> None:
    """Every stored step but the last of an episode is followed by the one that it led to."""
    rows = replay.sequences.storage[:]
    goes_on = ~rows["next", "done"][:-1, ..., 0]
    assert goes_on.any() and not goes_on.all()
    assert torch.equal(rows["observation"][1:][goes_on], rows["next", "observation"][:-1][goes_on])
    # Slices carry it on to the losses.
    sample = replay.sequences.sample()
    goes_on = ~sample[keys.AGENT_DONE][:, :-1, ..., 0]
    assert torch.equal(sample[keys.OBSERVATION][:, 1:][goes_on], sample[keys.NEXT_OBSERVATION][:, :-1][goes_on])


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each new process is sent."""
    sizes: list[int] = []
    dump = multiprocessing.reduction.dump

    def measured(obj: object, file: Any, protocol: int | None = None) -> None:
        before = file.tell()
        dump(obj, file, protocol)
        sizes.append(file.tell() - before)

    monkeypatch.setattr(multiprocessing.reduction, "dump", measured)
    return sizes


def test_workers_in_step_with_batched_environments(sent: list[int]) -> None:
    make = partial(make_env, "vmas/simple_tag", num_envs=3, max_steps=MAX_STEPS)
    env = make()
    policy = make_policy(env, hidden_size=128)
    parameters = list(policy.parameters())
    replay = make_small_replay(env, num_envs=6)
    workers = [partial(make, seed=seed) for seed in (1, 2)]
    with collecting(workers, policy, sync=True, frames_per_batch=30) as collector:
        batches = iter(collector)
        first = next(batches)
        assert first.batch_size == (2, 3, 5)
        assert not torch.equal(first[0][keys.OBSERVATION], first[1][keys.OBSERVATION])
        assert len(first[keys.ACTION].unique()) > 1
        # The world model was not pickled with the policy, nor with the environment; its weights came in shared memory.
        assert len(sent) >= 2
        assert max(sent) < 0.1 * sum(parameter.nbytes for parameter in parameters)
        assert (first["sharing"] == torch.tensor(first_with_same_memory(policy))).all()
        replay.extend(first)
        for action in (1, 2):
            insist_on(policy, action)
            collector.update_policy_weights_()
            data = next(batches)
            assert (data[keys.ACTION] == action).all()
            replay.extend(data)
    # Here they are still the parameters that a learner's optimizers hold.
    assert all(one is other for one, other in zip(policy.parameters(), parameters, strict=True))
    assert replay.env_steps == 90
    assert_unbroken(replay)


def episodes_of(data: TensorDictBase) -> Iterable[TensorDictBase]:
    ends = (data[keys.DONE].squeeze(-1).nonzero().squeeze(-1) + 1).tolist()
    assert ends[-1] == len(data)
    return data.split([end - begin for begin, end in zip([0, *ends], ends, strict=False)])


def test_workers_at_their_own_pace() -> None:
    # The length of an episode tells whose it is.
    lengths = (4, 6)
    make = [partial(make_env, "mock", episode_length=length) for length in lengths]
    env = make[0]()
    policy = make_policy(env)
    replay = make_small_replay(env)
    renewed = dict.fromkeys(lengths, False)
    stale = 0
    whole = {"frames_per_batch": 12, "trajs_per_batch": 2, "traj_format": "cat"}
    # The other scheme of TorchRL: weights are sent, not shared.
    schemes = {"policy": MultiProcessWeightSyncScheme()}
    with collecting(make, policy, sync=False, weight_sync_schemes=schemes, **whole) as collector:
        for data in collector:
            replay.extend(data)
            for episode in episodes_of(data):
                length = len(episode)
                steps = torch.arange(length).clamp(max=4).unsqueeze(-1)
                lived = episode["agents", "alive"]
                assert (episode["history", "length"] == steps)[lived].all()
                new = insists_on(episode, 1)
                # A worker that has heard of new weights does not return to the old ones.
                assert new.all() or not renewed[length]
                renewed[length] = bool(new.all())
                stale += not renewed[length]
            if replay.env_steps == data.numel():
                assert not any(renewed.values())
                insist_on(policy, 1)
                collector.update_policy_weights_()
            if all(renewed.values()):
                break
            # Each worker had one batch under way and another in the queue, of three episodes and parts of two.
            assert stale <= 2 * 2 * (3 + 2)
    assert_unbroken(replay)


def test_environments_in_processes_of_their_own() -> None:
    env = make_env("mpe2/simple_tag_v3", num_envs=2, parallel=True, seed=0, max_cycles=MAX_STEPS)
    serial = make_env("mpe2/simple_tag_v3", num_envs=2, seed=0, max_cycles=MAX_STEPS)
    assert env.layout == serial.layout and env.num_agents == serial.num_agents == 4
    policy = make_policy(env)
    replay = make_small_replay(env, num_envs=2)
    with collecting(env, policy, frames_per_batch=10) as collector:
        batches = iter(collector)
        for index in range(4):
            data = next(batches)
            assert data.batch_size == (2, 5)
            if index == 0:
                assert torch.equal(data[keys.OBSERVATION][:, 0], serial.reset()[keys.OBSERVATION])
            assert insists_on(data, 3).all() if index > 1 else not insists_on(data, 3).any()
            replay.extend(data)
            if index == 1:
                insist_on(policy, 3)
                collector.update_policy_weights_()
    assert_unbroken(replay)


def test_collectors_find_the_primer_themselves() -> None:
    """With ``auto_register_policy_transforms=True``, from TorchRL 0.15 on the default, as with the primer appended."""
    policy = make_policy(make_env("mock", seed=0))
    with_primer = TransformedEnv(make_env("mock", seed=0), policy.make_tensordict_primer())
    data = []
    for env in (make_env("mock", seed=0), with_primer):
        torch.manual_seed(3)
        with collecting(env, policy, frames_per_batch=14) as collector:
            data.append(next(iter(collector)))
    found, given = data
    assert set(given.keys(True, True)) <= set(found.keys(True, True))
    assert all(torch.equal(found[key], given[key]) for key in given.keys(True, True))
    assert given["history", "length"].max() == 4


def test_a_collector_fills_replay_itself() -> None:
    env = make_env("mock", seed=0)
    policy = make_policy(env)
    replay = make_small_replay(env)
    with collecting(env, policy, frames_per_batch=20, replay_buffer=replay.sequences) as collector:
        for count, data in zip(range(1, 4), collector, strict=False):
            assert data is None
            assert replay.env_steps == len(replay) == 20 * count
    assert_unbroken(replay)
    assert replay.starts.sample().shape == (4, 3)


def make_primed(primer: Transform, episode_length: int) -> TransformedEnv:
    return TransformedEnv(make_env("mock", episode_length=episode_length), primer)


@pytest.mark.slow
def test_workers_fill_replay_themselves() -> None:
    """With whole episodes; the primer has to be in their environments, which TorchRL here tries without its own."""
    env = make_env("mock")
    policy = make_policy(env)
    make = [partial(make_primed, policy.make_tensordict_primer(), length) for length in (4, 6)]
    replay = make_small_replay(env)
    whole = {"frames_per_batch": 12, "trajs_per_batch": 2, "traj_format": "cat"}
    filling = {"replay_buffer": replay.sequences, "auto_register_policy_transforms": False}
    with collecting(make, policy, sync=False, **filling, **whole) as collector:
        for _ in collector:
            ends = replay.sequences.storage[:]["next", "done"][:, 0, 0, 0].nonzero().squeeze(-1)
            # Episodes of 4 steps are the one worker's, those of 6 the other's.
            if replay.env_steps >= 100 and set(ends.diff().tolist()) == {4, 6}:
                break
            assert replay.env_steps < replay.capacity, "one worker wrote nothing"
    assert len(replay) == replay.env_steps
    assert_unbroken(replay)
    assert replay.starts.sample().shape == (4, 3)
