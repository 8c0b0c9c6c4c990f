"""A policy whose logits are no distribution acts nowhere: of NaN logits action 0 would be drawn, legal or not."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.action_space import DiscreteActions
from matwm_rl.envs import ImaginationEnv
from matwm_rl.evaluation import RunLog, evaluate
from matwm_rl.modules import WorldModelPolicy, make_actor
from matwm_rl.modules.actor_critic import check_logits
from tests.envs.helpers import make_dreams, random_rollout
from tests.helpers import make_model, mock_env

NAN, INF = math.nan, math.inf


def ruined_policy(number: float = NAN) -> WorldModelPolicy:
    model = make_model()
    policy = WorldModelPolicy(model, make_actor(model), history_length=4)
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter[1] = number
    return policy


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("exploration", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_the_policy_refuses_to_act(number: float, exploration: ExplorationType) -> None:
    policy = ruined_policy(number)
    env = mock_env().append_transform(policy.make_tensordict_primer())
    with set_exploration_type(exploration), pytest.raises(FloatingPointError, match="gave agent 1 the logits .*nan"):
        env.rollout(3, policy)


def test_evaluation_refuses_a_policy_of_ones_own() -> None:
    class Nan(nn.Module):
        def forward(self, td: TensorDict) -> TensorDict:
            td.set(keys.LOGITS, torch.full(td[keys.ACTION_MASK].shape, NAN))
            return td.set(keys.ACTION, td[keys.ACTION_MASK].int().argmax(-1))

    with pytest.raises(FloatingPointError, match="Nan gave agent 0 the logits"):
        evaluate(mock_env(), Nan(), episodes=1)


@pytest.mark.parametrize(
    ("logits", "is_refused"),
    [
        ([0.0, -INF, 1.0, 0.0], False),
        ([0.0, NAN, 1.0, INF], True),
        ([-INF, 0.0, -INF, 0.0], True),
        ([0.0, NAN, 1.0, NAN], False),
        ([0.0, 0.0, INF, 0.0], True),
        ([3e38, 3e38, 3e38, 3e38], False),
    ],
)
def test_only_legal_actions_count_and_minus_infinity_is_no_probability(logits: list[float], is_refused: bool) -> None:
    mask = torch.tensor([[True, False, True, False]])
    if logits == [0.0, NAN, 1.0, INF]:
        mask = ~mask
    outputs = TensorDict({"agents": {"logits": torch.tensor([logits])}})
    if is_refused:
        with pytest.raises(FloatingPointError, match="no legal action can be drawn"):
            check_logits(outputs, DiscreteActions([4]), mask, nn.Identity())
    else:
        check_logits(outputs, DiscreteActions([4]), mask, nn.Identity())


@pytest.mark.parametrize("part", ["reward", "continuation"])
def test_a_dream_with_such_numbers_is_refused(part: str) -> None:
    env: ImaginationEnv = make_dreams()
    env.reset()
    getattr(env.world_model, part).register_forward_hook(lambda module, inputs, output: output * NAN)
    message = f"the world model gave nan as {part} of agent 0 in imagined episode 0"
    with pytest.raises(FloatingPointError, match=message):
        random_rollout(env, 2)


def test_the_log_tells_of_losses_that_a_gpu_has_skipped(tmp_path) -> None:
    with RunLog(tmp_path, total_steps=20, progress=False, logger=None) as log:
        log.accumulate({"loss_reward": torch.tensor(1.0), "kl": torch.tensor(2.0)})
        log.write(10)
        log.accumulate({"loss_reward": torch.tensor(NAN), "kl": torch.tensor(2.0)})
        with pytest.raises(FloatingPointError, match=r"up to env step 20 are not finite: \{'loss_reward': nan\}"):
            log.write(20)
