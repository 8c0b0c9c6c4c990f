"""The benchmarks count, compare and write what they say; on sizes at which their figures mean nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import memory
import pytest
import scaling
import throughput
import torch
from measure import Case, FlopCounter, MatmulRate, Measurement, Row, Sizes
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, linear, scaled_dot_product_attention

from matwm_rl.modules.stacked import StackedMLP

TINY = Sizes(
    observation_size=6,
    num_actions=3,
    starts=4,
    context=2,
    horizon=2,
    sequences=4,
    sequence_length=4,
    episode_length=3,
    policy_context=3,
    num_cells=8,
    model={"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_dims": 4, "num_classes": 4},
)
ONCE = throughput.Repeats(
    imagination=1, imagination_with_teammates=1, world_model=1, actor_critic=1, acting=1, training_step=1
)
B, h, T, D = 3, 2, 5, 8


def flops(run: Any) -> int:
    with FlopCounter() as counter:
        run()
    return counter.total


def written(path: Path) -> dict[str, Any]:
    """A result file, after a look at what all of them have."""
    result = json.loads(path.read_text())
    assert set(result) == {"machine", "settings", "rows"}
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__
    for row in result["rows"]:
        assert {"case", "value", "unit", "share", "target", "met", "better"} <= set(row)
        assert row["value"] > 0
        assert row["share"] is None or row["share"] > 0
        if row["seconds"] is not None:
            assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
    return result


def by_case(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = {row["case"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    return rows


# -- FLOPs -----------------------------------------------------------------------------------------------------------


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


# -- timing ----------------------------------------------------------------------------------------------------------


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


# -- rows ------------------------------------------------------------------------------------------------------------


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
    shown = measure.table([row]).splitlines()[-1]
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


# -- memory ----------------------------------------------------------------------------------------------------------


def test_expected_growth() -> None:
    assert memory.expected_growth(1, 5, 8) == 5 * 8
    assert memory.expected_growth(3, 5, 8) == 3 * 5 * 8 + 2 * 5 * 8 + 2 * 5


def test_adams_state_is_measured_after_a_step() -> None:
    measured = memory.measure_memory(2, TINY)
    model = measure.make_learner(2, TINY).world_model
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


# -- scaling ---------------------------------------------------------------------------------------------------------


def test_scaling_compares_the_costs() -> None:
    measured = {2: Measurement(10, [2.0], [5.0]), 4: Measurement(10, [3.0], [5.0])}
    *rows, flatness = scaling.scaling_rows("step", measured, unit="us", per_second=100.0, target=1.4)
    assert [row.value for row in rows] == [200.0, 300.0]
    assert flatness.value == 1.5
    assert not flatness.met


def test_scaling_needs_equal_shares() -> None:
    with pytest.raises(ValueError, match=r"4 sequences cannot be shared out evenly among \[3\] agents"):
        scaling.cases([2, 3], replace(TINY, starts=6))


def test_scaling_writes_its_results(tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    scaling.main(["--output", str(output)], sizes=TINY, agents=(2, 4), repeats=1)
    rows = by_case(written(output))
    costs = [rows[f"imagined step, {agents} agents"] for agents in (2, 4)]
    for row in costs:
        # 4 starts and 2 steps in all, whatever the number of agents.
        assert row["value"] == pytest.approx(1e6 * row["seconds"] / 8)
    values = [row["value"] for row in costs]
    assert rows["flatness: imagined step"]["value"] == pytest.approx(max(values) / min(values))
    assert rows["flatness: imagined step"]["target"] == 1.15
    assert rows["flatness: world-model update"]["target"] is None


# -- throughput ------------------------------------------------------------------------------------------------------


def fake_loop(version: Path, **_: Any) -> dict[str, Any]:
    """This version makes 30 updates while the baseline makes 12."""
    updates = 30 if version == throughput.ROOT else 12
    return {"updates": updates, "seconds": 10.0, "environment": 1.0, "collecting": 0.5, "replay": 0.25}


def test_throughput_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "run_preset_loop", fake_loop)
    monkeypatch.setattr(throughput, "check_out", lambda commit, folder: None)
    output = tmp_path / "throughput.json"
    throughput.main(["--output", str(output)], sizes=TINY, repeats=ONCE)
    result = written(output)
    rows = by_case(result)
    targets = {case: (row["target"], row["share"] is not None) for case, row in rows.items() if row["target"]}
    assert targets == {
        "imagination without teammates 4x2, context 2, float32": (0.70, True),
        "imagination without teammates 4x2, context 2, bfloat16 over float32": (1.6, False),
        "imagination with teammates, 4 agents x 4 x 2, float32": (0.65, True),
        "world-model update 4x4": (1.25, False),
        "world-model update 4x4, share of the matmul rate": (0.75, True),
        "actor-critic update 4 agents x 4 x 2": (0.70, True),
        "cpu preset on simple_tag, whole loop, over 3480e40": (2.0, False),
        "collector, policy and replay, share of training time": (10.0, False),
        "acting, last over first step of an episode, context 3": (1.15, False),
    }
    assert {"matmul 768x512x512, float32", "matmul 768x512x512, bfloat16"} < set(rows)
    steps = rows["imagination with teammates, 4 agents x 4 x 2, float32"]
    assert steps["value"] == pytest.approx(4 * 4 * 2 / steps["seconds"])
    assert rows["cpu preset on simple_tag, whole loop"]["value"] == 3.0
    assert rows["cpu preset on simple_tag, whole loop, over 3480e40"]["value"] == 2.5
    assert rows["collector, policy and replay, share of training time"]["value"] == 7.5


def test_without_a_baseline_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "run_preset_loop", fake_loop)
    monkeypatch.setattr(throughput, "check_out", lambda commit, folder: "no such commit")
    whole, beside, environment = throughput.preset_against_baseline(threads=1)
    assert whole.note == "no ratio to 3480e40: no such commit"
    assert (beside.value, environment.value) == (7.5, 10.0)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_checked_out(tmp_path: Path) -> None:
    repository, folder = tmp_path / "repository", tmp_path / "folder"
    for path in (repository, folder):
        path.mkdir()
    (repository / "file").write_text("old")
    for command in ("init -q", "add file", "-c user.name=n -c user.email=e commit -q -m m"):
        subprocess.run(["git", *command.split()], cwd=repository, check=True)
    (repository / "file").write_text("new")
    assert throughput.check_out("HEAD", folder, repository) is None
    assert (folder / "file").read_text() == "old"
    obstacle = throughput.check_out("0" * 40, folder, repository)
    assert obstacle is not None
    assert "0" * 40 in obstacle


def test_the_loop_of_the_preset_runs() -> None:
    small = ["init_random_steps=100", "num_envs=2", "world_model.hidden_size=16", "sequences=4", "starts_per_agent=2"]
    result = throughput.run_preset_loop(throughput.ROOT, seconds=0.2, threads=1, overrides=small)
    assert result["updates"] > 0
    assert result["updates"] % 4 == 0
    assert result["seconds"] >= 0.2
    assert 0 < result["environment"] + result["collecting"] + result["replay"] < result["seconds"]


def test_another_package_than_the_versions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"package": "/elsewhere"}'\n""")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=f"measured the package of /elsewhere instead of {tmp_path}"):
        throughput.run_preset_loop(tmp_path, seconds=0.1, threads=1)


def test_a_failing_loop_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho reason >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="reason"):
        throughput.run_preset_loop(tmp_path, seconds=0.1, threads=1)


def test_training_step_in_parts() -> None:
    rows = {row.case: row for row in throughput.training_step_rows(TINY, 3, "cpu", precision="float32")}
    name = "training step, 4 agents, precision float32"
    parts = ("world-model update", "imagination alone, eager", "agents' update with imagination")
    cases = [f"{name}: {part}{of}" for part in parts for of in ("", ", of the whole step")]
    assert list(rows) == [name, *cases]
    assert all(row.value > 0 for row in rows.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_missing_gpu_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--device", "cuda"])
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_throughput_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "throughput.json"
    throughput.main(["--device", "cuda", "--output", str(output)], sizes=TINY, repeats=ONCE)
    result = written(output)
    assert result["machine"]["gpu"]
    assert len(result["rows"]) == 2 * 7
