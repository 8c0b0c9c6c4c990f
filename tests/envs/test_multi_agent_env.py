from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torchrl
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import (
    EnvBase,
    MarlGroupMapType,
    PettingZooWrapper,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

from matwm_rl.envs import MockEnv, MultiAgentEnv, SerialMultiAgentEnv, make_env
from matwm_rl.keys import (
    ACTION,
    ACTION_MASK,
    ALIVE,
    DONE,
    NEXT_ALIVE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TRUNCATED,
)
from tests.envs.helpers import DEADLY, KAZ, assert_legal, first_legal_policy

# ---------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("name", "kwargs", "shape", "num_actions"),
    [
        ("mock", {}, (3, 5), 4),
        ("mock", {"num_envs": 3}, (3, 3, 5), 4),
        ("mpe2/simple_tag_v3", {}, (4, 16), 5),
        ("mpe2/simple_tag_v3", {"num_envs": 2}, (2, 4, 16), 5),
        ("mpe2/simple_tag_v3", {"group_map": MarlGroupMapType.ONE_GROUP_PER_AGENT}, (4, 16), 5),
        ("mpe2/simple_spread_v3", {}, (3, 18), 5),
        ("mpe2/simple_speaker_listener_v4", {}, (2, 11), 5),
        ("vmas/simple_tag", {"num_envs": 2}, (2, 4, 16), 9),
        ("vmas/simple_tag", {"num_envs": 2, "group_map": MarlGroupMapType.ALL_IN_ONE_GROUP}, (2, 4, 16), 9),
        ("vmas/simple_tag", {"num_envs": 2, "categorical_actions": False}, (2, 4, 16), 9),
        (KAZ, {}, (4, 135), 6),
        ("butterfly/pistonball_v6", {}, (20, 3, 64, 64), 3),
        ("butterfly/cooperative_pong_v6", {"image_size": 32}, (2, 3, 32, 32), 3),
    ],
)
def test_specs(name: str, kwargs: dict[str, object], shape: tuple[int, ...], num_actions: int) -> None:
    env = make_env(name, seed=0, **kwargs)
    check_env_specs(env)
    assert set(env.full_done_spec.keys(True, True)) == {"done", "terminated", "truncated"}
    data = env.rand_action(env.reset())
    agents_shape = (*env.batch_size, env.layout.num_agents)
    assert data[OBSERVATION].shape == shape == (*agents_shape, *env.layout.observation_shape)
    assert data[OBSERVATION].dtype == (torch.uint8 if env.layout.is_image else torch.float32)
    assert data[ACTION].shape == agents_shape and data[ACTION].dtype == torch.int64
    assert data[ACTION_MASK].shape == (*agents_shape, num_actions)
    assert data[ALIVE].shape == agents_shape and data[ALIVE].all()
    data = env.step(data)
    assert data[REWARD].shape == (*agents_shape, 1) and data[REWARD].dtype == torch.float32
    assert data[DONE].shape == (*env.batch_size, 1)


def test_one_hot_groups_of_pettingzoo() -> None:
    from mpe2 import simple_speaker_listener_v4

    base = PettingZooWrapper(simple_speaker_listener_v4.parallel_env(), use_mask=True, categorical_actions=False)
    env = MultiAgentEnv(base)
    check_env_specs(env)
    assert env.action_counts == [3, 5]


def test_serial_environments_of_multi_agent_environments() -> None:
    check_env_specs(SerialEnv(2, lambda: make_env("mpe2/simple_tag_v3")))
    env = SerialMultiAgentEnv(2, lambda: make_env("mpe2/simple_speaker_listener_v4"))
    check_env_specs(env)
    drawn = torch.stack([env.rand_action()[ACTION] for _ in range(60)])
    assert drawn.amax(0).tolist() == [[2, 4]] * 2


def test_transforms_on_top() -> None:
    env = make_env("mock", num_envs=2, death_step=None)
    env = TransformedEnv(env, RewardSum(in_keys=[REWARD[1:]], out_keys=["episode_reward"], reset_keys=["_reset"]))
    check_env_specs(env)
    rollout = env.rollout(12, break_when_any_done=False)
    assert_legal(rollout)
    torch.testing.assert_close(rollout["next", "episode_reward"][:, 5], rollout[REWARD][:, :6].sum(1))
    torch.testing.assert_close(rollout["next", "episode_reward"][:, 11], rollout[REWARD][:, 6:].sum(1))
    appended = make_env("mock").append_transform(StepCounter())
    assert appended.rollout(12, break_when_any_done=False)["next", "step_count"].max() == 6
    assert appended.rand_action()[ACTION].shape == (3,)


# ---------------------------------------------------------------------- the same world as the raw environment


@pytest.mark.parametrize("task", ["simple_tag_v3", "simple_spread_v3", "simple_speaker_listener_v4"])
def test_mpe_equals_the_raw_environment(task: str) -> None:
    import importlib

    raw = importlib.import_module(f"mpe2.{task}").parallel_env(max_cycles=10)
    env = make_env(f"mpe2/{task}", max_cycles=10)
    env.set_seed(7)
    raw.reset(seed=7)
    data, (raw_observation, _) = env.reset(), raw.reset()
    counts = torch.tensor(env.action_counts)
    for step in range(10):
        assert_rows_equal(env, data[OBSERVATION], raw_observation)
        actions = torch.arange(env.num_agents).add(step) % counts
        data = env.step(data.set(ACTION, actions))["next"]
        raw_observation, reward, terminated, truncated, _ = raw.step(
            dict(zip(env.layout.agent_names, actions.tolist(), strict=True))
        )
        assert data["agents", "reward"][:, 0].tolist() == pytest.approx(
            [reward[name] for name in env.layout.agent_names]
        )
        assert data["truncated"].item() == any(truncated.values()) == (step == 9)
        assert data["terminated"].item() == any(terminated.values()) is False
    assert_rows_equal(env, data[OBSERVATION], raw_observation)
    assert data[ALIVE].all(), "a time limit kills nobody: the last observation is real"


def assert_rows_equal(env: MultiAgentEnv, observation: Tensor, raw: dict[str, np.ndarray]) -> None:
    for row, size, name in zip(observation, env.layout.observation_sizes, env.layout.agent_names, strict=True):
        np.testing.assert_allclose(row[:size].numpy(), raw[name].reshape(-1).astype(np.float32), atol=1e-6)
        assert not row[size:].any(), "padding"


def test_padding_of_simple_tag() -> None:
    env = make_env("mpe2/simple_tag_v3", seed=0)
    assert env.layout.observation_sizes == [16, 16, 16, 14]
    rollout = env.rollout(5)
    assert not rollout[OBSERVATION][:, 3, 14:].any()
    assert rollout[OBSERVATION][:, :3, 14:].any()


def test_padded_actions_are_illegal() -> None:
    env = make_env("mpe2/simple_speaker_listener_v4", seed=0)
    data = env.reset()
    assert data[ACTION_MASK].tolist() == [[True, True, True, False, False], [True] * 5]
    drawn = torch.stack([env.rand_action(data.clone())[ACTION] for _ in range(100)])
    assert set(drawn[:, 0].tolist()) == {0, 1, 2} and set(drawn[:, 1].tolist()) == set(range(5))
    from_spec = env.full_action_spec[ACTION].rand((100,))
    assert from_spec.amax(0).tolist() == [2, 4]
    with pytest.raises(
        ValueError, match=r"\[3, 0\] of agents with \[3, 5\] actions; the agents are \['speaker_0', 'lis"
    ):
        env.step(data.set(ACTION, torch.tensor([3, 0])))


@pytest.mark.parametrize("group_map", [None, MarlGroupMapType.ALL_IN_ONE_GROUP])
def test_vmas_equals_the_raw_environment(group_map: MarlGroupMapType | None) -> None:
    import vmas

    env = make_env("vmas/simple_tag", num_envs=2, seed=5, max_steps=20, group_map=group_map)
    data = env.reset()
    observations, rewards = [data[OBSERVATION]], []
    actions = [(torch.arange(8).view(2, 4) + step) % 9 for step in range(4)]
    for action in actions:
        data = env.step(data.set(ACTION, action))["next"]
        observations.append(data[OBSERVATION])
        rewards.append(data["agents", "reward"])
    # VMAS keeps one random state for all its environments, so the raw one plays after, not beside.
    raw = vmas.make_env("simple_tag", num_envs=2, continuous_actions=False, max_steps=20)
    raw.seed(5)
    raw_observation = raw.reset()
    for step, action in enumerate(actions):
        assert_batch_equal(env, observations[step], raw_observation)
        raw_observation, raw_reward, _, _ = raw.step([part.clone() for part in action.unbind(-1)])
        torch.testing.assert_close(rewards[step][..., 0], torch.stack(raw_reward, -1))
    assert_batch_equal(env, observations[-1], raw_observation)


def assert_batch_equal(env: MultiAgentEnv, observation: Tensor, raw: list[Tensor]) -> None:
    for agent, size in enumerate(env.layout.observation_sizes):
        torch.testing.assert_close(observation[:, agent, :size], raw[agent])
        assert not observation[:, agent, size:].any()


def test_images_are_the_raw_ones_resized() -> None:
    from pettingzoo.butterfly import pistonball_v6

    env = make_env("butterfly/pistonball_v6", n_pistons=4)
    raw = pistonball_v6.parallel_env(continuous=False, n_pistons=4, render_mode="rgb_array")
    env.set_seed(1)
    raw.reset(seed=1)
    data, (raw_observation, _) = env.reset(), raw.reset()
    action = torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        data = env.step(data.set(ACTION, action))["next"]
        raw_observation = raw.step(dict(zip(env.layout.agent_names, action.numpy(), strict=True)))[0]
    for agent, name in enumerate(env.layout.agent_names):
        image = torch.from_numpy(raw_observation[name].copy()).permute(2, 0, 1).unsqueeze(0).float()
        expected = torch.nn.functional.interpolate(image, size=(64, 64), mode="bilinear", antialias=True)[0]
        assert (data[OBSERVATION][agent].float() - expected).abs().max() <= 1.5
    assert env.layout.is_image and env.layout.observation_sizes == [3 * 64 * 64] * 4


def test_images_show_what_happens() -> None:
    """Without a render mode, butterfly's environments hand out pictures that never change."""
    env = make_env("butterfly/pistonball_v6", n_pistons=4, seed=0)
    images = env.rollout(8)[OBSERVATION].float()
    assert (images[1:] - images[:-1]).abs().amax((1, 2, 3, 4)).min() > 20


# ---------------------------------------------------------------------- collectors


def collect(env: EnvBase, frames: int, **kwargs: object) -> TensorDictBase:
    collector = Collector(
        env,
        first_legal_policy(),
        frames_per_batch=frames,
        total_frames=frames,
        auto_register_policy_transforms=False,
        **kwargs,
    )
    try:
        (data,) = (batch.clone() for batch in collector)
    finally:
        collector.shutdown()
    return data


@pytest.mark.parametrize("num_envs", [1, 3])
def test_random_frames_are_legal(num_envs: int) -> None:
    frames = 60 * num_envs
    data = collect(make_env("mock", num_envs=num_envs), frames, init_random_frames=frames)
    assert_legal(data)
    assert data[ACTION][data[ALIVE]].unique().tolist() == [0, 1, 2, 3]


def test_random_frames_are_legal_in_separate_environments() -> None:
    # Of unequal lengths, so that one is reset while the other goes on.
    makers = [partial(_mock, length) for length in (4, 7)]
    data = collect(SerialMultiAgentEnv(2, makers), 120, init_random_frames=120)
    assert_legal(data)
    assert [int(done.sum()) for done in data[DONE]] == [15, 8]


def _mock(episode_length: int) -> MultiAgentEnv:
    return MultiAgentEnv(MockEnv(episode_length=episode_length))


def test_collector_keeps_the_last_observation_and_resets_after() -> None:
    data = collect(make_env("mpe2/simple_tag_v3", seed=0, max_cycles=5), 15)
    assert data[TRUNCATED].flatten().tolist() == ([False] * 4 + [True]) * 3
    ends = data[DONE].squeeze(-1)[:-1]
    assert torch.equal(data[NEXT_OBSERVATION][:-1][~ends], data[OBSERVATION][1:][~ends])
    assert not torch.isclose(data[NEXT_OBSERVATION][:-1][ends], data[OBSERVATION][1:][ends]).all()
    assert data[NEXT_OBSERVATION][data[DONE].squeeze(-1)].any(-1).all(), "a last observation is zero"
    assert data["collector", "traj_ids"].tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_collector_keeps_the_trajectory_at_a_death() -> None:
    torch.manual_seed(0)
    data = collect(make_env(KAZ, seed=1, **DEADLY), 300, init_random_frames=300)
    assert (data[ALIVE] & ~data[NEXT_ALIVE]).any(), "nobody died; this test needs another seed"
    changes = data["collector", "traj_ids"].diff() != 0
    assert torch.equal(changes, data[DONE].squeeze(-1)[:-1])


# ---------------------------------------------------------------------- errors


def test_environments_without_groups_are_refused() -> None:
    from torchrl.envs.custom import TicTacToeEnv

    with pytest.raises(ValueError, match="`group_map`"):
        MultiAgentEnv(TicTacToeEnv())


def test_turn_based_environments_are_refused() -> None:
    from mpe2 import simple_tag_v3

    with pytest.raises(ValueError, match="parallel_env"):
        MultiAgentEnv(PettingZooWrapper(simple_tag_v3.env(), use_mask=True))


def test_step_before_reset() -> None:
    env = make_env("mock")
    action = TensorDict({"agents": TensorDict({"action": torch.tensor([1, 1, 1])}, batch_size=[3])})
    with pytest.raises(RuntimeError, match="reset"):
        env.step(action)


def test_bad_image_size() -> None:
    with pytest.raises(ValueError, match="image_size must be a positive integer, got 0"):
        MultiAgentEnv(MockEnv(), image_size=0)


def test_closing_a_serial_batch_leaves_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torchrl, "_THREAD_POOL_INIT", 8)
    env = SerialMultiAgentEnv(2, lambda: MultiAgentEnv(MockEnv()))
    env.reset()
    env.close()
    assert env.is_closed
    # TorchRL's own closing takes more; what counts is what is left.
    assert chosen == [1, 3, 1]
