from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import RewardSum, TransformedEnv, check_env_specs
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.envs import ImaginationEnv, make_env
from matwm_rl.functional import agents_first, agents_last
from matwm_rl.modules import Imagination, Latent, State, TeammatePredictorBase, WorldModel, make_actor
from tests.helpers import COUNTS, EXACT, LATENTS, STATE_KEYS, make_model, mock_replay, random_batch, randomize

N, S, C, H = len(COUNTS), 6, 3, 4


def starts(size: int = S, context: int = C, **kwargs: Any) -> TensorDict:
    """Focal starts, some of whose episodes end within the context; somebody lives in every row."""
    td = random_batch(size, context + 1, **kwargs)
    td[keys.ALIVE][..., 0] = True
    return td


def make_dreams(model: WorldModel | None = None, td: TensorDict | None = None, **kwargs: Any) -> ImaginationEnv:
    """An environment whose dreams always begin at the same starts, and end by the time limit alone."""
    td = starts() if td is None else td
    options = {"max_steps": H, "end_threshold": 0.0} | kwargs
    return ImaginationEnv(make_model() if model is None else model, lambda: td, **options)


def random_rollout(env: ImaginationEnv, steps: int, seed: int = 0) -> TensorDictBase:
    torch.manual_seed(seed)
    return env.rollout(steps, break_when_any_done=False)


# ---------------------------------------------------------------------- specs


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("teammate_predictor", [False, True])
def test_specs(latent: str, teammate_predictor: bool, decode: bool) -> None:
    real = make_env("mock", num_envs=S, device="cpu")
    model = make_model(latent=latent, teammate_predictor=teammate_predictor)
    env = make_dreams(model, decode=decode, layout=real.layout, end_threshold=None)
    check_env_specs(env, break_when_any_done="both")
    own = {*model.state_keys, keys.CONTINUATION[1:], *([] if decode else [keys.OBSERVATION])}
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
    model = make_model(observation_shape=shape, channels=4)
    env = make_dreams(model, starts(observation_shape=shape), decode=True)
    check_env_specs(env)
    td = env.reset()
    decoded = agents_last(model.decode(Latent(agents_first(td[keys.LATENT]))), 3)
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
    decoded = agents_last(model.decode(Latent(agents_first(padded[keys.LATENT]))))
    decoded = torch.where(padded[keys.ALIVE].unsqueeze(-1), decoded, 0)
    torch.testing.assert_close(padded[keys.OBSERVATION][own], decoded[own])
    assert not padded[keys.OBSERVATION][~own].any() and plain[keys.OBSERVATION][~own].any()
    assert not plain[keys.OBSERVATION][~plain[keys.ALIVE]].any() and not plain[keys.ALIVE].all()


# ---------------------------------------------------------------------- the dreams of Imagination


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("teammate_predictor", [False, True])
@pytest.mark.parametrize("reencode", [False, True])
def test_rollouts_are_those_of_imagination(latent: str, teammate_predictor: bool, reencode: bool) -> None:
    model = make_model(latent=latent, teammate_predictor=teammate_predictor, reencode=reencode)
    actor, td = randomize(make_actor(model, num_cells=8)), starts()
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


# ---------------------------------------------------------------------- ends


def script(monkeypatch: pytest.MonkeyPatch, model: WorldModel, continuation: list[Tensor]) -> None:
    """Have the model predict these probabilities ``[S, N]`` for the steps to come, one after the other."""
    outcome, left = model.outcome, list(continuation)

    def scripted(reached: State) -> tuple[Tensor, Tensor]:
        return outcome(reached)[0], left.pop(0).T

    monkeypatch.setattr(model, "outcome", scripted)


def test_the_time_limit_truncates() -> None:
    rollout = random_rollout(make_dreams(), 2 * H + 1)
    last = torch.arange(2 * H + 1) % H == H - 1
    assert torch.equal(rollout[keys.TRUNCATED].squeeze(-1), last.expand(S, -1))
    assert torch.equal(rollout[keys.DONE], rollout[keys.TRUNCATED])
    assert not rollout[keys.TERMINATED].any()
    assert torch.equal(rollout[keys.NEXT_ALIVE], rollout[keys.ALIVE])


def test_agents_end_on_their_own_and_rows_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops over rows and agents."""
    rows, T = 60, 3
    model, td = make_model(), starts(rows)
    continuation = [torch.rand(rows, N) for _ in range(T)]
    env = make_dreams(model, td, max_steps=T, end_threshold=0.15, decode=True)
    script(monkeypatch, model, continuation)
    data = env.reset()
    steps = []
    for _ in range(T):
        data = env.step(env.rand_action(data))
        steps.append(data)
        data = env.step_mdp(data)
    counts = dict.fromkeys(("terminated", "truncated", "truncated with a death", "death"), 0)
    for s in range(rows):
        living = {n for n in range(N) if td[keys.ALIVE][s, -1, n]}
        for t, step in enumerate(steps):
            assert {n for n in range(N) if step[keys.ALIVE][s, n]} == living
            for n in range(N):
                here = step[s]["agents"][n]
                assert bool(here["observation"].any()) is (n in living)
                assert n in living or here["action_mask"].tolist() == [True, False, False, False]
                assert bool(step[keys.REWARD][s, n]) is (n in living)
            left = {n for n in living if continuation[t][s, n] >= 0.15}
            terminated, truncated = not left, bool(left) and t == T - 1
            assert bool(step[keys.TERMINATED][s]) is terminated
            assert bool(step[keys.TRUNCATED][s]) is truncated
            assert bool(step[keys.DONE][s]) is (terminated or truncated)
            # Those who end with the row are alive in its last observation.
            after = living if terminated else left
            assert {n for n in range(N) if step[keys.NEXT_ALIVE][s, n]} == after
            counts["terminated"] += terminated
            counts["truncated"] += truncated
            counts["truncated with a death"] += truncated and left != living
            counts["death"] += left != living
            if terminated:
                break
            living = left
    assert min(counts.values()) > 3, counts


def test_ends_by_chance_have_the_predicted_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(), 2_000
    env = make_dreams(model, starts(1, deaths=False).expand(rows, C + 1).clone(), end_threshold=None)
    probability = torch.tensor([0.0, 0.3, 1.0]).expand(rows, N)
    script(monkeypatch, model, [probability])
    step = env.step(env.rand_action(env.reset()))
    alive = step[keys.NEXT_ALIVE]
    # Nobody ends with its row: the third agent goes on in all of them.
    assert not step[keys.DONE].any()
    assert not alive[:, 0].any() and alive[:, 2].all()
    assert abs(alive[:, 1].float().mean().item() - 0.3) < 5 * 0.5 / rows**0.5
    assert torch.equal(step[keys.CONTINUATION].squeeze(-1), probability)


def test_a_row_that_is_over_stays_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``break_when_all_done``, which steps on until the last row is over and shows the others as they ended."""
    model = make_model()
    continuation = torch.ones(S, N)
    continuation[:2] = 0.0
    env = make_dreams(model, starts(deaths=False), end_threshold=0.5)
    script(monkeypatch, model, [continuation] + [torch.ones(S, N)] * (H - 1))
    rollout = env.rollout(2 * H, break_when_any_done=False, break_when_all_done=True)
    assert rollout.batch_size == (S, H)
    assert rollout[keys.TERMINATED][:2].all() and not rollout[keys.TERMINATED][2:].any()
    assert rollout[keys.TRUNCATED][2:, -1].all() and not rollout[keys.TRUNCATED][:, :-1].any()
    assert torch.equal(rollout[keys.LATENT][:2, 1:], rollout[keys.LATENT][:2, :1].expand(-1, H - 1, -1, -1))


# ---------------------------------------------------------------------- partial resets


def step(env: ImaginationEnv, data: TensorDictBase, seed: int) -> TensorDictBase:
    """One step with random numbers of its own."""
    torch.manual_seed(seed)
    return env.step(env.rand_action(data))


def reset_rows(env: ImaginationEnv, data: TensorDictBase, rows: Tensor, seed: int) -> TensorDictBase:
    torch.manual_seed(seed)
    return env.reset(data.set("_reset", rows.unsqueeze(-1)))


def differing(one: TensorDictBase, other: TensorDictBase, rows: Tensor) -> list[object]:
    """Keys of entries that are not exactly the same in these rows."""
    return [key for key in one.keys(True, True) if not torch.equal(one[key][rows], other[key][rows])]


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("teammate_predictor", [False, True])
def test_other_rows_are_not_disturbed(latent: str, teammate_predictor: bool) -> None:
    """Their futures are, to the last bit, what they would have been."""
    model = make_model(latent=latent, teammate_predictor=teammate_predictor)
    td, rows = starts(deaths=False), torch.tensor([False, True, False, False, True, False])
    quiet, disturbed = (make_dreams(model, td, max_steps=8, decode=True) for _ in range(2))
    torch.manual_seed(0)
    data = quiet.reset()
    torch.manual_seed(0)
    other = disturbed.reset()
    for t in range(8):
        if t in (1, 3, 4):
            other = reset_rows(disturbed, other, rows, seed=100 + t)
            assert not other.get("done").any()
            assert not differing(data, other.select(*data.keys(True, True)), ~rows)
            assert keys.LATENT in differing(data, other.select(*data.keys(True, True)), rows)
        data, other = step(quiet, data, t), step(disturbed, other, t)
        assert not differing(data, other, ~rows)
        data, other = quiet.step_mdp(data), disturbed.step_mdp(other)


class Total:
    """What :class:`Adding` remembers: the sum of all latents."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def graft(self, rows: Tensor, fresh: Total) -> None:
        self.total[rows] = fresh.total

    def make_room(self, keep: int) -> None:
        """A sum needs none."""


class Adding(TeammatePredictorBase):
    """A predictor with a memory of its own kind."""

    def __init__(self, latent_size: int) -> None:
        super().__init__(COUNTS)
        self.linear = torch.nn.Linear(latent_size, self.num_outputs)

    def prefill(self, latent: Latent, mask: Tensor, room: int) -> tuple[Tensor, Total]:
        total = (latent.value.detach().flatten(0, 1) * mask[:, -1].unsqueeze(-1)).sum(1)
        return self._told(total, latent.value.shape[1]), Total(total)

    def step(self, latent: Latent, cache: Total) -> Tensor:
        cache.total = cache.total + latent.value.detach().flatten(0, 1)
        return self._told(cache.total, latent.value.shape[1])

    def _told(self, total: Tensor, rows: int) -> Tensor:
        return self._split(self.linear(total).view(N, rows, -1))


@pytest.mark.parametrize("memory", ["the predictor's cache", "one of another kind"])
@pytest.mark.parametrize("latent", EXACT)
def test_reset_rows_dream_what_fresh_dreams_would(latent: str, memory: str) -> None:
    """With the same starts and random numbers: nothing of what they dreamt before flows into them."""
    model = make_model(latent=latent).eval()
    if memory == "one of another kind":
        model.teammates = randomize(Adding(model.latent.latent_size))
    first, second = starts(deaths=False), starts(deaths=False)
    queue = [first, first, second]
    env = ImaginationEnv(model, lambda: queue.pop(0), max_steps=8, end_threshold=0.0)
    fresh = make_dreams(model, second, max_steps=8)
    rows = torch.tensor([True, False, True, True, False, True])
    data = env.reset()
    for t in range(5):
        data = env.step_mdp(step(env, data, 50 + t))
    data, other = reset_rows(env, data, rows, seed=9), fresh.reset()
    for t in range(8):
        torch.manual_seed(t)
        fresh.rand_action(other)
        data[keys.ACTION] = other[keys.ACTION].clone()
        torch.manual_seed(t)
        data = env.step(data)
        torch.manual_seed(t)
        other = fresh.step(other)
        for key in (*STATE_KEYS, keys.ACTION_MASK, keys.REWARD[1:], keys.CONTINUATION[1:]):
            found, expected = data["next"][key][rows], other["next"][key][rows]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
            assert key == keys.ACTION_MASK or not torch.equal(data["next"][key][~rows], other["next"][key][~rows])
        assert data[keys.TRUNCATED][rows].all().item() is (t == 7)
        data, other = env.step_mdp(data), fresh.step_mdp(other)


@torch.no_grad()
@pytest.mark.parametrize("latent", EXACT)
@pytest.mark.parametrize(("context", "max_steps", "num_steps"), [(0, 1, 7), (C, 3, 25)])
def test_however_often_rows_are_reset_each_follows_the_models_own_rules(
    float64: None, latent: str, context: int, max_steps: int, num_steps: int
) -> None:
    """Context and dream of every row put together are one sequence, on which the parallel pass must agree.

    Over many more steps than the caches have room for, with random partial resets beside those by the time limit.
    """
    model = make_model(latent=latent).eval()
    drawn: list[TensorDict] = []

    def sample() -> TensorDict:
        drawn.append(starts(context=context, deaths=False))
        drawn[-1][keys.OBSERVATION] = drawn[-1][keys.OBSERVATION].double()
        return drawn[-1]

    env = ImaginationEnv(model, sample, max_steps=max_steps, end_threshold=0.0)
    data = env.reset()
    begins: list[TensorDict] = [drawn[-1][s] for s in range(S)]
    dreams: list[list[TensorDictBase]] = [[] for _ in range(S)]
    lengths = []
    for _ in range(num_steps):
        full = env.step(env.rand_action(data))
        for s in range(S):
            dreams[s].append(full[s].clone())
        data = env.step_mdp(full)
        rows = data["done"].squeeze(-1) | (torch.rand(S) < 0.2)
        for s in rows.nonzero().flatten().tolist():
            check_against_the_parallel_pass(model, begins[s], dreams[s])
            lengths.append(len(dreams[s]))
            dreams[s] = []
        if rows.any():
            data = env.reset(data.set("_reset", rows.unsqueeze(-1)), select_reset_only=True)
            begins = [drawn[-1][s] if rows[s] else begins[s] for s in range(S)]
    assert set(lengths) == set(range(1, max_steps + 1)) and len(lengths) > 40


def check_against_the_parallel_pass(model: WorldModel, begin: TensorDict, dream: list[TensorDictBase]) -> None:
    """One row: its start ``[C+1]`` with context, and the steps ``[N, ...]`` of its dream."""
    for n in range(model.num_agents):
        ends = begin[keys.AGENT_DONE][:-1, n, 0].nonzero().flatten().tolist()
        first = ends[-1] + 1 if ends else 0
        context = model.encode(agents_first(begin[keys.OBSERVATION]))[:, first:-1]
        latent = torch.cat([context.value[n], torch.stack([step[keys.LATENT][n] for step in dream])])
        action = torch.cat([begin[keys.ACTION][first:-1, n], torch.stack([step[keys.ACTION][n] for step in dream])])
        # All agents' rows of the model are filled with this one's sequence, and this one's result is read.
        sequence = Latent(latent.expand(model.num_agents, 1, -1, -1))
        mask = torch.ones(len(latent), len(latent), dtype=torch.bool).tril()
        legal = action.clamp(max=min(COUNTS) - 1).expand(model.num_agents, 1, -1).clone()
        legal[n] = action
        hidden = model.transformer(model.action_mixer(sequence, legal).flatten(0, 1), mask)[n]
        teammates = model.teammates(sequence, mask)[n, 0]
        for t, step in enumerate(dream):
            at = t - len(dream)
            # Angles are float32 in the module.
            torch.testing.assert_close(step["next", "agents", "hidden"][n], hidden[at], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(step[keys.TEAMMATE_LOGITS][n], teammates[at], rtol=1e-4, atol=1e-5)


def test_resets_in_a_row_and_of_no_row() -> None:
    env = make_dreams()
    env.reset()
    data = env.reset()
    kept = env.reset(data.clone().set("_reset", torch.zeros(S, 1, dtype=torch.bool)))
    assert not differing(data, kept, torch.ones(S, dtype=torch.bool))
    again = env.reset(data.clone().set("_reset", torch.ones(S, 1, dtype=torch.bool)))
    assert again.batch_size == (S,)
    rows = torch.arange(S) < 2
    data = env.step_mdp(env.step(env.rand_action(again)))
    for seed in range(3):
        data = reset_rows(env, data, rows, seed)
    rollout = env.rollout(H, auto_reset=False, tensordict=data, break_when_any_done=False)
    assert torch.equal(rollout[keys.DONE][..., 0].int().argmax(1), torch.where(rows, H - 1, H - 2))


# ---------------------------------------------------------------------- as any TorchRL environment


def test_random_actions_are_legal_and_illegal_ones_are_refused() -> None:
    env = make_dreams()
    rollout = random_rollout(env, 20)
    assert rollout[keys.ACTION_MASK].gather(-1, rollout[keys.ACTION].unsqueeze(-1)).all()
    drawn = torch.stack([env.rand_action()[keys.ACTION] for _ in range(60)])
    assert drawn.amax((0, 1)).tolist() == [3, 3, 2]
    data = env.reset()
    with pytest.raises(
        ValueError, match=r"'action'\) of shape \(6, 3\).*expected \(6, 3\), of agents with \[4, 4, 3\]"
    ):
        env.step(data.set(keys.ACTION, torch.full((S, N), 3)))


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
    actor = randomize(make_actor(model, num_cells=8))
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


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda td: td.exclude(keys.ACTION), r"WorldModel reads \('agents', 'action'\), which is missing"),
        (lambda td: td.exclude(keys.AGENT_DONE), r"'next', 'agents', 'done'\), which is missing.*to_focal"),
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
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        make_dreams(max_steps=0)
    with pytest.raises(ValueError, match=r"end_threshold must lie in \[0, 1\] or be None, got 2"):
        make_dreams(end_threshold=2.0)
    with pytest.raises(TypeError, match=r"sample\(\) or be callable, got TensorDict"):
        ImaginationEnv(make_model(), starts(), max_steps=H)
    with pytest.raises(ValueError, match=r"\[4, 4\] actions, the layout of agents with \[4, 4, 3\]"):
        model = make_model(action_counts=(4, 4), group_index=(0, 0))
        make_dreams(model, random_batch(S, C + 1, action_counts=(4, 4)), layout=make_env("mock").layout)


def test_a_memory_that_cannot_begin_anew_is_named() -> None:
    class Listing(Adding):
        def prefill(self, latent: Latent, mask: Tensor, room: int) -> tuple[Tensor, Any]:
            logits, total = super().prefill(latent, mask, room)
            return logits, [total]

    model = make_model()
    model.teammates = Listing(model.latent.latent_size)
    env = make_dreams(model)
    with pytest.raises(TypeError, match=r"remembers, a list, has no \['graft', 'make_room'\]"):
        env.step(env.rand_action(env.reset()))


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
