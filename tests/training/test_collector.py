"""A collector's state brings environments, the policy's history and the counters back, bit by bit."""

from __future__ import annotations

import io
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs import TransformedEnv, VecNormV2

from matwm_rl import keys, presets
from matwm_rl.envs import MockEnv, MultiAgentEnv, make_env
from matwm_rl.evaluation import RandomActions
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor
from matwm_rl.training.collector import ResumableCollector, repeats_itself
from matwm_rl.training.process import random_states, set_random_states
from tests.training.helpers import assert_same

FRAMES = 8


class Unseeded(MockEnv):
    """Its observations differ from one run of the process to the next, whatever the seed."""

    played = 0

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict)
        Unseeded.played += 1
        out["hunter", "observation"] += Unseeded.played
        return out


def build(env: Any, total_frames: int = 400, checkpoint_every: int | None = None) -> ResumableCollector:
    torch.manual_seed(0)
    world_model = WorldModel.from_env(env, presets.tiny().world_model)
    policy = WorldModelPolicy(world_model, make_actor(world_model), history_length=3)
    primed = TransformedEnv(env, policy.make_tensordict_primer())
    sizes = {"frames_per_batch": FRAMES, "total_frames": total_frames, "init_random_frames": 2 * FRAMES}
    return ResumableCollector(
        primed, policy, seed=5, checkpoint_every=checkpoint_every, auto_register_policy_transforms=False, **sizes
    )


def resumed(state: dict[str, Any], env: Any, **sizes: int) -> ResumableCollector:
    """A new collector with the state that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    collector = build(env, **sizes)
    collector.load_state_dict(torch.load(file, weights_only=True))
    return collector


def test_a_copy_that_acts_elsewhere_gets_the_weights_of_the_policy() -> None:
    env = make_env("mock", seed=0)
    world_model = WorldModel.from_env(env, presets.tiny().world_model)
    policy = WorldModelPolicy(world_model, make_actor(world_model), history_length=3)
    primed = TransformedEnv(env, policy.make_tensordict_primer())
    options = {"frames_per_batch": 4, "total_frames": 8, "auto_register_policy_transforms": False}
    # To TorchRL, this is another device than "cpu".
    collector = ResumableCollector(primed, policy, seed=0, device="cpu:0", **options)
    assert collector.policy is not policy and collector.policy.world_model is not world_model
    for tensor in (*collector.policy.parameters(), *collector.policy.buffers()):
        tensor.data = torch.zeros_like(tensor)  # in memory of its own, as on another device
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    collector.update_policy_weights_()
    assert_same(collector.policy.state_dict(), before)
    assert_same(policy.state_dict(), before)
    # The posterior of a world model in training mode is noisy.
    assert policy.training and not any(module.training for module in collector.policy.modules())
    # The weights that a resumed run has loaded are those that it acts with.
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    collector.load_state_dict(collector.state_dict())
    assert_same(collector.policy.state_dict(), policy.state_dict())


@pytest.mark.parametrize("restart_every", [10_000, 3 * FRAMES], ids=["from the start", "from a restart"])
@pytest.mark.parametrize(
    ("name", "num_envs"), [("mock", 1), ("mpe2/simple_tag_v3", 2), ("vmas/balance", 2), ("butterfly/pistonball_v6", 1)]
)
def test_it_goes_on_as_if_it_had_never_stopped(name: str, num_envs: int, restart_every: int) -> None:
    kwargs = {"butterfly/pistonball_v6": {"n_pistons": 2, "max_cycles": 9}, "vmas/balance": {"max_steps": 9}}.get(
        name, {}
    )
    make = lambda: make_env(name, seed=5, num_envs=num_envs, **kwargs)  # noqa: E731
    with patch("matwm_rl.training.collector.RESTART_EVERY", restart_every):
        one = build(make())
        for index, _ in enumerate(one):
            if index == 4:
                break
        state, random_state = one.state_dict(), torch.get_rng_state()
        expected = [batch for batch, _ in zip(one, range(3), strict=False)]

        other = resumed(state, make())
        assert other.continues
        torch.set_rng_state(random_state)
        found = [batch for batch, _ in zip(other, range(3), strict=False)]
    for before, after in zip(expected, found, strict=True):
        for key in before.exclude("collector").keys(True, True):
            assert torch.equal(before[key], after[key]), key


def test_the_total_is_the_whole_run_s() -> None:
    one = build(make_env("mock", seed=5), total_frames=5 * FRAMES)
    for index, _ in enumerate(one):
        if index == 2:
            break
    other = resumed(one.state_dict(), make_env("mock", seed=5), total_frames=5 * FRAMES)
    assert sum(batch.numel() for batch in other) == 2 * FRAMES


def test_a_restart_is_a_truncation_and_begins_new_episodes() -> None:
    with patch("matwm_rl.training.collector.RESTART_EVERY", 2 * FRAMES):
        batches = [
            batch for batch, _ in zip(build(make_env("mock", seed=5, episode_length=100)), range(4), strict=False)
        ]
    done = torch.cat([batch["next", "done"] for batch in batches]).squeeze(-1)
    truncated = torch.cat([batch["next", "truncated"] for batch in batches]).squeeze(-1)
    assert done.nonzero().squeeze(-1).tolist() == [15, 31] and torch.equal(done, truncated)
    step = torch.cat([batch[keys.OBSERVATION] for batch in batches])[:, 0, 0]
    assert step.tolist() == [*range(16), *range(16)]


class GlobalRandom(MockEnv):
    """Its observations come from the global random state of NumPy, which no seed of an environment sets."""

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super()._step(tensordict)
        out["hunter", "observation"] += np.random.rand()
        return out


def test_nothing_is_cut_off_at_the_end_of_the_run() -> None:
    with patch("matwm_rl.training.collector.RESTART_EVERY", 2 * FRAMES):
        *_, last = build(make_env("mock", seed=5, episode_length=100), total_frames=4 * FRAMES)
    assert not last["next", "done"].any()


def test_an_environment_that_does_not_repeat_itself_begins_anew_at_checkpoints_in_both_runs() -> None:
    assert not repeats_itself(MultiAgentEnv(GlobalRandom()), 5) and repeats_itself(MultiAgentEnv(MockEnv()), 5)
    make = lambda: build(MultiAgentEnv(GlobalRandom(episode_length=100)), checkpoint_every=3 * FRAMES)  # noqa: E731
    one = make()
    batches = iter(one)
    batch = [next(batches) for _ in range(3)][-1]
    assert batch["next", "truncated"].squeeze(-1).tolist() == [False] * (FRAMES - 1) + [True]
    state, random = one.state_dict(), random_states()
    expected = [next(batches) for _ in range(2)]
    other = make()
    other.load_state_dict(state)
    assert other.continues
    set_random_states(random)
    for before, after in zip(expected, other, strict=False):
        for key in before.exclude("collector", "episode", ("next", "episode")).keys(True, True):
            assert torch.equal(before[key], after[key]), key
    assert expected[0][keys.OBSERVATION][0, 0, 0] == 0


@pytest.mark.parametrize("batches", [2, 3], ids=["at a checkpoint", "between checkpoints"])
def test_running_means_of_transforms_go_on(batches: int) -> None:
    def make() -> ResumableCollector:
        torch.manual_seed(0)
        env = TransformedEnv(make_env("mock", seed=5), VecNormV2(in_keys=[keys.OBSERVATION]))
        sizes = {"frames_per_batch": FRAMES, "total_frames": 400, "auto_register_policy_transforms": False}
        return ResumableCollector(env, RandomActions(), seed=5, checkpoint_every=2 * FRAMES, **sizes)

    one = make()
    stream = iter(one)
    for _ in range(batches):
        next(stream)
    state, random = one.state_dict(), random_states()
    expected = [next(stream).clone() for _ in range(3)]
    other = make()
    other.check_state_dict(state, source="state.pt")
    other.load_state_dict(state)
    assert_same(other.state_dict()["transforms"], state["transforms"])
    if batches == 2:  # where the checkpoint stands at which new episodes begin in both
        set_random_states(random)
        for first, second in zip(expected, other, strict=False):
            assert torch.equal(first[keys.OBSERVATION], second[keys.OBSERVATION])
    state["transforms"]["_extra_state"].popitem()
    with pytest.raises(ValueError, match=r"state.pt.*transforms._extra_state.* is missing"):
        other.check_state_dict(state, source="state.pt")


@pytest.mark.parametrize(
    ("name", "kwargs"), [("mock", {}), ("mpe2/simple_tag_v3", {}), ("vmas/balance", {"max_steps": 9})]
)
def test_to_try_whether_it_repeats_itself_changes_nothing(name: str, kwargs: dict[str, int]) -> None:
    played = []
    for tries in (False, True):
        torch.manual_seed(3)
        env = make_env(name, seed=5, num_envs=2, **kwargs)
        assert not tries or repeats_itself(env, 5)
        played.append(env.rollout(20, break_when_any_done=False))
    for key in played[0].exclude("episode", ("next", "episode")).keys(True, True):
        assert torch.equal(played[0][key], played[1][key]), key


def test_new_episodes_begin_where_the_environment_does_not_repeat_itself() -> None:
    one = build(MultiAgentEnv(Unseeded()))
    next(iter(one))
    other = resumed(one.state_dict(), MultiAgentEnv(Unseeded()))
    assert not other.continues
    assert next(iter(other))[keys.OBSERVATION][0, 0, 0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("carrier"), "carrier is missing"),
        (lambda state: state["carrier"].pop("agents.observation"), "carrier.agents.observation is missing"),
        (lambda state: state["carrier"].update({"agents.alive": torch.ones(7)}), "carrier.agents.alive has shape"),
        (lambda state: state.update(actions=torch.zeros(2)), "actions must be a torch.int64 tensor"),
        (lambda state: state.update(actions=torch.zeros(8, 5, dtype=torch.int64)), r"shape \[\*, 3\], found \[8, 5\]"),
        (lambda state: state["actions"].fill_(99), "99"),
        (lambda state: state.update(frames=-5), "has the actions of 8 steps; expected those of the steps from 0 to -5"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    one = build(make_env("mock", seed=5))
    next(iter(one))
    state = one.state_dict()
    one.check_state_dict(state, source="state.pt")
    change(state)
    with pytest.raises(ValueError, match=f"state.pt.*{message}"):
        one.check_state_dict(state, source="state.pt")


@pytest.mark.parametrize("option", [{"split_trajs": True}, {"reset_at_each_iter": True}, {"return_same_td": True}])
def test_options_that_cannot_be_resumed_are_refused(option: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=f"plain batches of running episodes, got \\['{next(iter(option))}'\\]"):
        ResumableCollector(make_env("mock"), RandomActions(), seed=0, frames_per_batch=4, total_frames=8, **option)
