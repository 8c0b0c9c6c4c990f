from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from matwm_rl import keys
from matwm_rl.action_space import DiscreteActions
from matwm_rl.data import ReplayConfig, make_replay
from matwm_rl.envs import MockEnv, MultiAgentEnv, make_env
from matwm_rl.evaluation.open_loop import episode_windows, open_loop, open_loop_errors
from matwm_rl.functional import agents_first
from matwm_rl.modules import (
    CategoricalLatentConfig,
    CoordinateEncoderConfig,
    GaussianLatentConfig,
    MLPEncoderConfig,
    Rollout,
    State,
    WorldModel,
    WorldModelConfig,
)
from matwm_rl.modules.latents import categorical
from matwm_rl.modules.rollout import Act, imagine
from tests.helpers import LATENTS, make_learner, make_model

C, H = 3, 4
SMALL = {"hidden_size": 16, "num_heads": 2, "latent": LATENTS["categorical"], "dropout": 0.0}


def mock_rollout(steps: int = 70, **kwargs: object) -> TensorDictBase:
    env = MultiAgentEnv(MockEnv(**{"episode_length": 9, "death_step": None, **kwargs}))
    return env.rollout(steps, break_when_any_done=False)


@pytest.fixture
def world_model() -> WorldModel:
    model = WorldModel.from_env(make_env("mock"), WorldModelConfig(**SMALL))
    # Heads that start at zero would predict the same whatever they read.
    torch.nn.init.normal_(model.reward.head.output.weight)
    return model


class KnowsMockEnv:
    """What MockEnv does, with the verbs of a world model; the latent is the observation itself."""

    observation_dims = 1
    teammates = "present"
    actions = DiscreteActions([4, 4, 4])

    def __init__(self, teammate_logits: Tensor, reward_offsets: list[float] | None = None) -> None:
        self.teammate_logits = teammate_logits
        self.reward_offsets = reward_offsets or [0.0]
        self.starts = 0

    def decode(self, latent: Tensor) -> Tensor:
        return latent

    def state(self, latent: Tensor) -> State:
        return State(latent, latent, self.teammate_logits.expand(*latent.shape[:2], 2, 4))

    def start_from(self, starts: TensorDictBase, horizon: int) -> tuple[State, None]:
        self.offset = self.reward_offsets[self.starts % len(self.reward_offsets)]
        self.starts += 1
        return self.state(agents_first(starts[keys.OBSERVATION][:, -1])), None

    def imagine(self, state: State, caches: None, act: Act, horizon: int) -> Rollout:
        return imagine(self, state, caches, act, horizon)

    def legal_actions(self, latent: Tensor) -> Tensor:
        return torch.ones(*latent.shape[:2], 4, dtype=torch.bool)

    def step(self, state: State, action: Tensor, caches: None) -> State:
        latent = state.latent.clone()
        latent[..., 0] += 1
        latent[..., 2] = action.float()
        return self.state(latent)

    def predict_outcome(self, state: State, action: Tensor, following: State) -> tuple[Tensor, Tensor]:
        reward = torch.arange(1, 4).view(-1, *[1] * (action.ndim - 1)) * action
        return reward + self.offset, torch.ones_like(reward)


def test_windows_lie_in_one_episode_each_and_start_with_it() -> None:
    rollout = torch.stack([mock_rollout(40), mock_rollout(40)])
    windows = episode_windows(rollout, 4)
    # Nine steps make an episode: windows from steps 0 and 4 of each, and the last, of four steps, has one.
    assert windows.shape == (2 * (4 * 2 + 1), 4)
    step, episode = windows["agents", "observation"][..., 0, 0], windows["agents", "observation"][..., 0, 3]
    assert set(step[:, 0].tolist()) == {0.0, 4.0}
    assert (step == step[:, :1] + torch.arange(4)).all()
    assert (episode == episode[:, :1]).all()
    assert episode_windows(rollout[0], 4).shape == (9, 4)
    assert episode_windows(rollout, 9).shape == (8, 9)


@pytest.mark.parametrize("length", [10, 200])
def test_no_episode_is_long_enough(length: int) -> None:
    with pytest.raises(ValueError, match=f"has {length} steps"):
        episode_windows(mock_rollout(40), length)


def test_agrees_with_a_pass_over_the_whole_history_at_every_step(
    world_model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = world_model
    # The likeliest class instead of a random one, so that both ways imagine the same.
    monkeypatch.setattr(categorical, "sample_index", lambda probs: probs.argmax(-1))
    windows = episode_windows(mock_rollout(), C + H)
    imagined = open_loop(model, windows, context_length=C, horizon=H)["imagined"]

    latents = model.encode(agents_first(windows[keys.OBSERVATION][:, : C + 1]))
    action = agents_first(windows[keys.ACTION], 0)
    for k in range(H):
        steps = C + k + 1
        mask = torch.ones(steps, steps, dtype=torch.bool).tril()
        tokens = model.action_mixer(latents, action[..., :steps])
        hidden = model.transformer(tokens.flatten(0, 1), mask).view(tokens.shape)[:, :, -1]
        teammates = model.teammates(latents, mask)[:, :, -1]
        z = model.dynamics.sample(hidden, latents[:, :, -1])
        latents = torch.cat([latents, z.unsqueeze(2)], 2)
        for key, expected in (
            (keys.TEAMMATE_LOGITS, teammates),
            (keys.NEXT_OBSERVATION, model.decode(z)),
            (keys.REWARD, model.two_hot.decode(model.reward.head(hidden)).unsqueeze(-1)),
            (keys.CONTINUATION, model.continuation(hidden).sigmoid()),
        ):
            result = agents_first(imagined[key][:, k], expected.ndim - 2)
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_nothing_after_the_context_is_seen_but_the_focal_agents_actions(world_model: WorldModel) -> None:
    windows = episode_windows(mock_rollout(), C + H)

    def imagine(changed: TensorDictBase) -> TensorDictBase:
        torch.manual_seed(0)
        return open_loop(world_model, changed, context_length=C, horizon=H)["imagined"]

    plain = imagine(windows)
    hidden = windows.clone()
    hidden["agents", "observation"][:, C + 1 :] += 1
    hidden["next", "agents", "observation"] += 1
    hidden["next", "agents", "reward"] += 1
    hidden["agents", "action"][:, C + H - 1 :, 1:] = (hidden["agents", "action"][:, C + H - 1 :, 1:] + 1) % 3
    unchanged = imagine(hidden)
    for key in (keys.NEXT_OBSERVATION, keys.REWARD, keys.TEAMMATE_LOGITS):
        # Agent 0 never meets the others' actions; nobody meets the last one before the last step.
        assert torch.equal(unchanged[key][:, :, 0], plain[key][:, :, 0])
        assert torch.equal(unchanged[key][:, :-1], plain[key][:, :-1])
    assert not torch.equal(unchanged[keys.REWARD][:, -1, 1:], plain[keys.REWARD][:, -1, 1:])

    seen = windows.clone()
    seen["agents", "observation"][:, C] += 1
    assert not torch.equal(imagine(seen)[keys.TEAMMATE_LOGITS][:, 0], plain[keys.TEAMMATE_LOGITS][:, 0])


def test_an_episode_that_ended_in_the_context_is_forgotten(world_model: WorldModel) -> None:
    rollout = mock_rollout()
    # The first episode's last two steps, then one step and the current observation of the second.
    windows = rollout[7 : 7 + C + H].unsqueeze(0)
    other = windows.clone()
    other["agents", "observation"][:, :2] += 3
    for key in (keys.REWARD, keys.TEAMMATE_LOGITS):
        results = []
        for batch in (windows, other):
            torch.manual_seed(0)
            results.append(open_loop(world_model, batch, context_length=C, horizon=H)["imagined", *key])
        assert torch.equal(*results)


def test_images_count_from_0_to_1() -> None:
    model = make_model([4, 4], [0, 0], (3, 16, 16))
    shape = [2, C + H, 2]
    windows = TensorDict(
        {
            "agents": {
                "observation": torch.full([*shape, 3, 16, 16], 255, dtype=torch.uint8),
                "action": torch.zeros(shape, dtype=torch.long),
            },
            "next": {
                "agents": {
                    "observation": torch.zeros([*shape, 3, 16, 16], dtype=torch.uint8),
                    "reward": torch.zeros(*shape, 1),
                },
                "done": torch.zeros(2, C + H, 1, dtype=torch.bool),
            },
        },
        [2, C + H],
    )
    errors = open_loop_errors(model, windows, context_length=C, horizon=H, num_samples=1)
    assert errors["trivial", "observation"].tolist() == [[3 * 16 * 16.0] * 2] * H


def test_the_true_model_has_no_error_and_trivial_predictors_have_that_of_the_formula() -> None:
    windows = episode_windows(mock_rollout(), C + H)
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    errors = open_loop_errors(KnowsMockEnv(logits), windows, context_length=C, horizon=H, num_samples=2)
    B = windows.shape[0]
    assert (errors["count"] == B).all()
    assert (errors["model", "observation"] == 0).all()
    assert (errors["model", "reward"] == 0).all()

    action = windows["agents", "action"]
    for k in range(H):
        for agent in range(3):
            reward = [(agent + 1) * float(a) for a in action[:, C + k, agent]]
            mean = (agent + 1) * action[:, C:, agent].float().mean().item()
            expected = sum((r - mean) ** 2 for r in reward) / B
            assert errors["trivial", "reward"][k, agent].item() == pytest.approx(expected, rel=1e-4)
            # Kept, the step is k + 1 behind, the last action is that before the context's end, all else is constant.
            moved = (action[:, C + k, agent] - action[:, C - 1, agent]).float().square().mean().item()
            assert errors["trivial", "observation"][k, agent].item() == pytest.approx((k + 1) ** 2 + moved, rel=1e-4)
            others = [other for other in range(3) if other != agent]
            nats = -logits[action[:, C + k][:, others]].mean().item()
            assert errors["model", "teammate"][k, agent].item() == pytest.approx(nats, rel=1e-4)
            trivial = 0.0
            for other in others:
                frequency = torch.bincount(action[:, C:, other].flatten(), minlength=4) / (B * H)
                trivial -= frequency.log()[action[:, C + k, other]].mean().item() / 2
            assert errors["trivial", "teammate"][k, agent].item() == pytest.approx(trivial, rel=1e-4)


def test_several_samples_are_judged_by_their_mean() -> None:
    windows = episode_windows(mock_rollout(), C + H)
    kwargs = {"context_length": C, "horizon": H}
    model = KnowsMockEnv(torch.zeros(4), reward_offsets=[-3.0, 3.0])
    assert (open_loop_errors(model, windows, num_samples=1, **kwargs)["model", "reward"] == 9).all()
    both = open_loop_errors(KnowsMockEnv(torch.zeros(4), [-3.0, 3.0]), windows, num_samples=2, **kwargs)
    assert (both["model", "reward"] == 0).all()


def test_what_follows_an_episodes_end_does_not_count() -> None:
    # Of nine steps, the window's context takes 0 to 5, and the horizon's first three are the episode's last.
    windows = mock_rollout(10).unsqueeze(0)
    errors = open_loop_errors(KnowsMockEnv(torch.zeros(4)), windows, context_length=6, horizon=4, num_samples=1)
    assert errors["count"].tolist() == [[1] * 3] * 3 + [[0] * 3]
    # The successor of the last step is its true final observation.
    assert (errors["model", "observation"][:3] == 0).all()
    assert errors["model", "reward"][3].isnan().all()


def test_dead_agents_do_not_count() -> None:
    # Agent 1 dies in step 5: its reward counts there, its observation no more, nor its actions after it.
    windows = episode_windows(mock_rollout(death_step=5), C + H)
    model = KnowsMockEnv(torch.tensor([10.0, 0.0, 0.0, 0.0]))
    errors = open_loop_errors(model, windows, context_length=C, horizon=H, num_samples=1)
    B = windows.shape[0]
    assert errors["count"].tolist() == [[B, B, B]] * 2 + [[B, 0, B]] * 2
    assert (errors["model", "reward"][:2] == 0).all()
    assert (errors["model", "observation"][0] == 0).all() and errors["model", "observation"][1, 1].isnan()
    # For agent 0 after the death, agent 2 is the one teammate.
    nats = -torch.tensor([10.0, 0.0, 0.0, 0.0]).log_softmax(-1)[windows["agents", "action"][:, C + 2, 2]].mean()
    torch.testing.assert_close(errors["model", "teammate"][2, 0], nats)


def test_without_teammate_predictor() -> None:
    model = WorldModel.from_env(make_env("mock"), WorldModelConfig(**SMALL, teammate_predictor=False))
    windows = episode_windows(mock_rollout(), C + H)
    errors = open_loop_errors(model, windows, context_length=C, horizon=H, num_samples=1)
    assert set(errors["model"].keys()) == {"observation", "reward"}


@pytest.mark.parametrize(
    ("shape", "context_length", "horizon"), [((7,), 3, 4), ((2, 6), 3, 4), ((2, 7), 3, 0), ((2, 7), -1, 4)]
)
def test_windows_of_a_wrong_shape(
    world_model: WorldModel, shape: tuple[int, ...], context_length: int, horizon: int
) -> None:
    windows = mock_rollout(7).expand(*shape[:-1], 7)[..., : shape[-1]]
    with pytest.raises(ValueError, match=r"expected \[B, T\]|horizon must be|context_length must be"):
        open_loop(world_model, windows, context_length=context_length, horizon=horizon)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"latent": CategoricalLatentConfig(num_dims=16, num_classes=8), "encoder": MLPEncoderConfig(depth=1)},
            id="categorical",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "latent": GaussianLatentConfig(num_dims=16),
                "encoder": CoordinateEncoderConfig(depth=1, fourier_features=0),
            },
            id="gaussian",
        ),
    ],
)
def test_training_beats_the_trivial_predictors(options: dict[str, Any]) -> None:
    env = make_env("mock", seed=0, death_step=None, episode_length=10)
    model = WorldModel.from_env(env, WorldModelConfig(hidden_size=32, num_heads=2, dropout=0.0, **options))
    learner = make_learner(model, world_model_lr=3e-3)
    sizes = ReplayConfig(capacity=1000, sequence_length=10, sequences=24, starts_per_agent=4, context_length=2)
    replay = make_replay(3, sizes, seed=0)
    # Episodes are numbered in the observation, without end: restart the count as in the test data.
    for _ in range(20):
        env.set_seed(0)
        replay.extend(env.rollout(50, break_when_any_done=False))
        replay.end_episodes()
    for _ in range(200):
        learner.update_world_model(replay.sequences.sample())
    env.set_seed(0)
    windows = episode_windows(env.rollout(50, break_when_any_done=False), 6)
    errors = open_loop_errors(model, windows, context_length=2, horizon=4)
    # Rewards and observations follow from actions; what others do is random among what is legal.
    assert (errors["model", "reward"] < 0.1 * errors["trivial", "reward"]).all()
    assert (errors["model", "observation"][1:] < 0.4 * errors["trivial", "observation"][1:]).all()
