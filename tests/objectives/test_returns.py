from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives.value.functional import td_lambda_return_estimate

from matwm_rl import keys
from matwm_rl.modules import ActorCriticConfig, RunningNorm, make_critic
from matwm_rl.objectives import LambdaReturn, ReturnScale
from tests.helpers import COUNTS, make_model, random_imagined, randomize
from tests.test_loss_functions import slow_lambda_return

N = len(COUNTS)


def chained(S: int, H: int) -> tuple[TensorDict, Tensor]:
    """An imagined rollout whose states are one number, its value; returns also V(s_0) .. V(s_H)."""
    values = torch.randn(S, H + 1, N, 1)
    after = {"x": values[:, 1:], "reward": torch.randn(S, H, N, 1), "continuation": torch.rand(S, H, N, 1)}
    return TensorDict({"agents": {"x": values[:, :-1]}, "next": {"agents": after}}, batch_size=[S, H]), values


CRITIC = TensorDictModule(torch.clone, in_keys=[("agents", "x")], out_keys=[keys.STATE_VALUE])


def test_returns_values_and_weights_are_those_of_slow_loops(float64: None) -> None:
    td, values = chained(4, 6)
    out = LambdaReturn(CRITIC, gamma=0.9, lmbda=0.8)(td.clone())
    torch.testing.assert_close(out[keys.STATE_VALUE], values[:, :-1])
    for s, n in itertools.product(range(4), range(N)):
        reward, continuation = (td[key][s, :, n, 0].tolist() for key in (keys.REWARD, keys.CONTINUATION))
        expected = slow_lambda_return(reward, continuation, values[s, 1:, n, 0].tolist(), 0.9, 0.8)
        assert out[keys.LAMBDA_RETURN][s, :, n, 0].tolist() == pytest.approx(expected, rel=1e-9)
        weights, reached = [], 1.0
        for c in continuation:
            weights.append(reached)
            reached *= c
        assert out[keys.WEIGHT][s, :, n, 0].tolist() == pytest.approx(weights, rel=1e-9)


def test_with_a_norm_they_are_in_units_of_the_spread_and_relative_to_the_mean_reward_for_ever(float64: None) -> None:
    gamma, td, values = 0.9, *chained(4, 6)
    norm = RunningNorm(1, group_index=[0, 0, 1])
    norm.update(torch.tensor([3.0, 3.0, 0.01]).view(N, 1, 1) * torch.randn(N, 50, 1) - 7)
    out = LambdaReturn(CRITIC, gamma=gamma, lmbda=0.8, reward_norm=norm)(td.clone())
    torch.testing.assert_close(out[keys.STATE_VALUE], values[:, :-1])
    for s, n in itertools.product(range(4), range(N)):
        mean, spread = float(norm.mean[[0, 0, 1][n]]), float(norm.scale[[0, 0, 1][n]])
        for_ever = mean / spread / (1 - gamma)
        reward = [r / spread for r in td[keys.REWARD][s, :, n, 0].tolist()]
        continuation = td[keys.CONTINUATION][s, :, n, 0].tolist()
        value = [v + for_ever for v in values[s, 1:, n, 0].tolist()]
        expected = [g - for_ever for g in slow_lambda_return(reward, continuation, value, gamma, 0.8)]
        assert out[keys.LAMBDA_RETURN][s, :, n, 0].tolist() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="gamma"):
        LambdaReturn(CRITIC, gamma=1.0, reward_norm=norm)


def test_agrees_with_torchrl(float64: None) -> None:
    td, values = chained(4, 6)
    td[keys.CONTINUATION] = (td[keys.CONTINUATION] < 0.7).double()
    out = LambdaReturn(CRITIC, gamma=0.9, lmbda=0.8)(td.clone())
    ended = td[keys.CONTINUATION].movedim(2, 1) == 0
    done = ended.clone()
    done[..., -1, :] = True
    theirs = td_lambda_return_estimate(
        0.9, 0.8, values[:, 1:].movedim(2, 1), td[keys.REWARD].movedim(2, 1), done, ended
    )
    torch.testing.assert_close(out[keys.LAMBDA_RETURN], theirs.movedim(1, 2))


def test_a_critic_may_read_an_entry_of_the_root(float64: None) -> None:
    td, _ = chained(4, 6)
    critic = TensorDictModule(torch.clone, in_keys=["state"], out_keys=[keys.STATE_VALUE])
    rooted = td.clone().rename_key_(("agents", "x"), "state").rename_key_(("next", "agents", "x"), ("next", "state"))
    assert ("next", "state") in LambdaReturn(critic).in_keys
    for key in (keys.STATE_VALUE, keys.LAMBDA_RETURN, keys.WEIGHT):
        torch.testing.assert_close(LambdaReturn(critic)(rooted.clone())[key], LambdaReturn(CRITIC)(td.clone())[key])


def test_a_predicted_end_cuts_the_return_and_the_weight() -> None:
    td, values = chained(2, 5)
    td[keys.CONTINUATION] = torch.ones(2, 5, N, 1)
    td[keys.CONTINUATION][:, 2] = 0.0
    out = LambdaReturn(CRITIC)(td.clone())
    torch.testing.assert_close(out[keys.LAMBDA_RETURN][:, 2], td[keys.REWARD][:, 2])
    assert out[keys.WEIGHT][0, :, 0, 0].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_real_critic_is_asked_for_the_last_successor_without_gradient() -> None:
    model = make_model()
    critic = randomize(make_critic(model, ActorCriticConfig(num_cells=8)))
    td = random_imagined(model=model).exclude(keys.STATE_VALUE, keys.LAMBDA_RETURN, keys.WEIGHT)
    out = LambdaReturn(critic, gamma=1.0, lmbda=1.0)(td.clone())
    last = critic(td["next"].select(*critic.in_keys))[keys.STATE_VALUE][:, -1]
    expected = td[keys.REWARD][:, -1] + td[keys.CONTINUATION][:, -1] * last
    torch.testing.assert_close(out[keys.LAMBDA_RETURN][:, -1], expected.detach())
    assert not any(out[key].requires_grad for key in (keys.STATE_VALUE, keys.LAMBDA_RETURN, keys.WEIGHT))


@pytest.mark.parametrize("wrong", [{"gamma": 1.5}, {"lmbda": -0.1}])
def test_factors_must_lie_between_0_and_1(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be a number from 0 to 1, got"):
        LambdaReturn(CRITIC, **wrong)


def slow_quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def test_scale_is_an_average_of_percentile_ranges_per_agent(float64: None) -> None:
    scale = ReturnScale(N, decay=0.9)
    low, high = [0.0] * N, [0.0] * N
    size = torch.tensor([100.0, 5.0, 0.01])
    for update in range(4):
        returns = size * torch.randn(30, 7, N)
        alive = torch.rand(30, 7, N) < 0.7
        scale.update(returns, alive)
        for n in range(N):
            living = returns[..., n][alive[..., n]].tolist()
            rate = 1.0 if update == 0 else 0.1
            low[n] += rate * (slow_quantile(living, 0.05) - low[n])
            high[n] += rate * (slow_quantile(living, 0.95) - high[n])
    expected = [max(1.0, h - lo) for h, lo in zip(high, low, strict=True)]
    assert scale.scale().tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[2] == 1.0


def test_scale_of_an_agent_dead_in_a_whole_batch_stays() -> None:
    scale = ReturnScale(2)
    scale.update(100 * torch.randn(50, 2))
    before = scale.scale().clone()
    alive = torch.ones(50, 2, dtype=torch.bool)
    alive[:, 1] = False
    scale.update(1000 * torch.randn(50, 2), alive)
    assert scale.scale()[1] == before[1] and scale.scale()[0] != before[0]
    assert scale.scale().isfinite().all()


def test_scale_goes_on_from_its_state_dict() -> None:
    one, other = ReturnScale(2), ReturnScale(2)
    one.update(100 * torch.randn(50, 2))
    other.load_state_dict(one.state_dict())
    more = 10 * torch.randn(50, 2)
    one.update(more)
    other.update(more)
    assert torch.equal(one.scale(), other.scale())
