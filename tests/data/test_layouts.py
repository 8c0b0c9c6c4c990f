from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from matwm_rl import keys
from matwm_rl.data import REPLAY_KEYS, FocalSlices, add_agent_entries


def rollout(*batch: int, num_agents: int, features: int = 3) -> TensorDict:
    """A plain rollout in which every entry of every agent differs from all others."""
    agents = (*batch, num_agents)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel()).reshape(shape)

    action = numbers(*agents)
    mask = numbers(*agents, action.numel()) % 3 > 0
    td = TensorDict(
        {
            "agents": {
                "observation": numbers(*agents, features).float(),
                "action": action,
                "action_mask": mask.scatter(-1, action.unsqueeze(-1), True),
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
def test_agents_get_what_their_teammates_did(num_agents, batch):
    td = rollout(*batch, num_agents=num_agents)
    added = add_agent_entries(td)
    for key, source in ((keys.TEAMMATE_ACTION, td[keys.ACTION]), (keys.TEAMMATE_ALIVE, td[keys.ALIVE])):
        assert added[key].shape == (*batch, num_agents, num_agents - 1)
        for focal in range(num_agents):
            others = [source[..., other] for other in range(num_agents) if other != focal]
            assert torch.equal(added[key][..., focal, :], torch.stack(others, -1) if others else source[..., :0])


def test_agents_get_the_ends_of_their_episodes_and_the_rest_stays():
    td = rollout(2, 5, num_agents=3)
    before = td.clone()
    added = add_agent_entries(td)
    assert (td == before).all() and set(td.keys(True)) == set(before.keys(True))
    assert all(added[key] is td[key] for key in td.keys(True, True))
    for agent in range(3):
        returns = ~td[keys.ALIVE][..., agent] & td[keys.NEXT_ALIVE][..., agent]
        assert torch.equal(added[keys.AGENT_DONE][..., agent, 0], td[keys.DONE].squeeze(-1) | returns)
        assert torch.equal(added[keys.AGENT_TERMINATED][..., agent, :], td[keys.TERMINATED])
    without = add_agent_entries(td.exclude(keys.ALIVE, "next"))
    assert set(without.keys(True, True)) == {keys.OBSERVATION, keys.ACTION, keys.ACTION_MASK, keys.TEAMMATE_ACTION}


def test_one_hot_actions_are_refused():
    td = rollout(4, num_agents=2)
    td["agents", "action"] = torch.zeros(4, 2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="categorical"):
        add_agent_entries(td)


def test_missing_actions_are_named():
    with pytest.raises(KeyError, match="add_agent_entries reads .*'action'.* is missing"):
        add_agent_entries(rollout(4, num_agents=2).exclude(("agents", "action")))


def test_rows_are_time_first_and_hold_replay_keys_only():
    transform = FocalSlices(3)
    td = rollout(2, 7, num_agents=3)
    td["agents", "hidden"] = torch.zeros(2, 7, 3, 9)
    rows = transform.inv(td)
    assert rows.batch_size == rows["next"].batch_size == (7, 2, 3)
    assert set(rows.keys(True, True)) == {
        *("observation", "action", "action_mask", "alive", "teammate_action", "teammate_alive"),
        *(("next", name) for name in ("observation", "reward", "alive", "done", "terminated")),
    }
    assert torch.equal(rows["action"][6, 1], td[keys.ACTION][1, 6])
    assert torch.equal(transform.inv(td[0])["next", "reward"], rows["next", "reward"][:, :1])


@pytest.mark.parametrize("num_agents", [1, 3])
def test_a_focal_batch_takes_each_agent_from_its_own_slice(num_agents):
    B, T, E = 4, 6, 5
    td = rollout(E, 20, num_agents=num_agents).select(*REPLAY_KEYS)
    transform = FocalSlices(num_agents)
    env, start = torch.randint(E, (B, 1, num_agents)), torch.randint(20 - T, (B, 1, num_agents))
    step, agent = start + torch.arange(T).view(1, T, 1), torch.arange(num_agents)
    rows = transform.inv(td)
    assert rows["observation"].untyped_storage().data_ptr() == td[keys.OBSERVATION].untyped_storage().data_ptr()
    sample = rows[step, env.expand_as(step), agent.expand_as(step)]
    focal = transform(sample)
    plain = add_agent_entries(td)
    expected_keys = {key for key in plain.keys(True, True) if "agents" in key}
    assert set(focal.keys(True, True)) == expected_keys
    assert focal.batch_size == (B, T)
    assert focal["agents"].batch_size == focal["next", "agents"].batch_size == (B, T, num_agents)
    for key in expected_keys:
        for b in range(B):
            for t in range(T):
                for n in range(num_agents):
                    assert torch.equal(focal[key][b, t, n], plain[key][env[b, 0, n], start[b, 0, n] + t, n]), key


def test_focal_slices_errors():
    transform = FocalSlices(3)
    rows = transform.inv(rollout(2, 8, num_agents=3))
    for sample in (rows[0, 0], rows[:, 0], rows[..., :2]):
        with pytest.raises(ValueError, match=r"expected \[B, T, 3\], as a slice sampler"):
            transform(sample)
    with pytest.raises(ValueError, match="2 agents; this buffer was built for 3"):
        transform.inv(rollout(7, num_agents=2))
    with pytest.raises(KeyError, match="action_mask"):
        transform.inv(rollout(7, num_agents=3).exclude(keys.ACTION_MASK))
    for shape, num_envs, expected in (((2, 7), 1, r"\[1, T\] or \[T\]"), ((2, 2, 7), 3, r"\[3, T\]")):
        with pytest.raises(ValueError, match=rf"expected {expected}: this replay was built with num_envs={num_envs}"):
            FocalSlices(3, num_envs).inv(rollout(*shape, num_agents=3))
