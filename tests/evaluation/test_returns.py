from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type

from matwm_rl import presets
from matwm_rl.envs import MockEnv, MultiAgentEnv, make_env
from matwm_rl.evaluation.opponents import RandomActions
from matwm_rl.evaluation.registry import evaluate_matches
from matwm_rl.evaluation.returns import Matches, Returns, evaluate, report_episodes
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor

COUNTS = torch.tensor([4, 4, 3])


class NextAction(TensorDictModuleBase):
    """Plays MockEnv: in step t action t + 1, modulo the agent's number of actions; the dead do what they must."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [("agents", "observation")], [("agents", "action")]
        self.explored: set[ExplorationType] = set()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.explored.add(exploration_type())
        step = tensordict["agents", "observation"][..., 0].long()
        mask, alive = tensordict["agents", "action_mask"], tensordict["agents", "alive"]
        return tensordict.set(("agents", "action"), torch.where(alive, (step + 1) % COUNTS, mask.int().argmax(-1)))


def mock_env(episode_length: torch.Tensor | int, batch_size: tuple[int, ...] = (), **kwargs: object) -> MultiAgentEnv:
    env = MockEnv(batch_size=batch_size, **{"death_step": None, **kwargs})
    env.episode_length = episode_length
    return MultiAgentEnv(env)


def hand_summed(length: int) -> list[float]:
    return [float(sum((i + 1) * ((t + 1) % count) for t in range(length))) for i, count in enumerate(COUNTS.tolist())]


def test_returns_are_the_hand_summed_rewards() -> None:
    returns = evaluate(mock_env(5), NextAction(), episodes=3)
    assert returns.values.tolist() == [hand_summed(5)] * 3


def test_an_evaluation_tells_how_far_it_is_and_can_be_ended() -> None:
    told: list[tuple[int, int, int]] = []
    env = mock_env(torch.tensor([2, 3]), (2,))
    with report_episodes(lambda *numbers: told.append(numbers)):
        evaluate_matches("mock", env, NextAction(), episodes=4)
    # What an environment plays while the other has not ended is not counted.
    assert told == [(0, 4, 0), (0, 4, 1), (1, 4, 2), (2, 4, 3), (3, 4, 4), (3, 4, 5), (4, 4, 6)]
    evaluate(env, NextAction(), episodes=1)
    assert len(told) == 7

    def end(played: int, episodes: int, steps: int) -> None:
        if steps == 2:
            raise KeyboardInterrupt

    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), report_episodes(end):
        evaluate(env, RandomActions(), episodes=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_environment_plays_the_same_number_of_episodes() -> None:
    # Three episodes of two steps fit into one of seven: counted as they come, the short would be over-represented.
    returns = evaluate(mock_env(torch.tensor([2, 7]), (2,)), NextAction(), episodes=4)
    assert returns.values.tolist() == [hand_summed(2)] * 2 + [hand_summed(7)] * 2


@pytest.mark.parametrize(("episodes", "played"), [(1, 2), (2, 2), (3, 4)])
def test_the_number_of_episodes_is_rounded_up(episodes: int, played: int) -> None:
    returns = evaluate(mock_env(3, (2,)), NextAction(), episodes=episodes)
    assert returns.values.tolist() == [hand_summed(3)] * played


def test_a_dead_agent_earns_no_more() -> None:
    (returns,) = evaluate(mock_env(6, death_step=2), NextAction(), episodes=1).values.tolist()
    full, short = hand_summed(6), hand_summed(2)
    assert returns == [full[0], short[1], full[2]]


def test_no_episodes() -> None:
    with pytest.raises(ValueError, match="got 0"):
        evaluate(mock_env(3), NextAction(), episodes=0)


def test_means_per_agent_and_per_group() -> None:
    returns = Returns(torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]]), make_env("mock").layout)
    assert returns.per_agent() == {"hunter_0": 2.0, "hunter_1": 4.0, "prey_0": 6.0}
    assert returns.per_group() == {"hunter": 3.0, "prey": 6.0}


@pytest.mark.parametrize("exploration", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_exploration_is_as_asked(exploration: ExplorationType) -> None:
    policy = NextAction()
    evaluate(mock_env(3), policy, exploration=exploration, episodes=1)
    assert policy.explored == {exploration}


def test_a_policy_starts_every_episode_without_history() -> None:
    env = make_env("mock", seed=0, num_envs=2)
    model = WorldModel.from_env(env, presets.tiny().world_model)
    lengths = []

    class Watched(WorldModelPolicy):
        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            lengths.append(tensordict["history", "length"].flatten().tolist())
            return super().forward(tensordict)

    policy = Watched(model, make_actor(model, presets.tiny().actor_critic), history_length=4)
    returns = evaluate(TransformedEnv(env, policy.make_tensordict_primer()), policy, episodes=4)
    assert returns.values.shape == (4, 3)
    # Two episodes of six steps.
    hunter_1 = [0, 1, 2, 3, 0, 0]  # it dies in step 3
    expected = [[min(t, 4), hunter_1[t], min(t, 4)] * 2 for t in range(6)]
    assert lengths == expected * 2


def test_other_environments_play_with_themselves() -> None:
    matches = evaluate_matches("mock", mock_env(5), NextAction(), episodes=2)
    first, second, prey = hand_summed(5)
    assert matches.summary() == {"hunter": (first + second) / 2, "prey": prey}
    assert set(matches.metrics()) == {"evaluation/self_play/hunter", "evaluation/self_play/prey"}
    assert matches.per_agent() == {"self_play": {"hunter_0": first, "hunter_1": second, "prey_0": prey}}


def test_matches_without_a_judged_group_keep_apart_in_the_summary() -> None:
    layout = make_env("mock").layout
    first, second = (Returns(torch.tensor([[value, value, 0.0]]), layout) for value in (1.0, 2.0))
    both = Matches({"by_day": first, "by_night": second, "chase": second}, {"chase": "hunter"})
    expected = {"by_day/hunter": 1.0, "by_day/prey": 0.0, "by_night/hunter": 2.0, "by_night/prey": 0.0, "chase": 2.0}
    assert both.summary() == expected
    assert Matches({"by_day": first}).summary() == {"hunter": 1.0, "prey": 0.0}


def test_it_leaves_the_random_state_as_it_was() -> None:
    env, state = make_env("mock", seed=0), torch.get_rng_state()
    evaluate(env, RandomActions(), episodes=1)
    assert torch.equal(torch.get_rng_state(), state)


class Endless(MockEnv):
    """Never ends: environment 0 of a batch, or all."""

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        ends = [end.clone() for end in super()._ends()]
        for end in ends:
            end[0] = False
        return ends[0], ends[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiAgentEnv(Endless(batch_size=[2], death_step=None)),
        lambda: mock_env(10**9),
        lambda: make_env("vmas/simple_tag", num_envs=2, max_steps=None),
    ],
    ids=["one-of-a-batch", "alone", "vmas"],
)
def test_an_episode_that_never_ends_is_an_error(make: Callable[[], MultiAgentEnv]) -> None:
    with pytest.raises(RuntimeError, match=r"environment 0 has not ended after max_steps=9 steps.*limit.*StepCounter"):
        evaluate(make(), RandomActions(), episodes=2, max_steps=9)


def test_the_limit_is_of_episodes_and_not_of_the_evaluation() -> None:
    assert evaluate(mock_env(5), NextAction(), episodes=3, max_steps=5).values.tolist() == [hand_summed(5)] * 3
    with pytest.raises(ValueError, match="max_steps must be a positive integer, got 0"):
        evaluate(mock_env(5), NextAction(), max_steps=0)


def test_an_environment_that_has_played_its_share_may_go_on_for_long() -> None:
    # The short one plays three episodes while the long one plays one and a half.
    returns = evaluate(mock_env(torch.tensor([2, 9]), (2,)), NextAction(), episodes=2, max_steps=9)
    assert returns.values.tolist() == [hand_summed(2), hand_summed(9)]


def test_matches_that_never_end_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.__wrapped__.__kwdefaults__, "max_steps", 9)
    with pytest.raises(RuntimeError, match="has not ended after max_steps=9"):
        evaluate_matches("mock", mock_env(10**9), RandomActions(), episodes=1)


def test_names_in_common_are_told_apart_by_their_groups() -> None:
    layout = replace(make_env("mock").layout, agent_names=["0", "1", "0"], group_map={"red": ["0", "1"], "blue": ["0"]})
    returns = Returns(torch.tensor([[1.0, 2.0, 6.0]]), layout)
    assert returns.per_agent() == {"red/0": 1.0, "red/1": 2.0, "blue/0": 6.0}
    assert returns.per_group() == {"red": 1.5, "blue": 6.0}
