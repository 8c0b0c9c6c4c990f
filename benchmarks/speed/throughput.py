"""How fast the parts of training are, and how near to the speed of matrix products on the same machine.

    python benchmarks/speed/throughput.py [--output FILE] [--threads 1]      # 5 minutes
    python benchmarks/speed/throughput.py --baseline COMMIT_OR_CHECKOUT      # 20 minutes
    python benchmarks/speed/throughput.py --device cuda                      # the paper's training step on a GPU

``--parts paper`` are the parts of training at the paper's sizes (Table C.6); ``--parts loop`` is the whole training
loop of a small preset on simple_tag, which needs the extras mpe and train. By default both are measured.

With a baseline, both versions are measured in turns. Their APIs may differ, so each runs its own scripts in processes
of their own: ``throughput.py --parts paper`` and ``preset_loop.py`` of its own checkout, in ``benchmarks/speed/`` or,
up to commit 748431c, in ``benchmarks/`` (then with that version's command lines). The oldest possible baseline is
748431c.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from measure import Case, MatmulRate, measure, measure_one, pinned
from rows import Row, duration, parser, progress, report
from tensordict import TensorDictBase
from torchrl.envs import TransformedEnv
from versions import loop_rows, paper_rows, run_paper_parts, run_preset_loop, versions
from workloads import Sizes, make_learner, model_config, random_replay

from matwm_rl.envs import make_env
from matwm_rl.modules import ActorCriticConfig, Imagination, WorldModel, WorldModelPolicy, make_actor
from matwm_rl.settings import to_plain
from matwm_rl.training import Learner

AGENTS = 4
PARTS = ("paper", "loop")
ROUNDS, LOOP_SECONDS = 3, 15.0
"""Runs of each version, and seconds of each run of the loop."""


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Timed runs of each case; long cases have few."""

    imagination: int = 5
    imagination_with_teammates: int = 3
    world_model: int = 8
    actor_critic: int = 4
    acting: int = 20
    training_step: int = 5


# -- the parts of training at the paper's sizes ----------------------------------------------------------------------


def imagination_alone_rows(sizes: Sizes, repeats: int, rate: MatmulRate) -> list[Row]:
    """Measure a single agent, which has no teammates, with float32 and bfloat16 in turns."""
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
    """Measure the three parts of a training step of four agents."""
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
    imagined = learner.imagination(starts)
    # What is left of the agents' update is that of actors and critics.
    learner.imagination = torch.nn.Identity()  # type: ignore[assignment]
    case = Case(learner.update_agents, prepare=imagined.copy)
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
    """Return the learner, the sequences and the starts of one training step of four agents."""
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
    """Compare the policy with a full history to the policy at the first step of an episode."""
    env = make_env("mock", seed=0, episode_length=sizes.policy_context + 1, death_step=None)
    world_model = WorldModel.from_env(env, model_config(sizes)).eval()
    actor = make_actor(world_model, ActorCriticConfig(num_cells=sizes.num_cells))
    policy = WorldModelPolicy(world_model, actor, history_length=sizes.policy_context)
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


# -- GPU -------------------------------------------------------------------------------------------------------------


def training_step_rows(sizes: Sizes, repeats: int, device: str, **config: Any) -> list[Row]:
    """Measure the whole training step of four agents, and its parts with the device idle between them.

    Args:
        sizes: of models and batches.
        repeats: timed steps.
        device: ``"cuda"``; ``"cpu"`` to test this function.
        **config: fields of LearnerConfig.
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
    # Apart from the parts, so that whole steps follow each other as they do in training.
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


def own_paper_rows(sizes: Sizes, repeats: Repeats) -> list[Row]:
    """Measure the parts of this version at the paper's sizes."""
    rate = MatmulRate()
    progress("imagination without teammates")
    rows = imagination_alone_rows(sizes, repeats.imagination, rate)
    rows += training_rows(sizes, repeats, rate)
    progress("acting")
    rows.append(acting_row(sizes, repeats.acting, rate))
    return [rate.row(torch.float32), rate.row(torch.bfloat16), *rows]


def cpu_rows(
    sizes: Sizes, repeats: Repeats, *, threads: int, parts: Sequence[str], folders: Mapping[str, Path]
) -> list[Row]:
    """Measure on the CPU.

    Args:
        sizes: of the parts, without a baseline; with one, each version measures its own default sizes.
        repeats: of the parts, without a baseline.
        threads: number of threads.
        parts: of :data:`PARTS`.
        folders: ``"now"``, and ``"baseline"`` if there is one.
    """
    loop: list[Row] = []
    if "loop" in parts:  # first, so that a missing package shows at once
        run = partial(run_preset_loop, seconds=LOOP_SECONDS, threads=threads)
        loop = loop_rows({name: partial(run, folder) for name, folder in folders.items()}, ROUNDS)
    if "paper" not in parts:
        return loop
    if "baseline" not in folders:
        return [*own_paper_rows(sizes, repeats), *loop]
    turns = {name: partial(run_paper_parts, folder, threads=threads) for name, folder in folders.items()}
    return [*paper_rows(turns, ROUNDS), *loop]


def cuda_rows(sizes: Sizes, repeats: Repeats) -> list[Row]:
    """Measure the training step in both precisions, eager and as CUDA graphs."""
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
    command.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="on the CPU; default: both")
    command.add_argument("--baseline", help="commit, or folder of a checkout, that takes turns with this version")
    options = command.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        command.error("--device cuda needs a GPU that PyTorch can use; found none")
    if on_gpu and options.baseline is not None:
        command.error("--baseline is measured on the CPU only")
    sizes, repeats = sizes or Sizes(), repeats or Repeats()
    torch.manual_seed(0)
    with pinned(options.threads), versions(options.baseline) as folders:
        on_cpu = partial(cpu_rows, threads=options.threads, parts=options.parts, folders=folders)
        rows = cuda_rows(sizes, repeats) if on_gpu else on_cpu(sizes, repeats)
        settings = {
            "agents": AGENTS,
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            "baseline": options.baseline,
            "sizes": asdict(sizes),
            "world_model": to_plain(model_config(sizes)),
        }
        name = "throughput_cuda" if on_gpu else "throughput"
        report(name, options.output, rows, settings=settings, device=options.device)


def with_huge_pages() -> None:
    """Restart this script with PyTorch's huge pages, a variable that PyTorch reads when it is imported.

    The actor-critic update takes dozens of tensors of 75 MB; in small pages, clearing them takes a tenth of its time.
    """
    if "THP_MEM_ALLOC_ENABLE" not in os.environ:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    with_huge_pages()
    main()
