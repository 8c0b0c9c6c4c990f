"""Imagination does the arithmetic it needs and no more: its matrix products, counted against a formula by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from matwm_rl.modules import (
    ActorCriticConfig,
    CategoricalLatentConfig,
    GaussianLatentConfig,
    Imagination,
    LatentConfig,
    WorldModel,
    make_actor,
    transformer,
)
from tests.helpers import COUNTS, SIZE, make_model, random_batch, randomize

N, A = len(COUNTS), max(COUNTS)
# No size is another's, so that the width of a product tells what is multiplied.
S, F, CELLS = 11, 16, 9
NUM_DIMS, NUM_CLASSES = 6, 29
LATENTS: dict[str, LatentConfig] = {
    "categorical": CategoricalLatentConfig(num_dims=NUM_DIMS, num_classes=NUM_CLASSES),
    "gaussian": GaussianLatentConfig(num_dims=NUM_DIMS),
}
BINS = 255


class CountProducts(TorchDispatchMode):
    """Multiplications and additions of all matrix products, and the lengths of the sums they take."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.summed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            # In inference mode products arrive inside composite operations, such as `linear`.
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        if operation in flop_registry:
            *_, right = (value for value in args if isinstance(value, Tensor))
            self.summed.add(right.shape[-2])
            # Classes are told from one-hot vectors by a product with 0, 1, 2, ..., which is of no weights.
            if right.shape[-2] != NUM_CLASSES:
                self.count += flop_registry[operation](*args, **kwargs, out_val=out)
        return out


@pytest.fixture
def countable_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention by plain products: those of the fused kernel and of sums over the cache are not seen from outside."""
    monkeypatch.setattr(transformer, "IN_CACHE", 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def small_model(latent: str, **options: Any) -> WorldModel:
    return make_model([A] * N, has_action_mask=False, hidden_size=F, latent=LATENTS[latent], **options)


def products_of(model: WorldModel, C: int, H: int) -> CountProducts:
    imagination = Imagination(model.eval(), randomize(make_actor(model, ActorCriticConfig(num_cells=CELLS))), horizon=H)
    starts = random_batch(S, C + 1, action_counts=[A] * N)
    with CountProducts() as counter:
        imagination(starts)
    return counter


def attention_products(width: int, cached: int) -> int:
    """Scores of one query, and the sum of the values; of one value, the sum is no matrix product."""
    return cached * width * (2 if cached > 1 else 1)


def transformer_products(width: int, layers: int, prefilled: int, steps: int) -> int:
    """Of one sequence: queries, keys, values of all positions; the last block's answer at the last position alone."""
    projected, output, feedforward = 3 * width**2, width**2, 4 * width**2
    position = projected + output + feedforward
    total = 0
    if prefilled:
        whole = prefilled * position + 2 * prefilled * prefilled * width
        last = prefilled * projected + attention_products(width, prefilled) + output + feedforward
        total += (layers - 1) * whole + last
    for cached in range(prefilled + 1, prefilled + steps + 1):
        total += layers * (position + attention_products(width, cached))
    return total


def mlp_products(*sizes: int) -> int:
    return sum(fan_in * fan_out for fan_in, fan_out in zip(sizes, sizes[1:], strict=False))


def expected_products(model: WorldModel, layers: int, C: int, H: int) -> int:
    """Two operations for each of the numbers multiplied, of N x S dreams."""
    space = model.latent
    # One-hot vectors are looked up wherever they are read.
    read = 0 if space.num_classes else space.latent_size
    teammates = (N - 1) * A
    one_dream = (
        (C + 1) * mlp_products(SIZE, F, F, F, space.encoder_size)
        + (C + H) * read * F
        + transformer_products(F, layers, C, H)
        + (C + 1 + H) * read * F
        + transformer_products(F, layers, C + 1, H)
        + (1 + H) * F * teammates
        + H * mlp_products(read + F + teammates, CELLS, CELLS, A)
        + H * mlp_products(F, F, F, space.dynamics_size)
        + H * mlp_products(F, F, F, BINS)
        + H * mlp_products(F, F, F, 1)
    )
    return 2 * N * S * one_dream


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize(("layers", "C", "H"), [(2, 3, 4), (1, 0, 2), (3, 1, 1), (1, 5, 3)])
def test_imagination_multiplies_nothing_twice(
    countable_attention: None, latent: str, layers: int, C: int, H: int
) -> None:
    model = small_model(latent, num_layers=layers)
    products = products_of(model, C, H)
    assert products.count == expected_products(model, layers, C, H)


def test_no_product_is_taken_with_one_hot_latents(countable_attention: None) -> None:
    model = small_model("categorical")
    summed = products_of(model, 3, 2).summed
    # Z itself, alone or with what actors read besides.
    assert F in summed and model.latent.latent_size == NUM_DIMS * NUM_CLASSES
    assert max(summed) == 2 * F < model.latent.latent_size
