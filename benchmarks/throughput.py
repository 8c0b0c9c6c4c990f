"""How fast the parts of training are, and how near to the speed of matrix products on the same machine.

    python benchmarks/throughput.py [--output FILE] [--threads 1]    # 5 to 10 minutes
    python benchmarks/throughput.py --device cuda                    # the paper's training step on a GPU

Sizes are the paper's (Table C.6). The last rows run the `cpu` preset on simple_tag, in turns with the version of this
repository from before it was optimised; they need git and the extras mpe and train, and without git or that version the
ratio is left out.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from measure import (
    Case,
    MatmulRate,
    Row,
    Sizes,
    duration,
    make_learner,
    measure,
    measure_one,
    model_config,
    parser,
    pinned,
    progress,
    random_replay,
    report,
)
from tensordict import TensorDictBase
from torchrl.envs import TransformedEnv

from matwm_rl.envs import make_env
from matwm_rl.modules import Imagination, WorldModel, WorldModelPolicy, make_actor
from matwm_rl.training import Learner

ROOT = Path(__file__).resolve().parents[1]
AGENTS = 4
BASELINE = "3480e40"
ROUNDS, LOOP_SECONDS = 3, 15.0


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Timed runs of each case: the longer one takes, the fewer."""

    imagination: int = 5
    imagination_with_teammates: int = 3
    world_model: int = 8
    actor_critic: int = 4
    acting: int = 20
    training_step: int = 5


# -- the parts of training at the paper's sizes ----------------------------------------------------------------------


def imagination_alone_rows(sizes: Sizes, repeats: int, rate: MatmulRate) -> list[Row]:
    """One agent, hence no teammates: float32 and bfloat16 in turns."""
    learner = make_learner(1, sizes)
    starts = random_replay(1, sizes, sequences_per_agent=1, starts_per_agent=sizes.starts).starts.sample()
    half = Imagination(learner.world_model, learner.actor, horizon=sizes.horizon, precision="bfloat16")
    cases = {
        "float32": Case(learner.imagination, prepare=starts.copy),
        "bfloat16": Case(half, prepare=starts.copy, dtype=torch.bfloat16),
    }
    measured = measure(cases, repeats=repeats, rate=rate)
    name = f"imagination without teammates {sizes.starts}x{sizes.horizon}, context {sizes.context}"
    rows = [
        Row(
            case=f"{name}, {precision}",
            value=sizes.starts * sizes.horizon / measurement.median,
            unit="imagined steps/s",
            share=measurement.share,
            target=0.70 if precision == "float32" else None,
            **measurement.fields(),
        )
        for precision, measurement in measured.items()
    ]
    speedup = measured["float32"].median / measured["bfloat16"].median
    return [*rows, Row(case=f"{name}, bfloat16 over float32", value=speedup, unit="ratio", target=1.6)]


def training_rows(sizes: Sizes, repeats: Repeats, rate: MatmulRate) -> list[Row]:
    """The three parts of a training step of four agents."""
    learner, sequences, starts = training_step(sizes)
    agents = f"{AGENTS} agents x {sizes.starts} x {sizes.horizon}"
    steps = AGENTS * sizes.starts * sizes.horizon

    progress("imagination with teammates")
    case = Case(learner.imagination, prepare=starts.copy)
    imagination = measure_one(case, repeats=repeats.imagination_with_teammates, rate=rate)
    progress("world-model update")
    case = Case(learner.update_world_model, prepare=sequences.copy)
    update = measure_one(case, repeats=repeats.world_model, rate=rate)
    progress("actor-critic update")
    case = Case(learner.update_actor_critic, prepare=learner.imagination(starts).copy)
    actor_critic = measure_one(case, repeats=repeats.actor_critic, rate=rate)

    update_name = f"world-model update {sizes.sequences}x{sizes.sequence_length}"
    return [
        Row(
            case=f"imagination with teammates, {agents}, float32",
            value=steps / imagination.median,
            unit="imagined steps/s",
            share=imagination.share,
            target=0.65,
            **imagination.fields(),
        ),
        Row(
            case=update_name,
            value=update.median,
            unit="s",
            target=1.25,
            better="lower",
            **update.fields(),
        ),
        Row(
            case=f"{update_name}, share of the matmul rate",
            value=update.gflops,
            unit="GFLOP/s",
            share=update.share,
            target=0.75,
            **update.fields(),
        ),
        Row(
            case=f"actor-critic update {agents}",
            value=steps / actor_critic.median,
            unit="imagined steps/s",
            share=actor_critic.share,
            target=0.70,
            **actor_critic.fields(),
        ),
    ]


def training_step(
    sizes: Sizes, *, device: str = "cpu", **config: Any
) -> tuple[Learner, TensorDictBase, TensorDictBase]:
    """Learner, sequences and starts of one training step of four agents."""
    learner = make_learner(AGENTS, sizes, device=device, **config)
    replay = random_replay(
        AGENTS,
        sizes,
        sequences_per_agent=max(1, sizes.sequences // AGENTS),
        starts_per_agent=sizes.starts,
        device=device,
    )
    return learner, replay.sequences.sample(), replay.starts.sample()


def acting_row(sizes: Sizes, repeats: int, rate: MatmulRate) -> Row:
    """The policy at the first step of an episode, and with a full context."""
    env = make_env("mock", seed=0, episode_length=sizes.policy_context + 1, death_step=None)
    world_model = WorldModel.from_env(env, **asdict(model_config(sizes))).eval()
    actor = make_actor(world_model, num_cells=sizes.num_cells)
    policy = WorldModelPolicy(world_model, actor, context_length=sizes.policy_context)
    env = TransformedEnv(env, policy.make_tensordict_primer())
    first = env.reset()
    last = first.clone()
    for _ in range(sizes.policy_context):
        _, last = env.step_and_maybe_reset(policy(last))
    cases = {"first": Case(policy, prepare=first.clone), "last": Case(policy, prepare=last.clone)}
    measured = measure(cases, repeats=repeats, rate=rate)
    return Row(
        case=f"acting, last over first step of an episode, context {sizes.policy_context}",
        value=measured["last"].median / measured["first"].median,
        unit="ratio",
        target=1.15,
        better="lower",
        **measured["last"].fields(),
        note=f"the first step takes {measured['first'].median:.4g} s",
    )


# -- the whole loop of the `cpu` preset ------------------------------------------------------------------------------


def check_out(commit: str, folder: Path, repository: Path = ROOT) -> str | None:
    """Write the files of a commit into a folder; returns what is in the way, if anything."""
    if shutil.which("git") is None:
        return "git is not installed"
    command = ["git", "-C", str(repository), "archive", "--format=tar", commit]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        return archive.stderr.decode().strip()
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return None


def run_preset_loop(version: Path, *, seconds: float, threads: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What preset_loop.py measures, with the package and the configuration of a version, in a process of its own."""
    script = Path(__file__).with_name("preset_loop.py")
    options = ["--seconds", str(seconds), "--threads", str(threads), *overrides]
    run = subprocess.run(
        [sys.executable, str(script), str(version / "examples" / "conf"), *options],
        env={**os.environ, "PYTHONPATH": str(version), "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"the loop of the `cpu` preset failed in {version}:\n{run.stderr}")
    result = json.loads(run.stdout.splitlines()[-1])
    if Path(result["package"]).resolve() != version.resolve():
        raise RuntimeError(f"measured the package of {result['package']} instead of {version}")
    return result


def preset_rows(loops: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> list[Row]:
    """Updates per second of the loop, and what it spends beside updates.

    Args:
        loops: ``"now"``, and ``"baseline"`` where there is one; they take turns.
        rounds: runs of each.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, loop in loops.items():
            progress(f"cpu preset, {name}, {number + 1} of {rounds}")
            results[name].append(loop())
    speed = {name: median(run["updates"] / run["seconds"] for run in runs) for name, runs in results.items()}
    now = results["now"]
    name = "cpu preset on simple_tag, whole loop"
    per_update = duration([run["seconds"] / run["updates"] for run in now])
    rows = [Row(case=name, value=speed["now"], unit="updates/s", **per_update)]
    if "baseline" in speed:
        ratio = speed["now"] / speed["baseline"]
        note = f"baseline: {speed['baseline']:.4g} updates/s"
        rows.append(Row(case=f"{name}, over {BASELINE}", value=ratio, unit="ratio", target=2.0, note=note))
    beside = [100 * (run["collecting"] + run["replay"]) / run["seconds"] for run in now]
    environment = [100 * run["environment"] / run["seconds"] for run in now]
    return [
        *rows,
        Row(
            case="collector, policy and replay, share of training time",
            value=median(beside),
            unit="%",
            target=10.0,
            better="lower",
        ),
        Row(case="environment steps, share of training time", value=median(environment), unit="%", better="lower"),
    ]


def preset_against_baseline(threads: int) -> list[Row]:
    """The loop of this version and of the baseline; the first row notes why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        obstacle = check_out(BASELINE, Path(folder))
        versions = {"now": ROOT} if obstacle else {"now": ROOT, "baseline": Path(folder)}
        loops = {
            name: lambda version=version: run_preset_loop(version, seconds=LOOP_SECONDS, threads=threads)
            for name, version in versions.items()
        }
        rows = preset_rows(loops, ROUNDS)
    if obstacle:
        rows[0] = replace(rows[0], note=f"no ratio to {BASELINE}: {obstacle}")
    return rows


# -- GPU -------------------------------------------------------------------------------------------------------------


def training_step_rows(sizes: Sizes, repeats: int, device: str, **config: Any) -> list[Row]:
    """The whole training step of four agents, and its parts with the device idle in between.

    Args:
        sizes: of everything.
        repeats: timed steps.
        device: ``"cuda"``; ``"cpu"`` to test this function.
        **config: entries of LearnerConfig.
    """
    learner, sequences, starts = training_step(sizes, device=device, **config)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def clock() -> float:
        synchronize()
        return perf_counter()

    def in_parts() -> list[float]:
        times = [clock()]
        learner.update_world_model(sequences)
        times.append(clock())
        learner.imagination(starts)
        times.append(clock())
        learner.update_agents(starts)
        times.append(clock())
        return times

    def in_one() -> float:
        start = clock()
        learner.update_world_model(sequences)
        learner.update_agents(starts)
        return clock() - start

    for _ in range(3):
        in_one()
    # Before the parts take their turns: whole steps follow each other as they do in training.
    whole = [in_one() for _ in range(repeats)]
    marks = [in_parts() for _ in range(repeats)]
    form = ", ".join(f"{name} {value}" for name, value in config.items())
    name = f"training step, {AGENTS} agents, {form}"
    rows = [Row(case=name, value=median(whole), unit="s", target=0.025, better="lower", **duration(whole))]
    for index, part in enumerate(("world-model update", "imagination alone, eager", "agents' update with imagination")):
        seconds = [run[index + 1] - run[index] for run in marks]
        share = 100 * median(seconds) / median(whole)
        rows += [
            Row(case=f"{name}: {part}", value=median(seconds), unit="s", better="lower", **duration(seconds)),
            Row(case=f"{name}: {part}, of the whole step", value=share, unit="%", better="lower"),
        ]
    return rows


# -- all -------------------------------------------------------------------------------------------------------------


def cpu_rows(sizes: Sizes, repeats: Repeats, threads: int) -> list[Row]:
    """Everything that is measured on the CPU."""
    # First, so that a missing package shows at once.
    loop = preset_against_baseline(threads)
    rate = MatmulRate()
    progress("imagination without teammates")
    rows = imagination_alone_rows(sizes, repeats.imagination, rate)
    rows += training_rows(sizes, repeats, rate)
    progress("acting")
    acting = acting_row(sizes, repeats.acting, rate)
    return [rate.row(torch.float32), rate.row(torch.bfloat16), *rows, *loop, acting]


def cuda_rows(sizes: Sizes, repeats: Repeats) -> list[Row]:
    """The training step in both precisions, eager and as CUDA graphs."""
    return [
        row
        for precision in ("float32", "bfloat16")
        for graphs in (False, True)
        for row in training_step_rows(sizes, repeats.training_step, "cuda", precision=precision, cuda_graphs=graphs)
    ]


def main(arguments: Sequence[str] | None = None, *, sizes: Sizes | None = None, repeats: Repeats | None = None) -> None:
    """Measure, print, write."""
    command = parser(__doc__)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs a GPU")
    options = command.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        command.error("--device cuda needs a GPU that PyTorch can use; found none")
    sizes, repeats = sizes or Sizes(), repeats or Repeats()
    torch.manual_seed(0)
    with pinned(options.threads):
        rows = cuda_rows(sizes, repeats) if on_gpu else cpu_rows(sizes, repeats, options.threads)
        settings = {
            "agents": AGENTS,
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            "baseline": BASELINE,
            "sizes": asdict(sizes),
            "world_model": asdict(model_config(sizes)),
        }
        name = "throughput_cuda" if on_gpu else "throughput"
        report(name, options.output, rows, settings=settings, device=options.device)


def with_huge_pages() -> None:
    """Start this script again with PyTorch's huge pages, which it reads before anything of ours can tell it.

    The actor-critic update takes dozens of tensors of 75 MB; in small pages, clearing them is a tenth of its time.
    """
    if "THP_MEM_ALLOC_ENABLE" not in os.environ:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    with_huge_pages()
    main()
