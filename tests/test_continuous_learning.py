"""Agents with continuous actions: losses against slow loops, dreams, replay, acting, resuming, evaluation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import TransformedEnv, check_env_specs
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys, presets
from matwm_rl.action_distribution import BoxDistribution
from matwm_rl.data import ReplayConfig, add_agent_entries, make_replay
from matwm_rl.envs import ImaginationEnv, make_env
from matwm_rl.evaluation import (
    CrossPlay,
    RandomActions,
    TagScript,
    episode_windows,
    evaluate,
    evaluate_tag,
    open_loop_errors,
)
from matwm_rl.modules import ActorCriticConfig, Imagination, WorldModel, WorldModelPolicy, make_actor
from matwm_rl.objectives import ActorLoss, ActorLossConfig, MeanPolicyEntropy, Signalling, WorldModelLoss
from matwm_rl.training import PolicyCard, TrainedPolicy, export_policy, guard
from matwm_rl.training.collector import ResumableCollector
from tests.helpers import (
    BOXES,
    LATENTS,
    grads,
    make_learner,
    make_model,
    mock_env,
    mock_replay,
    others,
    random_batch,
    random_imagined,
    randomize,
    total,
)
from tests.test_box_actions import slow_log_density
from tests.training.helpers import update
from tests.training.test_no_wait import Waits

N, SIZES = 3, BOXES.sizes
SMALL = ActorCriticConfig(num_cells=8)


def model_of_boxes(**config: object) -> WorldModel:
    return make_model(actions=BOXES, **({"latent": "gaussian"} | config))


def slow_log_prob(raw: list[float], action: list[float], size: int) -> float:
    return sum(slow_log_density(raw[i], raw[len(raw) // 2 + i], action[i]) for i in range(size))


def slow_entropy(raw: list[float], size: int, points: int = 4_001) -> float:
    """By the trapezoidal rule."""
    entropy = 0.0
    for i in range(size):
        grid = [-1 + 2 * k / (points - 1) for k in range(points)]
        logs = [slow_log_density(raw[i], raw[len(raw) // 2 + i], a) for a in grid]
        terms = [-math.exp(p) * p for p in logs]
        entropy += 2 / (points - 1) * (sum(terms) - 0.5 * (terms[0] + terms[-1]))
    return entropy


def test_teammate_loss(float64: None) -> None:
    """Also of actions on the bounds, whose gradients are finite."""
    model, batch = model_of_boxes().eval(), random_batch(boxes=BOXES)
    at_bound = torch.rand_like(batch[keys.TEAMMATE_ACTION]) < 0.3
    batch[keys.TEAMMATE_ACTION][at_bound] = batch[keys.TEAMMATE_ACTION][at_bound].sign()
    logits = model(batch.clone())[keys.TEAMMATE_LOGITS].tolist()
    expected, count = 0.0, 0
    for b, t, i in itertools.product(range(3), range(7), range(N)):
        if not batch[keys.ALIVE][b, t, i]:
            continue
        count += 1
        for place, j in enumerate(others(i, N)):
            if batch[keys.TEAMMATE_ALIVE][b, t, i, place]:
                action = batch[keys.TEAMMATE_ACTION][b, t, i, place].tolist()
                expected -= slow_log_prob(logits[b][t][i][place], action, SIZES[j])
    losses = WorldModelLoss(model)(batch)
    assert losses["loss_teammate"].item() == pytest.approx(expected / count, rel=1e-9)
    assert all(grad.isfinite().all() for grad in grads(total(losses), model.parameters()))


@pytest.mark.parametrize("old", [None, 0.0, 1.5, -1.5])
def test_actor_loss(float64: None, old: float | None) -> None:
    """REINFORCE, and PPO at the old policy, and at 4.5 times more or less; actions on the bounds are among them."""
    model = model_of_boxes()
    actor, td = randomize(make_actor(model, SMALL)), random_imagined(2, 3, model=model)
    td[keys.ACTION] = torch.where(torch.rand(2, 3, N, 1) < 0.3, td[keys.ACTION].sign(), td[keys.ACTION])
    objective = "reinforce" if old is None else "ppo"
    loss = ActorLoss(actor, num_agents=N, entropy_coeff=0.1, objective=objective).eval()
    with torch.no_grad():
        logits = actor(td.clone())[keys.LOGITS].tolist()
    log_probs = torch.zeros(2, 3, N)
    expected = 0.0
    for n in range(N):
        alive = [s for s in range(2) if td[keys.ALIVE][s, 0, n]]
        for s, t in itertools.product(alive, range(3)):
            log_prob = slow_log_prob(logits[s][t][n], td[keys.ACTION][s, t, n].tolist(), SIZES[n])
            log_probs[s, t, n] = log_prob
            advantage = float(td[keys.LAMBDA_RETURN][s, t, n] - td[keys.STATE_VALUE][s, t, n])
            advantage /= max(1.0, float(loss.return_scale.scale()[n]))
            gain = advantage * log_prob
            if old is not None:
                ratio = math.exp(-old)
                gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            entropy = slow_entropy(logits[s][t][n], SIZES[n])
            expected -= float(td[keys.WEIGHT][s, t, n]) * (gain + 0.1 * entropy) / (len(alive) * 3)
    if old is not None:
        td[keys.ACTION_LOG_PROB] = log_probs + old
    found = loss(td)["loss_actor"]
    assert found.item() == pytest.approx(expected, rel=1e-4)
    gradients = grads(found, actor.parameters())
    assert all(grad.isfinite().all() for grad in gradients) and all(grad.any() for grad in gradients)


def test_bonuses_that_need_probabilities_say_so_and_the_settings_leave_them_out() -> None:
    model = model_of_boxes()
    actor, td = make_actor(model, SMALL), random_imagined(model=model)
    for bonus in (MeanPolicyEntropy(0.1), Signalling(1.0)):
        with pytest.raises(TypeError, match=f"{type(bonus).__name__} needs the probabilities of discrete actions"):
            ActorLoss(actor, num_agents=N, regularizers=[bonus])(td)
    config = presets.vectors().learner.actor
    assert isinstance(config, ActorLossConfig) and config.signalling_coeff and config.mean_policy_entropy_coeff
    assert config.arguments(BOXES)["regularizers"] == []


@pytest.mark.parametrize("scaled", [True, False])
def test_an_action_changes_what_follows_and_action_scaling_tells_agents_apart(scaled: bool) -> None:
    model = model_of_boxes(action_scaling=scaled).eval()
    latent, action = torch.zeros(N, 4, model.latent.latent_size), torch.zeros(N, 4, 2)
    tokens = model.action_mixer(latent, action)
    assert torch.equal(tokens[0], tokens[1]) != scaled
    assert not torch.equal(model.action_mixer(latent, action + 0.5), tokens)


@torch.no_grad()
@pytest.mark.parametrize("teammate_predictor", [False, True])
def test_dreams(teammate_predictor: bool) -> None:
    """Imagination and the environment of dreams play the same, with legal actions, and pad what an agent has not."""
    model = model_of_boxes(teammate_predictor=teammate_predictor)
    actor, replay = randomize(make_actor(model, SMALL)), mock_replay(env=mock_env(continuous=True))
    starts, seed = replay.starts.sample(), 7
    torch.manual_seed(seed)
    imagined = Imagination(model, actor, horizon=4)(starts.clone())
    env = ImaginationEnv(model, lambda: starts.clone(), max_steps=4, end_threshold=0.0)
    check_env_specs(env)
    torch.manual_seed(seed)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(4, actor)
    alive = imagined[keys.ALIVE]
    assert imagined.shape == rollout.shape and imagined[keys.ACTION].shape == (*imagined.shape, N, 2)
    for key in (keys.ACTION, keys.LATENT, ("next", *keys.LATENT)):
        assert torch.equal(imagined[key][alive], rollout[key][alive])
    assert BOXES.problem(imagined[keys.ACTION]) is None and not imagined[keys.ACTION][:, :, 2, 1].any()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        greedy = actor(imagined.clone())
    loc = greedy[keys.LOGITS][..., :2].tanh() * imagined[keys.ACTION_MASK]
    torch.testing.assert_close(greedy[keys.ACTION], loc)


def test_one_learner_trains_and_never_waits_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "can_wait", lambda device: False)
    model, replay = model_of_boxes(), mock_replay(env=mock_env(continuous=True))
    learner = make_learner(model, actor=ActorLossConfig(objective="ppo"), agent_epochs=2)
    before = {name: value.clone() for name, value in learner.actor.state_dict().items()}
    assert all(value.isfinite().all() for value in update(learner, replay).values())
    assert any(not torch.equal(value, before[name]) for name, value in learner.actor.state_dict().items())
    sequences, starts = replay.sequences.sample(), replay.starts.sample()
    model.max_boundaries = sequences.numel()
    with Waits() as waits:
        learner.update_world_model(sequences)
        learner.update_agents(starts)
    assert waits.found == []


def test_replay_keeps_actions_and_refuses_what_is_none() -> None:
    env, replay = mock_env(continuous=True), mock_replay(env=mock_env(continuous=True))
    batch = replay.sequences.sample()
    assert batch[keys.ACTION].shape == (2, 8, N, 2) and batch[keys.TEAMMATE_ACTION].shape == (2, 8, N, N - 1, 2)
    plain = env.rollout(8, break_when_any_done=False)
    entries = add_agent_entries(plain)
    for i in range(N):
        assert torch.equal(entries[keys.TEAMMATE_ACTION][:, i], plain[keys.ACTION][:, others(i, N)])
    for value, message in ((1.5, "expected numbers from -1 to 1"), (math.nan, "expected numbers from -1 to 1")):
        wrong = plain.clone()
        wrong[keys.ACTION][2, 1, 0] = value
        with pytest.raises(ValueError, match=f"of agent 1 in step 2 of environment 0 of the batch; {message}"):
            replay.extend(wrong)
    dead = plain.clone()
    dead[keys.ACTION][~dead[keys.ALIVE]] = math.nan
    make_replay(N, ReplayConfig()).extend(dead)  # what is stored of the dead may be anything
    wrong = plain.clone()
    wrong[keys.ACTION][2, 2, 1] = 0.5
    with pytest.raises(ValueError, match=r"\[.*, 0.5\] of agent 2 in step 2 .* and 0 where .* \[True, False\]"):
        make_replay(N, ReplayConfig()).extend(wrong)
    wrong = plain.clone()
    wrong[keys.ACTION] = plain[keys.ACTION][..., :1]
    with pytest.raises(ValueError, match=r"actions of 1 numbers, of which .*'action_mask'\) has 2 entries"):
        make_replay(N, ReplayConfig()).extend(wrong)


def test_bfloat16_gives_float32_states_and_nan_weights_a_nan_loss() -> None:
    model, replay = model_of_boxes(), mock_replay(env=mock_env(continuous=True))
    actor = randomize(make_actor(model, SMALL))
    imagined = Imagination(model, actor, horizon=3, precision="bfloat16")(replay.starts.sample())
    assert {imagined[key].dtype for key in (keys.LATENT, keys.HIDDEN, keys.TEAMMATE_LOGITS, keys.ACTION)} == {
        torch.float32
    }
    for parameter in model.teammates.parameters():
        parameter.data.fill_(math.nan)
    assert WorldModelLoss(model)(replay.sequences.sample())["loss_teammate"].isnan()


def test_a_model_in_double_precision_acts_and_learns_in_the_same_data() -> None:
    model = model_of_boxes().double().eval()
    policy = WorldModelPolicy(model, randomize(make_actor(model, SMALL)).double(), history_length=3)
    env = TransformedEnv(mock_env(continuous=True), policy.make_tensordict_primer())
    rollout = env.rollout(12, policy, break_when_any_done=False)
    assert rollout[keys.ACTION].dtype == torch.float32 and env.full_action_spec[keys.ACTION].is_in(rollout[keys.ACTION])
    make_replay(N, ReplayConfig()).extend(rollout)
    states = random_imagined(model=model).apply(lambda value: value.double() if value.is_floating_point() else value)
    dist = policy.actor.get_dist(states)
    assert dist.log_prob(torch.zeros(4, 5, N, 2)).isfinite().all()


def collector_of(policy: WorldModelPolicy, frames: int) -> ResumableCollector:
    env = TransformedEnv(mock_env(continuous=True), policy.make_tensordict_primer())
    sizes = {"frames_per_batch": 5, "total_frames": frames, "init_random_frames": 5}
    return ResumableCollector(env, policy, seed=0, auto_register_policy_transforms=False, **sizes)


def test_a_policy_acts_and_collection_goes_on_from_a_state() -> None:
    model = model_of_boxes().eval()
    policy = WorldModelPolicy(model, randomize(make_actor(model, SMALL)), history_length=3)
    first = collector_of(policy, 40)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state, random = first.state_dict(), torch.get_rng_state()
    expected = next(batches)
    second = collector_of(policy, 40)
    second.load_state_dict(state)
    torch.set_rng_state(random)
    found = next(iter(second))
    assert second.continues
    for key in (keys.ACTION, keys.OBSERVATION, ("history", "action")):
        assert torch.equal(found[key], expected[key])
    state["actions"] = state["actions"].long()
    with pytest.raises(ValueError, match="actions must be a torch.float32 tensor, found a torch.int64 tensor"):
        second.check_state_dict(state, source="the state's")


def test_open_loop_errors_know_the_best_constant_prediction() -> None:
    env, model = mock_env(continuous=True), model_of_boxes()
    windows = episode_windows(env.rollout(60, break_when_any_done=False), 5)
    errors = open_loop_errors(model, windows, context_length=2, horizon=3, num_samples=2)
    uniform = torch.tensor([1.5, 1.5, 2.0]) * math.log(2)  # of the living others' numbers, at first
    # What teammates do here is uniform: no constant is better by much, and what an agent does not have adds nothing.
    assert (errors["trivial", "teammate"][0] < uniform + 0.1).all()
    assert (errors["trivial", "teammate"][errors["count"] > 20] > 0.3 * uniform.amin()).all()
    # Hunter 1 is dead after the first of these steps, and nobody's error is counted.
    lives = errors["count"] > 0
    model_error, trivial_error = errors["model", "teammate"][lives], errors["trivial", "teammate"][lives]
    assert (trivial_error < model_error).all(), "the model has learnt nothing"


@pytest.mark.parametrize("name", ["mpe2/simple_tag_v3", pytest.param("vmas/simple_tag", marks=pytest.mark.slow)])
def test_scripts_and_matches_play_continuous_simple_tag(name: str) -> None:
    env = make_env(name, seed=0, num_envs=2, continuous_actions=True)
    script, random = TagScript(env.layout), RandomActions(env.layout.actions)
    chased = evaluate(env, CrossPlay(script, random, env.layout, ["adversary"]), episodes=4)
    chance = evaluate(env, random, episodes=4)
    assert chased.per_group()["adversary"] > 3 * max(1.0, chance.per_group()["adversary"])
    matches = evaluate_tag(env, random, episodes=2)
    assert len(matches.summary()) == 4


def test_programs_decide_and_draw_as_the_policy(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason='needs pip install "matwm_rl[onnx]"')
    pytest.importorskip("onnxruntime", reason='needs pip install "matwm_rl[onnx]"')
    from examples.numpy_policy import NumpyPolicy

    env = mock_env(continuous=True)
    model = randomize(WorldModel.from_env(env, replace(presets.tiny().world_model, latent=LATENTS["gaussian"]))).eval()
    actor, card = randomize(make_actor(model, SMALL)), PolicyCard(env="mock", env_kwargs={"continuous": True})
    policy = TrainedPolicy(model, actor, history_length=3, card=card).eval()
    export_policy(policy, tmp_path / "policy.onnx")
    player = NumpyPolicy(tmp_path / "policy.onnx")
    assert env.layout.actions == BOXES
    env = policy.make_env(seed=0, num_envs=2)
    inputs, tensordict = player.reset(2), env.reset()
    for _ in range(5):
        inputs |= {name: tensordict["agents", name].numpy() for name in ("observation", "action_mask", "alive")}
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            tensordict = policy(tensordict)
        chosen = torch.as_tensor(player.act(inputs, sample=False))
        torch.testing.assert_close(chosen, tensordict[keys.ACTION], rtol=0, atol=1e-5)
        following: TensorDict = tensordict["next", "history"]
        for name in ("code", "action", "length"):
            torch.testing.assert_close(torch.as_tensor(inputs[f"history_{name}"]), following[name], rtol=0, atol=1e-5)
        _, tensordict = env.step_and_maybe_reset(tensordict)
    logits = torch.randn(N, 4)
    mask = BOXES.legal()
    drawn = torch.as_tensor(player.draw(BOXES.mask_parameters(logits, mask, -torch.inf).expand(4_000, N, 4).numpy()))
    expected = BoxDistribution(logits=logits, mask=mask)
    assert BOXES.problem(drawn) is None
    torch.testing.assert_close(drawn.mean(0), expected.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std(0), expected.sample((4_000,)).std(0), rtol=0, atol=0.05)
    assert player.in_units(2, drawn.numpy()[0, 2]).tolist() == pytest.approx([1 + float(drawn[0, 2, 0])])
