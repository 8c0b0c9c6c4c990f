"""What users of TorchRL do with a loss works with ours: renaming, dispatch, copies, functional calls, compiling."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from matwm_rl import keys
from matwm_rl.modules import make_actor, make_critic
from matwm_rl.objectives import ActorLoss, CriticLoss, WorldModelLoss
from matwm_rl.objectives.common import KeyedLoss
from tests.helpers import COUNTS, make_model, random_batch, random_imagined, randomize, total

N = len(COUNTS)
OPTIONAL = {keys.ALIVE, keys.NEXT_ALIVE, keys.TEAMMATE_ALIVE, keys.ACTION_LOG_PROB, keys.SLOW_VALUE}
NETWORKS = {"world_model": "world_model", "actor": "actor_network", "critic": "critic_network"}

every_loss = pytest.mark.parametrize("kind", ["world_model", "actor", "clipped_actor", "critic", "slow_critic"])
"""The last and the third are given what is optional: log-probabilities of the actions, values of the EMA copy."""
each_class = pytest.mark.parametrize("kind", ["world_model", "actor", "critic"])


def make_loss(kind: str, **config: Any) -> KeyedLoss:
    """A loss without chance in it, whose EMA copy lags behind."""
    model = make_model(latent="fsq")
    if kind == "world_model":
        return WorldModelLoss(model, **config).eval()
    if "actor" in kind:
        config = {"signalling_coeff": 0.5, "signalling_tolerance": 1.0} | config
        return ActorLoss(randomize(make_actor(model, num_cells=8)), num_agents=N, **config).eval()
    loss = CriticLoss(randomize(make_critic(model, num_cells=8)), **config)
    SoftUpdate(loss, eps=0.98)
    randomize(loss.critic_network)
    return loss.eval()


def make_batch(kind: str, B: int = 3, T: int = 5, *, deaths: bool = True) -> TensorDict:
    if kind == "world_model":
        return random_batch(B, T, deaths=deaths)
    batch = random_imagined(B, T, model=make_model(latent="fsq"), deaths=deaths)
    if kind == "clipped_actor":
        batch[keys.ACTION_LOG_PROB] = -2 * torch.rand(B, T, N)
    if kind == "slow_critic":
        batch[keys.SLOW_VALUE] = torch.randn(B, T, N, 1)
    return batch


def given(loss: KeyedLoss, batch: TensorDictBase) -> list[NestedKey]:
    """Which of the keys that the loss reads are there."""
    return [key for key in loss.in_keys if key in batch.keys(True)]


def by_keyword(loss: KeyedLoss, batch: TensorDictBase) -> dict[str, Tensor]:
    return {"_".join(key): batch[key] for key in given(loss, batch)}


def assert_same(one: TensorDictBase, other: TensorDictBase, **tolerance: float) -> None:
    assert list(one.keys()) == list(other.keys())
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def network_of(kind: str, loss: KeyedLoss) -> TensorDictModuleBase:
    return getattr(loss, NETWORKS[kind])


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
        loss.signalling_coeff = 0.0
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


# -- state -----------------------------------------------------------------------------------------------------------


def state(loss: KeyedLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.state_dict().items()}


@each_class
def test_reset_draws_all_parameters_and_the_ema_copy_starts_equal(kind: str) -> None:
    loss = make_loss(kind)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(1000.0)
    before = {name: parameter.clone() for name, parameter in loss.named_parameters()}
    loss.reset_parameters_recursive()
    for name, parameter in loss.named_parameters():
        assert (parameter.abs() < 100).all() and not torch.equal(parameter, before[name]), name
    if kind == "critic":
        assert (loss.target_critic_network_params.data == loss.critic_network_params.data).all()
    total(loss(make_batch(kind))).backward()


@every_loss
def test_a_loss_goes_on_from_a_state_dict(kind: str) -> None:
    loss, other, batch = make_loss(kind), make_loss(kind), make_batch(kind)
    loss.train()(batch)
    loss.eval()
    other(batch)
    other.load_state_dict(state(loss))
    assert_same(other(batch), loss(batch))
    assert state(other).keys() == state(loss).keys()
    assert all(torch.equal(value, state(loss)[name]) for name, value in state(other).items())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["copy", "pickle"]
)
@each_class
def test_a_copy_is_a_loss_of_its_own(kind: str, copied: Callable[[KeyedLoss], KeyedLoss]) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected, before = loss(batch), state(loss)
    other = copied(loss)
    assert_same(other(batch), expected)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in loss.named_parameters()]
    assert not {p.data_ptr() for p in other.state_dict().values()} & {p.data_ptr() for p in before.values()}
    # Its networks are those that it trains.
    assert {id(p) for p in network_of(kind, other).parameters()} == {id(p) for p in other.parameters()}
    total(other(batch)).backward()
    assert all(p.grad is not None for p in other.parameters()) and all(p.grad is None for p in loss.parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(parameter.grad + 0.1)
    assert not torch.equal(total(other(batch)), total(expected))
    assert_same(loss(batch), expected)
    if kind == "critic":
        # Its EMA copy is no parameter, and starts from the original's.
        ema = loss.target_critic_network_params
        assert (other.target_critic_network_params.data == ema.data).all()
        SoftUpdate(other, eps=0.5).step()
        assert all(torch.equal(value, before[name]) for name, value in state(loss).items())


@each_class
def test_a_network_copied_with_its_loss_is_still_its_network(kind: str) -> None:
    loss = make_loss(kind)
    network, other = copy.deepcopy((network_of(kind, loss), loss))
    assert network_of(kind, other) is network
    assert [id(p) for p in network.parameters()] == [id(p) for p in other.parameters()]


@each_class
def test_a_copy_of_a_compiled_loss_computes_with_its_own_parameters(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    loss.compile(backend="eager")
    other = copy.deepcopy(loss)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2).add_(0.1)
    assert not torch.equal(total(other(batch)), total(loss(batch)))


@each_class
def test_a_copy_is_of_the_same_precision(kind: str) -> None:
    loss = make_loss(kind).double()
    other = copy.deepcopy(loss)
    named = [{name: value.dtype for name, value in each.state_dict().items()} for each in (loss, other)]
    named += [{name: value.dtype for name, value in each.named_buffers()} for each in (loss, other)]
    assert named[0] == named[1] and named[2] == named[3]


def test_the_ema_copy_is_never_trained() -> None:
    loss, batch = make_loss("critic"), make_batch("critic")
    for _ in range(2):
        total(loss(batch)).backward()
        loss.slow_value(batch)
        ema = list(loss.target_critic_network_params.values(True, True))
        assert not any(value.requires_grad or isinstance(value, nn.Parameter) for value in ema)
        assert not {id(value) for value in ema} & {id(p) for p in loss.parameters()}


@every_loss
def test_double_precision(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch)
    wide = batch.apply(lambda value: value.double() if value.is_floating_point() else value)
    for cast in (nn.Module.double, lambda loss: loss.to(torch.float64)):
        other = cast(copy.deepcopy(loss))
        out = other(wide)
        assert all(value.dtype == torch.float64 for value in out.values())
        assert_same(out.float(), expected, rtol=1e-4, atol=1e-4)
        total(out).backward()
        assert all(p.dtype == p.grad.dtype == torch.float64 for p in other.parameters())
        assert_same(other.float()(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@every_loss
def test_to_a_gpu_and_back(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch)
    out = loss.to("cuda")(batch.to("cuda"))
    assert all(value.is_cuda for value in (*out.values(), *loss.state_dict().values()))
    assert_same(out.cpu(), expected, rtol=1e-3, atol=1e-3)
    total(out).backward()
    assert_same(loss.to("cpu")(batch), expected)


@each_class
def test_gradients_are_switched_off_and_cleared(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    loss.requires_grad_(False).requires_grad_(True)
    total(loss(batch)).backward()
    assert all(p.grad is not None for p in loss.parameters())
    loss.zero_grad()
    assert all(p.grad is None for p in loss.parameters())


def test_losses_in_a_list_list_every_parameter_once() -> None:
    losses = nn.ModuleList(make_loss(kind) for kind in NETWORKS)
    listed = [id(p) for p in losses.parameters()]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {id(p) for kind, loss in zip(NETWORKS, losses, strict=True) for p in loss.parameters()}
    assert all(p.requires_grad for p in losses.parameters())


# -- functional calls ------------------------------------------------------------------------------------------------


@every_loss
def test_calls_with_other_parameters(kind: str) -> None:
    loss, other, batch = make_loss(kind), make_loss(kind), make_batch(kind)
    expected, before = loss(batch), other(batch)
    params = TensorDict.from_module(loss)
    with params.to_module(other):
        out = other(batch)
        assert_same(out, expected)
        total(out).backward()
    assert_same(other(batch), before)
    assert all(p.grad is not None for p in loss.parameters()) and all(p.grad is None for p in other.parameters())


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@every_loss
def test_gradients_of_an_ensemble_are_those_of_its_members(kind: str) -> None:
    losses, batch, skeleton = [make_loss(kind) for _ in range(2)], make_batch(kind), make_loss(kind)
    alone = copy.deepcopy(losses)

    def call(params: TensorDictBase) -> TensorDictBase:
        with params.to_module(skeleton, preserve_module_state=False):
            return skeleton(batch)

    out = torch.vmap(call)(torch.stack([TensorDict.from_module(loss) for loss in losses]))
    total(out).backward()
    for i, (loss, expected_loss) in enumerate(zip(losses, alone, strict=True)):
        expected = expected_loss(batch)
        total(expected).backward()
        assert_same(out[i], expected, rtol=1e-4, atol=1e-4)
        for one, other in zip(loss.parameters(), expected_loss.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@each_class
def test_torchs_functional_call_works_or_says_what_to_do(kind: str) -> None:
    loss, other, batch = make_loss(kind), make_loss(kind), make_batch(kind)
    state = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
    if kind == "world_model":
        assert_same(torch.func.functional_call(other, state, (batch,)), loss(batch))
        params = {name: parameter.detach() for name, parameter in loss.named_parameters()}
        grads = torch.func.grad(lambda params: total(torch.func.functional_call(other, params, (batch,))))(params)
        total(loss(batch)).backward()
        for name, parameter in loss.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad)
    else:
        # Its parameters lie in a TensorDictParams, as in TorchRL's losses.
        with pytest.raises(TypeError, match="to_module"):
            torch.func.functional_call(other, state, (batch,))


# -- torch.compile ---------------------------------------------------------------------------------------------------


def assert_compiles(kind: str, backend: str) -> None:
    loss, batch = make_loss(kind).train(), make_batch(kind)
    expected_loss = copy.deepcopy(loss)
    expected = expected_loss(batch)
    total(expected).backward()
    torch._dynamo.reset()
    out = torch.compile(loss, backend=backend, fullgraph=True)(batch)
    assert_same(out, expected, rtol=1e-4, atol=1e-5)
    total(out).backward()
    for one, other in zip(loss.parameters(), expected_loss.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    for name, value in state(loss).items():
        torch.testing.assert_close(value, state(expected_loss)[name], msg=name)


@every_loss
def test_a_loss_compiles_as_one_graph(kind: str) -> None:
    assert_compiles(kind, "aot_eager")


@pytest.mark.slow
@each_class
def test_a_compiled_loss_learns_the_same(kind: str) -> None:
    assert_compiles(kind, "inductor")
