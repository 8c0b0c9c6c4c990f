"""Sizes at which the speed benchmarks run in tests, and a look at the files that they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from workloads import Sizes

from matwm_rl.modules import CategoricalLatentConfig

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
    model={
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "latent": CategoricalLatentConfig(num_dims=4, num_classes=4),
    },
)


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
