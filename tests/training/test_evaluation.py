from __future__ import annotations

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type

from matwm_rl.envs import MockEnv, MultiAgentEnv, make_env
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor
from matwm_rl.training import evaluation
from matwm_rl.training.evaluation import Returns, evaluate, evaluate_matches, evaluate_tag
from matwm_rl.training.opponents import RandomActions

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


class Constant(TensorDictModuleBase):
    def __init__(self, action: int) -> None:
        super().__init__()
        self.in_keys, self.out_keys, self.action = [("agents", "action_mask")], [("agents", "action")], action

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict["agents", "action_mask"].shape[:-1]
        return tensordict.set(("agents", "action"), torch.full(shape, self.action))


def mock_env(episode_length: torch.Tensor | int, batch_size: tuple[int, ...] = (), **kwargs: object) -> MultiAgentEnv:
    env = MockEnv(batch_size=batch_size, **{"death_step": None, **kwargs})
    env.episode_length = episode_length
    return MultiAgentEnv(env)


def hand_summed(length: int) -> list[float]:
    return [float(sum((i + 1) * ((t + 1) % count) for t in range(length))) for i, count in enumerate(COUNTS.tolist())]


def test_returns_are_the_hand_summed_rewards() -> None:
    returns = evaluate(mock_env(5), NextAction(), episodes=3)
    assert returns.values.tolist() == [hand_summed(5)] * 3


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


def test_a_policy_with_context_starts_every_episode_without_one() -> None:
    env = make_env("mock", seed=0, num_envs=2)
    model = WorldModel.from_env(env, hidden_size=16, num_heads=2, num_dims=4, num_classes=4)
    lengths = []

    class Watched(WorldModelPolicy):
        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            lengths.append(tensordict["context", "length"].flatten().tolist())
            return super().forward(tensordict)

    policy = Watched(model, make_actor(model, num_cells=8), context_length=4)
    returns = evaluate(TransformedEnv(env, policy.make_tensordict_primer()), policy, episodes=4)
    assert returns.values.shape == (4, 3)
    # Two episodes of six steps.
    assert lengths == [[min(t, 4)] * 6 for t in range(6)] * 2


def test_cross_play_of_tag_takes_each_side_from_the_right_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env("mpe2/simple_tag_v3", seed=0)
    policies = []

    def remember(env: object, policy: TensorDictModuleBase, **kwargs: object) -> TensorDictModuleBase:
        policies.append((policy, kwargs["episodes"]))
        return policy

    monkeypatch.setattr(evaluation, "evaluate", remember)
    monkeypatch.setattr(evaluation, "RandomActions", lambda: Constant(1))
    monkeypatch.setattr(evaluation, "TagScript", lambda layout: Constant(2))
    matches = evaluate_tag(env, Constant(4), episodes=7)
    assert [episodes for _, episodes in policies] == [7] * 4
    actions = {name: policy(env.reset())["agents", "action"].tolist() for name, policy in matches.items()}
    assert actions == {
        "adversaries_vs_random_prey": [4, 4, 4, 1],
        "adversaries_vs_fleeing_prey": [4, 4, 4, 2],
        "prey_vs_random_adversaries": [1, 1, 1, 4],
        "prey_vs_chasing_adversaries": [2, 2, 2, 4],
    }


def test_matches_of_tag_are_judged_by_the_pursuers() -> None:
    name = "mpe2/simple_tag_v3"
    matches = evaluate_matches(name, make_env(name, seed=0), RandomActions(), episodes=1)
    assert len(matches.summary()) == len(matches.returns) == 4
    for match, returns in matches.returns.items():
        assert matches.summary()[match] == returns.per_group()["adversary"]
        assert matches.metrics()[f"evaluation/{match}/agent"] == returns.per_group()["agent"]
    assert matches.episodes == 1


def test_other_environments_play_with_themselves() -> None:
    matches = evaluate_matches("mock", mock_env(5), NextAction(), episodes=2)
    first, second, prey = hand_summed(5)
    assert matches.summary() == {"hunter": (first + second) / 2, "prey": prey}
    assert set(matches.metrics()) == {"evaluation/self_play/hunter", "evaluation/self_play/prey"}
    assert matches.per_agent() == {"self_play": {"hunter_0": first, "hunter_1": second, "prey_0": prey}}
