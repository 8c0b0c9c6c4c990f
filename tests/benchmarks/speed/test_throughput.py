"""The throughput benchmark measures what it names; at sizes at which the figures mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import throughput
import torch
from rows import Row

from tests.benchmarks.speed.sizes import TINY, by_case, written

ONCE = throughput.Repeats(
    imagination=1, imagination_with_teammates=1, world_model=1, actor_critic=1, acting=1, training_step=1
)
LOOP = {"updates": 30, "seconds": 10.0, "environment": 1.0, "collecting": 0.5, "replay": 0.25}


def test_throughput_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "run_preset_loop", lambda version, **_: LOOP)
    output = tmp_path / "throughput.json"
    throughput.main(["--output", str(output)], sizes=TINY, repeats=ONCE)
    result = written(output)
    assert result["settings"]["baseline"] is None
    rows = by_case(result)
    targets = {case: (row["target"], row["share"] is not None) for case, row in rows.items() if row["target"]}
    assert targets == {
        "imagination without teammates 4x2, context 2, float32": (0.70, True),
        "imagination without teammates 4x2, context 2, bfloat16 over float32": (1.6, False),
        "imagination with teammates, 4 agents x 4 x 2, float32": (0.65, True),
        "world-model update 4x4": (1.25, False),
        "world-model update 4x4, share of the matmul rate": (0.75, True),
        "actor-critic update 4 agents x 4 x 2": (0.70, True),
        "collector, policy and replay, share of training time": (10.0, False),
        "acting, last over first step of an episode, context 3": (1.15, False),
    }
    assert {"matmul 768x512x512, float32", "matmul 768x512x512, bfloat16"} < set(rows)
    steps = rows["imagination with teammates, 4 agents x 4 x 2, float32"]
    assert steps["value"] == pytest.approx(4 * 4 * 2 / steps["seconds"])
    assert rows["whole training loop on simple_tag"]["value"] == 3.0


def test_a_baseline_takes_turns_in_the_parts_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loop(version: Path, **_: Any) -> dict[str, Any]:
        return LOOP | {"updates": 60 if version == tmp_path else 30}

    def parts(version: Path, *, threads: int) -> list[dict[str, Any]]:
        return [Row(case="update", value=4.0 if version == tmp_path else 1.0, unit="s", better="lower").as_dict()]

    monkeypatch.setattr(throughput, "run_preset_loop", loop)
    monkeypatch.setattr(throughput, "run_paper_parts", parts)

    def measured(*arguments: str) -> dict[str, float]:
        output = tmp_path / "throughput.json"
        throughput.main(["--output", str(output), "--baseline", str(tmp_path), *arguments])
        result = written(output)
        assert result["settings"]["baseline"] == str(tmp_path)
        return {case: row["value"] for case, row in by_case(result).items() if row["unit"] == "ratio"}

    of_loop = {"whole training loop on simple_tag, speed over the baseline": 0.5}
    of_paper = {"update, speed over the baseline": 4.0}
    assert measured() == of_paper | of_loop
    assert measured("--parts", "loop") == of_loop
    assert measured("--parts", "paper") == of_paper


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
