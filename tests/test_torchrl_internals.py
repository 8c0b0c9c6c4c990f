"""Check TorchRL's private parts that ``matwm_rl.torchrl_internals`` reads; a release that changes one fails here."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    RandomSampler,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.objectives import LossModule

from matwm_rl import keys
from matwm_rl.envs import make_env
from matwm_rl.evaluation import RandomActions
from matwm_rl.objectives import ReturnScale
from matwm_rl.torchrl_internals import (
    attached_entities,
    buffer_generator,
    collector_carrier,
    padding_masks,
    percentile_levels,
    show_out_keys,
    write_cursor,
)

PACKAGE = Path(__file__).parents[1] / "matwm_rl"


def data(steps: int) -> TensorDict:
    return TensorDict({"step": torch.arange(steps)}, [steps])


@pytest.mark.parametrize("buffer_cls", [ReplayBuffer, TensorDictReplayBuffer])
@pytest.mark.parametrize("storage_cls", [LazyTensorStorage, LazyMemmapStorage])
def test_every_buffer_on_a_storage_is_found(buffer_cls, storage_cls):
    storage = storage_cls(10)
    writing = buffer_cls(storage=storage)
    reading = buffer_cls(storage=storage, writer=ImmutableDatasetWriter())
    first, second = attached_entities(storage)
    assert first is writing and second is reading
    assert not attached_entities(storage_cls(10))


def test_buffers_are_found_after_pickling():
    rb = pickle.loads(pickle.dumps(ReplayBuffer(storage=LazyTensorStorage(10))))
    assert attached_entities(rb.storage)[0].writer is rb.writer


@pytest.mark.parametrize("buffer_cls", [ReplayBuffer, TensorDictReplayBuffer])
def test_the_cursor_is_where_the_next_step_is_written(buffer_cls):
    rb = buffer_cls(storage=LazyTensorStorage(10))
    assert write_cursor(rb.writer) == 0
    for steps in (4, 6, 3, 9, 1):
        expected = write_cursor(rb.writer)
        assert int(rb.extend(data(steps))[0]) == expected
    assert write_cursor(rb.writer) == 3
    # This is why the public count does not do.
    rb.empty(empty_write_count=False)
    assert (write_cursor(rb.writer), rb.write_count) == (0, 23)


def test_the_cursor_counts_along_the_first_dimension():
    rb = ReplayBuffer(storage=LazyTensorStorage(10, ndim=2), dim_extend=0)
    rb.extend(data(3).unsqueeze(-1).expand(3, 2))
    assert write_cursor(rb.writer) == 3


def test_the_generator_is_the_buffers():
    sampler = RandomSampler()
    assert buffer_generator(sampler) is None
    rb = ReplayBuffer(storage=LazyTensorStorage(10), sampler=sampler)
    assert buffer_generator(sampler) is None
    generator = torch.Generator()
    rb.set_rng(generator)
    assert buffer_generator(sampler) is generator


def test_padding_is_where_collectors_mark_it():
    class Loss(LossModule):
        def forward(self, tensordict):
            return tensordict

    mask = torch.tensor([[True, False]])
    batch = TensorDict({("collector", "mask"): mask}, [1, 2])
    (found,) = padding_masks(Loss(), batch, torch.zeros(1, 2, 3))
    assert torch.equal(found.expand(1, 2, 3), mask.unsqueeze(-1).expand(1, 2, 3))
    assert padding_masks(Loss(), batch.exclude("collector"), torch.zeros(1, 2, 3)) == []


def test_the_levels_are_the_5th_and_the_95th_percentile():
    assert torch.allclose(percentile_levels(ReturnScale(2)), torch.tensor([0.05, 0.95]))


def test_shown_out_keys_are_a_part_of_all():
    module = TensorDictModule(lambda x: (x, x), in_keys=["x"], out_keys=["y", "z"])
    show_out_keys(module, ["z"])
    assert module.out_keys == ["z"] and module.out_keys_source == ["y", "z"]


def test_no_other_private_attribute_is_read():
    """Only what a class of ours defines itself may begin with an underscore."""
    sources = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
        if path.name != "torchrl_internals.py"
    }
    nodes = [(path, node) for path, tree in sources.items() for node in ast.walk(tree)]
    ours = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    private = [(path.name, node) for path, node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)]
    ours |= {node.attr for _, node in private if isinstance(node.ctx, ast.Store)}
    ours |= {
        node.target.id for _, node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert [(name, node.lineno, node.attr) for name, node in private if node.attr not in ours] == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_exit"  # os._exit is public


def test_the_carrier_is_what_a_collector_acts_on_next() -> None:
    env = make_env("mock", seed=0)
    collector = Collector(
        env, RandomActions(), frames_per_batch=3, total_frames=9, auto_register_policy_transforms=False
    )
    batch = next(iter(collector))
    assert torch.equal(collector_carrier(collector)[keys.OBSERVATION], batch["next", *keys.OBSERVATION][-1])
