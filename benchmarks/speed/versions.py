"""Two versions of this repository measured in turns, each by its own scripts.

No script of its own: throughput.py imports it. The APIs of two versions may differ, so no script of one version ever
imports the package of another: each version's loop and paper-scale parts run in a process of their own, with that
version's scripts, package and configuration. Versions up to 748431c have their scripts in ``benchmarks/``, later ones
in ``benchmarks/speed/``. What all versions agree on is the JSON that the scripts write.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rows import Row, duration, progress

ROOT = Path(__file__).resolve().parents[2]
NOT_SLOWER = 0.95
"""Target of the speed over the baseline's: a few per cent are noise."""
LOOP = "whole training loop on simple_tag"

# Up to 748431c, throughput.py had no choice of parts.
OLD_PAPER_PARTS = """
import sys
import throughput
throughput.preset_against_baseline = lambda threads: []
throughput.main(sys.argv[1:])
"""


# -- checkouts -------------------------------------------------------------------------------------------------------


def check_out(commit: str, folder: Path, repository: Path = ROOT) -> None:
    """Write the files of a commit into a folder.

    Raises:
        ValueError: if git is missing, or does not know the commit.
    """
    if shutil.which("git") is None:
        raise ValueError(f"cannot check out {commit}: git is not installed")
    command = ["git", "-C", str(repository), "archive", "--format=tar", commit]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        raise ValueError(f"cannot check out {commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


@contextmanager
def versions(baseline: str | None) -> Iterator[dict[str, Path]]:
    """Yield ``{"now": folder}``, and ``"baseline"`` if there is one.

    Args:
        baseline: folder of a checkout, or a commit of this repository, which is then checked out into a temporary
            folder; ``None``: no baseline.
    """
    if baseline is None:
        yield {"now": ROOT}
    elif Path(baseline).is_dir():
        yield {"now": ROOT, "baseline": Path(baseline).resolve()}
    else:
        with TemporaryDirectory() as folder:
            check_out(baseline, Path(folder))
            yield {"now": ROOT, "baseline": Path(folder).resolve()}


def script_of(version: Path, name: str) -> Path:
    """Return the path of a version's own benchmark script.

    Raises:
        ValueError: if the version has no such script.
    """
    places = [version / "benchmarks" / "speed" / name, version / "benchmarks" / name]
    for path in places:
        if path.is_file():
            return path
    raise ValueError(f"expected {name} in benchmarks/speed or benchmarks of {version}, found neither")


def is_old(script: Path) -> bool:
    """Whether the version of a script is 748431c or earlier."""
    return script.parent.name != "speed"


def run_script(version: Path, command: Sequence[str], *, threads: int) -> str:
    """Run Python with a version's package; return what it printed.

    Raises:
        RuntimeError: if it failed; contains its errors.
    """
    # The scripts' folder too, for the one that is given as text.
    path = os.pathsep.join(map(str, (version, script_of(version, "throughput.py").parent)))
    run = subprocess.run(
        [sys.executable, *command],
        cwd=version,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"a benchmark failed in {version}:\n{run.stderr}")
    return run.stdout


# -- the whole loop --------------------------------------------------------------------------------------------------


def run_preset_loop(version: Path, *, seconds: float, threads: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run a version's own preset_loop.py and return what it measured.

    Args:
        version: folder of a checkout.
        seconds: of the loop, after its warm-up.
        threads: number of threads.
        overrides: of that version's configuration.

    Raises:
        RuntimeError: if the loop failed, or ran with the package of another version.
    """
    script = script_of(version, "preset_loop.py")
    configuration = [str(version / "examples" / "conf")] if is_old(script) else []
    options = ["--seconds", str(seconds), "--threads", str(threads), *overrides]
    printed = run_script(version, [str(script), *configuration, *options], threads=threads)
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    if Path(result["package"]).resolve() != version.resolve():
        raise RuntimeError(f"measured the package of {result['package']} instead of {version}")
    return result


def loop_rows(loops: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> list[Row]:
    """Measure the updates per second of the loop, and the time that it spends outside updates.

    Args:
        loops: ``"now"``, and ``"baseline"`` if there is one; they take turns.
        rounds: runs of each.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, loop in loops.items():
            progress(f"{LOOP}, {name}, {number + 1} of {rounds}")
            results[name].append(loop())
    speed = {name: median(run["updates"] / run["seconds"] for run in runs) for name, runs in results.items()}
    now = results["now"]
    per_update = duration([run["seconds"] / run["updates"] for run in now])
    row = Row(case=LOOP, value=speed["now"], unit="updates/s", **per_update)
    rows = [row, *([over_baseline(row, speed["baseline"])] if "baseline" in speed else [])]
    outside = [100 * (run["collecting"] + run["replay"]) / run["seconds"] for run in now]
    environment = [100 * run["environment"] / run["seconds"] for run in now]
    return [
        *rows,
        Row(
            case="collector, policy and replay, share of training time",
            value=median(outside),
            unit="%",
            target=10.0,
            better="lower",
        ),
        Row(case="environment steps, share of training time", value=median(environment), unit="%", better="lower"),
    ]


# -- the parts at the paper's sizes ----------------------------------------------------------------------------------


def run_paper_parts(version: Path, *, threads: int) -> list[dict[str, Any]]:
    """Run the paper-scale parts of a version's own throughput.py; return its rows."""
    script = script_of(version, "throughput.py")
    with TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        options = ["--output", str(output), "--threads", str(threads)]
        command = ["-c", OLD_PAPER_PARTS] if is_old(script) else [str(script), "--parts", "paper"]
        run_script(version, [*command, *options], threads=threads)
        rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["rows"]
    return rows


def paper_rows(parts: Mapping[str, Callable[[], list[dict[str, Any]]]], rounds: int) -> list[Row]:
    """Measure the paper-scale parts of two versions in turns.

    Args:
        parts: ``"now"`` and ``"baseline"``, each returns the rows of one run.
        rounds: runs of each.

    Returns:
        of every case of this version the row of the run with the median value, and after it the speed over the
        baseline's, if both versions have the case and it is not a ratio itself.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in parts}
    for number in range(rounds):
        for name, run in parts.items():
            progress(f"parts at the paper's sizes, {name}, {number + 1} of {rounds}")
            for entry in run():
                found[name].setdefault(entry["case"], []).append(entry)
    rows = []
    for case, entries in found["now"].items():
        row = Row.from_dict(sorted(entries, key=lambda entry: entry["value"])[len(entries) // 2])
        rows.append(row)
        if (others := found["baseline"].get(case)) and row.unit != "ratio":
            rows.append(over_baseline(row, median(entry["value"] for entry in others)))
    return rows


def over_baseline(row: Row, baseline: float) -> Row:
    """Return the speed of a row over the baseline's: above 1 is faster, whatever the unit."""
    ratio = row.value / baseline if row.better == "higher" else baseline / row.value
    note = f"baseline: {baseline:.4g} {row.unit}"
    return Row(case=f"{row.case}, speed over the baseline", value=ratio, unit="ratio", target=NOT_SLOWER, note=note)
