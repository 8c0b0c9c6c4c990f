"""The world model as an environment: its specs, its dreams, and its use as any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import RewardSum, TransformedEnv, check_env_specs
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.envs import ImaginationEnv, make_env
from matwm_rl.functional import agents_first, agents_last
from matwm_rl.modules import STATE_KEYS, ActorCriticConfig, Imagination, make_actor
from tests.envs.helpers import C, H, N, S, differing, make_dreams, random_rollout, starts
from tests.helpers import LATENTS, make_model, mock_replay, random_batch, randomize


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("teammate_predictor", [False, True])
def test_specs(latent: str, teammate_predictor: bool, decode: bool) -> None:
    real = make_env("mock", num_envs=S, device="cpu")
    model = make_model(latent=latent, teammate_predictor=teammate_predictor)
    env = make_dreams(model, decode=decode, layout=real.layout, end_threshold=None)
    check_env_specs(env, break_when_any_done="both")
    # Nobody leaves a dream by a time limit of its own, and nothing of dreams is stored.
    real_alone = {keys.AGENT_TRUNCATED[1:], keys.EPISODE}
    own = {*STATE_KEYS, keys.CONTINUATION[1:], *([] if decode else [keys.OBSERVATION]), *real_alone}
    real_keys = set(real.full_observation_spec.keys(True, True))
    # What it does not say with `decode=False`, and what it says besides, is known; all else is as in the real one.
    assert set(env.full_observation_spec.keys(True, True)) ^ real_keys == own
    for name in ("full_action_spec", "full_reward_spec", "full_done_spec"):
        assert getattr(env, name) == getattr(real, name), name
    for key in set(env.full_observation_spec.keys(True, True)) & real_keys:
        assert env.full_observation_spec[key] == real.full_observation_spec[key], key
    assert env.batch_size == (S,) and env.batch_locked and env.num_agents == N and env.layout is real.layout


@pytest.mark.parametrize("max_steps", [1, 2])
@pytest.mark.parametrize("context", [0, 1, 5])
def test_dreams_of_any_context_and_length(context: int, max_steps: int) -> None:
    env = make_dreams(td=starts(context=context), max_steps=max_steps, end_threshold=None)
    check_env_specs(env)
    assert random_rollout(env, 9).batch_size == (S, 9)


def test_images() -> None:
    shape = (3, 32, 32)
    model = make_model(observation_shape=shape)
    env = make_dreams(model, starts(observation_shape=shape), decode=True)
    check_env_specs(env)
    td = env.reset()
    decoded = agents_last(model.decode(agents_first(td[keys.LATENT])), 3)
    expected = (255 * decoded).round().clamp(0, 255).where(td[keys.ALIVE][..., None, None, None], 0)
    assert td[keys.OBSERVATION].dtype == torch.uint8
    assert torch.equal(td[keys.OBSERVATION].float(), expected) and expected.unique().numel() > 5


@torch.no_grad()
def test_decoded_observations_are_padded_as_real_ones() -> None:
    layout, model = make_env("mock").layout, make_model()
    plain, padded = (
        random_rollout(make_dreams(model, starts(), decode=True, **kwargs), H) for kwargs in ({}, {"layout": layout})
    )
    sizes = torch.tensor(layout.observation_sizes)
    own = (torch.arange(5) < sizes.unsqueeze(-1)).expand_as(padded[keys.OBSERVATION])
    decoded = agents_last(model.decode(agents_first(padded[keys.LATENT])))
    decoded = torch.where(padded[keys.ALIVE].unsqueeze(-1), decoded, 0)
    torch.testing.assert_close(padded[keys.OBSERVATION][own], decoded[own])
    assert not padded[keys.OBSERVATION][~own].any() and plain[keys.OBSERVATION][~own].any()
    assert not plain[keys.OBSERVATION][~plain[keys.ALIVE]].any() and not plain[keys.ALIVE].all()


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("teammate_predictor", [False, True])
@pytest.mark.parametrize("reencode", [False, True])
def test_rollouts_are_those_of_imagination(latent: str, teammate_predictor: bool, reencode: bool) -> None:
    model = make_model(latent=latent, teammate_predictor=teammate_predictor, reencode=reencode)
    actor, td = randomize(make_actor(model, ActorCriticConfig(num_cells=8))), starts()
    env = make_dreams(model, td)
    torch.manual_seed(7)
    imagined = Imagination(model, actor, horizon=H)(td.clone())
    torch.manual_seed(7)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(H, actor)
    assert rollout.batch_size == imagined.batch_size == (S, H)
    alive = imagined[keys.ALIVE]
    assert torch.equal(rollout[keys.ALIVE], alive) and not alive.all()
    for key in imagined.keys(True, True):
        found, expected = rollout[key][alive], imagined[key][alive]
        if key in (keys.REWARD, keys.CONTINUATION):
            # Heads are asked step by step here, of all steps at once there: products of other sizes round otherwise.
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found, expected), key


def test_starts_come_from_replay_and_from_a_callable() -> None:
    replay, model = mock_replay(), make_model()
    for source in (replay.starts, replay.starts.sample):
        env = ImaginationEnv(model, source, max_steps=H)
        assert env.batch_size == (4,)
        first, second = env.reset(), env.reset()
        assert not torch.equal(first[keys.LATENT], second[keys.LATENT])


def test_random_actions_are_legal_and_illegal_ones_are_refused() -> None:
    env = make_dreams()
    rollout = random_rollout(env, 20)
    assert rollout[keys.ACTION_MASK].gather(-1, rollout[keys.ACTION].unsqueeze(-1)).all()
    drawn = torch.stack([env.rand_action()[keys.ACTION] for _ in range(60)])
    assert drawn.amax((0, 1)).tolist() == [3, 3, 2]
    data = env.reset()
    with pytest.raises(ValueError, match=r"actions \[\[3, 3, 3\].* of agents with \[4, 4, 3\] actions.*action_mask"):
        env.step(data.set(keys.ACTION, torch.full((S, N), 3)))
    with pytest.raises(ValueError, match=r"of shape \[6, 3, 1\].*one index for each of 3 agents"):
        env.step(data.set(keys.ACTION, torch.zeros(S, N, 1, dtype=torch.long)))


def test_seeds_repeat_dreams() -> None:
    env = make_dreams(end_threshold=None)
    rollouts = []
    for seed in (3, 3, 4):
        env.set_seed(seed)
        rollouts.append(env.rollout(20, break_when_any_done=False))
    everything = torch.ones(S, dtype=torch.bool)
    assert not differing(rollouts[0], rollouts[1], everything)
    assert keys.LATENT in differing(rollouts[0], rollouts[2], everything)


def test_no_gradient_flows_and_the_model_is_not_a_copy() -> None:
    model = make_model()
    env = make_dreams(model, decode=True)
    rollout = env.rollout(2)
    assert env.world_model is model and any(parameter.requires_grad for parameter in model.parameters())
    assert not any(value.requires_grad for value in rollout.values(True, True))
    before = random_rollout(env, 2)
    with torch.no_grad():
        model.continuation.output.bias.add_(1.0)
    assert not torch.equal(random_rollout(env, 2)[keys.CONTINUATION], before[keys.CONTINUATION])


def test_in_a_collector() -> None:
    """Rows end at different times, and each goes on with a new start."""
    model = make_model(latent="gaussian")
    actor = randomize(make_actor(model, ActorCriticConfig(num_cells=8)))
    env = ImaginationEnv(model, starts, max_steps=H, end_threshold=None, decode=True)
    env = TransformedEnv(env, RewardSum(in_keys=[keys.REWARD[1:]], out_keys=["sum"], reset_keys=["_reset"]))
    collector = Collector(
        env, actor, frames_per_batch=S * 10, total_frames=S * 30, auto_register_policy_transforms=False
    )
    batches = list(collector)
    collector.shutdown()
    data = torch.cat(batches, 1)
    assert data.batch_size == (S, 30)
    done = data[keys.DONE].squeeze(-1)
    assert torch.equal(done, (data[keys.TERMINATED] | data[keys.TRUNCATED]).squeeze(-1))
    assert data[keys.TERMINATED].any() and data[keys.TRUNCATED].any() and (done.any(0) & ~done.all(0)).any()
    traj = data["collector", "traj_ids"]
    assert torch.equal(traj[:, 1:] != traj[:, :-1], done[:, :-1])
    # Within a dream a step begins where the last one ended; after its end, it does not.
    for key in (keys.LATENT, keys.HIDDEN, keys.OBSERVATION):
        same = (data[key][:, 1:] == data["next"][key][:, :-1]).flatten(2).all(-1)
        assert torch.equal(same, ~done[:, :-1]), key
    running = torch.zeros(S, N, 1)
    for t in range(30):
        running = running + data[keys.REWARD][:, t]
        torch.testing.assert_close(data["next", "sum"][:, t], running)
        running = torch.where(done[:, t, None, None], 0.0, running)
    env.close()


def test_moving_it_needs_a_reset() -> None:
    env = make_dreams(layout=make_env("mock").layout)
    data = env.rand_action(env.reset())
    env.to("cpu").step(data)
    moved = env.to("meta")
    assert moved is env and env.device.type == "meta"
    assert {parameter.device.type for parameter in env.world_model.parameters()} == {"meta"}
    assert {spec.device.type for spec in env.specs.values(True, True)} == {"meta"}
    with pytest.raises(RuntimeError, match=r"call env\.reset\(\) first"):
        env.step(data.to("meta"))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    env = make_dreams(end_threshold=None, decode=True, layout=make_env("mock").layout).to("cuda")
    check_env_specs(env, break_when_any_done="both")
    assert random_rollout(env, 20)[keys.REWARD].is_cuda


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda td: td.exclude(keys.ACTION), r"WorldModel reads \('agents', 'action'\), which is missing"),
        (lambda td: td.exclude(keys.AGENT_DONE), r"'next', 'agents', 'done'\), which is missing.*add_agent_entries"),
        (lambda td: td.exclude(keys.OBSERVATION), r"'observation'\), which is missing"),
        (lambda td: td[0], r"batch size \[S, context \+ 1\], got \(4,\)"),
        (lambda td: td.unsqueeze(0), r"batch size \[S, context \+ 1\], got \(1, 6, 4\)"),
        (lambda td: random_batch(S, C + 1, action_counts=(4, 4)), r"of shape \[6, 4, 3, 5\], found \[6, 4, 2, 5\]"),
    ],
)
def test_starts_that_do_not_fit_are_named(change: Any, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        make_dreams(td=change(starts()))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="max_steps must be a positive integer, got 0"):
        make_dreams(max_steps=0)
    with pytest.raises(ValueError, match="end_threshold must be a number from 0 to 1, got 2"):
        make_dreams(end_threshold=2.0)
    with pytest.raises(TypeError, match=r"sample\(\) or be callable, got TensorDict"):
        ImaginationEnv(make_model(), starts(), max_steps=H)
    with pytest.raises(ValueError, match=r"counts=\[4, 4\]\), the layout DiscreteActions\(counts=\[4, 4, 3\]"):
        model = make_model(action_counts=(4, 4), group_index=(0, 0))
        make_dreams(model, random_batch(S, C + 1, action_counts=(4, 4)), layout=make_env("mock").layout)


def test_use_out_of_order_is_named() -> None:
    queue = [starts(), starts(S + 1)]
    env = ImaginationEnv(make_model(), lambda: queue.pop(0), max_steps=H)
    fake = env.fake_tensordict()
    with pytest.raises(RuntimeError, match=r"call env\.reset\(\) first"):
        env.step(fake)
    with pytest.raises(RuntimeError, match="without a `_reset` mask"):
        env.reset(TensorDict({"_reset": torch.arange(S).unsqueeze(-1) < 2}, [S]))
    with pytest.raises(ValueError, match=r"\(7, 4\); expected \[S, context \+ 1\] = \(6, 4\)"):
        env.reset()
    env = make_dreams()
    data = env.rand_action(env.reset()).set("_step", torch.arange(S).unsqueeze(-1) < 2)
    with pytest.raises(ValueError, match="stepped together"):
        env.step(data)
