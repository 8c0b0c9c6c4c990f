"""Partial resets: some dreams begin anew beside others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from matwm_rl import keys
from matwm_rl.action_space import DiscreteActions
from matwm_rl.envs import ImaginationEnv
from matwm_rl.functional import agents_first
from matwm_rl.modules import STATE_KEYS, TeammatePredictorBase, WorldModel
from tests.envs.helpers import C, H, N, S, differing, make_dreams, starts
from tests.helpers import COUNTS, LATENTS, make_model, randomize


def step(env: ImaginationEnv, data: TensorDictBase, seed: int) -> TensorDictBase:
    """One step with random numbers of its own."""
    torch.manual_seed(seed)
    return env.step(env.rand_action(data))


def reset_rows(env: ImaginationEnv, data: TensorDictBase, rows: Tensor, seed: int) -> TensorDictBase:
    torch.manual_seed(seed)
    return env.reset(data.set("_reset", rows.unsqueeze(-1)))


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

    def replace_rows(self, rows: Tensor, new: Total) -> None:
        self.total[rows] = new.total

    def make_room(self, keep: int) -> None:
        """A sum needs none."""


class Adding(TeammatePredictorBase):
    """A predictor with a memory of its own kind."""

    def __init__(self, latent_size: int) -> None:
        super().__init__(DiscreteActions(COUNTS))
        self.linear = torch.nn.Linear(latent_size, self.num_outputs)

    def prefill(self, latent: Tensor, mask: Tensor, room: int) -> tuple[Tensor, Total]:
        total = (latent.detach().flatten(0, 1) * mask[:, -1].unsqueeze(-1)).sum(1)
        return self._told(total, latent.shape[1]), Total(total)

    def step(self, latent: Tensor, cache: Total) -> Tensor:
        cache.total = cache.total + latent.detach().flatten(0, 1)
        return self._told(cache.total, latent.shape[1])

    def _told(self, total: Tensor, rows: int) -> Tensor:
        return self._split(self.linear(total).view(N, rows, -1))


@pytest.mark.parametrize("memory", ["the predictor's cache", "one of another kind"])
def test_reset_rows_dream_what_fresh_dreams_would(memory: str) -> None:
    """With the same starts and random numbers: nothing of what they dreamt before flows into them."""
    model = make_model(latent="gaussian").eval()
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
@pytest.mark.parametrize(("context", "max_steps", "num_steps"), [(0, 1, 7), (C, 3, 25)])
def test_however_often_rows_are_reset_each_follows_the_models_own_rules(
    float64: None, context: int, max_steps: int, num_steps: int
) -> None:
    """Context and dream of every row put together are one sequence, on which the parallel pass must agree.

    Over many more steps than the caches have room for, with random partial resets beside those by the time limit.
    """
    model = make_model(latent="gaussian").eval()
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
        latent = torch.cat([context[n], torch.stack([step[keys.LATENT][n] for step in dream])])
        action = torch.cat([begin[keys.ACTION][first:-1, n], torch.stack([step[keys.ACTION][n] for step in dream])])
        # All agents' rows of the model are filled with this one's sequence, and this one's result is read.
        sequence = latent.expand(model.num_agents, 1, -1, -1)
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


def test_a_memory_that_cannot_begin_anew_is_named() -> None:
    class Listing(Adding):
        def prefill(self, latent: Tensor, mask: Tensor, room: int) -> tuple[Tensor, Any]:
            logits, total = super().prefill(latent, mask, room)
            return logits, [total]

    model = make_model()
    model.teammates = Listing(model.latent.latent_size)
    env = make_dreams(model)
    with pytest.raises(TypeError, match=r"cache, a list, has no \['replace_rows', 'make_room'\]"):
        env.step(env.rand_action(env.reset()))
