from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot, silu

from matwm_rl.modules import CategoricalLatent, LatentLinear, StackedLinear, StackedMLP, StackedNormSiLU
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
    """``blocks`` one-hot vectors of ``classes`` each: positions of the ones, and the vectors."""
    index = torch.randint(classes, (num_agents, *batch, blocks))
    return index + classes * torch.arange(blocks), one_hot(index, classes).flatten(-2).to(torch.get_default_dtype())


@pytest.mark.parametrize("stack_index", INDICES)
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
@pytest.mark.parametrize("rest", [0, 3])
def test_rows_of_ones_add_up_to_the_product(
    float64: None, stack_index: list[int], batch: tuple[int, ...], rest: int
) -> None:
    layer = StackedLinear(4 * 5 + rest, 6, stack_index)
    index, latent = multi_hot(len(stack_index), batch, 4, 5)
    behind = torch.randn(len(stack_index), *batch, rest, requires_grad=True)
    out = layer.forward_multi_hot(index, behind if rest else None)
    expected = layer(torch.cat([latent, behind], -1))
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    parameters = [*layer.parameters(), *([behind] if rest else [])]
    for one, other in zip(
        grads((weight * out).sum(), parameters), grads((weight * expected).sum(), parameters), strict=True
    ):
        assert other.any()
        torch.testing.assert_close(one, other)


# -- first layers of latents -----------------------------------------------------------------------------------------


class Counted(LatentLinear):
    """Counts its look-ups."""

    look_ups = 0

    def forward_multi_hot(self, index: Tensor, extra: Tensor | None = None) -> Tensor:
        self.look_ups += 1
        return super().forward_multi_hot(index, extra)


@pytest.mark.parametrize("stack_index", INDICES)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("num_classes", [5, 4])
def test_latent_linear_is_the_dense_product(
    float64: None, stack_index: list[int], extra: int, num_classes: int
) -> None:
    """Whether rows are looked up, as without a gradient to z, or multiplied, as with one; with the same gradients."""
    layer = Counted(20, 6, stack_index, num_classes=num_classes, extra_features=extra)
    _, latent = multi_hot(len(stack_index), (2, 7), 20 // num_classes, num_classes)
    beside = torch.randn(len(stack_index), 2, 7, extra, requires_grad=True) if extra else None
    expected = torch.stack(
        [
            (z if beside is None else torch.cat([z, beside[n]], -1)) @ layer.weight[index] + layer.bias[index]
            for n, (z, index) in enumerate(zip(latent, stack_index, strict=True))
        ]
    )
    weight = torch.randn_like(expected)
    inputs = [*layer.parameters(), *([] if beside is None else [beside])]
    wanted = grads((weight * expected).sum(), inputs)
    for z, look_ups in ((latent, 1), (latent.clone().requires_grad_(), 0)):
        layer.look_ups = 0
        out = layer(z, beside)
        assert layer.look_ups == look_ups
        torch.testing.assert_close(out, expected)
        for found, grad in zip(grads((weight * out).sum(), inputs), wanted, strict=True):
            assert grad.any()
            torch.testing.assert_close(found, grad)


def test_the_gradient_to_the_encoder_passes_through_the_product(float64: None) -> None:
    space, layer = CategoricalLatent(3, 4), Counted(12, 5, [0], num_classes=4)
    features = torch.randn(3, 7, 12, requires_grad=True)
    drawn = space.sample_posterior(features)
    out = layer(drawn)
    weight = torch.randn_like(out)
    (grad,) = grads((weight * out).sum(), [features])
    (expected,) = grads((weight @ layer.weight[0].T * space.posterior(features).exp().flatten(-2)).sum(), [features])
    torch.testing.assert_close(grad, expected)
    assert grad.any() and layer.look_ups == 0
    # Without gradient the same latents are looked up.
    torch.testing.assert_close(layer(drawn.detach()), out)
    assert layer.look_ups == 1


def test_latents_that_are_no_one_hot_vectors_are_multiplied(float64: None) -> None:
    layer = Counted(8, 5, [0, 1], num_classes=None, extra_features=2)
    latent, extra = torch.randn(2, 7, 8), torch.randn(2, 7, 2)
    torch.testing.assert_close(layer(latent, extra), StackedLinear.forward(layer, torch.cat([latent, extra], -1)))
    assert layer.look_ups == 0
    assert LatentLinear(8, 5, [0], num_classes=None).weight.shape == (1, 8, 5)


@torch.no_grad()
def test_one_shared_layer_reads_latents_of_any_number_of_agents() -> None:
    layer = Counted(20, 6, [0], num_classes=5)
    _, latent = multi_hot(3, (7,), 4, 5)
    torch.testing.assert_close(layer(latent), StackedLinear.forward(layer, latent))
    assert layer.look_ups == 1
    assert not LatentLinear(20, 6, [0], num_classes=5, zero_init=True)(latent).any()


# -- layer norm and MLP ----------------------------------------------------------------------------------------------


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
    assert not StackedMLP(3, 2, stack_index=range(4), num_cells=8, depth=2)(torch.randn(4, 5, 3)).any()


@pytest.mark.parametrize("stack_index", INDICES)
def test_agents_share_the_networks_that_the_index_says_and_no_others(stack_index: list[int]) -> None:
    net = randomize(StackedMLP(3, 2, stack_index=stack_index, num_cells=8, depth=2))
    x = torch.randn(len(stack_index), 5, 3)
    for n, own in enumerate(stack_index):
        for grad in grads(net(x)[n].square().sum(), net.parameters()):
            assert grad.shape[0] == max(stack_index) + 1
            assert grad[own].any()
            assert not grad[:own].any() and not grad[own + 1 :].any()
    same = net(x[:1].expand_as(x))
    for (n, one), (m, other) in itertools.combinations(enumerate(stack_index), 2):
        assert torch.allclose(same[n], same[m], atol=1e-6) is (one == other)
