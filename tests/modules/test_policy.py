from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import MockEnv, MultiAgentEnv, SerialMultiAgentEnv
from matwm_rl.modules import HISTORY_KEYS, STATE_KEYS, ActorCriticConfig, WorldModel, WorldModelPolicy, make_actor
from tests.helpers import COUNTS, LATENTS, make_model, mock_env, randomize

N = len(COUNTS)


def make_exact() -> WorldModel:
    """A model that encodes without chance, so that two passes over the same data agree."""
    return make_model(latent="gaussian").eval()


def make_policy(model: WorldModel | None = None, history_length: int = 4) -> WorldModelPolicy:
    model = make_exact() if model is None else model
    actor = randomize(make_actor(model, ActorCriticConfig(num_cells=8)))
    return WorldModelPolicy(model, actor, history_length=history_length)


def with_history(env: EnvBase, policy: WorldModelPolicy) -> EnvBase:
    return env.append_transform(policy.make_tensordict_primer())


def start(policy: WorldModelPolicy, *batch: int, shape: tuple[int, ...] = (5,)) -> TensorDict:
    """What the policy reads at the first step of an episode, with random observations."""
    empty = policy.make_tensordict_primer().primers.zero()
    td = TensorDict(empty.expand(*batch).to_dict(), batch_size=batch)
    image = len(shape) == 3
    size = (*batch, policy.world_model.num_agents, *shape)
    td[keys.OBSERVATION] = torch.randint(256, size, dtype=torch.uint8) if image else torch.randn(size)
    td[keys.ACTION_MASK] = policy.world_model.legal.expand(*batch, -1, -1).clone()
    return td


def after_steps(policy: WorldModelPolicy, length: int, *batch: int) -> TensorDict:
    """The policy's input after ``length`` steps with random observations."""
    td = start(policy, *batch)
    for _ in range(length):
        out = policy(td)
        td = start(policy, *batch)
        for key in HISTORY_KEYS:
            td[key] = out["next", *key]
    return td


class Spy(torch.nn.Module):
    """Remembers what the actor is given."""

    def __init__(self, actor: torch.nn.Module) -> None:
        super().__init__()
        self.actor = actor
        self.seen: list[TensorDict] = []

    def forward(self, td: TensorDict) -> TensorDict:
        self.seen.append(td.select(*STATE_KEYS).clone())
        return self.actor(td)


@torch.no_grad()
def test_acting_agrees_with_the_sequence_pass_of_the_same_episodes() -> None:
    policy = make_policy(make_exact(), history_length=8)
    policy.actor = spy = Spy(policy.actor)
    env = with_history(mock_env(episode_length=6), policy)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(15, policy, break_when_any_done=False)
    assert rollout["next", "done"].sum() == 2
    trained_on = policy.world_model(add_agent_entries(rollout.exclude(keys.LOGITS)))
    acted_on, alive = torch.stack(spy.seen), rollout[keys.ALIVE]
    for key in STATE_KEYS:
        torch.testing.assert_close(acted_on[key][alive], trained_on[key][alive], rtol=1e-4, atol=1e-5)
    assert acted_on[keys.HIDDEN].any(-1).float().mean() > 0.7
    logits = spy.actor(trained_on)[keys.LOGITS]
    torch.testing.assert_close(logits[alive], rollout[keys.LOGITS][alive], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_policy_remembers_the_last_steps_and_no_more() -> None:
    policy = make_policy(make_exact(), history_length=2)
    policy.actor = spy = Spy(policy.actor)
    env = with_history(mock_env(episode_length=9), policy)
    rollout = add_agent_entries(env.rollout(8, policy))
    for t in range(8):
        window = policy.world_model(rollout[max(0, t - 2) : t + 1].clone())
        # The transformer sees the window alone; the teammate predictor too.
        for key in STATE_KEYS:
            alive = rollout[keys.ALIVE][t]
            torch.testing.assert_close(spy.seen[t][key][alive], window[key][-1][alive], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("batch", [(), (20,), (2, 10)], ids=str)
def test_what_is_remembered_is_what_was_acted_on(latent: str, batch: tuple[int, ...]) -> None:
    """Also where encoding draws at random: it is not encoded again. It fits the type in which it is stored."""
    policy = make_policy(make_model(latent=latent))
    policy.actor = spy = Spy(policy.actor)
    space = policy.world_model.latent
    primer = policy.make_tensordict_primer().primers["history", "code"]
    assert primer.dtype == space.code_dtype == (torch.float32 if latent == "gaussian" else torch.int16)
    td = start(policy, *batch)
    steps = [policy(td)["next", "history", "code"] for _ in range(2)]
    for seen, stored in zip(spy.seen, steps, strict=True):
        assert stored.dtype == space.code_dtype and stored.shape == (*batch, N, 4, 4)
        assert torch.equal(space.from_code(stored[..., -1, :]), seen[keys.LATENT])
    assert not torch.equal(steps[0], steps[1])


@torch.no_grad()
def test_second_episode_is_as_if_it_were_the_first() -> None:
    policy = make_policy()
    env = with_history(mock_env(episode_length=5, ending="terminate"), policy)
    both = env.rollout(10, policy, break_when_any_done=False)
    assert both["next", "done"].squeeze(-1).nonzero().squeeze(-1).tolist() == [4, 9]
    fresh_env = with_history(mock_env(episode_length=5, ending="terminate"), policy)
    # The mock environment counts its episodes, and shows the count.
    fresh_env.reset()
    fresh = fresh_env.rollout(5, policy)
    torch.testing.assert_close(both[5:][keys.OBSERVATION], fresh[keys.OBSERVATION])
    torch.testing.assert_close(both[5:][keys.LOGITS], fresh[keys.LOGITS])
    assert both["history", "length"][:, 0].tolist() == [0, 1, 2, 3, 4] * 2


@torch.no_grad()
def test_environments_of_a_batch_reset_on_their_own() -> None:
    policy = make_policy()
    lengths = (3, 5)
    makers = [lambda n=n: MultiAgentEnv(MockEnv(episode_length=n)) for n in lengths]
    batched = with_history(SerialMultiAgentEnv(2, makers), policy).rollout(9, policy, break_when_any_done=False)
    for row, length in enumerate(lengths):
        single = with_history(mock_env(episode_length=length), policy).rollout(9, policy, break_when_any_done=False)
        torch.testing.assert_close(batched[row][keys.LOGITS], single[keys.LOGITS], rtol=1e-4, atol=1e-5)
        assert torch.equal(batched[row]["history", "length"], single["history", "length"])


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
def test_an_agent_reacts_to_its_own_present_observation_alone(latent: str) -> None:
    policy = make_policy(make_model(latent=latent))
    td = after_steps(policy, 3, 32)
    torch.manual_seed(5)
    logits = policy(td.clone())[keys.LOGITS]
    for n in range(N):
        other = td.clone()
        other[keys.OBSERVATION][:, n] = torch.randn(32, 5)
        torch.manual_seed(5)
        differs = (policy(other)[keys.LOGITS] != logits).any(-1)
        # Two observations may give the same one-hot vectors.
        assert differs[:, n].float().mean() > (0.8 if latent == "gaussian" else 0.3)
        assert differs[:, n].sum() == differs.sum(), "another agent's action depends on what only this one sees"


@torch.no_grad()
def test_an_agent_acts_on_its_own_past_alone() -> None:
    policy = make_policy()
    td = after_steps(policy, 3, 2)
    logits = policy(td.clone())[keys.LOGITS]
    for n in range(N):
        other = td.clone()
        other["history", "code"][:, n, -1] += 1.0
        differs = (policy(other)[keys.LOGITS] != logits).any(-1)
        assert differs[:, n].all() and differs.sum() == 2
        forgotten = td.clone()
        forgotten["history", "code"][:, n, 0] = 31.0
        # Three steps of four: the oldest place is empty, whatever stands there.
        assert torch.equal(policy(forgotten)[keys.LOGITS], logits)


@pytest.mark.parametrize("latent", LATENTS)
def test_illegal_actions_are_never_taken(latent: str) -> None:
    policy = make_policy(make_model(latent=latent))
    env = with_history(mock_env(num_envs=8), policy)
    with set_exploration_type(ExplorationType.RANDOM):
        # The mock environment itself raises when a living agent takes an illegal action.
        rollout = env.rollout(30, policy, break_when_any_done=False)
    assert rollout[keys.ACTION_MASK].gather(-1, rollout[keys.ACTION].unsqueeze(-1)).all()
    assert not rollout[keys.ACTION_MASK].all()
    assert len(rollout[keys.ACTION][..., 0].unique()) == 4


@pytest.mark.parametrize("num_envs", [1, 3])
def test_collector_carries_and_resets_the_history(num_envs: int) -> None:
    policy = make_policy()
    collector = Collector(
        with_history(mock_env(num_envs=num_envs, episode_length=5), policy),
        policy,
        frames_per_batch=12 * num_envs,
        total_frames=36 * num_envs,
        init_random_frames=12 * num_envs,
        auto_register_policy_transforms=False,
    )
    lengths, logits = [], []
    for data in collector:
        data = data.reshape(num_envs, -1)
        lengths += data["history", "length"][0, :, 0].tolist()
        logits += data[keys.LOGITS][0].abs().sum((-2, -1)).bool().tolist()
        assert data[keys.ACTION_MASK].gather(-1, data[keys.ACTION].unsqueeze(-1)).all()
    collector.shutdown()
    # Random frames leave no history; then it grows to the window's 4, and restarts every 5 steps.
    assert lengths[:12] == [0] * 12
    assert lengths[12:] == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert logits == [False] * 12 + [True] * 24


@torch.no_grad()
def test_images() -> None:
    model = make_model(observation_shape=(3, 32, 32))
    policy = make_policy(model)
    for batch in ((), (2,), (2, 3)):
        out = policy(start(policy, *batch, shape=(3, 32, 32)))
        assert out[keys.ACTION].shape == (*batch, N)
        assert out["next", "history", "code"].shape == (*batch, N, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"action_counts": (3,), "group_index": (0,)}, {"teammate_predictor": False}, {"action_scaling": False}],
    ids=str,
)
def test_switches(options: dict) -> None:
    policy = make_policy(make_model(**options))
    out = policy(after_steps(policy, 5, 2))
    assert out[keys.LOGITS].shape == (2, policy.world_model.num_agents, policy.world_model.num_actions)
    assert out["next", "history", "length"].unique().tolist() == [4]


def test_missing_primer_is_explained() -> None:
    policy = make_policy()
    with pytest.raises(KeyError, match="make_tensordict_primer"):
        mock_env().rollout(2, policy)


def test_a_policy_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="history_length must be a positive integer, got 0"):
        make_policy(history_length=0)
