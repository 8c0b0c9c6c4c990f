"""What replay stores one after the other happened one after the other: TorchRL's trajectory numbers tell."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from matwm_rl import keys
from matwm_rl.data import Continuity, Replay
from matwm_rl.envs import SerialMultiAgentEnv
from matwm_rl.evaluation import RandomActions, evaluate
from tests.data.test_replay import build, rollout
from tests.envs.population import population
from tests.helpers import mock_env


def numbered(trajectories: list[list[int]], done: list[list[int]]) -> TensorDict:
    """``[E, T]``, as a collector numbers it."""
    ids = torch.tensor(trajectories)
    ended = torch.tensor(done, dtype=torch.bool).unsqueeze(-1)
    return TensorDict({"collector": {"traj_ids": ids}, "next": {"done": ended}}, ids.shape)


def test_episodes_go_on_from_batch_to_batch_in_every_environment() -> None:
    continuity = Continuity()
    continuity.check(numbered([[4, 4, 6], [5, 5, 5]], [[0, 1, 0], [0, 0, 1]]))
    # 6 goes on, and after 5 anything may follow.
    continuity.check(numbered([[6, 6, 6], [9, 9, 9]], [[0, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"trajectory 6 begins where trajectory 9 of environment 1 .* \(step 0"):
        continuity.check(numbered([[6, 6], [6, 6]], [[0, 0], [0, 0]]))
    # What was refused was not remembered.
    continuity.check(numbered([[6, 6], [9, 9]], [[0, 0], [0, 0]]))


def test_a_break_within_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trajectory 2 begins where trajectory 1 of environment 0 .* \(step 2 .*cat_"):
        Continuity().check(numbered([[1, 1, 2, 2]], [[0, 0, 0, 0]]))


def test_without_numbers_nothing_is_known() -> None:
    continuity = Continuity()
    continuity.check(numbered([[1, 1]], [[0, 0]]))
    continuity.check(numbered([[1, 1]], [[0, 0]]).exclude("collector"))
    continuity.check(numbered([[7, 7]], [[0, 0]]))
    continuity.forget()
    continuity.check(numbered([[8, 8]], [[0, 0]]))


def test_padding_is_refused() -> None:
    td = numbered([[1, 1]], [[0, 1]])
    td["collector", "mask"] = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="1 of 2 steps are padding"):
        Continuity().check(td)
    td["collector", "mask"][:] = True
    Continuity().check(td)


def collected(frames: int, env: EnvBase | None = None, **kwargs: object) -> Collector:
    options = {"auto_register_policy_transforms": False, "total_frames": -1} | kwargs
    return Collector(env or mock_env(episode_length=5), RandomActions(), frames_per_batch=frames, **options)


def fill(replay: Replay, collector: Collector, batches: int = 4) -> None:
    for _, batch in zip(range(batches), collector, strict=False):
        replay.extend(batch)
    collector.shutdown()


def test_replay_takes_what_a_collector_yields() -> None:
    replay = build(1)
    fill(replay, collected(7))
    # Another collector begins anew: with an episode's end in between it may.
    with pytest.raises(ValueError, match="Batches must continue one another"):
        fill(replay, collected(7))
    replay.end_episodes()
    fill(replay, collected(7))
    assert replay.env_steps == 56


@pytest.mark.parametrize("num_envs", [1, 2])
def test_workers_that_number_alike_are_told_apart_at_the_first_mixed_batch(num_envs: int) -> None:
    """As those on a Ray cluster: each counts its own trajectories, from 0."""
    replay, make = build(num_envs), partial(population, names=("a_0", "a_1", "a_2"), length=9)
    collectors = [collected(4 * num_envs, SerialMultiAgentEnv(2, make) if num_envs == 2 else make()) for _ in range(2)]
    one, other = map(iter, collectors)
    replay.extend(next(one))
    next(other)
    mixed = next(other)
    assert (mixed["collector", "traj_ids"][..., 0] == torch.arange(num_envs)).all()
    mixed[keys.OBSERVATION][..., 0, 1:, :] += 1  # of another worker, it shows something else
    with pytest.raises(ValueError, match=r"step 0 of the batch does not show .*another worker.*trajs_per_batch=1"):
        replay.extend(mixed)
    assert len(replay) == 4 * num_envs
    replay.extend(next(one))
    for collector in collectors:
        collector.shutdown()


def test_environments_reset_in_the_middle_of_an_episode_are_noticed() -> None:
    replay = build(1)
    with pytest.raises(ValueError, match=r"call Replay\.end_episodes first"):
        fill(replay, collected(7, reset_at_each_iter=True))
    replay.end_episodes()
    collector = collected(7, reset_at_each_iter=True)
    for _, batch in zip(range(3), collector, strict=False):
        replay.extend(batch)
        replay.end_episodes()
    collector.shutdown()
    done = replay.sequences.storage[:]["next", "done"][:, 0, 0, 0]
    assert done.view(4, 7)[:, [4, 6]].all() and done.sum() == 8


def test_a_refused_batch_leaves_no_trace() -> None:
    replay = build(1)
    collector = collected(7)
    first, second = (batch.clone() for _, batch in zip(range(2), collector, strict=False))
    collector.shutdown()
    replay.extend(first)
    entries = {key: value[:, :2] if "agents" in key else value for key, value in second.items(True, True)}
    with pytest.raises(ValueError, match="of 2 agents"):
        replay.extend(TensorDict(entries, second.shape))
    replay.extend(second)
    assert len(replay) == 14


def test_after_loading_anything_may_follow(tmp_path: Path) -> None:
    whole = build(1)
    fill(whole, collected(10), batches=1)  # two episodes
    whole.dumps(tmp_path)
    for way in ("loads", "load_state_dict"):
        replay = build(1)
        fill(replay, collected(7), batches=1)  # the second is not over
        replay.loads(tmp_path) if way == "loads" else replay.load_state_dict(whole.state_dict())
        fill(replay, collected(7), batches=1)
        assert len(replay) == 17


def test_an_emptied_replay_begins_anew() -> None:
    replay = build(1)
    fill(replay, collected(7), batches=1)
    replay.sequences.empty()
    fill(replay, collected(7), batches=1)
    assert len(replay) == 7


def test_batches_of_several_workers_are_environments_side_by_side() -> None:
    """``[W, E/W, T]``, as a synchronous collector stacks the batches of its workers."""
    replay, same = build(4, capacity=80), build(4, capacity=80)
    for begin in (0, 10):
        td = rollout(begin, begin + 10, 4)
        replay.extend(td.reshape(2, 2, 10))
        same.extend(td)
    one, other = replay.sequences.storage[:], same.sequences.storage[:]
    assert one.batch_size == (20, 4, 3) and (one == other).all()
    assert torch.equal(one["observation"][..., 0, 0], torch.arange(4.0).expand(20, 4))
    with pytest.raises(ValueError, match=r"batch \(2, 3, 10\); expected \[4, T\].*all workers together"):
        replay.extend(rollout(20, 30, 6).reshape(2, 3, 10))


def test_several_writers_must_write_whole_episodes() -> None:
    replay = build(1)
    td = rollout(0, 8, None)
    assert td[keys.DONE][-1] and not td[keys.DONE][-2]
    replay.extend(td)
    # TorchRL does this where worker processes get the buffer.
    replay.sequences.share()
    replay.sequences.extend(td)
    with pytest.raises(ValueError, match="several processes write to this replay.*trajs_per_batch=1"):
        replay.sequences.extend(td[:-1])
    assert replay.env_steps == 16


def looked_at(env: EnvBase, look: str) -> None:
    """Play in an environment that a collector is at work in."""
    if look == "evaluate":
        evaluate(env, RandomActions(), episodes=1)
    elif look == "rollout":
        env.rollout(2)
    else:
        env.reset()


@pytest.mark.parametrize("look", ["evaluate", "rollout", "reset"])
@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("frames", [7, 5], ids=["within-an-episode", "at-its-end"])
def test_play_in_the_environment_of_a_collector_is_noticed(look: str, num_envs: int, frames: int) -> None:
    make = partial(population, names=("a_0", "a_1", "a_2"), length=5)
    env = SerialMultiAgentEnv(2, make) if num_envs == 2 else make()
    # As README has it: a primer, or any transform, around the environment.
    wrapped, replay = TransformedEnv(env, StepCounter()), build(num_envs)
    options = {"auto_register_policy_transforms": False, "total_frames": -1}
    collector = Collector(wrapped, RandomActions(), frames_per_batch=frames * num_envs, **options)
    batches = iter(collector)
    replay.extend(next(batches))
    stored = len(replay)
    looked_at(env, look)
    with pytest.raises(ValueError, match=r"step 0 of environment 0 begins in its episode .*evaluate and record on an"):
        replay.extend(next(batches))
    assert len(replay) == stored
    replay.end_episodes()
    replay.extend(next(batches))
    collector.shutdown()


def test_play_in_an_environment_of_its_own_is_no_concern() -> None:
    replay, collector, own = build(1), collected(7), mock_env(episode_length=5)
    for _, batch in zip(range(4), collector, strict=False):
        replay.extend(batch)
        for look in ("evaluate", "rollout", "reset"):
            looked_at(own, look)
    collector.shutdown()
    assert len(replay) == 28
