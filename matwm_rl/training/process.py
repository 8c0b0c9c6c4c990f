"""Settings of the whole process that make training on CPU faster, and its random states."""

from __future__ import annotations

import ctypes
import platform
import random
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from matwm_rl.arguments import check_ints, read_choice
from matwm_rl.data.replay_state import check_random_state
from matwm_rl.state_files import check_entries, check_same

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


class MatmulPrecision(StrEnum):
    """Precision of float32 matrix products; see ``torch.set_float32_matmul_precision``."""

    highest = "highest"
    high = "high"
    medium = "medium"


def prepare_process(*, num_threads: int, matmul_precision: str = "highest") -> None:
    """Set up PyTorch and the memory allocator; call it once, at the start of a script.

    - Threads: as many as given, for this process.
    - Precision of float32 matrix products: ``"medium"`` has oneDNN compute them in place of MKL. On AMD processors with
      AVX-512 that is float32 at 2.3 times the speed; where the processor multiplies bfloat16 in hardware tiles (Intel
      AMX), it may round the factors to bfloat16. On a GPU it allows TensorFloat-32.
    - Denormal numbers count as zero: CPUs compute with them many times slower, and here they mean nothing.
    - Memory that is freed is kept (glibc): given back to the system, it is cleared and mapped anew in every update,
      which takes a third of the time of an actor-critic update with the preset ``vectors``. For tensors of many
      megabytes, as with the preset ``paper``, set ``THP_MEM_ALLOC_ENABLE=1`` before Python starts: PyTorch then asks
      for huge pages.

    Args:
        num_threads: threads of PyTorch's operations.
        matmul_precision: ``"highest"``, ``"high"`` or ``"medium"``, see ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: if there would be no thread, or for any other precision.

    Examples:
        >>> prepare_process(num_threads=torch.get_num_threads())
    """
    check_ints(1, num_threads=num_threads)
    precision = read_choice("matmul_precision", matmul_precision, MatmulPrecision)
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision(precision.value)
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Keep freed memory: never shrink the heap, and never allocate by mmap, whose blocks go back when freed.
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def random_states() -> dict[str, Any]:
    """Return the global random states of torch, NumPy and Python; loads with ``torch.load(weights_only=True)``.

    Examples:
        >>> state = random_states()
        >>> first = torch.rand(3)
        >>> set_random_states(state)
        >>> torch.equal(torch.rand(3), first)
        True
    """
    legacy: Any = np.random.get_state()
    kind, numbers, position, has_gauss, cached = legacy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (kind, numbers.tolist(), position, has_gauss, cached),
        "python": random.getstate(),
    }


def set_random_states(state: Mapping[str, Any]) -> None:
    """Set the global random states to what :func:`random_states` returned; GPUs that are not there are left out."""
    torch.set_rng_state(state["torch"].cpu())
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state.cpu(), index)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def check_random_states(states: Any, *, source: str) -> None:
    """Check that :func:`set_random_states` can set these, and change nothing.

    Raises:
        ValueError: if an entry is missing or unknown, or is no random state.
    """
    check_entries(states, ["torch", "cuda", "numpy", "python"], source=source)
    check_random_state(states["torch"], source=f"{source} torch,")
    if not isinstance(states["cuda"], list):
        raise ValueError(f"{source} cuda must be a list, found a {type(states['cuda']).__name__}")
    for cuda_state in states["cuda"] if torch.cuda.is_available() else []:
        check_same({"cuda": cuda_state}, {"cuda": torch.cuda.get_rng_state()}, source=source)
    for name, generator in (("numpy", np.random.RandomState().set_state), ("python", random.Random().setstate)):
        try:
            generator(states[name])
        except (TypeError, ValueError, OverflowError, IndexError) as error:
            raise ValueError(f"{source} {name} is no random state: {error}") from error
