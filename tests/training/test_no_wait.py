"""On a GPU the host must never wait for a value: nothing in an update may turn a tensor into a Python number."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from matwm_rl.training import guard
from tests.helpers import LATENTS, make_learner, make_model, mock_replay
from tests.training.helpers import update

# What copies from the device to the host, or has a shape that depends on values.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class Waits(TorchDispatchMode):
    """Collects the operations that would have the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
        )
        if name in WAITING or by_mask:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("latent", LATENTS)
def test_updates_never_wait_for_a_value(latent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: on a CPU numbers that are not finite are looked for at once.
    monkeypatch.setattr(guard, "can_wait", lambda device: False)
    model = make_model(latent=latent)
    learner = make_learner(model)
    replay = mock_replay()
    sequences, starts = replay.sequences.sample(), replay.starts.sample()
    update(learner, replay)
    # As the learner sets it for CUDA graphs; otherwise the ends of episodes are counted: the one thing to wait for.
    model.max_boundaries = sequences.numel()
    with Waits() as waits:
        learner.update_world_model(sequences)
        learner.update_agents(starts)
    assert waits.found == []
    model.max_boundaries = None
    with Waits() as waits:
        learner.update_world_model(sequences)
    assert waits.found == ["aten._local_scalar_dense.default"]


def test_all_tensors_of_both_presets_are_on_the_device_of_the_networks() -> None:
    command = [sys.executable, "-m", "tests.training.fake_device", "vectors", "paper"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("acted")] == [
        "acted and learnt: vectors",
        "acted and learnt: paper",
    ]
