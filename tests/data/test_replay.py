from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from matwm_rl import keys
from matwm_rl.data import Replay, ReplayConfig, make_replay, starts_per_agent_by_agents

N, T, C = 3, 6, 2
ACTIONS = 101


def action_of(env: torch.Tensor, step: torch.Tensor, agent: torch.Tensor) -> torch.Tensor:
    return (env * 31 + step * 7 + agent) % ACTIONS


def rollout(begin: int, end: int, num_envs: int | None, num_agents: int = N) -> TensorDict:
    """[E, T], or [T] without num_envs: the observation tells (env, step, agent), the action is made of all three."""
    envs = num_envs or 1
    env, step, agent = torch.meshgrid(
        torch.arange(envs), torch.arange(begin, end), torch.arange(num_agents), indexing="ij"
    )
    observation = torch.stack([env, step, agent], -1).float()
    done = ((step[..., :1] + env[..., :1]) % 7 == 0).clone()
    td = TensorDict(
        {
            "agents": {
                "observation": observation,
                "action": action_of(env, step, agent),
                "action_mask": torch.ones(*agent.shape, ACTIONS, dtype=torch.bool),
                "alive": (step + agent) % 3 > 0,
                "hidden": torch.zeros(*agent.shape, 2),
            },
            "next": {
                "agents": {
                    "observation": observation + torch.tensor([0.0, 1.0, 0.0]),
                    "reward": (step * agent).unsqueeze(-1).float(),
                    "alive": (step + 1 + agent) % 3 > 0,
                },
                "done": done,
                "terminated": done & (env[..., :1] == 0),
                "truncated": done & (env[..., :1] > 0),
            },
        },
        [envs, end - begin],
    )
    return td if num_envs else td[0]


def build(
    num_envs: int = 1, capacity: int = 60, seed: int | None = 0, scratch_dir: Path | None = None, **overrides
) -> Replay:
    options = {
        "sequences": 2 * N,
        "starts_per_agent": 5,
        "sequence_length": T,
        "context_length": C,
        "recency_decay": 0.98,
    }
    config = ReplayConfig(capacity=capacity, **(options | overrides))
    return make_replay(N, config, num_envs=num_envs, seed=seed, scratch_dir=scratch_dir)


def check_focal(sample: TensorDict, B: int, length: int) -> None:
    """Everything in the sample is a function of (env, step, agent): recompute it, entry by entry."""
    assert sample.batch_size == (B, length)
    env, step, agent = sample[keys.OBSERVATION].long().unbind(-1)
    assert (agent == torch.arange(N)).all()
    assert (step.diff(dim=1) == 1).all() and (env.diff(dim=1) == 0).all()
    assert torch.equal(sample[keys.ACTION], action_of(env, step, agent))
    joint_action = action_of(env.unsqueeze(-1), step.unsqueeze(-1), torch.arange(N))
    joint_alive = (step.unsqueeze(-1) + torch.arange(N)) % 3 > 0
    for n in range(N):
        others = [other for other in range(N) if other != n]
        assert torch.equal(sample[keys.TEAMMATE_ACTION][:, :, n], joint_action[:, :, n, others])
        assert torch.equal(sample[keys.TEAMMATE_ALIVE][:, :, n], joint_alive[:, :, n, others])
    assert torch.equal(sample[keys.ALIVE], (step + agent) % 3 > 0)
    assert torch.equal(sample[keys.NEXT_OBSERVATION][..., 1].long(), step + 1)
    assert torch.equal(sample[keys.REWARD].squeeze(-1).long(), step * agent)
    done = (step + env) % 7 == 0
    returns = ~sample[keys.ALIVE] & sample[keys.NEXT_ALIVE]
    assert torch.equal(sample[keys.AGENT_DONE].squeeze(-1), done | returns) and (returns & ~done).any()
    assert torch.equal(sample[keys.AGENT_TERMINATED].squeeze(-1), done & (env == 0))
    assert set(sample.keys()) == {"agents", "next", "index"} and "hidden" not in sample["agents"].keys()
    assert sample["index"].shape == (B, length, N, 3)
    assert torch.equal(sample["index"][..., 1:], torch.stack([env, agent], -1))


@pytest.mark.parametrize("num_envs", [None, 1, 2])
@pytest.mark.parametrize("memmap", [False, True])
def test_both_samples_are_focal_and_consecutive(num_envs, memmap, tmp_path: Path):
    replay = build(num_envs or 1, scratch_dir=tmp_path if memmap else None)
    assert not replay.can_sample
    for begin in range(0, 90, 10):  # wraps
        replay.extend(rollout(begin, begin + 10, num_envs))
        if begin >= 20:
            for _ in range(3):
                check_focal(replay.sequences.sample(), 2, T)
                check_focal(replay.starts.sample(), 5, C + 1)
    assert replay.can_sample
    assert len(replay) == replay.capacity == 60
    assert replay.env_steps == 90 * (num_envs or 1)
    assert memmap == any(tmp_path.rglob("*.memmap"))


def test_both_buffers_see_the_same_storage():
    replay = build()
    replay.extend(rollout(0, 60, None))
    replay.extend(rollout(1000, 1060, None))
    assert replay.starts.storage is replay.sequences.storage
    for sample in (replay.sequences.sample(), replay.starts.sample()):
        assert sample[keys.OBSERVATION][..., 1].min() >= 1000
    with pytest.raises(RuntimeError, match="writing"):
        replay.starts.extend(rollout(0, 10, None))


def test_extend_leaves_the_given_data_alone():
    replay, td = build(), rollout(0, 10, None)
    before = td.clone()
    replay.extend(td)
    assert set(td.keys(True, True)) == set(before.keys(True, True))
    assert (td == before).all()


def test_a_single_agent(tmp_path: Path):
    for scratch_dir in (None, tmp_path):
        config = ReplayConfig(sequences=2, starts_per_agent=3, sequence_length=4, capacity=40)
        replay = make_replay(1, config, scratch_dir=scratch_dir)
        replay.extend(rollout(0, 30, None, num_agents=1))
        assert replay.sequences.sample()[keys.TEAMMATE_ACTION].shape == (2, 4, 1, 0)


@pytest.mark.parametrize("memmap", [False, True])
def test_end_episodes_marks_the_newest_step_only(memmap, tmp_path: Path):
    replay = build(2, scratch_dir=tmp_path if memmap else None)
    replay.end_episodes()  # nothing stored: nothing to mark
    replay.extend(rollout(0, 25, 2))
    replay.extend(rollout(25, 36, 2))  # full: the newest lies at index 5
    storage = replay.sequences.storage
    before = storage[:].clone()
    replay.end_episodes()
    changed = (storage[:]["next", "done"] != before["next", "done"]).nonzero()[:, 0].unique()
    assert changed.tolist() == [5]
    assert storage[5]["next", "done"].all()
    assert torch.equal(storage[:]["next", "terminated"], before["next", "terminated"])
    assert replay.env_steps == 72


@pytest.mark.parametrize("way", ["state_dict", "dumps"])
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("memmap", [False, True])
@pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized")
def test_a_restored_replay_goes_on_exactly(way, used_before, memmap, tmp_path: Path):
    replay = build(2, scratch_dir=tmp_path / "a" if memmap else None)
    replay.extend(rollout(0, 30, 2))
    replay.extend(rollout(30, 41, 2))
    replay.sequences.sample(), replay.starts.sample()
    other = build(2, seed=7, scratch_dir=tmp_path / "b" if memmap else None)
    if used_before:
        other.extend(rollout(100, 117, 2))
        other.sequences.sample()
    if way == "state_dict":
        torch.save(replay.state_dict(), tmp_path / "replay.pt")
        other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    else:
        replay.dumps(tmp_path / "replay")
        assert not list((tmp_path / "replay").rglob("*.pkl"))
        other.loads(tmp_path / "replay")
    assert len(other) == len(replay) and other.env_steps == replay.env_steps == 82
    for begin in range(41, 60, 3):
        for name in ("sequences", "starts"):
            mine, theirs = getattr(replay, name).sample(), getattr(other, name).sample()
            assert (mine == theirs).all()
        replay.extend(rollout(begin, begin + 3, 2))
        other.extend(rollout(begin, begin + 3, 2))


def test_a_restored_replay_shares_no_memory():
    replay, other, used = build(), build(), build()
    replay.extend(rollout(0, 30, None))
    used.extend(rollout(500, 530, None))
    for copy in (other, used):
        copy.load_state_dict(replay.state_dict())
        copy.extend(rollout(1000, 1060, None))
    check_focal(replay.sequences.sample(), 2, T)
    assert replay.sequences.sample()[keys.OBSERVATION][..., 1].max() < 30


def test_state_of_another_layout_is_refused(tmp_path: Path):
    replay = build(2)
    replay.extend(rollout(0, 30, 2))
    replay.dumps(tmp_path)
    for other in (build(1), build(2, capacity=80)):
        with pytest.raises(ValueError, match="Build it to match"):
            other.load_state_dict(replay.state_dict())
        with pytest.raises(ValueError, match="Build it to match"):
            other.loads(tmp_path)


def test_extend_errors():
    with pytest.raises(ValueError, match=r"expected \[2, T\]:"):
        build(2).extend(rollout(0, 10, 3))
    with pytest.raises(ValueError, match=r"expected \[1, T\] or \[T\]"):
        build(1).extend(rollout(0, 10, 3))
    with pytest.raises(ValueError, match="replay holds 60"):
        build(1).extend(rollout(0, 61, None))
    with pytest.raises(KeyError, match="reward"):
        build(1).extend(rollout(0, 10, None).exclude(keys.REWARD))
    with pytest.raises(ValueError, match="2 agents"):
        build(1).extend(rollout(0, 10, None, num_agents=2))


def test_make_replay_errors():
    with pytest.raises(ValueError, match="starts_per_agent must be a positive integer, got 0"):
        build(starts_per_agent=0)
    with pytest.raises(ValueError, match="can never hold 11 slices of 6"):
        build(sequences=11 * N)
    with pytest.raises(ValueError, match="context_length . 1 must be at most the capacity, 60, got 61"):
        build(context_length=60)
    assert build(7, capacity=60).capacity == 56


@pytest.mark.parametrize(("sequences", "num_agents", "expected"), [(16, 1, 16), (16, 3, 5), (32, 4, 8), (2, 5, 1)])
def test_sequences_are_shared_out(sequences, num_agents, expected):
    config = ReplayConfig(sequences=sequences, sequence_length=2, context_length=0, starts_per_agent=1)
    replay = make_replay(num_agents, config)
    assert config.sequences_per_agent(num_agents) == expected
    assert replay.sequences.batch_size == num_agents * expected * 2


@pytest.mark.parametrize(("num_agents", "expected"), [(1, 512), (3, 512), (4, 768), (6, 768), (7, 1024), (20, 1024)])
def test_starts_by_the_number_of_agents(num_agents, expected):
    """Table C.6."""
    assert starts_per_agent_by_agents(num_agents) == expected
    replay = make_replay(num_agents, ReplayConfig(sequence_length=8))
    assert replay.starts.batch_size == num_agents * expected * (ReplayConfig().context_length + 1)
    fixed = make_replay(num_agents, ReplayConfig(sequence_length=8, context_length=0, starts_per_agent=3))
    assert fixed.starts.batch_size == num_agents * 3


def test_both_buffers_are_torchrl_tensordict_buffers_and_iterate_over_samples():
    replay = build()
    replay.extend(rollout(0, 60, None))
    for buffer, B, length in ((replay.sequences, 2, T), (replay.starts, 5, C + 1)):
        assert isinstance(buffer, TensorDictReplayBuffer)
        check_focal(buffer.sample(), B, length)
        check_focal(next(iter(buffer)), B, length)
        sample, info = buffer.sample(return_info=True)
        assert torch.equal(torch.stack(info["index"], -1), sample["index"])
    assert "index" not in replay.sequences.storage[:].keys()


def test_seed_decides_the_batches():
    batches = []
    for seed in (3, 3, 4):
        replay = build(seed=seed)
        replay.extend(rollout(0, 60, None))
        batches.append(torch.cat([replay.sequences.sample()[keys.ACTION].flatten() for _ in range(3)]))
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
