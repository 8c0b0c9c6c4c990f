"""The benchmark of decisions gives all ways the same inputs, and times them in turns."""

from __future__ import annotations

import policies
import torch

from matwm_rl.training.export import example_inputs


def test_the_policy_reads_what_the_exported_ones_read() -> None:
    policy = policies.make_policy("vectors")
    inputs = example_inputs(policy, num_envs=2)
    tensordict = policies.as_tensordict(inputs)
    assert set(tensordict.keys(True, True)) == set(policy.in_keys)
    assert torch.equal(tensordict["history", "length"], inputs["history_length"])
    assert policy(tensordict)["agents", "action"].shape == (2, 4)


def test_all_ways_take_turns() -> None:
    calls: list[str] = []
    seconds = policies.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ab" * 4
    assert [len(times) for times in seconds.values()] == [3, 3]
