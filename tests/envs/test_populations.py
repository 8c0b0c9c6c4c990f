"""Agents that join late, leave, are cut off alone, and return; limits wherever they are imposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.envs import EnvBase, RewardSum, SerialEnv, StepCounter, TransformedEnv, check_env_specs
from torchrl.envs.libs.vmas import VmasEnv

from matwm_rl.data import add_agent_entries
from matwm_rl.envs import (
    MockEnv,
    MultiAgentEnv,
    ParallelMultiAgentEnv,
    SerialMultiAgentEnv,
    make_env,
    merge_rollout,
)
from matwm_rl.envs.families import wrap_pettingzoo
from matwm_rl.keys import (
    ACTION,
    ACTION_MASK,
    AGENT_DONE,
    AGENT_TERMINATED,
    AGENT_TRUNCATED,
    ALIVE,
    CONTINUATION_LOGITS,
    DONE,
    EPISODE,
    NEXT_ALIVE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
)
from matwm_rl.modules import StateEstimator, WorldModel, WorldModelPolicy, make_actor
from matwm_rl.objectives import WorldModelLoss
from matwm_rl.presets import tiny
from tests.envs.population import Population, population
from tests.envs.test_merge_rollout import play_grouped

RETURNS = {"timetable": {"a_1": {2: "die", 4: "join"}}}
CUT = {"timetable": {"a_1": {3: "cut"}}}


def vmas(**kwargs: Any) -> EnvBase:
    return VmasEnv("simple_tag", num_envs=2, continuous_actions=False, max_steps=None, **kwargs)


def limited(env: EnvBase, steps: int = 5) -> EnvBase:
    return TransformedEnv(env, StepCounter(steps))


class RootOnly(MockEnv):
    """Says only of the whole episode how it ends, and which agents act."""

    def _make_specs(self) -> None:
        super()._make_specs()
        done = self.done_spec.clone()
        for group in self.group_map:
            del done[group]
        self.done_spec = done

    def _output(self, *args: Any) -> TensorDictBase:
        output = super()._output(*args)
        names = ("done", "terminated", "truncated")
        return output.exclude(*((group, name) for group in self.group_map for name in names))


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiAgentEnv(limited(vmas())),
        lambda: MultiAgentEnv(TransformedEnv(limited(vmas()), RewardSum())),
        lambda: MultiAgentEnv(VmasEnv("simple_tag", num_envs=2, continuous_actions=False, max_steps=5)),
        lambda: limited(MultiAgentEnv(vmas())),
        lambda: MultiAgentEnv(limited(wrap_pettingzoo(Population()))),
        lambda: MultiAgentEnv(limited(wrap_pettingzoo(Population(**RETURNS)))),
        lambda: limited(population()),
        lambda: population().append_transform(StepCounter(5)),
        lambda: population(length=5),
        lambda: MultiAgentEnv(limited(MockEnv(episode_length=9, batch_size=[2]))),
        lambda: MultiAgentEnv(limited(RootOnly(episode_length=9, batch_size=[2]))),
        lambda: MultiAgentEnv(RootOnly(episode_length=5, ending="truncate")),
        lambda: SerialMultiAgentEnv(2, lambda: MultiAgentEnv(limited(wrap_pettingzoo(Population())))),
        lambda: limited(SerialMultiAgentEnv(2, population)),
        lambda: ParallelMultiAgentEnv(
            2, lambda: MultiAgentEnv(limited(wrap_pettingzoo(Population()))), mp_start_method="fork"
        ),
    ],
    ids=[
        "vmas-below", "vmas-below-others", "vmas-own", "vmas-above", "pettingzoo-below", "pettingzoo-below-returns",
        "pettingzoo-above", "pettingzoo-appended", "pettingzoo-own", "mock-below", "root-below", "root-own",
        "serial-below", "serial-above", "parallel-below",
    ],
)  # fmt: skip
def test_a_limit_truncates_wherever_it_is_imposed(make: Callable[[], EnvBase]) -> None:
    env = make()
    data = add_agent_entries(env.rollout(10, break_when_any_done=False)).reshape(-1, 10)
    env.close()
    every_fifth = torch.tensor([[False] * 4 + [True]] * 2).flatten().expand(len(data), -1)
    assert torch.equal(data[DONE].squeeze(-1), every_fifth)
    assert torch.equal(data[TRUNCATED], data[DONE])
    assert not data[TERMINATED].any() and not data[AGENT_TERMINATED].any()
    assert torch.equal(data[NEXT_ALIVE][:, 4], data[ALIVE][:, 4]), "nobody dies of a limit"
    assert not data[AGENT_TRUNCATED].any() if AGENT_TRUNCATED in data.keys(True) else True


@pytest.mark.parametrize("make", [lambda: wrap_pettingzoo(Population(length=5, end="terminate")), MockEnv, RootOnly])
def test_what_terminates_in_the_very_step_of_a_limit_terminates(make: Callable[..., EnvBase]) -> None:
    base = make() if make not in (MockEnv, RootOnly) else make(episode_length=5, ending="terminate", death_step=None)
    for env in (MultiAgentEnv(limited(base)), limited(MultiAgentEnv(base))):
        data = env.rollout(9)
        assert data.shape == (5,) and data[TERMINATED][-1], "values do not bootstrap"


def test_who_dies_in_the_step_of_an_imposed_limit_is_dead() -> None:
    base = wrap_pettingzoo(Population(timetable={"a_1": {5: "die"}}))
    data = MultiAgentEnv(limited(base)).rollout(9)
    assert data[TRUNCATED][-1] and not data[TERMINATED].any()
    assert data[NEXT_ALIVE][-1].tolist() == [True, False]


def test_stored_data_of_limited_environments_is_truncated() -> None:
    for make in (lambda: limited(vmas(seed=1)), lambda: limited(wrap_pettingzoo(Population()))):
        stored = make().rollout(10, break_when_any_done=False)
        merged = merge_rollout(stored, MultiAgentEnv(make()).layout)
        assert torch.equal(merged[TRUNCATED], merged[DONE]) and merged[DONE][..., [4, 9], :].all()
        assert not merged[TERMINATED].any() and merged[NEXT_ALIVE].all()


# ---------------------------------------------------------------------- cut off alone


@pytest.mark.parametrize("end", ["terminate", "truncate"])
def test_an_agent_that_a_limit_takes_out_alone_does_not_die(end: str) -> None:
    env = population(**CUT, end=end)
    check_env_specs(env)
    data = env.rollout(20)
    assert data.shape == (8,)
    assert data[ALIVE][:, 1].tolist() == [True] * 3 + [False] * 5
    assert data[AGENT_TRUNCATED][:, 1, 0].tolist() == [False, False, True] + [False] * 5
    assert data[NEXT_OBSERVATION][2, 1].tolist() == [3, 1, 1], "its last observation, from which its value bootstraps"
    assert not data[NEXT_OBSERVATION][3:, 1].any()
    added = add_agent_entries(data)
    assert added[AGENT_DONE][2].flatten().tolist() == [False, True]
    assert not added[AGENT_TERMINATED][:7].any() and added[NEXT_ALIVE][2].all()
    assert added[AGENT_TERMINATED][7].all() == (end == "terminate")


class Continues(TensorDictModuleBase):
    """Stands between the loss and a model: certain that everybody goes on."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.model, self.in_keys, self.out_keys = model, model.in_keys, model.out_keys
        self.two_hot = model.two_hot

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = self.model(tensordict)
        return out.set(CONTINUATION_LOGITS, torch.full_like(out[CONTINUATION_LOGITS], 50.0))


@pytest.mark.parametrize(
    ("kwargs", "deaths"),
    [({}, 0), (CUT, 0), ({"timetable": {"a_1": {3: "die"}}}, 1), (RETURNS, 1), ({"end": "terminate"}, 2)],
    ids=["limit", "cut-alone", "dies", "returns", "terminates"],
)
def test_the_continuation_that_is_learnt_is_zero_of_deaths_alone(kwargs: dict[str, Any], deaths: int) -> None:
    env = population(**kwargs)
    loss = WorldModelLoss(Continues(WorldModel.from_env(env, tiny().world_model)))
    data = env.rollout(20)
    living = int(data[ALIVE].sum())
    # Each step of a living agent whose target is not "goes on" costs its logit.
    torch.testing.assert_close(loss(add_agent_entries(data))["loss_continuation"], torch.tensor(50.0 * deaths / living))


def test_what_is_cut_off_alone_is_replayed_so() -> None:
    from matwm_rl.data import ReplayConfig, make_replay

    config = ReplayConfig(capacity=50, sequences=2, sequence_length=8, starts_per_agent=1, context_length=3)
    replay = make_replay(2, config, seed=0)
    replay.extend(population(**CUT).rollout(8))
    sample = replay.sequences.sample()[0]
    assert sample[AGENT_DONE][:, 1, 0].tolist() == [False, False, True] + [False] * 4 + [True]
    assert sample[NEXT_ALIVE][:3, 1].all() and not sample[AGENT_TERMINATED].any()
    assert AGENT_TRUNCATED not in sample.keys(True)


# ---------------------------------------------------------------------- populations


def test_who_returns_lives_again() -> None:
    env = population(**RETURNS)
    torch.manual_seed(0)
    data = env.rollout(20)
    alive = [True, True, False, False, True, True, True, True]
    assert data[ALIVE][:, 1].tolist() == alive and data[NEXT_ALIVE][:, 1].tolist() == [*alive[1:], True]
    assert data[OBSERVATION][:, 1, 0].tolist() == [0, 1, 0, 0, 4, 5, 6, 7]
    assert data[REWARD][:, 1, 0].tolist() == [2 * a for a in alive]
    assert data[ACTION_MASK][:, 1].all(-1).tolist() == alive
    given = [step["a_1"] for step in env.base_env._env.given]
    assert given == data[ACTION][:, 1].tolist() and any(given[4:]), "its own actions reach the environment"


def test_who_joins_late_lives_from_then_on() -> None:
    env = population(
        names=("a_0", "a_1", "b_0"), late=("a_1", "b_0"), timetable={"a_1": {1: "join"}, "b_0": {3: "join"}}
    )
    check_env_specs(env)
    data = env.rollout(20, break_when_any_done=False)[:16]
    for episode in data.reshape(2, 8):
        assert episode[ALIVE].int().sum(0).tolist() == [8, 7, 5]
        assert episode[OBSERVATION][:3, 2].any().item() is False and episode[OBSERVATION][3, 2].tolist() == [3, 2, 1]
        assert episode[TRUNCATED][-1] and episode[NEXT_ALIVE][-1].all()


def test_whoever_is_there_last_ends_the_episode() -> None:
    """All die, one after another, some having returned; the last death terminates."""
    data = population(timetable={"a_0": {4: "die"}, "a_1": {1: "die", 3: "join", 6: "die"}}, length=30).rollout(40)
    assert data.shape == (6,) and data[TERMINATED][-1] and not data[TRUNCATED].any()
    assert data[ALIVE].int().tolist() == [[1, 1], [1, 0], [1, 0], [1, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("batched", [SerialMultiAgentEnv, SerialEnv])
def test_batched_populations(batched: type[SerialMultiAgentEnv]) -> None:
    env = batched(2, [lambda: population(**RETURNS), lambda: population(**CUT)])
    policy = TensorDictModule(lambda mask: mask.int().argmax(-1), in_keys=[ACTION_MASK], out_keys=[ACTION])
    data = env.rollout(16, policy, break_when_any_done=False)
    assert data[ALIVE][0, :, 1].int().tolist() == [1, 1, 0, 0, 1, 1, 1, 1] * 2
    assert data[ALIVE][1, :, 1].int().tolist() == [1, 1, 1, 0, 0, 0, 0, 0] * 2
    assert data[AGENT_TRUNCATED][1].sum() == 2 and not data[AGENT_TRUNCATED][0].any()


@pytest.mark.parametrize("kwargs", [RETURNS, CUT, {"late": ("a_1",), "timetable": {"a_1": {2: "join", 5: "cut"}}}])
def test_stored_populations_are_the_live_ones(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    env = population(**kwargs)
    live = env.rollout(20, break_when_any_done=False)
    stored = play_grouped(wrap_pettingzoo(Population(**kwargs)), live[ACTION], env.layout.group_map)
    merged = merge_rollout(stored, env.layout)
    assert AGENT_TRUNCATED in merged.keys(True)
    for key in merged.keys(include_nested=True, leaves_only=True):
        assert torch.equal(merged[key], live[key]), key


# ---------------------------------------------------------------------- histories of their own


@torch.no_grad()
def test_nothing_flows_across_an_absence() -> None:
    env = population(**RETURNS)
    model = WorldModel.from_env(env, tiny().world_model).eval()
    data = env.rollout(20)
    other = data.clone()
    other[OBSERVATION][:2, 1] += 7.0
    other[ACTION][:2, 1] = (other[ACTION][:2, 1] + 1) % 3
    torch.manual_seed(0)
    one = model(add_agent_entries(data))
    torch.manual_seed(0)
    two = model(add_agent_entries(other))
    hidden = ("agents", "hidden")
    assert not torch.equal(one[hidden][1, 1], two[hidden][1, 1]), "within its first life it does"
    assert torch.equal(one[hidden][4:, 1], two[hidden][4:, 1])
    assert not one[hidden][4, 1].any(), "its second life begins as an episode does"
    for td in (data, other):
        start = add_agent_entries(td)[:6].unsqueeze(0)
        torch.manual_seed(0)
        td["began"] = model.start_from(start)[0].hidden[1].expand(8, -1)
    assert torch.equal(data["began"], other["began"])


@torch.no_grad()
def test_a_policy_remembers_nothing_of_an_earlier_life() -> None:
    env = population(**RETURNS)
    model = WorldModel.from_env(env, tiny().world_model)
    policy = WorldModelPolicy(model, make_actor(model, tiny().actor_critic), history_length=8)
    primed = env.append_transform(policy.make_tensordict_primer())
    data = primed.rollout(20, policy)
    assert data["history", "length"][:, 0].tolist() == list(range(8))
    lengths = data["history", "length"][:, 1].tolist()
    assert lengths[:3] == [0, 1, 2] and lengths[4:] == [0, 1, 2, 3]
    estimator = StateEstimator(model, history_length=8)
    assert not estimator(data[4].clone())["agents", "hidden"][1].any()


def test_resets_are_counted() -> None:
    env = make_env("mock", num_envs=2, episode_length=3)
    data = env.rollout(7, break_when_any_done=False)
    expected = [0, 0, 0, 1, 1, 1, 2]
    assert data[EPISODE][..., 0].tolist() == data["next", EPISODE][..., 0].tolist() == [expected] * 2
    assert env.reset()[EPISODE].flatten().tolist() == [3, 3]
    env.set_seed(0)
    assert env.reset()[EPISODE].flatten().tolist() == [0, 0]
