"""Settings of the whole process that make training on CPU faster."""

from __future__ import annotations

import ctypes
import platform
from enum import StrEnum

import torch

from matwm_rl.arguments import check_ints, read_choice

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
