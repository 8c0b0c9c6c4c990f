"""FLOPs are counted, cases take turns, targets are checked; at sizes at which the figures mean nothing."""

from __future__ import annotations

import os
from typing import Any

import measure
import pytest
import rows
import torch
from measure import Case, FlopCounter, MatmulRate, Measurement
from rows import Row
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, linear, scaled_dot_product_attention

from matwm_rl.modules.stacked_mlp import StackedMLP

B, h, T, D = 3, 2, 5, 8


def flops(run: Any) -> int:
    with FlopCounter() as counter:
        run()
    return counter.total


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: torch.randn(3, 4) @ torch.randn(4, 5), 2 * 3 * 4 * 5),
        (lambda: torch.mm(torch.randn(3, 4), torch.randn(4, 5), out=torch.empty(3, 5)), 2 * 3 * 4 * 5),
        (lambda: torch.addmm(torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)), 2 * 3 * 4 * 5),
        (lambda: torch.randn(3, 5).addmm_(torch.randn(3, 4), torch.randn(4, 5)), 2 * 3 * 4 * 5),
        (lambda: torch.randn(6, 3, 4) @ torch.randn(6, 4, 5), 6 * 2 * 3 * 4 * 5),
        (lambda: torch.baddbmm(torch.randn(6, 1, 5), torch.randn(6, 3, 4), torch.randn(6, 4, 5)), 6 * 2 * 3 * 4 * 5),
        (lambda: torch.randn(6, 3, 5).baddbmm_(torch.randn(6, 3, 4), torch.randn(6, 4, 5)), 6 * 2 * 3 * 4 * 5),
        (lambda: linear(torch.randn(7, 3, 4), torch.randn(5, 4), torch.randn(5)), 7 * 2 * 3 * 4 * 5),
        (lambda: torch.randn(3, 4).bfloat16() @ torch.randn(4, 5).bfloat16(), 2 * 3 * 4 * 5),
        (lambda: embedding(torch.zeros(3, 2, dtype=torch.long), torch.randn(9, 4)), 0),
        (lambda: embedding_bag(torch.zeros(3, 2, dtype=torch.long), torch.randn(9, 4), mode="sum"), 0),
        (lambda: torch.randn(3, 4) * torch.randn(3, 4) + 1, 0),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_flops_of_a_product(run: Any, expected: int, mode: Any) -> None:
    with mode():
        assert flops(run) == expected


def attend(*, training: bool) -> None:
    query, key, value = (torch.randn(B, h, T, D, requires_grad=training) for _ in range(3))
    mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if training:
        attended.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flops_of_attention_with_a_mask(mode: Any) -> None:
    with mode():
        # Scores, and their product with the values.
        assert flops(lambda: attend(training=False)) == 2 * 2 * B * h * T * T * D


def test_flops_of_attention_and_its_gradients() -> None:
    # Backward: scores again, and one product for each of scores, values, queries and keys.
    assert flops(lambda: attend(training=True)) == (2 + 5) * 2 * B * h * T * T * D


def test_flops_of_a_layer_and_its_gradients() -> None:
    layer = nn.Linear(4, 5)
    forward = 2 * 3 * 4 * 5
    assert flops(lambda: layer(torch.randn(3, 4)).sum().backward()) == 2 * forward
    assert flops(lambda: layer(torch.randn(3, 4, requires_grad=True)).sum().backward()) == 3 * forward


def test_flops_of_stacked_networks() -> None:
    network = StackedMLP(3, 2, stack_index=range(4), num_cells=8, depth=2)
    assert flops(lambda: network(torch.randn(4, 5, 3))) == 2 * 4 * 5 * (3 * 8 + 8 * 8 + 8 * 2)


# -- timing ------------------------------------------------------------------------------------------------------------


def test_cases_take_turns_after_one_that_counts() -> None:
    calls = []

    def case(name: str) -> Case:
        def run(inputs: Tensor) -> None:
            calls.append(name)
            inputs @ inputs

        return Case(run, prepare=lambda: torch.ones(2, 2))

    rate = MatmulRate(products=1)
    measured = measure.measure({"a": case("a"), "b": case("b")}, repeats=2, rate=rate)
    assert calls == ["a", "b"] * 3
    assert [(m.flops, len(m.seconds), len(m.rates)) for m in measured.values()] == [(16, 2, 2)] * 2
    # Before and after each of two runs of two cases.
    assert len(rate.samples[torch.float32]) == 8


def test_preparation_is_not_timed() -> None:
    clock = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "perf_counter", lambda: next(clock))
        case = Case(lambda _: None, prepare=lambda: [measure.perf_counter() for _ in range(7)])
        assert measure.measure_one(case, repeats=1, rate=MatmulRate(products=1)).seconds == [1]


def test_a_slow_moment_of_the_machine_does_not_change_the_share() -> None:
    measured = Measurement(flops=600, seconds=[10.0, 20.0, 11.0], rates=[100.0, 50.0, 90.0])
    assert measured.share == pytest.approx(0.6)
    assert measured.fields() == {
        "gflops": pytest.approx(600 / 11 / 1e9),
        "seconds": 11.0,
        "spread": (10.0, 20.0),
        "repeats": 3,
    }


def test_matmul_rate_is_that_of_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 9.0, 2.0])
    monkeypatch.setattr(measure, "timed", lambda run: [run(), next(seconds)][1])
    rate = MatmulRate(products=3)
    assert flops(lambda: rate.sample(torch.float32)) == (1 + 3) * rate.flops
    row = rate.row(torch.float32)
    assert row.value == pytest.approx(2 * 768 * 512 * 512 / 2.0 / 1e9)
    assert row.seconds == pytest.approx(2.0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let cores be chosen")
def test_threads_and_cores_are_pinned_and_given_back() -> None:
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    with measure.pinned(1):
        assert torch.get_num_threads() == 1
        assert os.sched_getaffinity(0) == {min(before[1])}
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before


@pytest.mark.parametrize("threads", [0, 10_000])
def test_impossible_threads_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"got {threads} threads; expected 1 to"), measure.pinned(threads):
        pass


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "met"),
    [
        ({"value": 1.0}, True),
        ({"value": 1.0, "share": 0.1}, True),
        ({"value": 2.0, "target": 2.0}, True),
        ({"value": 1.9, "target": 2.0}, False),
        ({"value": 2.0, "target": 2.0, "better": "lower"}, True),
        ({"value": 2.1, "target": 2.0, "better": "lower"}, False),
        ({"value": 0.0, "share": 0.7, "target": 0.7}, True),
        ({"value": 9.0, "share": 0.6, "target": 0.7}, False),
    ],
)
def test_a_target_is_on_the_share_where_there_is_one(entries: dict[str, Any], met: bool) -> None:
    row = Row(case="case", unit="s", **entries)
    assert row.met is met
    assert row.as_dict()["met"] is met
    shown = rows.table([row]).splitlines()[-1]
    assert ("NO" in shown) is (not met)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"better": "smaller"}, "must be 'higher' or 'lower', got 'smaller'"),
        ({"better": "lower", "share": 0.5, "target": 0.7}, "higher is better there"),
    ],
)
def test_contradictory_rows_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(case="case", value=1.0, unit="s", **entries)
