from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, StepCounter, TransformedEnv

from matwm_rl.envs import (
    Ends,
    MockEnv,
    MultiAgentEnv,
    SerialMultiAgentEnv,
    factory,
    make_env,
    register_end_rule,
    register_family,
    register_renderer,
    render_frame,
)
from matwm_rl.envs import registry as registries
from matwm_rl.keys import ACTION_MASK, ALIVE, NEXT_ALIVE, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED, TRUNCATED


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test registers."""
    monkeypatch.setattr(registries.end_rules, "_values", dict(registries.end_rules._values))
    monkeypatch.setattr(registries.renderers, "_values", dict(registries.renderers._values))
    before = dict(registries.families)
    yield
    registries.families.clear()
    registries.families.update(before)


# ---------------------------------------------------------------------- families


class Recorder:
    """A family that writes down how it was called."""

    def __init__(self, result: Any = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.result = result

    def __call__(self, task: str, *, num_envs: int, device: torch.device | str | None, **kwargs: Any) -> Any:
        self.calls.append({"task": task, "num_envs": num_envs, "device": device, **kwargs})
        return self.result(num_envs) if self.result else MockEnv(episode_length=int(task), device=device)


def test_a_registered_family_is_made() -> None:
    make = Recorder()
    register_family("mine", make)
    env = make_env("mine/2", device="cpu", speed=3)
    assert make.calls == [{"task": "2", "num_envs": 1, "device": "cpu", "speed": 3}]
    assert type(env) is MultiAgentEnv
    assert env.rollout(9).shape == (2,)


def test_a_registered_family_is_batched() -> None:
    make = Recorder()
    register_family("mine", make)
    env = make_env("mine/2", num_envs=3)
    assert type(env) is SerialMultiAgentEnv
    assert env.rollout(9).shape == (3, 2)
    assert {call["num_envs"] for call in make.calls} == {1}


def test_a_vectorized_family_is_made_once() -> None:
    make = Recorder(lambda num_envs: MockEnv(batch_size=[num_envs]))
    register_family("mine", make, vectorized=True)
    env = make_env("mine", num_envs=3)
    assert make.calls == [{"task": "", "num_envs": 3, "device": None}]
    assert type(env) is MultiAgentEnv and env.batch_size == (3,)


def test_families_may_return_other_kinds_of_environment() -> None:
    from mpe2 import simple_tag_v3

    merged = MultiAgentEnv(MockEnv())
    register_family("merged", Recorder(lambda num_envs: merged))
    assert make_env("merged/1") is merged
    register_family("pettingzoo", Recorder(lambda num_envs: simple_tag_v3.parallel_env(max_cycles=4)))
    assert make_env("pettingzoo/1").rollout(9)[OBSERVATION].shape == (4, 4, 16)
    register_family("nothing", Recorder(lambda num_envs: "text"))
    with pytest.raises(TypeError, match="'nothing/1' made a str; expected a grouped TorchRL environment"):
        make_env("nothing/1")
    register_family("turns", Recorder(lambda num_envs: simple_tag_v3.env()))
    with pytest.raises(ValueError, match=r"AEC environment act in turns; wrap its parallel_env"):
        make_env("turns/1")
    register_family("batched", Recorder(lambda num_envs: MockEnv(batch_size=[2])))
    with pytest.raises(ValueError, match=r"of batch size \[2\]; expected none.*vectorized=True"):
        make_env("batched/1")


def test_a_family_can_be_replaced() -> None:
    register_family("mock", Recorder())
    assert make_env("mock/5").rollout(9).shape == (5,)


@pytest.mark.parametrize("name", ["", "mine/one", "mine:one"])
def test_bad_family_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"(a slash or a colon|not empty), got '{name}'"):
        register_family(name, Recorder())


def test_unknown_names_list_what_is_registered() -> None:
    register_family("mine", Recorder())
    with pytest.raises(
        ValueError, match=r"magent2, mamujoco, mine, mock, mpe2, .*, vmas\. .*Register another family with"
    ):
        make_env("other/one")


# ---------------------------------------------------------------------- factories

FACTORIES = """
from matwm_rl.envs import MockEnv, register_family

def grouped(length=3):
    return MockEnv(episode_length=length)

def registered(task, *, num_envs, device, **kwargs):
    return MockEnv(episode_length=int(task), device=device)

register_family("of_my_module", registered)
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_envs_for_tests.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_module")
def test_a_factory_is_imported_and_called() -> None:
    assert make_env("my_envs_for_tests:grouped").rollout(9).shape == (3,)
    assert make_env("my_envs_for_tests:grouped", num_envs=2, length=4).rollout(9).shape == (2, 4)
    assert make_env("my_envs_for_tests:grouped", device="cpu").device == torch.device("cpu")


def test_a_factory_of_pettingzoo_is_wrapped_as_those_of_mpe2() -> None:
    name = "simple_speaker_listener_v4"

    def play(env: EnvBase) -> TensorDictBase:
        torch.manual_seed(0)
        return env.rollout(60, break_when_any_done=False)

    factory = play(make_env(f"mpe2.{name}:parallel_env", seed=3, num_envs=2, max_cycles=25))
    family = play(make_env(f"mpe2/{name}", seed=3, num_envs=2))
    assert factory[TRUNCATED].sum() == 4
    for key in (OBSERVATION, REWARD, TRUNCATED, ALIVE):
        assert torch.equal(factory[key], family[key])


@pytest.mark.usefixtures("my_module")
def test_unknown_factories() -> None:
    with pytest.raises(ImportError, match="'not_there.envs:make' needs the module 'not_there.envs'"):
        make_env("not_there.envs:make")
    with pytest.raises(ValueError, match="'my_envs_for_tests' has no function 'make'"):
        make_env("my_envs_for_tests:make")


# ---------------------------------------------------------------------- end rules


class Duel(MockEnv):
    """An environment whose ends only its own rule knows."""


class Rematch(Duel):
    """A subclass of it."""


def hunter_0_dies(env: Duel, tensordict: TensorDictBase, alive: Tensor) -> Ends:
    """``hunter_0`` dies in step 2, ``hunter_1`` lives although the environment says otherwise."""
    done = tensordict["done"]
    alive = alive & torch.stack([env._steps < 2, *[torch.ones_like(env._steps, dtype=torch.bool)] * 2], -1)
    return Ends(alive=alive, done=done, terminated=torch.zeros_like(done), truncated=done)


@pytest.mark.parametrize("env_type", [Duel, Rematch])
@pytest.mark.parametrize("transformed", [False, True])
def test_an_own_end_rule_is_used(env_type: type[MockEnv], transformed: bool) -> None:
    register_end_rule(Duel, hunter_0_dies)
    base: EnvBase = env_type(episode_length=4, ending="terminate")
    if transformed:
        base = TransformedEnv(base, StepCounter())
    data = MultiAgentEnv(base).rollout(8, break_when_any_done=False)
    assert data[NEXT_ALIVE].tolist() == ([[True] * 3] + [[False, True, True]] * 3) * 2
    assert data[ALIVE][4].all(), "all live again after a reset"
    assert data[TRUNCATED].flatten().tolist() == ([False] * 3 + [True]) * 2 and not data[TERMINATED].any()
    assert not data[NEXT_OBSERVATION][1:4, 0].any() and data[NEXT_OBSERVATION][0, 0].any()
    assert data["next", *ACTION_MASK][1:4, 0].tolist() == [[True, False, False, False]] * 3


def test_the_newest_rule_of_the_nearest_class_wins() -> None:
    def never(env: EnvBase, tensordict: TensorDictBase, alive: Tensor) -> Ends:
        no = torch.zeros_like(tensordict["done"])
        return Ends(alive=alive, done=no, terminated=no, truncated=no)

    register_end_rule(Rematch, never)
    register_end_rule(Duel, never)
    register_end_rule(Duel, hunter_0_dies)
    assert MultiAgentEnv(Duel(episode_length=2)).rollout(3).shape == (2,)
    assert MultiAgentEnv(Rematch(episode_length=2)).rollout(3).shape == (3,)
    assert MultiAgentEnv(MockEnv(episode_length=2, ending="terminate")).rollout(3)[TERMINATED].any()


def test_masks_are_spared_where_nobody_dies() -> None:
    register_end_rule(Duel, hunter_0_dies, agents_die=False)
    data = MultiAgentEnv(Duel(episode_length=4)).rollout(4)
    assert data[NEXT_OBSERVATION][2, 0].any(), "taken at its word, although this rule lets an agent die"


def test_end_rules_are_sent_to_the_processes_of_parallel_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[Callable[[], MultiAgentEnv]] = []
    monkeypatch.setattr(factory, "ParallelMultiAgentEnv", lambda num_envs, create: workers.append(create))
    register_family("duel", lambda task, *, num_envs, device: Duel(episode_length=4, ending="terminate"))
    register_end_rule(Duel, hunter_0_dies)
    make_env("duel", num_envs=2, parallel=True)
    (worker,) = (pickle.loads(cloudpickle.dumps(create)) for create in workers)
    # What a new process starts with: the rule of the copied class is not there.
    monkeypatch.setattr(registries.end_rules, "_values", {})
    assert worker().rollout(4)[NEXT_ALIVE].tolist() == [[True] * 3] + [[False, True, True]] * 3


# ---------------------------------------------------------------------- renderers


def test_an_own_renderer_is_used() -> None:
    def draw(env: Duel, env_index: int) -> NDArray[np.uint8]:
        return np.full((2, 3, 3), 10 * int(env._steps[env_index]) + env_index, dtype=np.uint8)

    register_renderer(Duel, draw)
    env = MultiAgentEnv(Rematch(batch_size=[2]))
    env.step(env.rand_action(env.reset()))
    assert render_frame(TransformedEnv(env), 1).tolist() == [[[11] * 3] * 3] * 2
    assert env.render_frame()[0, 0, 0] == 10
    with pytest.raises(
        NotImplementedError,
        match="no renderer for MockEnv; registered: Duel, GameBatch, MeltingpotWrapper, PettingZooWrapper, Vmas",
    ):
        make_env("mock").render_frame()
