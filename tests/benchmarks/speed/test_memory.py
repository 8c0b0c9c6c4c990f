"""The memory benchmark counts parameters and Adam's state, and catches growth that is not expected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import memory
import pytest
import workloads

from tests.benchmarks.speed.sizes import TINY, written


def test_expected_growth() -> None:
    assert memory.expected_growth(1, 5, 8) == 5 * 8
    assert memory.expected_growth(3, 5, 8) == 3 * 5 * 8 + 2 * 5 * 8 + 2 * 5


def test_adams_state_is_measured_after_a_step() -> None:
    measured = memory.measure_memory(2, TINY)
    model = workloads.make_learner(2, TINY).world_model
    tensors = list(model.parameters())
    assert measured.parameters == sum(tensor.numel() for tensor in tensors)
    assert measured.parameter_bytes == 4 * measured.parameters
    # Two moments, and one number of steps for each tensor.
    assert measured.adam_bytes == 8 * measured.parameters + 4 * len(tensors)


def test_memory_is_flat(tmp_path: Path) -> None:
    output = tmp_path / "new" / "memory.json"
    memory.main(["--output", str(output)], sizes=TINY, agents=(1, 2, 5))
    rows = written(output)["rows"]
    assert [(row["value"], row["met"]) for row in rows if row["target"] is not None] == [(1.0, True)] * 2
    ratios = [row["value"] for row in rows if row["case"].endswith("separate models")]
    assert ratios[0] == 1.0
    assert ratios[1] > ratios[2]


def test_other_growth_is_caught() -> None:
    # Without action scaling the rows do not grow as they should.
    sizes = replace(TINY, model={**TINY.model, "action_scaling": False})
    rows = memory.memory_rows([memory.measure_memory(agents, sizes) for agents in (1, 2, 3)])
    assert [row.met for row in rows if row.target is not None] == [False, False]


def test_memory_needs_a_single_agent_first() -> None:
    measured = memory.measure_memory(2, TINY)
    with pytest.raises(ValueError, match=r"expected 1 and at least two larger numbers of agents, got \[2, 2, 2\]"):
        memory.memory_rows([measured] * 3)
