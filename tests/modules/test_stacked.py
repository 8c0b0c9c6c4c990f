from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot, silu

from matwm_rl.modules import StackedLinear, StackedMLP, StackedNormSiLU
from tests.helpers import grads, randomize

INDICES = [[0, 1, 2], [0, 0, 1], [0, 0, 0], [0, 1, 0], [0], [1, 1]]


@pytest.mark.parametrize("stack_index", INDICES)
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_stacked_linear_is_one_linear_layer_per_agent(stack_index: list[int], batch: tuple[int, ...]) -> None:
    layer = StackedLinear(3, 5, stack_index)
    x = torch.randn(len(stack_index), *batch, 3)
    out = layer(x)
    assert out.shape == (len(stack_index), *batch, 5)
    for n, index in enumerate(stack_index):
        torch.testing.assert_close(out[n], x[n] @ layer.weight[index] + layer.bias[index])
    assert layer.weight.shape[0] == max(stack_index) + 1


def test_stacked_linear_reads_strided_input() -> None:
    layer = StackedLinear(3, 5, range(2))
    x = torch.randn(4, 6, 2, 3).movedim(2, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_stacked_linear_names_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match="expected 3 agents"):
        StackedLinear(3, 5, range(3))(torch.zeros(2, 4, 3))


def multi_hot(num_agents: int, batch: tuple[int, ...], blocks: int, classes: int) -> tuple[Tensor, Tensor]:
    """``blocks`` one-hots of ``classes`` each, as positions of the ones and as numbers."""
    index = torch.randint(classes, (num_agents, *batch, blocks))
    return index + classes * torch.arange(blocks), one_hot(index, classes).flatten(-2).to(torch.get_default_dtype())


@pytest.mark.parametrize("stack_index", INDICES)
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
@pytest.mark.parametrize("rest", [0, 3])
def test_rows_of_ones_add_up_to_the_product(
    float64: None, stack_index: list[int], batch: tuple[int, ...], rest: int
) -> None:
    layer = StackedLinear(4 * 5 + rest, 6, stack_index)
    ones, numbers = multi_hot(len(stack_index), batch, 4, 5)
    behind = torch.randn(len(stack_index), *batch, rest, requires_grad=True)
    out = layer.from_ones(ones, behind if rest else None)
    expected = layer(torch.cat([numbers, behind], -1))
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    parameters = [*layer.parameters(), *([behind] if rest else [])]
    for one, other in zip(
        grads((weight * out).sum(), parameters), grads((weight * expected).sum(), parameters), strict=True
    ):
        assert other.any()
        torch.testing.assert_close(one, other)


def test_one_shared_layer_looks_up_for_any_number_of_agents() -> None:
    layer = StackedLinear(20, 6, [0])
    ones, numbers = multi_hot(3, (7,), 4, 5)
    torch.testing.assert_close(layer.from_ones(ones), layer(numbers))


@pytest.mark.parametrize("stack_index", INDICES)
@pytest.mark.parametrize("depth", [0, 2])
def test_stacked_mlp_of_a_multi_hot_part_and_the_rest(float64: None, stack_index: list[int], depth: int) -> None:
    num_agents = len(stack_index)
    net = randomize(StackedMLP(20 + 3, 2, stack_index=stack_index, num_cells=8, depth=depth))
    ones, numbers = multi_hot(num_agents, (2, 7), 4, 5)
    behind = torch.randn(num_agents, 2, 7, 3)
    out, expected = net(behind, ones), net(torch.cat([numbers, behind], -1))
    torch.testing.assert_close(out, expected)
    for one, other in zip(grads(out.sum(), net.parameters()), grads(expected.sum(), net.parameters()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stack_index", INDICES)
def test_stacked_norm_is_one_layer_norm_per_agent_and_its_gradient(float64: None, stack_index: list[int]) -> None:
    layer = randomize(StackedNormSiLU(4, stack_index=stack_index))
    assert layer.weight.shape == layer.bias.shape == (max(stack_index) + 1, 4)
    x = torch.randn(len(stack_index), 2, 5, 4, requires_grad=True)
    out = layer(x)
    slices = [layer_norm(x[n], (4,), layer.weight[index], layer.bias[index]) for n, index in enumerate(stack_index)]
    expected = silu(torch.stack(slices))
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    inputs = [x, *layer.parameters()]
    for found, wanted in zip(
        grads((weight * out).sum(), inputs), grads((weight * expected).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_stacked_mlp_starts_at_zero() -> None:
    assert not StackedMLP(3, 2, stack_index=range(4), num_cells=8)(torch.randn(4, 5, 3)).any()


@pytest.mark.parametrize("stack_index", INDICES)
def test_agents_share_the_networks_that_the_index_says_and_no_others(stack_index: list[int]) -> None:
    net = randomize(StackedMLP(3, 2, stack_index=stack_index, num_cells=8))
    x = torch.randn(len(stack_index), 5, 3)
    for n, own in enumerate(stack_index):
        for grad in grads(net(x)[n].square().sum(), net.parameters()):
            assert grad.shape[0] == max(stack_index) + 1
            assert grad[own].any()
            assert not grad[:own].any() and not grad[own + 1 :].any()
    same = net(x[:1].expand_as(x))
    for (n, one), (m, other) in itertools.combinations(enumerate(stack_index), 2):
        assert torch.allclose(same[n], same[m], atol=1e-6) is (one == other)
