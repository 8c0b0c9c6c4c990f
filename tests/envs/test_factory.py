from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torchrl.envs import MarlGroupMapType, TransformedEnv

from matwm_rl.action_space import DiscreteActions
from matwm_rl.envs import AgentLayout, MultiAgentEnv, make_env, render_frame
from matwm_rl.keys import ACTION, ACTION_MASK, OBSERVATION, TERMINATED, TRUNCATED
from tests.envs.population import Population

SPEAKER_LISTENER = AgentLayout(
    agent_names=["speaker_0", "listener_0"],
    group_map={"speaker": ["speaker_0"], "listener": ["listener_0"]},
    group_index=[0, 1],
    actions=DiscreteActions([3, 5]),
    observation_shape=(11,),
    observation_sizes=[3, 11],
    is_image=False,
)


def test_layout_of_a_single_environment() -> None:
    env = make_env("mpe2/simple_speaker_listener_v4")
    assert env.layout == SPEAKER_LISTENER
    assert (env.num_agents, env.action_counts, list(env.group_map)) == (2, [3, 5], ["speaker", "listener"])
    assert env.layout.num_actions == 5
    assert env.batch_size == torch.Size([])


def test_serial_environments_keep_the_layout_and_differ() -> None:
    env = make_env("mpe2/simple_speaker_listener_v4", num_envs=3, seed=0)
    assert env.layout == SPEAKER_LISTENER
    assert TransformedEnv(env).layout == SPEAKER_LISTENER
    # Not a list of each environment's, as TorchRL gives it of what the batch itself does not have.
    assert (env.num_agents, env.action_counts, list(env.group_map)) == (2, [3, 5], ["speaker", "listener"])
    assert TransformedEnv(env).num_agents == 2
    assert env.batch_size == torch.Size([3])
    observation = env.reset()[OBSERVATION]
    assert observation.shape == (3, 2, 11)
    assert not torch.equal(observation[0], observation[1]), "each environment has a seed of its own"


@pytest.mark.parametrize(("name", "num_envs"), [("mock", 3), ("vmas/simple_tag", 1), ("vmas/simple_tag", 3)])
def test_vectorized_environments_are_one(name: str, num_envs: int) -> None:
    env = make_env(name, num_envs=num_envs)
    assert type(env) is MultiAgentEnv
    assert env.batch_size == torch.Size([num_envs])


def test_default_time_limits() -> None:
    rollout = make_env("mpe2/simple_spread_v3").rollout(40)
    assert rollout.shape == (25,)
    assert rollout[TRUNCATED][-1] and not rollout[TERMINATED].any()
    assert make_env("vmas/simple_tag").rollout(200).shape == (1, 100)
    assert make_env("mpe2/simple_spread_v3", max_cycles=7).rollout(40).shape == (7,)


@pytest.mark.parametrize("name", ["mpe2/simple_tag_v3", "vmas/simple_tag"])
def test_a_seeded_environment_is_not_changed_by_others(name: str) -> None:
    def play(*, others: bool) -> torch.Tensor:
        env, starts = make_env(name, seed=3), []
        if others:
            make_env(name, seed=4).rollout(2)
        for _ in range(3):
            starts.append(env.reset()[OBSERVATION])
            if others:
                make_env(name).reset()
                make_env(name, seed=3).rollout(2)
        return torch.stack(starts)

    alone = play(others=False)
    assert torch.equal(play(others=True), alone)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("name", ["mpe2/simple_tag_v3", "vmas/simple_tag", "butterfly/knights_archers_zombies_v11"])
def test_seeds_decide_everything(name: str) -> None:
    def play(seed: int) -> torch.Tensor:
        env = make_env(name, seed=seed)
        data, observations = env.reset(), []
        for step in range(5):
            action = torch.full((*env.batch_size, env.num_agents), step % 3)
            data = env.step(data.set(ACTION, action))["next"]
            observations.append(data[OBSERVATION])
        return torch.stack(observations)

    assert torch.equal(play(3), play(3))
    # Nothing is random in the first steps of Knights Archers Zombies.
    if not name.startswith("butterfly"):
        assert not torch.equal(play(3), play(4))


def test_group_map_is_passed_on() -> None:
    env = make_env("mpe2/simple_tag_v3", group_map=MarlGroupMapType.ONE_GROUP_PER_AGENT)
    assert env.layout.group_index == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="groups of their own"):
        make_env("mpe2/simple_tag_v3", group_map=MarlGroupMapType.ALL_IN_ONE_GROUP)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mpe2/simple_tga_v3",
            r"unknown environment 'mpe2/simple_tga_v3'; near ones: simple_tag_v3, .*; environments: .*simple_v3",
        ),
        ("butterfly/pong", r"environments: cooperative_pong_v6, knights_archers_zombies_v11, pistonball_v6"),
        ("vmas/simple_tga", r"unknown environment 'vmas/simple_tga'; near ones: simple_tag.*; scenarios: .*balance"),
        (
            "atari/pong_v3",
            r"'atari/pong_v3'; registered families: butterfly, lbforaging, magent2, mamujoco, mock, .*register_family",
        ),
        ("magnet2/battle_v4", "near ones: magent2/battle_v4; registered"),
        ("lbforaging/Foraging-8x8-2p-3f-v2", r"near ones: Foraging-8x8-2p-3f-v3, .*; environments: .* 1917 more"),
        ("json:dmps", "'json' has no function 'dmps'; near ones: dumps, dump"),
        ("simple_tag_v3", "A name is family and environment, as in 'mpe2/simple_tag_v3'"),
        ("mock/one", "unknown environment"),
        ("vmas", "unknown environment"),
    ],
)
def test_unknown_names_list_what_exists(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(name)


def test_no_environments() -> None:
    with pytest.raises(ValueError, match="num_envs must be a positive integer, got 0"):
        make_env("mock", num_envs=0)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("mpe2/simple_tag_v3", "mpe2", "mpe"),
        ("vmas/simple_tag", "vmas", "vmas"),
        ("butterfly/pistonball_v6", "pettingzoo.butterfly", "butterfly"),
        ("sisl/pursuit_v5", "pettingzoo.sisl", "sisl"),
        ("magent2/battle_v4", "magent2.environments", "magent2"),
        ("rware/rware-tiny-2ag-v2", "rware", "rware"),
        ("lbforaging/Foraging-5x5-2p-1f-v3", "lbforaging", "lbforaging"),
        ("mamujoco/HalfCheetah-2x3", "gymnasium_robotics", "mamujoco"),
    ],
)
def test_missing_package_names_the_extra(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "matwm_rl\[{extra}\]"'):
        make_env(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mpe2/simple_tag_v3", {"max_cycle": 5}, "'max_cycle'; near ones: max_cycles; it takes num_good, "),
        ("butterfly/pistonball_v6", {"n_piston": 5}, "'n_piston'; near ones: n_pistons; it takes "),
        ("sisl/pursuit_v5", {"n_evader": 5}, "'n_evader'; near ones: .*n_evaders.*; it takes x_size, "),
        ("vmas/simple_tag", {"num_landmark": 5}, "'num_landmark'$"),
        ("lbforaging/Foraging-5x5-2p-1f-v3", {"sigt": 2}, "'sigt'; near ones: sight; it takes players, "),
        ("mamujoco/HalfCheetah-2x3", {"agent_obks": 0}, "'agent_obks'; near ones: agent_obsk; it takes agent_obsk, "),
        ("mock", {"length": 5}, "'length'; near ones: episode_length; it takes "),
        ("tests.envs.population:Population", {"lenght": 5}, "'lenght'; near ones: length; it takes names, "),
    ],
)
def test_unknown_arguments_name_near_ones(name: str, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(TypeError, match=f"the environment '{name}' has no argument {message}"):
        make_env(name, **kwargs)


def test_other_errors_of_a_constructor_are_its_own() -> None:
    def broken(size: int) -> None:
        raise TypeError("open() got an unexpected keyword argument 'colour'")

    with pytest.raises(TypeError, match=r"^open\(\) got"):
        make_env(broken, size=3)


def test_a_function_is_called_for_each_environment() -> None:
    env = make_env(Population, num_envs=2, length=3)
    assert (env.batch_size, env.num_agents, env.rollout(9).shape) == ((2,), 2, (2, 3))
    with pytest.raises(ImportError, match=r"Name the module, not the file: games.mine:make\."):
        make_env("games/mine.py:make")


def test_frames() -> None:
    env = make_env("mpe2/simple_tag_v3", render_mode="rgb_array", seed=0)
    env.reset()
    first = env.render_frame()
    env.step(env.rand_action(env.reset()))
    second = render_frame(TransformedEnv(env))
    assert first.shape == second.shape == (700, 700, 3)
    assert first.dtype == np.uint8
    assert (first != second).any()


def test_frames_that_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match='render_mode="rgb_array"'):
        make_env("mpe2/simple_tag_v3", render_mode=None).render_frame()
    with pytest.raises(NotImplementedError, match="MockEnv"):
        make_env("mock").render_frame()
    monkeypatch.setitem(sys.modules, "pyglet.libs.egl.egl", None)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(RuntimeError, match="neither EGL nor a screen"):
        make_env("vmas/simple_tag").render_frame()


def test_serial_random_actions_obey_the_masks_of_the_tensordict() -> None:
    env = make_env("mock", num_envs=4)
    data = env.reset()
    for _ in range(8):
        data = env.rand_action(data)
        assert data[ACTION_MASK].gather(-1, data[ACTION].unsqueeze(-1)).all()
        _, data = env.step_and_maybe_reset(data)
