"""Find a NaN or an infinity, and describe where it is.

These functions read values, for which the host must wait for a GPU; no update on a GPU calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from matwm_rl.torchrl_internals import is_batched


def is_finite(value: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; integers and flags always are.

    Args:
        value: of any shape.

    Examples:
        >>> is_finite(torch.tensor([1.0, 3e38, 3e38])), is_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    if not value.is_floating_point():
        return True
    # The sum of few numbers takes a third of the time of isfinite. Only the sum of huge ones may overflow.
    return math.isfinite(float(value.detach().sum())) or bool(value.isfinite().all())


def is_readable(value: Tensor) -> bool:
    """Return whether the numbers of a tensor can be read at no cost: on a CPU, outside ``torch.compile`` and ``vmap``.

    Args:
        value: of any shape.

    Examples:
        >>> is_readable(torch.ones(2))
        True
    """
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched(value)


def first_non_finite(value: Tensor) -> tuple[list[int], float]:
    """Return the index of the first number that is not finite, and the number.

    Args:
        value: has such a number.

    Examples:
        >>> first_non_finite(torch.tensor([[0.0, 1.0], [float("-inf"), 0.0]]))
        ([1, 0], -inf)
    """
    index: list[int] = value.isfinite().logical_not().nonzero()[0].tolist()
    return index, float(value.detach()[tuple(index)])


def non_finite_entries(state: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of what is not finite in a nested state, each with the first such number in brackets.

    Args:
        state: tensors and Python numbers, in mappings and sequences. All else passes.
        name: of the state itself, which begins the names of its entries.

    Examples:
        >>> list(non_finite_entries({"bias": torch.zeros(2), "rates": [0.1, float("inf")]}, "net"))
        ['net.rates.1 (inf)']
    """
    if isinstance(state, Tensor):
        if not is_finite(state):
            yield f"{name} ({first_non_finite(state)[1]})"
    elif isinstance(state, float):
        if not math.isfinite(state):
            yield f"{name} ({state})"
    elif isinstance(state, Mapping) or is_tensor_collection(state):
        for key, value in state.items():
            yield from non_finite_entries(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from non_finite_entries(value, f"{name}.{index}" if name else str(index))


def check_finite(state: Any, source: str) -> None:
    """Refuse a state with numbers that are not finite, before it is written or read.

    Args:
        state: see :func:`non_finite_entries`.
        source: begins the message.

    Raises:
        ValueError: if there are such numbers; names the first few.

    Examples:
        >>> check_finite({"weight": torch.tensor([float("nan")])}, "policy.pt")
        Traceback (most recent call last):
        ValueError: policy.pt holds numbers that are not finite: weight (nan)...
    """
    if names := list(non_finite_entries(state)):
        raise ValueError(
            f"{source} holds numbers that are not finite: {shorten(names)}. With these nothing can act or learn; go "
            "back to the last good checkpoint or file"
        )


def shorten(names: Sequence[str]) -> str:
    """Join the first five names, and tell how many more there are.

    Args:
        names: any number.

    Examples:
        >>> shorten(list("abcdefg"))
        'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@torch.no_grad()
def find_source(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> str | None:
    """Run something again and name the first module that makes numbers that are not finite out of finite ones.

    The global random state of the CPU stays as it was.

    Args:
        modules: those that may do it, by name; their submodules are looked at, too.
        run: calls them.

    Returns:
        the dotted name, or ``None`` if there is no such module.

    Examples:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> _ = nn.init.constant_(net[1].bias, float("nan"))
        >>> find_source({"net": net}, lambda: net(torch.ones(1)))
        'net.1'
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _all_finite(output) and _all_finite(inputs):
                found.append(name)

        return hook

    named = {
        f"{role}.{name}".rstrip("."): part for role, root in modules.items() for name, part in root.named_modules()
    }
    handles = [part.register_forward_hook(watch(name)) for name, part in named.items()]
    try:
        # What such numbers make fail later, for instance as an index, is not what is looked for.
        with torch.random.fork_rng(devices=[]), suppress(Exception):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_finite(value)
    if isinstance(value, TensorDictBase):
        return all(_all_finite(entry) for entry in value.values(True, True))
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    return all(map(_all_finite, value)) if isinstance(value, list | tuple) else True
