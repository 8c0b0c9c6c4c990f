"""What users of TorchRL do with a loss works with ours: renaming, dispatch, copies, functional calls, compiling."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModuleBase
from torchrl.objectives import SoftUpdate

from matwm_rl import keys
from matwm_rl.objectives import ActorLoss, CriticLoss, WorldModelLoss
from matwm_rl.objectives.common import KeyedLoss
from tests.helpers import make_model, total
from tests.objectives.contract import (
    OPTIONAL,
    N,
    assert_same,
    by_keyword,
    each_class,
    every_loss,
    given,
    make_batch,
    make_loss,
)

# -- keys ------------------------------------------------------------------------------------------------------------


@each_class
def test_default_keys_are_those_of_the_library(kind: str) -> None:
    loss = make_loss(kind)
    names = {value: name for name, value in vars(keys).items() if isinstance(value, tuple)}
    assert asdict(loss.tensor_keys) == asdict(loss.default_keys())
    for name, key in asdict(loss.tensor_keys).items():
        assert names[key].removeprefix("AGENT_") == name.upper()


class Renamed(TensorDictModuleBase):
    """A network whose entries have other names."""

    def __init__(self, network: TensorDictModuleBase, names: dict[NestedKey, NestedKey]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.in_keys = [names.get(key, key) for key in network.in_keys]
        self.out_keys = [names.get(key, key) for key in network.out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = {key: tensordict[self.names.get(key, key)] for key in self.network.in_keys}
        outputs = self.network(TensorDict(inputs, batch_size=tensordict.batch_size))
        for key in self.network.out_keys:
            tensordict.set(self.names.get(key, key), outputs[key])
        return tensordict


def with_names(kind: str, loss: KeyedLoss, names: dict[NestedKey, NestedKey]) -> KeyedLoss:
    """The same loss of a network whose entries have other names; TorchRL's actors are renamed by no loss."""
    if isinstance(loss, WorldModelLoss):
        return WorldModelLoss(Renamed(loss.world_model, names), two_hot=loss.two_hot).eval()
    if isinstance(loss, CriticLoss):
        other = CriticLoss(Renamed(loss.critic_network, names)).eval()
        SoftUpdate(other, eps=0.98)
        other.target_critic_network_params["network"].data.update_(loss.target_critic_network_params.data)
        return other
    return copy.deepcopy(loss)


@every_loss
def test_every_key_can_be_renamed(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch)
    fields = asdict(loss.tensor_keys)
    # What the actor reads for itself, which is not renamed.
    its_own = set(loss.actor_network.in_keys) if isinstance(loss, ActorLoss) else set()
    for renamed in ([name] for name in fields), [list(fields)]:
        for some in renamed:
            new = {fields[name]: ("mine", name) for name in some}
            other, renamed_batch = with_names(kind, loss, new), batch.clone()
            other.set_keys(**{name: ("mine", name) for name in some})
            for old, key in new.items():
                if old in its_own:
                    renamed_batch[key] = batch[old]
                elif old in batch.keys(True):
                    renamed_batch.rename_key_(old, key)
            assert not (set(new) - its_own) & set(other.in_keys)
            assert set(given(loss, batch)) & set(new) == {k for k, v in new.items() if v in given(other, renamed_batch)}
            assert_same(other(renamed_batch), expected)


@each_class
def test_a_key_set_to_none_is_the_default_again(kind: str) -> None:
    loss = make_loss(kind)
    before, name = list(loss.in_keys), "alive"
    loss.set_keys(**{name: "here"})
    assert "here" in loss.in_keys and loss.in_keys != before
    loss.set_keys(**{name: None})
    assert loss.in_keys == before


@each_class
def test_an_unknown_key_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not an accepted tensordict key"):
        make_loss(kind).set_keys(value_target="target")


@every_loss
def test_in_keys_are_what_is_read(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch)
    assert_same(loss(batch.select(*given(loss, batch))), expected)
    for key in given(loss, batch):
        if key in OPTIONAL:
            loss(batch.exclude(key))
        else:
            with pytest.raises(KeyError) as error:
                loss(batch.exclude(key))
            assert repr(key) in str(error.value)


@every_loss
def test_out_keys_are_what_is_written_and_losses_alone_are_differentiable(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    out = loss(batch)
    assert list(out.keys()) == loss.out_keys and out.batch_size == ()
    for key, value in out.items():
        assert value.requires_grad == key.startswith("loss_")
        assert value.shape == ((N,) if key == "return_scale" else ())
    with torch.no_grad():
        assert_same(loss(batch), out.detach())
    loss.requires_grad_(False)
    assert not any(value.requires_grad for value in loss(batch).values())


@every_loss
def test_tensors_by_keyword(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch)
    values = loss(**by_keyword(loss, batch))
    assert_same(TensorDict(dict(zip(loss.out_keys, values, strict=True))), expected)
    total(TensorDict(dict(zip(loss.out_keys, values, strict=True)))).backward()
    assert all(p.grad is not None for p in loss.parameters())


@each_class
def test_outputs_can_be_selected_and_reset(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected, written = loss(batch), list(loss.out_keys)
    loss.select_out_keys(written[-1])
    assert_same(loss(batch), expected.select(written[-1]))
    torch.testing.assert_close(loss(**by_keyword(loss, batch)), expected[written[-1]])
    loss.set_keys(alive=keys.ALIVE)
    assert loss.out_keys == [written[-1]]
    with pytest.raises(ValueError, match="does not write"):
        loss.select_out_keys("loss_other")
    loss.reset_out_keys()
    assert_same(loss(batch), expected)


# -- batches ---------------------------------------------------------------------------------------------------------


@every_loss
def test_batches_of_any_shape_are_averaged(kind: str) -> None:
    loss, one, other = make_loss(kind), make_batch(kind, deaths=False), make_batch(kind, deaths=False)
    both = torch.stack([one, other])
    if isinstance(loss, ActorLoss):
        assert_same(loss(both.flatten(0, 1)), loss(both))
        # What the actions of a batch tell is not the mean of what its halves do.
        loss.regularizers[0].coeff = 0.0
    mean = TensorDict({key: (loss(one)[key] + loss(other)[key]) / 2 for key in loss.out_keys})
    for batch in (both, both.flatten(0, 1), both.unsqueeze(0), both.transpose(0, 1).contiguous()):
        assert_same(loss(batch), mean)
    assert_same(loss(one[0]), loss(one[:1]))
    # Entries may have more dimensions in common than the batch.
    for size in ([2], []):
        loose = both.clone()
        loose.batch_size = size
        assert_same(loss(loose), mean)


@every_loss
def test_padding_counts_for_nothing(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind, 4)
    expected, everything = loss(batch[:3]), loss(batch)
    real = torch.tensor([True, True, True, False])
    batch["collector", "mask"] = real[:, None, None].expand(4, 5, 1)
    assert_same(loss(batch), expected)
    loss.loss_mask_key = None
    assert_same(loss(batch), everything)
    batch["real"] = batch["collector", "mask"].squeeze(-1)
    loss.loss_mask_key = "real"
    assert_same(loss(batch), expected)


@every_loss
def test_the_given_batch_is_left_as_it_was(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    before = batch.clone()
    loss(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True)) and (batch == before).all()


@every_loss
def test_locked_lazy_and_memory_mapped_batches(kind: str, tmp_path: Path) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch)
    for given_as in (batch.clone().lock_(), lazy_stack(list(batch.unbind(0))), batch.memmap(tmp_path)):
        assert_same(loss(given_as), expected)


def test_negative_free_nats_are_refused() -> None:
    with pytest.raises(ValueError, match="free_nats must be a number of at least 0, got -1"):
        WorldModelLoss(make_model(), free_nats=-1.0)
