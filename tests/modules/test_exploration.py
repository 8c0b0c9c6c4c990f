from __future__ import annotations

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv

from matwm_rl import keys
from matwm_rl.envs import make_env
from matwm_rl.modules import RandomEpisodes, WorldModelPolicy, make_actor
from matwm_rl.modules.exploration import ROLE
from tests.helpers import make_model, mock_env


def make(probability: float, context_length: int = 3) -> RandomEpisodes:
    """A policy of which every agent always takes its first legal action: others are random."""
    model = make_model()
    actor = make_actor(model, num_cells=8)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        bias = list(actor.parameters())[-1]
        bias.copy_(-1e3 * torch.arange(bias.shape[-1]).expand_as(bias))
    return RandomEpisodes(WorldModelPolicy(model, actor, context_length=context_length), probability=probability)


def collect(exploring: RandomEpisodes, steps: int = 240, num_envs: int = 1) -> torch.Tensor:
    env = TransformedEnv(make_env("mock", seed=0, num_envs=num_envs), exploring.make_tensordict_primer())
    collector = Collector(
        env, exploring, frames_per_batch=steps, total_frames=steps, auto_register_policy_transforms=False
    )
    return next(iter(collector))


@pytest.mark.parametrize("num_envs", [1, 4])
def test_roles_hold_for_an_episode_and_are_drawn_apart(num_envs: int) -> None:
    data = collect(make(0.5), 400, num_envs).reshape(num_envs, -1)
    role, done = data["next", *ROLE], data[keys.DONE].squeeze(-1)
    assert set(role.unique().tolist()) == {1, 2}
    same = (role[:, 1:] == role[:, :-1]).all(-1)
    assert same[~done[:, :-1]].all()
    assert not same[done[:, :-1]].all()
    firsts = role[:, 1:][done[:, :-1]].float()
    assert (firsts.std(0) > 0).all()
    assert not (firsts == firsts[:, :1]).all()


def test_random_agents_act_at_random_within_their_legal_actions_and_others_by_policy() -> None:
    data = collect(make(0.5))
    role, action, mask = data["next", *ROLE], data[keys.ACTION], data[keys.ACTION_MASK]
    assert mask.gather(-1, action.unsqueeze(-1)).all()
    first_legal = mask.int().argmax(-1)
    assert (action == first_legal)[role == 1].all()
    assert not (action == first_legal)[role == 2].all()


def test_context_holds_what_was_really_done() -> None:
    data = collect(make(1.0))
    assert torch.equal(data["next", "context", "action"][..., -1], data[keys.ACTION])


@pytest.mark.parametrize(("probability", "role"), [(0.0, 1), (1.0, 2)])
def test_never_and_always(probability: float, role: int) -> None:
    assert (collect(make(probability))["next", *ROLE] == role).all()


def test_probability_is_checked() -> None:
    with pytest.raises(ValueError, match="probability"):
        make(1.5)


def test_missing_role_is_named() -> None:
    exploring = make(0.5)
    step = mock_env().append_transform(exploring.policy.make_tensordict_primer()).reset()
    with pytest.raises(KeyError, match="'context', 'role'.*make_tensordict_primer"):
        exploring(step)
