from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from torchrl.data import Bounded, Categorical, OneHot, TensorSpec, Unbounded

from matwm_rl.action_space import ActionSpace, DiscreteActions
from matwm_rl.box_actions import BoxActions
from matwm_rl.envs import AgentLayout, MockEnv, make_env
from matwm_rl.envs.actions import BoxGroupActions, DiscreteGroupActions, join_actions, read_action_specs


@pytest.mark.parametrize("name", ["mock", "mpe2/simple_speaker_listener_v4", "butterfly/pistonball_v6"])
def test_a_layout_is_rebuilt_from_plain_values(name: str) -> None:
    layout = make_env(name).layout
    stored = layout.to_dict()
    assert AgentLayout.from_dict(stored) == layout
    assert AgentLayout.from_dict(json.loads(json.dumps(stored))) == layout
    assert AgentLayout.from_dict(asdict(layout)) == layout
    assert AgentLayout.from_dict(replace(layout, has_action_mask=not layout.has_action_mask).to_dict()) != layout


def test_a_stored_layout_shares_nothing_with_the_layout() -> None:
    layout = make_env("mock").layout
    stored = layout.to_dict()
    stored["group_map"]["hunter"].append("hunter_2")
    stored["actions"]["counts"].append(7)
    assert layout == make_env("mock").layout


def test_stored_layouts_that_do_not_fit() -> None:
    stored = make_env("mock").layout.to_dict()
    actions = stored.pop("actions")
    with pytest.raises(ValueError, match=r"lacks \['actions'\] and has the unknown entries \['action_counts'\]"):
        AgentLayout.from_dict({**stored, "action_counts": [4, 4, 3]})
    with pytest.raises(ValueError, match=r"unknown kind of action space 'levers'; known: .*'discrete'"):
        AgentLayout.from_dict({**stored, "actions": {**actions, "kind": "levers"}})


def test_another_kind_of_action_space_is_rebuilt() -> None:
    class Levers(DiscreteActions, kind="levers_for_tests"):
        def to_dict(self) -> dict[str, object]:
            return {"kind": "levers_for_tests", "counts": self.counts}

    try:
        layout = replace(make_env("mock").layout, actions=Levers([4, 4, 3]))
        assert type(AgentLayout.from_dict(layout.to_dict()).actions) is Levers
    finally:
        del ActionSpace._kinds["levers_for_tests"]


def test_action_counts_are_read_off_the_action_space() -> None:
    layout = make_env("mock").layout
    assert layout.actions == DiscreteActions([4, 4, 3])
    assert (layout.action_counts, layout.num_actions) == ([4, 4, 3], 4)


def test_every_row_of_a_mask_keeps_an_action() -> None:
    mask = torch.tensor([[False, True], [False, False]])
    assert DiscreteActions([2, 2]).allow_one_(mask) is mask
    assert mask.tolist() == [[False, True], [True, False]]


# ---------------------------------------------------------------------- actions of groups


def test_actions_of_groups_are_joined_in_order() -> None:
    groups = {"b": DiscreteGroupActions([4, 2], is_one_hot=False), "a": DiscreteGroupActions([3], is_one_hot=True)}
    assert join_actions(groups) == DiscreteActions([4, 2, 3])
    assert [group.num_actions for group in groups.values()] == [4, 3]
    boxes = {"b": BoxGroupActions([[0.0, 1.0]], [[2.0, 3.0]]), "a": BoxGroupActions([[-1.0]] * 2, [[1.0], [4.0]])}
    assert join_actions(boxes) == BoxActions([[0.0, 1.0], [-1.0], [-1.0]], [[2.0, 3.0], [1.0], [4.0]])
    assert [(group.sizes, group.num_actions) for group in boxes.values()] == [([2], 2), ([1, 1], 1)]
    with pytest.raises(ValueError, match=r"groups \['a'\] are continuous, those of \['b'\] are discrete; expected one"):
        join_actions({"a": boxes["a"], "b": groups["b"]})


@pytest.mark.parametrize("is_one_hot", [False, True])
def test_actions_of_a_group_come_back(is_one_hot: bool) -> None:
    actions, dense = DiscreteGroupActions([3, 3], is_one_hot=is_one_hot), torch.tensor([[0, 2], [1, 1]])
    own = actions.from_dense(dense)
    assert own.shape == ((2, 2, 3) if is_one_hot else (2, 2))
    assert torch.equal(actions.to_dense(own), dense)
    assert actions.to_dense(own.float()).dtype == torch.int64


def test_action_specs() -> None:
    assert read_action_specs([Categorical(3), Categorical(2)], "team") == DiscreteGroupActions([3, 2], False)
    assert read_action_specs([OneHot(3), OneHot(3)], "team") == DiscreteGroupActions([3, 3], is_one_hot=True)
    with pytest.raises(ValueError, match="group 'team' has one-hot actions of unequal sizes"):
        read_action_specs([OneHot(3), OneHot(2)], "team")
    box = Bounded(torch.tensor([0.0, -1.0]), torch.tensor([0.5, 1.0]), dtype=torch.float64)
    expected = BoxGroupActions([[0.0, -1.0]] * 2, [[0.5, 1.0]] * 2, torch.float64)
    assert read_action_specs([box, box], "team") == expected


@pytest.mark.parametrize(
    "specs",
    [
        [Categorical(3, shape=[2])],
        [Bounded(-1, 1, shape=[])],
        [Bounded(-1, 1, shape=[0])],
        [Bounded(-1, 1, shape=[2, 2])],
        [Bounded(-1, 1, shape=[2], dtype=torch.int64)],
        [Unbounded([2])],
        [Bounded(-1, 1, shape=[2]), Categorical(3)],
    ],
    ids=["two choices", "a number", "no number", "a matrix", "whole numbers", "unbounded", "mixed"],
)
def test_actions_of_other_kinds_are_refused(specs: list[TensorSpec]) -> None:
    with pytest.raises(ValueError, match=r"(?s)group 'team' has .* one discrete action, or one vector of numbers b"):
        read_action_specs(specs, "team")


# ---------------------------------------------------------------------- stored data


def test_layout_of_stored_data() -> None:
    rollout = MockEnv().rollout(3)
    layout = AgentLayout.from_rollout(rollout)
    assert layout == make_env("mock").layout
    blind = rollout.exclude(("hunter", "action_mask"))
    with pytest.raises(ValueError, match=r"how many actions agents of group 'hunter' have .*num_actions={'hunter'"):
        AgentLayout.from_rollout(blind)
    assert AgentLayout.from_rollout(blind, num_actions={"hunter": 4, "prey": 9}) == layout, "masks come first"
    with pytest.raises(ValueError, match="no entry holds an observation and an action"):
        AgentLayout.from_rollout(rollout.exclude(("hunter", "action"), ("prey", "action")))
