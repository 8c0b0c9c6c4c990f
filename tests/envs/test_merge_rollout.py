"""Stored data of a grouped environment, merged, is what the live environment gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.envs import EnvBase, PettingZooWrapper
from torchrl.envs.libs.vmas import VmasEnv

from matwm_rl.envs import AgentLayout, MockEnv, MultiAgentEnv, merge_rollout
from matwm_rl.keys import ACTION, ALIVE, NEXT_ALIVE, TERMINATED, TRUNCATED


def mpe() -> EnvBase:
    from mpe2 import simple_tag_v3

    return PettingZooWrapper(simple_tag_v3.parallel_env(max_cycles=5), use_mask=True, done_on_any=False, seed=3)


def knights() -> EnvBase:
    from pettingzoo.butterfly import knights_archers_zombies_v11

    raw = knights_archers_zombies_v11.parallel_env(spawn_delay=1, max_zombies=100, max_cycles=105)
    return PettingZooWrapper(raw, use_mask=True, done_on_any=False, seed=1)


def vmas() -> EnvBase:
    return VmasEnv("simple_tag", num_envs=2, continuous_actions=False, max_steps=4, seed=3)


def play_grouped(env: EnvBase, actions: Tensor, group_map: dict[str, list[str]]) -> TensorDictBase:
    """Play a base environment with the dense group's actions ``[*E, T, N]``; the data ``[*E, T]`` that it gives."""
    data, steps = env.reset(), []
    for action in actions.unbind(-2):
        start = 0
        for group, names in group_map.items():
            data[group, "action"] = action[..., start : start + len(names)]
            start += len(names)
        step, data = env.step_and_maybe_reset(data)
        steps.append(step)
    return torch.stack(steps, dim=env.batch_dims)


@pytest.mark.parametrize(
    ("make", "steps", "max_steps", "deaths"),
    [
        (MockEnv, 26, None, True),
        (lambda: MockEnv(batch_size=[2], death_step=1, ending="truncate"), 13, None, True),
        (mpe, 12, None, False),
        (knights, 108, None, True),
        (vmas, 9, 4, False),
    ],
    ids=["mock", "mock-batch", "mpe2", "butterfly", "vmas"],
)
def test_merged_data_equals_the_live_environment(
    make: Callable[[], EnvBase], steps: int, max_steps: int | None, deaths: bool
) -> None:
    torch.manual_seed(0)
    env = MultiAgentEnv(make())
    live = env.rollout(steps, break_when_any_done=False)
    assert live[TRUNCATED].any() or live[TERMINATED].any()
    assert (live[ALIVE] & ~live[NEXT_ALIVE]).any().item() == deaths, "choose another seed"
    stored = play_grouped(make(), live[ACTION], env.layout.group_map)
    merged = merge_rollout(stored, env.layout, max_steps=max_steps)
    for key in merged.keys(include_nested=True, leaves_only=True):
        assert torch.equal(merged[key], live[key]), key


def test_a_time_limit_that_is_stored_as_a_termination() -> None:
    stored = MockEnv(episode_length=3, death_step=None, ending="terminate").rollout(9, break_when_any_done=False)
    layout = AgentLayout.from_rollout(stored)
    assert merge_rollout(stored, layout)[TERMINATED].sum() == 3
    limited = merge_rollout(stored, layout, max_steps=3)
    assert limited[TRUNCATED].sum() == 3 and not limited[TERMINATED].any()
    assert merge_rollout(stored, layout, max_steps=4)[TERMINATED].sum() == 3


def test_a_mask_that_is_stored_on_one_side_only_is_ignored() -> None:
    stored = MockEnv(death_step=1).rollout(5)
    ends = [("next", group, name) for group in ("hunter", "prey") for name in ("terminated", "truncated")]
    layout = AgentLayout.from_rollout(stored)
    assert not merge_rollout(stored.exclude(*ends), layout)[NEXT_ALIVE].all(), "without ends the masks are read"
    half = merge_rollout(stored.exclude(*ends, ("next", "hunter", "mask")), layout)
    assert half[ALIVE].all() and half[NEXT_ALIVE].all()


def test_one_hot_actions() -> None:
    stored = MockEnv().rollout(5)
    layout, expected = AgentLayout.from_rollout(stored), merge_rollout(stored, AgentLayout.from_rollout(stored))
    for group, count in (("hunter", 4), ("prey", 3)):
        stored[group, "action"] = one_hot(stored[group, "action"], count)
    assert AgentLayout.from_rollout(stored) == layout
    assert torch.equal(merge_rollout(stored, layout)[ACTION], expected[ACTION])


def test_data_that_does_not_fit() -> None:
    stored = MockEnv().rollout(5)
    layout = AgentLayout.from_rollout(stored)
    too_large = stored.clone()
    too_large["prey", "action"][2] = 3
    with pytest.raises(ValueError, match=r"stored actions go up to \[.*3\].*\[4, 4, 3\] actions; correct the layout"):
        merge_rollout(too_large, layout)
    with pytest.raises(ValueError, match=r"expected \[T\] or \[E, T\]"):
        merge_rollout(stored[0], layout)
    with pytest.raises(KeyError, match="merge_rollout reads"):
        merge_rollout(stored.exclude(("next", "prey", "reward")), layout)
    with pytest.raises(KeyError, match="merge_rollout reads"):
        merge_rollout(TensorDict(batch_size=[3]), layout)
