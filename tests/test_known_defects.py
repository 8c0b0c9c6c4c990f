"""One test per defect of earlier implementations, each made to fail should the defect come back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.data import ReplayConfig, add_agent_entries, make_replay
from matwm_rl.modules import ActorCriticConfig, Imagination, WorldModelPolicy, make_actor
from matwm_rl.objectives import LambdaReturn, WorldModelLoss
from tests.helpers import (
    COUNTS,
    grad_norm,
    grads,
    make_learner,
    make_model,
    mock_env,
    mock_replay,
    others,
    random_batch,
    randomize,
    total,
)

N = len(COUNTS)
SMALL = ActorCriticConfig(num_cells=8)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    yield seen
    handle.remove()


def policy_input(policy: WorldModelPolicy, length: int = 3, starts: int = 64) -> TensorDict:
    """Random observations after a history of ``length`` steps."""
    window, model = policy.history_length, policy.world_model
    shape, classes = (starts, N, window, model.latent.num_dims), model.latent.num_classes
    codes = torch.randn(shape) if classes is None else torch.randint(classes, shape)
    return TensorDict(
        {
            keys.OBSERVATION: torch.randn(starts, N, 5),
            keys.ACTION_MASK: model.legal.expand(starts, -1, -1),
            ("history", "code"): codes,
            ("history", "action"): torch.randint(3, (starts, N, window)),
            ("history", "length"): torch.full((starts, N), length),
        },
        batch_size=[starts],
    )


def act(policy: WorldModelPolicy, td: TensorDict) -> Tensor:
    torch.manual_seed(5)
    return policy(td.clone())[keys.LOGITS]


# Defect: only one of N world models is trained; the others stay as initialised, and all of them act and imagine.


def test_what_acts_and_imagines_is_what_was_trained() -> None:
    learner = make_learner(world_model_lr=1e-2)
    policy = WorldModelPolicy(learner.world_model, learner.actor, history_length=4)
    untrained = {name: value.clone() for name, value in learner.world_model.state_dict().items()}
    learner.update_world_model(mock_replay().sequences.sample())
    weights = copy.deepcopy(learner.state_dict()["world_model"])
    assert all(not torch.equal(weights[name], untrained[name]) for name in weights)

    alone = make_model()
    alone.load_state_dict(weights)
    actor = copy.deepcopy(learner.actor)
    td = policy_input(policy)
    expected = act(WorldModelPolicy(alone, actor, history_length=4), td)
    starts = mock_replay().starts.sample()
    torch.manual_seed(5)
    dreamt = learner.imagination(starts)
    torch.manual_seed(5)
    expected_dream = Imagination(alone, actor, horizon=3)(starts)
    for n in range(N):
        torch.testing.assert_close(act(policy, td)[:, n], expected[:, n])
        for key in (keys.LATENT, keys.HIDDEN, keys.TEAMMATE_LOGITS, keys.REWARD):
            torch.testing.assert_close(dreamt[key][:, :, n], expected_dream[key][:, :, n])


def test_every_agents_experience_trains_the_model() -> None:
    model = make_model()
    loss = WorldModelLoss(model)
    for n in range(N):
        batch = random_batch(deaths=False)
        batch[keys.ALIVE][:] = torch.arange(N) == n
        gradient = grads(total(loss(batch)), model.parameters())
        assert all(g.any() for g in gradient)


# Defect: the policy never sees h_t or the teammate logits.


def test_policy_sees_the_hidden_state_and_the_teammate_logits() -> None:
    model = make_model(latent="gaussian").eval()
    policy = WorldModelPolicy(model, randomize(make_actor(model, SMALL)), history_length=4)
    td = policy_input(policy)
    logits = act(policy, td)
    # Earlier actions reach the actors through h_t alone: the teammate predictor reads latents.
    past = td.clone()
    past["history", "action"][:, :, -1] = (past["history", "action"][:, :, -1] + 1) % 3
    assert (act(policy, past) != logits).any(-1).all()
    # Without history there is no h_t: what differs, differs through the teammate logits.
    first = td.clone()
    first["history", "length"][:] = 0
    logits = act(policy, first)
    randomize(model.teammates.output, 1.0)
    assert (act(policy, first) != logits).any(-1).all()


def test_imagined_actions_depend_on_the_hidden_state_and_the_teammate_logits() -> None:
    model = make_model(latent="gaussian").eval()
    imagination = Imagination(model, randomize(make_actor(model, SMALL), 1.0), horizon=1)
    starts = random_batch(400, 3, done=torch.zeros(400, 3, N, dtype=torch.bool), deaths=False)

    def chosen(td: TensorDict) -> Tensor:
        torch.manual_seed(5)
        return imagination(td)[keys.ACTION]

    plain = chosen(starts)
    past = starts.clone()
    past[keys.ACTION][:, 1] = (past[keys.ACTION][:, 1] + 1) % 3
    assert (chosen(past) != plain).float().mean() > 0.01
    randomize(model.teammates.output, 1.0)
    assert (chosen(starts) != plain).float().mean() > 0.01


# Defect: the model predicts from a single latent, with no history.


def test_predictions_depend_on_the_whole_history() -> None:
    model = make_model(latent="gaussian").eval()
    batch = random_batch(16, 6, done=torch.zeros(16, 6, N, dtype=torch.bool))
    out = model(batch.clone())
    earlier = batch.clone()
    earlier[keys.OBSERVATION][:, 0] = torch.randn(16, N, 5)
    again = model(earlier)
    seen = (out[keys.LATENT][:, 0] != again[keys.LATENT][:, 0]).any(-1)
    assert seen.float().mean() > 0.8
    for key in (keys.HIDDEN, keys.PRIOR, keys.REWARD_LOGITS, keys.CONTINUATION_LOGITS, keys.TEAMMATE_LOGITS):
        assert (out[key][:, -1] != again[key][:, -1]).flatten(2).any(-1)[seen].all(), key
    acted = batch.clone()
    acted[keys.ACTION][:, 0] = (acted[keys.ACTION][:, 0] + 1) % 3
    again = model(acted)
    for key in (keys.HIDDEN, keys.PRIOR, keys.REWARD_LOGITS, keys.CONTINUATION_LOGITS):
        assert (out[key][:, -1] != again[key][:, -1]).flatten(2).any(-1).all(), key


def test_dreams_depend_on_the_whole_context() -> None:
    model = make_model(latent="gaussian").eval()
    imagination = Imagination(model, randomize(make_actor(model, SMALL)), horizon=2)
    starts = random_batch(16, 5, done=torch.zeros(16, 5, N, dtype=torch.bool))
    torch.manual_seed(5)
    plain = imagination(starts)
    starts[keys.ACTION][:, 0] = (starts[keys.ACTION][:, 0] + 1) % 3
    torch.manual_seed(5)
    again = imagination(starts)
    for t in range(2):
        assert (plain[keys.HIDDEN][:, t] != again[keys.HIDDEN][:, t]).any(-1).all()
        assert (plain[keys.REWARD][:, t] != again[keys.REWARD][:, t]).any(-1).all()


# Defect: the recency priority is computed but unused.


@pytest.mark.parametrize(("decay", "least", "most"), [(0.95, 10.0, 35.0), (1.0, 70.0, 110.0)])
def test_recency_decides_what_is_sampled(decay: float, least: float, most: float) -> None:
    """Ages of 192 starts: 19 steps on average with decay 0.95 (somewhat more, as slices do not overlap), or 96."""
    sizes = ReplayConfig(capacity=200, sequence_length=8, sequences=6, starts_per_agent=8, recency_decay=decay)
    replay = make_replay(N, sizes, seed=0)
    replay.extend(mock_env(episode_length=10, death_step=None).rollout(200, break_when_any_done=False))

    def mean_age(samples: list[TensorDict]) -> float:
        first = torch.cat([sample[keys.OBSERVATION][:, 0, 0] for sample in samples])
        # A hunter observes [steps, agent, action, episode, 1].
        return float((200 - (10 * first[:, 3] + first[:, 0])).mean())

    assert least < mean_age([replay.sequences.sample() for _ in range(60)]) - 8 < most
    assert 70.0 < mean_age([replay.starts.sample() for _ in range(20)]) - 8 < 120.0


# Defect: truncation is treated as termination.


def test_a_time_limit_is_no_end_of_the_world() -> None:
    """From environment through replay to the loss: which way the continuation logit is pushed."""
    replay = mock_replay(120, mock_env(episode_length=5, ending="alternate"))
    model = make_model()
    loss = WorldModelLoss(model)
    seen = {"truncated": 0, "terminated": 0, "inner": 0}
    for _ in range(10):
        batch = replay.sequences.sample()
        with outputs_of(model.continuation) as outputs:
            losses = loss(batch)
        (gradient,) = grads(losses["loss_continuation"], outputs)
        push = gradient.squeeze(-1).movedim(0, -1)
        alive = batch[keys.ALIVE] & batch[keys.NEXT_ALIVE]
        # Hunters observe the number of the episode: even ones are truncated, odd ones terminated.
        odd = batch[keys.OBSERVATION][..., 3] % 2 == 1
        for b, t, n in itertools.product(range(2), range(8), range(2)):
            if not alive[b, t, n]:
                continue
            last = batch[keys.OBSERVATION][b, t, n, 0] == 4
            kind = "inner" if not last else "terminated" if odd[b, t, n] else "truncated"
            seen[kind] += 1
            assert (push[b, t, n] > 0) == (kind == "terminated"), kind
    assert min(seen.values()) > 5


def test_a_truncated_step_is_followed_by_its_true_final_observation() -> None:
    batch = add_agent_entries(
        mock_env(episode_length=4, ending="truncate").rollout(8, break_when_any_done=False)
    ).unsqueeze(0)
    model = make_model(latent="gaussian").eval()
    out = model(batch.clone())
    for t in (3, 7):
        final = batch[keys.NEXT_OBSERVATION][0, t]
        assert final[0, 0] == 4, "the mock environment counts its steps"
        expected = model.latent.posterior(model.encoder(final.unsqueeze(1))).squeeze(1)
        torch.testing.assert_close(out[keys.POSTERIOR][0, t], expected, rtol=1e-4, atol=1e-4)
    reset = model.latent.posterior(model.encoder(batch[keys.OBSERVATION][0, 4].unsqueeze(1))).squeeze(1)
    assert (out[keys.POSTERIOR][0, 3] - reset).abs().amax((-2, -1)).min() > 0.1


# Defect: teammate targets are misaligned by one step.


def test_teammate_targets_are_the_actions_of_the_same_step() -> None:
    rollout = mock_env(death_step=None).rollout(20, break_when_any_done=False)
    focal = add_agent_entries(rollout)
    for t, i in itertools.product(range(20), range(N)):
        for place, j in enumerate(others(i, N)):
            # The mock environment shows every agent the action that it has just taken.
            shown = rollout[keys.NEXT_OBSERVATION][t, j, 2]
            assert focal[keys.TEAMMATE_ACTION][t, i, place] == shown


def test_teammate_logits_of_a_step_learn_the_actions_of_that_step() -> None:
    env = mock_env(death_step=None, episode_length=5)
    rollout = env.rollout(60, break_when_any_done=False)
    actions = {
        tuple(o[0, [3, 0]].int().tolist()): a
        for o, a in zip(rollout[keys.OBSERVATION], rollout[keys.ACTION], strict=True)
    }
    replay = make_replay(N, ReplayConfig(capacity=60, sequence_length=8, sequences=6, starts_per_agent=4), seed=0)
    replay.extend(rollout)
    batch, model = replay.sequences.sample(), make_model()
    with outputs_of(model.teammates) as outputs:
        losses = WorldModelLoss(model)(batch)
    (gradient,) = grads(losses["loss_teammate"], outputs)
    for b, t, i in itertools.product(range(2), range(8), range(2)):
        episode_and_step = tuple(batch[keys.OBSERVATION][b, t, i, [3, 0]].int().tolist())
        for place, j in enumerate(others(i, N)):
            # The one action whose logit is pushed up; the logits are those of the latents up to this very step.
            assert gradient[i, b, t, place].argmin() == actions[episode_and_step][j]


def test_teammate_logits_of_a_step_know_its_observation_and_none_later() -> None:
    model = make_model(latent="gaussian").eval()
    batch = random_batch(32, 5, done=torch.zeros(32, 5, N, dtype=torch.bool))
    out = model(batch.clone())[keys.TEAMMATE_LOGITS]
    batch[keys.OBSERVATION][:, 2] = torch.randn(32, N, 5)
    differs = (model(batch.clone())[keys.TEAMMATE_LOGITS] != out).flatten(3).any(-1).float().mean((0, 2))
    assert differs[:2].tolist() == [0.0, 0.0] and (differs[2:] > 0.8).all()


# Defect: V(s_t) in place of V(s_{t+1}) in the lambda-return.


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_lambda_return_bootstraps_from_the_next_state(lmbda: float) -> None:
    critic = TensorDictModule(torch.clone, in_keys=[("agents", "x")], out_keys=[keys.STATE_VALUE])
    value = torch.tensor([100.0, 20.0, 3.0, 0.4]).view(1, 4, 1, 1)
    after = {"x": value[:, 1:], "reward": torch.zeros(1, 3, 1, 1), "continuation": torch.ones(1, 3, 1, 1)}
    td = TensorDict({"agents": {"x": value[:, :-1]}, "next": {"agents": after}}, batch_size=[1, 3])
    returns = LambdaReturn(critic, gamma=0.5, lmbda=lmbda)(td)[keys.LAMBDA_RETURN].flatten().tolist()
    last = 0.5 * 0.4
    middle = 0.5 * ((1 - lmbda) * 3.0 + lmbda * last)
    first = 0.5 * ((1 - lmbda) * 20.0 + lmbda * middle)
    assert returns == pytest.approx([first, middle, last], rel=1e-5)


# Defect: the KL divergence is computed between posteriors instead of posterior and prior.


def test_kl_is_between_posterior_and_the_dynamics_predictors_prior() -> None:
    model, batch = make_model(latent="gaussian").eval(), random_batch()
    loss = WorldModelLoss(model, free_nats=0.0)
    losses = loss(batch)
    trained = {name for name, child in model.named_children() if grad_norm(losses["loss_dynamics"], child) > 0}
    assert {"dynamics", "transformer", "action_mixer"} <= trained
    out = model(batch.clone())
    randomize(model.dynamics.head.output, 1.0)
    again = model(batch.clone())
    assert torch.equal(out[keys.POSTERIOR], again[keys.POSTERIOR])
    assert (out[keys.PRIOR] != again[keys.PRIOR]).any()
    assert (loss(batch)["kl"] - losses["kl"]).abs() > 1e-3


def test_kl_vanishes_if_the_prior_foresees_the_posterior_and_then_alone() -> None:
    model, batch = make_model(latent="gaussian").eval(), random_batch(deaths=False)
    foreseen = model(batch.clone())[keys.POSTERIOR].movedim(2, 0).detach()
    loss = WorldModelLoss(model, free_nats=0.0)
    assert loss(batch)["kl"] > 0.01
    model.latent.prior = lambda output, latent: foreseen
    losses = loss(batch)
    for name in ("kl", "loss_dynamics", "loss_representation"):
        assert losses[name].item() == pytest.approx(0.0, abs=1e-5)
