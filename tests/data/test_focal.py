from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from matwm_rl import keys
from matwm_rl.data import REPLAY_KEYS, FocalSlices, agent_rows, focal_batch, select_focal, teammate_actions, to_focal


def rollout(*batch: int, num_agents: int, features: int = 3) -> TensorDict:
    """A plain rollout in which every entry of every agent differs from all others."""
    agents = (*batch, num_agents)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel()).reshape(shape)

    td = TensorDict(
        {
            "agents": {
                "observation": numbers(*agents, features).float(),
                "action": numbers(*agents),
                "action_mask": numbers(*agents, 5) % 3 > 0,
                "alive": numbers(*agents) % 4 > 0,
            },
            "next": {
                "agents": {
                    "observation": numbers(*agents, features).float() + 0.5,
                    "reward": -numbers(*agents, 1).float(),
                    "alive": numbers(*agents) % 5 > 0,
                },
                "done": numbers(*batch, 1) % 3 == 0,
                "terminated": numbers(*batch, 1) % 6 == 0,
                "truncated": numbers(*batch, 1) % 6 == 3,
            },
        },
        batch,
    )
    td["agents"].batch_size = agents  # as TorchRL's environments have it
    return td


@pytest.mark.parametrize("num_agents", [1, 2, 5])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_teammate_actions(num_agents, batch):
    action = torch.randint(9, (*batch, num_agents))
    teammates = teammate_actions(action)
    assert teammates.shape == (*batch, num_agents, num_agents - 1)
    for focal in range(num_agents):
        others = [action[..., other] for other in range(num_agents) if other != focal]
        assert torch.equal(teammates[..., focal, :], torch.stack(others, -1) if others else action[..., :0])


def test_to_focal_adds_and_leaves_the_rest():
    td = rollout(2, 5, num_agents=3)
    before = td.clone()
    focal = to_focal(td)
    assert (td == before).all() and set(td.keys(True)) == set(before.keys(True))
    assert torch.equal(focal[keys.TEAMMATE_ALIVE], teammate_actions(td[keys.ALIVE]))
    for agent in range(3):
        assert torch.equal(focal[keys.AGENT_DONE][..., agent, :], td[keys.DONE])
        assert torch.equal(focal[keys.AGENT_TERMINATED][..., agent, :], td[keys.TERMINATED])
    without_alive = to_focal(td.exclude(keys.ALIVE))
    assert keys.TEAMMATE_ALIVE not in without_alive.keys(True)


def test_to_focal_refuses_one_hot_actions():
    td = rollout(4, num_agents=2)
    td["agents", "action"] = torch.zeros(4, 2, 5)
    with pytest.raises(ValueError, match="categorical"):
        to_focal(td)


def test_to_focal_names_missing_actions():
    with pytest.raises(KeyError, match="to_focal reads .*'action'.* is missing"):
        to_focal(rollout(4, num_agents=2).exclude(("agents", "action")))


def test_rows_and_back():
    td = rollout(2, 5, num_agents=3)
    rows = agent_rows(td)
    assert rows.batch_size == (2, 5, 3)
    assert rows["observation"].data_ptr() == td[keys.OBSERVATION].data_ptr()  # views, not copies
    focal = focal_batch(rows)
    for key in set(td.keys(True, True)) - {keys.DONE, keys.TERMINATED, keys.TRUNCATED}:
        assert torch.equal(focal[key], td[key])
    assert focal["agents"].batch_size == (2, 5, 3)


@pytest.mark.parametrize("num_agents", [1, 3])
def test_select_focal_against_loops(num_agents):
    B, T = 4, 6
    td = rollout(num_agents * B, T, num_agents=num_agents)
    focal = select_focal(td, num_agents)
    plain = to_focal(td)
    expected_keys = {key for key in plain.keys(True, True) if "agents" in key}
    assert set(focal.keys(True, True)) == expected_keys
    assert focal.batch_size == (B, T)
    for key in expected_keys:
        for b in range(B):
            for t in range(T):
                for n in range(num_agents):
                    assert torch.equal(focal[key][b, t, n], plain[key][n * B + b, t, n]), key


def test_select_focal_errors():
    with pytest.raises(ValueError, match="equal share"):
        select_focal(rollout(7, 4, num_agents=3), 3)
    with pytest.raises(ValueError, match="equal share"):
        select_focal(rollout(6, num_agents=3), 3)
    with pytest.raises(ValueError, match="3 agents and num_agents=2"):
        select_focal(rollout(6, 4, num_agents=3), 2)


def test_focal_slices_gives_what_select_focal_gives():
    N, B, T = 3, 4, 5
    td = rollout(N * B, T, num_agents=N).select(*REPLAY_KEYS)
    rows = agent_rows(td)
    shares = torch.cat([rows[n * B : (n + 1) * B, :, n] for n in range(N)]).flatten()
    focal = FocalSlices(N, T)(shares)
    expected = select_focal(td, N)
    assert set(focal.keys(True, True)) == set(expected.keys(True, True))
    assert (focal == expected).all()


def test_focal_slices_inverse_orders_time_first_and_keeps_replay_keys():
    transform = FocalSlices(3, 5)
    td = rollout(2, 7, num_agents=3)
    td["agents", "hidden"] = torch.zeros(2, 7, 3, 9)
    rows = transform.inv(td)
    assert rows.batch_size == (7, 2, 3)
    assert "hidden" not in rows.keys()
    assert torch.equal(rows["action"][6, 1], td[keys.ACTION][1, 6])
    assert torch.equal(transform.inv(td[0])["next", "reward"], rows["next", "reward"][:, :1])


def test_focal_slices_errors():
    transform = FocalSlices(3, 5)
    with pytest.raises(ValueError, match="equal share"):
        transform(agent_rows(rollout(7, num_agents=3))[:, 0])
    with pytest.raises(ValueError, match="2 agents; this buffer was built for 3"):
        transform.inv(rollout(7, num_agents=2))
    with pytest.raises(KeyError, match="action_mask"):
        transform.inv(rollout(7, num_agents=3).exclude(keys.ACTION_MASK))
    for shape, num_envs, expected in (((2, 7), 1, r"\[1, T\] or \[T\]"), ((2, 2, 7), 3, r"\[3, T\]")):
        with pytest.raises(ValueError, match=rf"expected {expected}: this replay was built with num_envs={num_envs}"):
            FocalSlices(3, 5, num_envs).inv(rollout(*shape, num_agents=3))
