"""Losses are reset, saved, copied, moved, called with other parameters and compiled, as TorchRL's are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from matwm_rl.objectives.common import KeyedLoss
from tests.helpers import total
from tests.objectives.contract import (
    NETWORKS,
    assert_same,
    each_class,
    every_loss,
    make_batch,
    make_loss,
    network_of,
)


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


def test_a_copy_of_a_compiled_loss_computes_with_its_own_parameters() -> None:
    loss, batch = make_loss("critic"), make_batch("critic")
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
    loss, batch = make_loss(kind), make_batch(kind)
    if kind != "world_model":
        # The actors' then updates its return scale; the world model's would draw latents.
        loss.train()
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


# The others are parts of these.
@pytest.mark.parametrize("kind", ["world_model", "clipped_actor", "slow_critic"])
def test_a_loss_compiles_as_one_graph(kind: str) -> None:
    assert_compiles(kind, "eager")


@pytest.mark.slow
@each_class
def test_a_compiled_loss_learns_the_same(kind: str) -> None:
    assert_compiles(kind, "inductor")
