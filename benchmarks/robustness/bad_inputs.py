"""Thousands of generated wrong inputs: each must be refused at once, by an error of ours that names what was wrong.

    python benchmarks/robustness/bad_inputs.py                # 10,000 inputs, in minutes
    python benchmarks/robustness/bad_inputs.py --inputs 500

Hypothesis draws a target (an entry of a configuration, an argument of a constructor, an entry of a batch, or an
environment) and a value for it that cannot be right. An input counts as *clear* if the error is raised in this package
and names the entry, as *unclear* if it is raised elsewhere or does not name it, as *accepted* if there is none.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from targets import BATCHES, ENVIRONMENTS, TARGETS, Batch

from matwm_rl import presets
from matwm_rl.files import write_text

logging.getLogger("torchrl").setLevel(logging.WARNING)

RESULTS = Path(__file__).parents[1] / "results" / "robustness" / "bad_inputs.json"
PACKAGE = str(Path(presets.__file__).parent)
LIMIT = 20
"""Seconds after which an input counts as a hang."""

TEXT = st.sampled_from(["no", "off", "high", "0.1", "", " ", "nan", "None", "[1]"]) | st.text(max_size=8)
NO_NUMBER = TEXT | st.none() | st.booleans() | st.lists(st.integers(), max_size=2) | st.just({}) | st.complex_numbers()
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
NEGATIVE = st.integers(-(2**70), -1)
BELOW_0 = st.floats(max_value=0, exclude_max=True, allow_infinity=False) | NEGATIVE
OBJECTS = TEXT | st.integers() | st.lists(st.integers(), max_size=2) | st.just({}) | st.floats()


def bad_values(kind: str, optional: bool = False) -> SearchStrategy[Any]:
    """Return values that no argument of a kind can have."""
    values: dict[str, SearchStrategy[Any]] = {
        "size": NO_NUMBER | NOT_FINITE | NEGATIVE | st.just(0) | st.floats(),
        "count": NO_NUMBER | NOT_FINITE | NEGATIVE | st.floats(),
        "positive": NO_NUMBER | NOT_FINITE | BELOW_0 | st.just(0.0),
        "weight": NO_NUMBER | NOT_FINITE | BELOW_0,
        "share": NO_NUMBER | NOT_FINITE | BELOW_0 | st.floats(min_value=1, exclude_min=True),
        "switch": TEXT | st.integers() | st.floats() | st.none() | st.just([]),
        "choice": TEXT | st.integers() | st.none(),
        "text": st.integers() | st.floats() | st.none() | st.sampled_from(["", " ", "\0"]) | st.just([]),
        "index": TEXT | st.integers() | st.none() | st.just([]) | st.lists(NEGATIVE, min_size=1, max_size=3),
        "mapping": TEXT | st.integers() | st.none() | st.just([1]),
        "real": NO_NUMBER | NOT_FINITE,
        "object": OBJECTS | st.none(),
    }
    return values[kind].filter(lambda value: not (optional and value is None))


@dataclass
class Input:
    """What is tried: a call that must be refused."""

    kind: str
    entry: str
    given: str
    call: Callable[[], Any]


# -- configurations ----------------------------------------------------------------------------------------------------

AT_LEAST_0 = {"context_length", "depth", "head_depth", "point_size", "fourier_features", "seed"}
AT_LEAST_0 |= {"init_random_steps", "world_model_warmup", "critic_warmup"}
SHARES = {"gamma", "lmbda", "dropout", "critic_decay", "recency_decay"}
POSITIVE = {"world_model_lr", "actor_lr", "critic_lr", "world_model_clip", "actor_critic_clip", "max_minutes"}


def configurations(config: Any) -> Iterator[Any]:
    yield config
    for entry in fields(config):
        if is_dataclass(value := getattr(config, entry.name)):
            yield from configurations(value)


CONFIGS = [config for preset in presets.PRESETS.values() for config in configurations(preset())]


def kind_of(name: str, annotation: str, value: Any) -> str:
    """Kind of an entry of a configuration, by what it is called and holds: not by what the package says of it."""
    if is_dataclass(value):
        return "object"
    if isinstance(value, Enum):
        return "choice"
    if annotation.startswith("list"):
        return "list"
    if annotation.startswith("dict"):
        return "mapping"
    if annotation.startswith("int"):
        return "count" if name in AT_LEAST_0 else "size"
    if annotation.startswith("float"):
        return "share" if name in SHARES else "positive" if name in POSITIVE else "weight"
    return {"bool": "switch", "str": "text"}[annotation]


@st.composite
def wrong_settings(draw: DrawFn) -> Input:
    config = draw(st.sampled_from([config for config in CONFIGS if fields(config)]))
    cls = type(config)
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from([entry.name for entry in fields(cls)])) + draw(st.sampled_from(["s", "_", "x"]))
        return Input("misspelt entry", name, "1", lambda: cls(**{name: 1}))
    entry = draw(st.sampled_from(fields(cls)))
    kind = kind_of(entry.name, str(entry.type), getattr(config, entry.name))
    optional = "None" in str(entry.type)
    values = st.integers() | TEXT | st.just([1]) if kind == "list" else bad_values(kind, optional)
    choices = {str(choice.value) for choice in type(getattr(config, entry.name))} if kind == "choice" else set()
    value = draw(values.filter(lambda value: not (isinstance(value, str) and value in choices)))

    def construct() -> Any:
        return cls(**{entry.name: value})

    def assign() -> Any:
        changed = cls()
        setattr(changed, entry.name, value)
        return changed

    return Input("setting", entry.name, repr(value), draw(st.sampled_from([construct, assign])))


# -- arguments ---------------------------------------------------------------------------------------------------------


@st.composite
def wrong_arguments(draw: DrawFn) -> Input:
    target = draw(st.sampled_from(TARGETS))
    name = draw(st.sampled_from(sorted(target.kinds)))
    kind, _, optional = target.kinds[name].partition("?")
    value = draw(bad_values(kind, optional == "None").filter(lambda value: not target.allows(name, value)))
    return Input("argument", name, repr(value), lambda: target.make(**{name: value}))


# -- batches -----------------------------------------------------------------------------------------------------------


def wider(value: torch.Tensor, amount: int) -> torch.Tensor:
    return torch.cat([value, *[value[..., :1]] * amount], -1)


def narrower(value: torch.Tensor, amount: int) -> torch.Tensor:
    return value[..., : max(0, value.shape[-1] - amount)]


def deeper(value: torch.Tensor, amount: int) -> torch.Tensor:
    return value.unsqueeze(-1).expand(*value.shape, amount)


def as_other_type(value: torch.Tensor, amount: int) -> torch.Tensor:
    return value.float() if value.dtype in (torch.bool, torch.int64) else value.to(torch.complex64)


CHANGES = {"wider": wider, "narrower": narrower, "deeper": deeper, "type": as_other_type}


@st.composite
def wrong_batches(draw: DrawFn) -> Input:
    batch: Batch = draw(st.sampled_from(BATCHES()))
    key = draw(st.sampled_from(batch.keys))
    change = draw(st.sampled_from([*CHANGES, "missing"]))
    amount = draw(st.integers(1, 40))
    if change == "missing" and key in batch.optional:
        change = "wider"

    def call() -> Any:
        data = batch.make()
        if change == "missing":
            return batch.reader(data.exclude(key))
        return batch.reader(data.set(key, CHANGES[change](data.get(key), amount)))

    name = key if isinstance(key, str) else key[-1]
    return Input(f"batch: {change}", name, f"{batch.name}: {key} {change} by {amount}", call)


@st.composite
def wrong_environments(draw: DrawFn) -> Input:
    environment = draw(st.sampled_from(ENVIRONMENTS))
    value = draw(bad_values(environment.kind).filter(environment.is_bad))
    return Input("environment", environment.name, repr(value), lambda: environment.make(value))


# -- the trial ---------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """An input that did not return in time."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(tried: Input) -> tuple[str, str]:
    """Return ``"clear"``, ``"unclear"``, ``"accepted"`` or ``"hang"``, and the message."""
    try:
        with time_limit(LIMIT):
            tried.call()
    except Hang:
        return "hang", ""
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
        return ("clear" if ours and tried.entry in str(error) else "unclear"), message
    return "accepted", ""


def run(inputs: int, seed_value: int = 0) -> tuple[dict[str, Counter[str]], list[tuple[str, Input, str]]]:
    """Try so many inputs; return how they were judged, by kind, and those that were not refused clearly."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    found: list[tuple[str, Input, str]] = []
    kinds = [(wrong_settings(), 0.4), (wrong_arguments(), 0.3), (wrong_batches(), 0.2), (wrong_environments(), 0.1)]
    for strategy, share in kinds:

        @seed(seed_value)
        @settings(
            max_examples=max(1, round(share * inputs)),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def attempt(tried: Input) -> None:
            verdict, message = judge(tried)
            counts[tried.kind][verdict] += 1
            if verdict != "clear":
                found.append((verdict, tried, message))

        attempt()
    return counts, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    counts, found = run(options.inputs, options.seed)
    shown = Counter((verdict, tried.kind, tried.entry, message[:160]) for verdict, tried, message in found)
    for line, times in shown.most_common(60):
        example = next(tried.given for verdict, tried, _ in found if (verdict, tried.kind, tried.entry) == line[:3])
        print(times, *line, "| for example", example[:80])
    total = sum(counts.values(), Counter())
    result = {
        "inputs": total.total(),
        **{verdict: total[verdict] for verdict in ("clear", "unclear", "accepted", "hang")},
        "by_kind": {kind: dict(counter) for kind, counter in sorted(counts.items())},
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
