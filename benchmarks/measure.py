"""What the benchmarks share: the speed of matrix products, timing against it, rows with targets, and the workloads.

No script of its own: throughput.py, scaling.py and memory.py import it. FLOPs are those that matrix products execute in
one run of a case, forward and backward; look-ups count nothing. The share of a case is its FLOP/s over the FLOP/s of
one large matrix product, measured in the same process just before and just after every run of the case.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from json import dumps
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchrl import torchrl_logger

from matwm_rl.data import Replay, make_replay
from matwm_rl.modules import WorldModel, WorldModelConfig, make_actor, make_critic
from matwm_rl.training import Learner, LearnerConfig, prepare_process
from matwm_rl.training.files import write_text

# Its notes on every storage that it makes would stand between the lines of progress.
torchrl_logger.setLevel("WARNING")

# -- matrix products -------------------------------------------------------------------------------------------------

aten = torch.ops.aten
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # PyTorch lists neither attention on CPU nor products in place.
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
}


class FlopCounter(TorchDispatchMode):
    """Counts in ``total`` the floating-point operations of all matrix products executed under it.

    PyTorch's FlopCounterMode also groups by module, and for that asks parameters for their truth value, which
    TensorDictParams does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            # In inference mode products arrive inside composite operations, such as `linear`.
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if (formula := FLOP_FORMULAS.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class MatmulRate:
    """FLOP/s of [768, 512] x [512, 512], the ceiling of this machine at this moment.

    A sample is the median of ``products`` products timed one by one, so that an interruption by another process, which
    cannot be kept from the case beside it, does not lower the ceiling: shares come out too low rather than too high.

    Attributes:
        samples: every sample so far, by type.
    """

    ROWS, INNER, COLUMNS = 768, 512, 512

    def __init__(self, products: int = 20) -> None:
        self.products = products
        self.flops = 2 * self.ROWS * self.INNER * self.COLUMNS
        self.samples: dict[torch.dtype, list[float]] = defaultdict(list)

    def sample(self, dtype: torch.dtype) -> float:
        left = torch.randn(self.ROWS, self.INNER).to(dtype)
        right = torch.randn(self.INNER, self.COLUMNS).to(dtype)
        product = left @ right
        seconds = [timed(lambda: torch.mm(left, right, out=product)) for _ in range(self.products)]
        self.samples[dtype].append(self.flops / median(seconds))
        return self.samples[dtype][-1]

    def row(self, dtype: torch.dtype) -> Row:
        """The median of all samples."""
        rates = self.samples[dtype]
        seconds = [self.flops / rate for rate in rates]
        return Row(
            case=f"matmul {self.ROWS}x{self.INNER}x{self.COLUMNS}, {str(dtype).removeprefix('torch.')}",
            value=median(rates) / 1e9,
            unit="GFLOP/s",
            gflops=median(rates) / 1e9,
            **duration(seconds),
        )


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = perf_counter()
    run()
    return perf_counter() - start


# -- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        run: what is timed; gets what ``prepare`` gave.
        prepare: what is not timed.
        dtype: type of the matrix product that it is compared with.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Measurement:
    """One case: the FLOPs of a run, the seconds of every run, the matmul rate around every run."""

    flops: int
    seconds: Sequence[float]
    rates: Sequence[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def share(self) -> float:
        """Median over the runs, each against the rate around it: what slows the machine slows both."""
        return median(self.flops / seconds / rate for seconds, rate in zip(self.seconds, self.rates, strict=True))

    @property
    def gflops(self) -> float:
        return self.flops / self.median / 1e9

    def fields(self) -> dict[str, Any]:
        """What a row says of it besides its value and its share."""
        return {"gflops": self.gflops, **duration(self.seconds)}


def duration(seconds: Sequence[float]) -> dict[str, Any]:
    """How a row states several runs."""
    return {"seconds": median(seconds), "spread": (min(seconds), max(seconds)), "repeats": len(seconds)}


def measure(cases: Mapping[Any, Case], *, repeats: int, rate: MatmulRate) -> dict[Any, Measurement]:
    """Time all cases in turns, so that drift of the machine meets them alike; one run before that warms up and counts.

    Args:
        cases: by name.
        repeats: timed runs of each case.
        rate: sampled before and after every run.
    """
    flops = {name: count_flops(case) for name, case in cases.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in cases}
    rates: dict[Any, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            prepared = case.prepare()
            before = rate.sample(case.dtype)
            seconds[name].append(timed(partial(case.run, prepared)))
            rates[name].append(mean([before, rate.sample(case.dtype)]))
    return {name: Measurement(flops[name], seconds[name], rates[name]) for name in cases}


def measure_one(case: Case, *, repeats: int, rate: MatmulRate) -> Measurement:
    """Time a single case, see :func:`measure`."""
    return measure({"": case}, repeats=repeats, rate=rate)[""]


def count_flops(case: Case) -> int:
    """FLOPs of one run."""
    prepared = case.prepare()
    with FlopCounter() as counter:
        case.run(prepared)
    return counter.total


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Compute with so many threads on so many of the cores that this process may use; afterwards as before."""
    threads_before = torch.get_num_threads()
    can_pin = hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if can_pin else set(range(os.cpu_count() or 1))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"got {threads} threads; expected 1 to {len(cores)}, the cores that this process may use")
    prepare_process(num_threads=threads)
    if can_pin:
        os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if can_pin:
            os.sched_setaffinity(0, cores)


# -- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result.

    Attributes:
        case: what was measured.
        value: the result, in ``unit``.
        unit: of the value.
        share: FLOP/s over those of the matrix product, where that says something.
        target: bound of the share where there is one, else of the value.
        better: which values are better, ``"higher"`` or ``"lower"``.
        gflops: 10^9 FLOP/s.
        seconds: median of all runs.
        spread: fewest and most seconds.
        repeats: number of runs.
        note: what else a reader has to know.
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

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def table(rows: Sequence[Row]) -> str:
    """All rows, to be read."""
    header = ("case", "value", "unit", "share", "target", "met", "seconds (fewest to most)")
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
    """What the results were measured on."""
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
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; by default in benchmarks/results")
    parser.add_argument("--threads", type=int, default=1, help="threads, each on a core of its own")
    return parser


def progress(text: str) -> None:
    """Say what is being measured, beside the results."""
    print(text, file=sys.stderr, flush=True)


def report(
    name: str, output: Path | None, rows: Sequence[Row], *, settings: Mapping[str, Any], device: str = "cpu"
) -> None:
    """Print the rows and write them with their circumstances.

    Args:
        name: of the file in benchmarks/results, where there is no ``output``.
        output: file to write.
        rows: the results.
        settings: what was measured.
        device: what it was measured on.
    """
    print(table(rows))
    for row in rows:
        if row.note:
            print(f"{row.case}: {row.note}")
    result = {"machine": machine(device), "settings": dict(settings), "rows": [row.as_dict() for row in rows]}
    output = output or Path(__file__).parent / "results" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, dumps(result, indent=2) + "\n")


# -- workloads -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the workloads; by default the paper's (Table C.6), with simple_tag's observations and actions.

    Attributes:
        observation_size: entries of an agent's observation.
        num_actions: actions of an agent.
        starts: starts of imagination.
        context: steps of context before a start.
        horizon: imagined steps.
        sequences: sequences of a world-model batch, all agents together.
        sequence_length: steps of a sequence.
        episode_length: steps of an episode.
        policy_context: steps of history that the acting policy sees.
        num_cells: width of actors and critics.
        model: entries of WorldModelConfig that are not the paper's.
    """

    observation_size: int = 18
    num_actions: int = 5
    starts: int = 768
    context: int = 8
    horizon: int = 12
    sequences: int = 16
    sequence_length: int = 64
    episode_length: int = 25
    policy_context: int = 64
    num_cells: int = 512
    model: Mapping[str, Any] = field(default_factory=dict)


def model_config(sizes: Sizes) -> WorldModelConfig:
    """The paper's model: all its layers are shared by all agents."""
    return WorldModelConfig(**sizes.model)


def make_learner(num_agents: int, sizes: Sizes, *, device: str = "cpu", **config: Any) -> Learner:
    """Freshly initialised models of ``num_agents`` agents and their optimizers.

    Args:
        num_agents: N.
        sizes: of models and horizon.
        device: where the models are.
        **config: entries of LearnerConfig.
    """
    world_model = WorldModel.from_layout(
        observation_shape=[sizes.observation_size],
        action_counts=[sizes.num_actions] * num_agents,
        group_index=[0] * num_agents,
        config=model_config(sizes),
    ).to(device)
    actor = make_actor(world_model, num_cells=sizes.num_cells).to(device)
    critic = make_critic(world_model, num_cells=sizes.num_cells).to(device)
    # As an update of the world model leaves it: imagination uses no dropout.
    world_model.eval()
    return Learner(world_model, actor, critic, LearnerConfig(horizon=sizes.horizon, **config))


def random_replay(
    num_agents: int, sizes: Sizes, *, sequences_per_agent: int, starts_per_agent: int, device: str = "cpu"
) -> Replay:
    """Replay of random episodes, from which batches come as in training."""
    steps = max(20 * sizes.episode_length, 2 * sequences_per_agent * sizes.sequence_length, sizes.context + 1)
    replay = make_replay(
        num_agents=num_agents,
        sequences_per_agent=sequences_per_agent,
        starts_per_agent=starts_per_agent,
        capacity=steps,
        sequence_length=sizes.sequence_length,
        context_length=sizes.context,
        device=device,
        seed=0,
    )
    replay.extend(random_rollout(steps, num_agents, sizes))
    return replay


def random_rollout(steps: int, num_agents: int, sizes: Sizes) -> TensorDict:
    """What a collector gives, ``[steps]``: random numbers in episodes that end by a time limit."""
    observation = torch.randn(steps + 1, num_agents, sizes.observation_size)
    alive = torch.ones(steps, num_agents, dtype=torch.bool)
    done = (torch.arange(1, steps + 1) % sizes.episode_length == 0).unsqueeze(-1)
    agents = {
        "observation": observation[:-1],
        "action": torch.randint(sizes.num_actions, (steps, num_agents)),
        "action_mask": torch.ones(steps, num_agents, sizes.num_actions, dtype=torch.bool),
        "alive": alive,
    }
    following = {
        "agents": {"observation": observation[1:], "reward": torch.randn(steps, num_agents, 1), "alive": alive},
        "done": done,
        "terminated": torch.zeros_like(done),
    }
    return TensorDict({"agents": agents, "next": following}, batch_size=[steps])
