"""Settings of the whole process that make training on CPU faster, and its random states."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from torchrl.checkpoint import GlobalRNGState

from matwm_rl.arguments import check_ints, read_choice
from matwm_rl.state_files import check_entries

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
_ACCELERATORS = ("torch_cuda", "torch_xpu", "torch_mps")


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
    """Return the global random states of Python, NumPy, torch and its accelerators.

    They are TorchRL's :class:`~torchrl.checkpoint.GlobalRNGState`; ``torch.load(weights_only=True)`` reads them.

    Examples:
        >>> state = random_states()
        >>> first = torch.rand(3)
        >>> set_random_states(state)
        >>> torch.equal(torch.rand(3), first)
        True
    """
    return GlobalRNGState().state_dict()


def set_random_states(state: Mapping[str, Any]) -> None:
    """Set the global random states to what :func:`random_states` returned; accelerators not in use are left out."""
    # TorchRL refuses states of accelerators that are not there, after it has set the others.
    here = random_states()
    usable = {name: value for name, value in state.items() if name in here}
    if "torch_cuda" in usable:
        usable["torch_cuda"] = usable["torch_cuda"][: torch.cuda.device_count()]
    GlobalRNGState().load_state_dict(usable)


def check_random_states(states: Any, *, source: str) -> None:
    """Check that :func:`set_random_states` can set these, and change nothing.

    Raises:
        ValueError: if an entry is missing or unknown, or is no random state.
    """
    present = [name for name in _ACCELERATORS if isinstance(states, Mapping) and name in states]
    check_entries(states, ["python", "numpy", "torch_cpu", *present], source=source)
    before = random_states()
    try:
        set_random_states(states)
        # NumPy takes any position, and reads there whatever the memory holds.
        if not 0 <= (position := states["numpy"][2]) <= len(states["numpy"][1]):
            raise ValueError(f"the position in NumPy's state is {position}")
    except Exception as error:  # whatever a generator raises for what is none of its states
        raise ValueError(f"{source} holds no random states: {error}") from error
    finally:
        set_random_states(before)
