from __future__ import annotations

import os
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from tensordict import TensorDictBase

from matwm_rl.training import Learner, has_checkpoint
from tests.examples.helpers import EXAMPLES, numbers

PROCESSES = 2
SIZES: dict[str, Any] = {
    **{"env": "mock", "episodes": 2, "frames_per_batch": 200, "init_random_steps": 400},
    **{"updates_per_batch": 1, "world_model_warmup": 1, "critic_warmup": 0, "checkpoint_every": 200},
}


def run_twice(rank: int, folder: str, ports: list[int]) -> None:
    """Do what torchrun does: a run of 600 steps, and one that goes on from there to 800."""
    main = runpy.run_path(str(EXAMPLES / "distributed_learning.py"))["main"]
    update, learnt = Learner.update_world_model, open(f"{folder}/{rank}.txt", "w", encoding="utf-8")

    def noted(learner: Learner, sequences: TensorDictBase) -> TensorDictBase:
        print(float(sequences["agents", "observation"].sum()), file=learnt, flush=True)
        return update(learner, sequences)

    Learner.update_world_model = noted
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(PROCESSES), MASTER_ADDR="127.0.0.1")
    for port, total_steps in zip(ports, (600, 800), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        main(total_steps=total_steps, run_dir=folder, **SIZES)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_two_processes_learn_and_go_on_from_their_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "distributed_learning.py").read_text(encoding="utf-8").splitlines()) < 60
    mp.spawn(run_twice, (str(tmp_path), free_ports(2)), nprocs=PROCESSES)
    lines = [line for line in capfd.readouterr().out.splitlines() if "mean return" in line]
    # One of the two processes prints.
    assert [line.split()[0] for line in lines] == 2 * ["random", "trained"]
    assert all(len(numbers(line)) == 2 for line in lines)
    assert has_checkpoint(tmp_path)
    # Every process draws other sequences, also when all have loaded the replay of the first one.
    batches = [(tmp_path / f"{rank}.txt").read_text(encoding="utf-8").split() for rank in range(PROCESSES)]
    assert len(batches[0]) == len(batches[1]) > 3 and not set(batches[0]) & set(batches[1])
