from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from matwm_rl.checks import batch_shape, check_reads, check_shape, check_writes, read_entry, read_optional, read_output


def batch() -> TensorDict:
    return TensorDict({"agents": {"reward": torch.ones(4, 3, 1)}, "other": torch.zeros(4)}, [4])


@pytest.mark.parametrize("shape", [None, (4, 3, 1), (None, 3, 1), torch.Size([4, 3, 1])])
def test_what_is_as_expected_is_handed_over(shape: tuple[int | None, ...] | None) -> None:
    td = batch()
    for read in (read_entry, read_output, read_optional):
        assert read(td, ("agents", "reward"), "Reader", shape) is td["agents", "reward"]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 1, 1), (4, None, 2)])
def test_another_shape_names_the_key_the_reader_and_both_shapes(shape: tuple[int | None, ...]) -> None:
    expected = ", ".join("\\*" if size is None else str(size) for size in shape)
    message = rf"Linear VERB \('agents', 'reward'\) of shape \[{expected}\], found \[4, 3, 1\]; do this"
    for read, verb in ((read_entry, "reads"), (read_output, "must write")):
        with pytest.raises(ValueError, match=message.replace("VERB", verb)):
            read(batch(), ("agents", "reward"), nn.Linear(1, 1), shape, "do this")
    with pytest.raises(ValueError, match="agents"):
        read_optional(batch(), ("agents", "reward"), "Reader", shape)


def test_a_missing_entry_names_what_is_there() -> None:
    with pytest.raises(KeyError, match=r"Reader reads 'value', which is missing; there are \[.*reward.*other.*\]; do"):
        read_entry(batch(), "value", "Reader", (4,), "do this")
    with pytest.raises(KeyError, match="Linear must write 'value', which is missing"):
        read_output(batch(), "value", nn.Linear(1, 1), (4,))
    assert read_optional(batch(), "value", "Reader", (4,)) is None


def test_tensors_without_a_batch_size_tell_their_own() -> None:
    td = batch()
    assert batch_shape(td, ("agents", "reward"), 1, "Reader") == (4,)
    td.batch_size = []
    assert batch_shape(td, ("agents", "reward"), 2, "Reader") == (4,)
    assert batch_shape(td, ("agents", "reward"), 3, "Reader") == ()
    with pytest.raises(KeyError, match="Reader reads 'value'"):
        batch_shape(td, "value", 1, "Reader")


def test_a_tensor_is_handed_over() -> None:
    value = torch.zeros(2, 3)
    assert check_shape(value, "it", (2, None)) is value


def test_modules_are_judged_by_what_they_say_of_themselves() -> None:
    module = TensorDictModule(nn.Identity(), in_keys=["x"], out_keys=["y"])
    check_reads(module, ["x", "z"], "the actor")
    check_writes(module, ["y"], "the actor")
    with pytest.raises(ValueError, match=r"the actor, a TensorDictModule, reads \['x'\], and is given \['z'\]"):
        check_reads(module, ["z"], "the actor")
    with pytest.raises(ValueError, match=r"the actor, a TensorDictModule, must write \['z'\].*\['y'\] lack"):
        check_writes(module, ["y", "z"], "the actor")
    # A module that says nothing is believed until it has run.
    check_reads(nn.Identity(), [], "the actor")
    check_writes(nn.Identity(), ["y"], "the actor")
