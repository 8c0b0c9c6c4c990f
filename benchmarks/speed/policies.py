"""Milliseconds per decision of a policy, as it is and exported, and the sizes of the exported files.

    python benchmarks/speed/policies.py [--output FILE] [--threads 1]

A decision is that of all agents of simple_tag, in 1 and in 32 environments: by the policy itself, on tensordicts; by
the program of torch.export; and by the ONNX file in onnxruntime. The networks are those of the preset ``vectors`` and
of the preset ``paper``, which reads four times as many steps of history. All take turns, so that drift of the machine
cancels. Speed does not depend on the weights, which are random. Counted is the time of the processor, of all threads
together, so that other processes do not count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch
from measure import pinned
from rows import Row, duration, parser, progress, report
from tensordict import TensorDict
from torch import Tensor

from matwm_rl.envs import make_env
from matwm_rl.files import import_optional
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor
from matwm_rl.presets import PRESETS
from matwm_rl.training import export_policy
from matwm_rl.training.export import example_inputs

ENV, NUM_ENVS = "mpe2/simple_tag_v3", (1, 32)
REPEATS = {"vectors": 50, "paper": 3}
"""Runs of every case, by preset."""
Decide = Callable[[], object]


def make_policy(preset: str) -> WorldModelPolicy:
    cfg = PRESETS[preset]()
    model = WorldModel.from_env(make_env(ENV), cfg.world_model)
    actor = make_actor(model, cfg.actor_critic)
    return WorldModelPolicy(model, actor, history_length=cfg.policy.history_length).eval()


def as_tensordict(inputs: Mapping[str, Tensor]) -> TensorDict:
    """Return inputs of an exported policy as the policy itself reads them."""
    parts: dict[str, dict[str, Tensor]] = {"agents": {}, "history": {}}
    for name, value in inputs.items():
        entry = name.removeprefix("history_")
        parts["agents" if entry == name else "history"][entry] = value
    return TensorDict(parts, batch_size=[len(inputs["alive"])])


def decisions(policy: WorldModelPolicy, folder: Path, num_envs: int, threads: int) -> dict[str, Decide]:
    """Return one decision by the policy and by each exported file of the folder, ready to be called."""
    ort = import_optional("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    inputs = example_inputs(policy, num_envs=num_envs)
    inputs["history_length"] += policy.history_length  # full, as it is in long episodes
    tensordict, arrays = as_tensordict(inputs), {name: value.numpy() for name, value in inputs.items()}
    program = torch.export.load(folder / "policy.pt2").module()
    session = ort.InferenceSession(folder / "policy.onnx", options)
    return {
        "policy": lambda: policy(tensordict.copy()),
        "torch.export": lambda: program(**inputs),
        "onnxruntime": lambda: session.run(None, arrays),
    }


def take_turns(cases: Mapping[str, Decide], repeats: int) -> dict[str, list[float]]:
    """Return the processor's seconds of every run of all cases, after one run of each that warms up."""
    for run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = process_time()
            run()
            seconds[name].append(process_time() - start)
    return seconds


def policy_rows(name: str, policy: WorldModelPolicy, folder: Path, *, threads: int, repeats: int) -> list[Row]:
    """Export a policy, and return the sizes of the files and the milliseconds of decisions."""
    rows = []
    for suffix in (".pt2", ".onnx"):
        path = folder / f"policy{suffix}"
        export_policy(policy, path)
        rows.append(Row(case=f"{name}: {suffix} file", value=path.stat().st_size / 1e6, unit="MB", better="lower"))
    for num_envs in NUM_ENVS:
        found = take_turns(decisions(policy, folder, num_envs, threads), repeats)
        rows += [
            Row(
                case=f"{name}: {way}, {num_envs} env{'s' if num_envs > 1 else ''}",
                value=1e3 * duration(seconds)["seconds"],
                unit="ms",
                better="lower",
                **duration(seconds),
            )
            for way, seconds in found.items()
        ]
    return rows


def main(arguments: Sequence[str] | None = None, *, repeats: Mapping[str, int] = REPEATS) -> None:
    """Measure, print, write."""
    options = parser(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    rows: list[Row] = []
    with pinned(options.threads), torch.no_grad():
        for preset, times in repeats.items():
            progress(f"preset {preset}")
            with tempfile.TemporaryDirectory() as folder:
                rows += policy_rows(
                    f"preset {preset}", make_policy(preset), Path(folder), threads=options.threads, repeats=times
                )
    settings: dict[str, Any] = {"env": ENV, "num_envs": list(NUM_ENVS), "repeats": dict(repeats)}
    settings["onnxruntime"] = import_optional("onnxruntime", extra="onnx").__version__
    report("policies", options.output, rows, settings=settings)


if __name__ == "__main__":
    main()
