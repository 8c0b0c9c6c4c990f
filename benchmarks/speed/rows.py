"""Result rows of the speed benchmarks: values with targets, the printed table, the JSON file, the common command line.

No script of its own: throughput.py, scaling.py and memory.py import it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from json import dumps
from pathlib import Path
from statistics import median
from typing import Any

import torch

from matwm_rl.files import write_text

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Where results are written if no other file is named."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result with its target.

    Attributes:
        case: what was measured.
        value: the result, in ``unit``.
        unit: of the value.
        share: FLOP/s over those of the matrix product; ``None`` where that means nothing.
        target: bound of the share if the row has one, else of the value.
        better: which values are better, ``"higher"`` or ``"lower"``.
        gflops: 10^9 FLOP/s.
        seconds: median over the runs.
        spread: shortest and longest run, in seconds.
        repeats: number of runs.
        note: printed below the table.
    """

    case: str
    value: float
    unit: str
    share: float | None = None
    target: float | None = None
    better: str = "higher"
    gflops: float | None = None
    seconds: float | None = None
    spread: tuple[float, float] | None = None
    repeats: int | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better must be 'higher' or 'lower', got {self.better!r}")
        if self.share is not None and self.target is not None and self.better == "lower":
            raise ValueError(f"{self.case}: the target of a row with a share is on the share; higher is better there")

    @property
    def met(self) -> bool:
        """Whether the target is met; true without one."""
        if self.target is None:
            return True
        reached = self.value if self.share is None else self.share
        return reached <= self.target if self.better == "lower" else reached >= self.target

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Row:
        """Return the row that :meth:`as_dict` gave, also after JSON."""
        spread = entries["spread"]
        known = {name: value for name, value in entries.items() if name != "met"}
        return cls(**{**known, "spread": None if spread is None else tuple(spread)})

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def duration(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the fields of a row that sum up several runs."""
    return {"seconds": median(seconds), "spread": (min(seconds), max(seconds)), "repeats": len(seconds)}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a text table."""
    header = ("case", "value", "unit", "share", "target", "met", "seconds (min to max)")
    cells = [header]
    for row in rows:
        share = "" if row.share is None else f"{row.share:.3f}"
        bound = "<=" if row.better == "lower" else ">="
        target = "" if row.target is None else f"{'share ' if share else ''}{bound} {row.target:g}"
        met = "" if row.target is None else "yes" if row.met else "NO"
        spread = "" if row.spread is None else f"{row.seconds:.4g} ({row.spread[0]:.4g} to {row.spread[1]:.4g})"
        value = f"{row.value:,}" if isinstance(row.value, int) else f"{row.value:,.4g}"
        cells.append((row.case, value, row.unit, share, target, met, spread))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def machine(device: str) -> dict[str, Any]:
    """Return the hardware and the versions that the results depend on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        **{package: version(package) for package in ("torch", "torchrl", "tensordict")},
        "platform": platform.platform(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cpu_model() -> str:
    """Return the processor's name if the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line that the speed benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; by default in benchmarks/results")
    parser.add_argument("--threads", type=int, default=1, help="number of threads, each pinned to its own core")
    return parser


def progress(text: str) -> None:
    """Print on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)


def report(
    name: str, output: Path | None, rows: Sequence[Row], *, settings: Mapping[str, Any], device: str = "cpu"
) -> None:
    """Print the rows, and write them with the machine and the settings.

    Args:
        name: of the file in benchmarks/results that is written if ``output`` is ``None``.
        output: file to write.
        rows: the results.
        settings: of the measurement.
        device: that was measured.
    """
    print(table(rows))
    for row in rows:
        if row.note:
            print(f"{row.case}: {row.note}")
    result = {"machine": machine(device), "settings": dict(settings), "rows": [row.as_dict() for row in rows]}
    output = output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, dumps(result, indent=2) + "\n")
