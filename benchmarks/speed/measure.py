"""Timing against the speed of matrix products: FLOP counts, the matmul rate of the machine, cases that take turns.

No script of its own: throughput.py and scaling.py import it. FLOPs are those that matrix products execute in one run of
a case, forward and backward; look-ups count as zero. The share of a case is its FLOP/s divided by the FLOP/s of one
large matrix product, measured in the same process just before and just after every run of the case.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from rows import Row, duration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from matwm_rl.training import prepare_process

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

    A sample is the median of ``products`` products that are timed one by one, so that an interruption by another
    process does not lower the ceiling. An interruption of the case itself still counts: shares err on the low side.

    Attributes:
        samples: every sample so far, by dtype.
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
        """Return a row with the median of all samples."""
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
    """Return the seconds of one call."""
    start = perf_counter()
    run()
    return perf_counter() - start


# -- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One piece of work to time.

    Attributes:
        run: the timed call; its argument is the result of ``prepare``.
        prepare: makes the input of a run; not timed.
        dtype: of the matrix product that the case is compared with.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Measurement:
    """Timings of one case.

    Attributes:
        flops: of a single run.
        seconds: of every run.
        rates: FLOP/s of the matrix product around every run.
    """

    flops: int
    seconds: Sequence[float]
    rates: Sequence[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def share(self) -> float:
        """Median over the runs of FLOP/s over the rate around the run: a slow moment of the machine slows both."""
        return median(self.flops / seconds / rate for seconds, rate in zip(self.seconds, self.rates, strict=True))

    @property
    def gflops(self) -> float:
        return self.flops / self.median / 1e9

    def fields(self) -> dict[str, Any]:
        """Return the fields of a row other than its value and its share."""
        return {"gflops": self.gflops, **duration(self.seconds)}


def measure(cases: Mapping[Any, Case], *, repeats: int, rate: MatmulRate) -> dict[Any, Measurement]:
    """Time all cases in turns, so that drift of the machine affects them equally.

    One run of each case before that warms up and counts the FLOPs.

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
    """Time a single case as :func:`measure` does."""
    return measure({"": case}, repeats=repeats, rate=rate)[""]


def count_flops(case: Case) -> int:
    """Return the FLOPs of one run."""
    prepared = case.prepare()
    with FlopCounter() as counter:
        case.run(prepared)
    return counter.total


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Use this many threads on as many cores, and restore both afterwards.

    Raises:
        ValueError: if this process may not use as many cores.
    """
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
