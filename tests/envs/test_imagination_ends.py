"""How imagined episodes end: by the time limit, agent by agent, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matwm_rl import keys
from matwm_rl.modules import State, WorldModel
from tests.envs.helpers import C, H, N, S, make_dreams, random_rollout, starts
from tests.helpers import make_model


def script(monkeypatch: pytest.MonkeyPatch, model: WorldModel, continuation: list[Tensor]) -> None:
    """Have the model predict these probabilities ``[S, N]`` for the steps to come, one after the other."""
    predict, left = model.predict_outcome, list(continuation)

    def scripted(state: State, action: Tensor, following: State) -> tuple[Tensor, Tensor]:
        return predict(state, action, following)[0], left.pop(0).T.unsqueeze(-1)

    monkeypatch.setattr(model, "predict_outcome", scripted)


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
