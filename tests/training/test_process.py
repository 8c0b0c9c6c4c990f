from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from matwm_rl.training import prepare_process


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)


def test_threads_precision_and_denormals_are_set() -> None:
    prepare_process(num_threads=1, matmul_precision="medium")
    assert torch.get_num_threads() == 1
    assert torch.get_float32_matmul_precision() == "medium"
    smallest_normal = torch.finfo(torch.float32).tiny
    assert (torch.tensor([smallest_normal]) / 2).item() == 0.0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_threads must be a positive integer, got 0"):
        prepare_process(num_threads=0)
    with pytest.raises(ValueError, match="got 'lowest'"):
        prepare_process(num_threads=1, matmul_precision="lowest")
