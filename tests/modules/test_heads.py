from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import one_hot

from matwm_rl.action_space import DiscreteActions
from matwm_rl.modules import ActionMixer, CategoricalLatent, Head
from tests.helpers import grads, random_latent, randomize

COUNTS = [4, 2, 3]
ACTIONS = DiscreteActions(COUNTS)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("num_classes", [5, None])
def test_mixer_is_one_linear_map_of_latent_and_one_hot_action(
    float64: None, scaled: bool, num_classes: int | None
) -> None:
    mixer = ActionMixer(5, 8, actions=ACTIONS, num_classes=num_classes, scaled=scaled)
    ids = sum(COUNTS) if scaled else max(COUNTS)
    assert mixer.action.rows.weight.shape == (ids, 8)
    linear = torch.cat([mixer.latent.weight[0].T, mixer.action.rows.weight.T], 1)
    action = torch.stack([torch.randint(n, (6,)) for n in COUNTS])
    latent = torch.randn(3, 6, 5) if num_classes is None else random_latent(CategoricalLatent(1, 5), 3, 6)
    out = mixer(latent, action)
    for i, b in itertools.product(range(3), range(6)):
        offset = sum(COUNTS[:i]) if scaled else 0
        x = torch.cat([latent[i, b], one_hot(action[i, b] + offset, ids).double()])
        torch.testing.assert_close(out[i, b], linear @ x + mixer.latent.bias[0])


def test_scaled_actions_of_different_agents_share_no_row() -> None:
    mixer = ActionMixer(5, 8, actions=ACTIONS, num_classes=None, scaled=True)
    touched = torch.zeros(sum(COUNTS))
    for agent, count in enumerate(COUNTS):
        action = torch.zeros(3, count, dtype=torch.long)
        action[agent] = torch.arange(count)
        out = mixer(torch.zeros(3, count, 5), action)[agent]
        (grad,) = grads(out.sum(), [mixer.action.rows.weight])
        touched += (grad != 0).any(1)
    assert touched.tolist() == [1.0] * sum(COUNTS)


def test_head_has_its_last_layer_per_group_and_may_start_at_zero() -> None:
    head = Head(4, 6, group_index=[0, 0, 1], num_cells=8, depth=2, zero_init=True)
    assert not head(torch.randn(3, 5, 4)).any()
    assert head.output.weight.shape == (2, 8, 6)
    assert Head(4, 6, group_index=[0, 1], num_cells=8, depth=0)(torch.randn(2, 4)).shape == (2, 6)


@torch.no_grad()
def test_a_linear_skip_adds_each_groups_own_linear_map() -> None:
    head = randomize(Head(4, 6, group_index=[0, 0, 1], num_cells=8, depth=1, linear_skip=True))
    x = torch.randn(3, 5, 4)
    for agent, group in enumerate([0, 0, 1]):
        hidden = head.trunk(x[agent])
        expected = hidden @ head.output.weight[group] + head.output.bias[group]
        expected += x[agent] @ head.skip.weight[group] + head.skip.bias[group]
        torch.testing.assert_close(head(x)[agent], expected)
