"""A causal transformer with an explicit key-value cache. It knows nothing of reinforcement learning.

``nn.TransformerEncoder`` has no cache and no rotary positions: for one more imagined step it would run all positions
again, in 10 to 40 times the time on CPU (docs/lab_notes.md, Written by hand).

Dimension letters: M sequences, T positions, W cached positions, D features, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from matwm_rl.arguments import check_ints, check_numbers, check_switches
from matwm_rl.functional import compute_dtype

MASKED = -1e9
"""Added to the score of a position that may not be attended to. Finite, so that a row without any stays a number."""

IN_CACHE = 2**20
"""Numbers in a temporary tensor up to which plain arithmetic beats batched products of single rows on CPU."""


@dataclass
class KVCache:
    """Projected keys and values of all layers, preallocated and written in place; positions come first.

    Attributes:
        key: ``[layers, W, M, h, D/h]``, rotated to their positions.
        value: ``[layers, W, M, h, D/h]``.
        bias: ``[W, M, 1]``, added to the scores of later queries: :data:`MASKED` where they may not look, else 0.
        rotary: cosines and sines of the W positions, ``[2, W, D/h]``.
        length: number of positions written so far.

    Raises:
        ValueError: by :meth:`replace_rows`, if a new past is too long.

    Examples:
        >>> transformer = Transformer(16, num_layers=1, num_heads=2).eval()
        >>> cache = transformer.empty_cache(3, length=2)
        >>> _ = transformer.step(torch.randn(3, 16), cache)
        >>> cache.length, cache.key.shape
        (1, torch.Size([1, 2, 3, 2, 8]))
        >>> cache.forget(1)
        >>> cache.length
        0
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    rotary: Tensor
    length: int = 0

    def replace_rows(self, rows: Tensor, new: KVCache) -> None:
        """Give some sequences another past, as if its last position had just been written; in place.

        Nothing that they had before stays visible to them. The other sequences are not touched.

        Args:
            rows: bool ``[M]``, which sequences.
            new: the new past of these sequences alone, in their order.

        Raises:
            ValueError: if the new past is longer than the cache's.
        """
        first = self.length - new.length
        if first < 0:
            raise ValueError(f"cannot put {new.length} positions into a cache of {self.length}")
        index = rows.nonzero().squeeze(-1)
        self.bias[:first, index] = MASKED
        if new.length:
            written, read = slice(first, self.length), slice(new.length)
            # Keys are rotated by their positions already. Rotations add up, so their shift is one more rotation.
            self.key[:, written, index] = _rotate(new.key[:, read], self.rotary[:, first])
            self.value[:, written, index] = new.value[:, read]
            self.bias[written, index] = new.bias[read]

    def make_room(self, keep: int) -> None:
        """Drop all but the last ``keep`` positions, in place, if the cache is full."""
        if self.length == self.bias.shape[0]:
            self.forget(self.length - keep)

    def forget(self, count: int) -> None:
        """Drop the oldest ``count`` positions of all sequences, which makes room for as many; in place."""
        old, kept = slice(count, self.length), slice(self.length - count)
        back = self.rotary[:, count] * self.rotary.new_tensor([[1.0], [-1.0]])
        self.key[:, kept] = _rotate(self.key[:, old], back)
        self.value[:, kept] = self.value[:, old].clone()
        self.bias[kept] = self.bias[old].clone()
        self.bias[kept.stop :] = 0.0
        self.length = kept.stop


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of ``x [..., D/h]`` by ``rotary [2, ..., D/h]``."""
    cos, sin = rotary.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _score_bias(mask: Tensor, like: Tensor) -> Tensor:
    """Return what is added to every head's scores, ``[..., 1, T, T]``, to attend to ``mask [..., T, T]`` only."""
    return like.new_zeros(()).masked_fill(~mask, MASKED).unsqueeze(-3)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of whole sequences, ``[M, T, h, D/h]`` each; ``bias`` is added to the scores ``[M, h, T, T]``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    # A compiler fuses attention itself, and cannot read the precision.
    if query.is_cuda or torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest":
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    else:
        # On CPU the fused kernel is up to 20 times slower in other precisions: oneDNN sets up each tiny product anew.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias
        attended = scores.softmax(-1).to(value.dtype) @ value
    return attended.transpose(1, 2).flatten(-2)


def _attend_once(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of one query per sequence, ``[M, h, D/h]``, over a cache's ``[W, M, h, D/h]``."""
    query = query * query.shape[-1] ** -0.5
    if query.is_cuda or key.numel() <= IN_CACHE:
        # On a CPU, a product and a sum are 1.5 to 3 times as fast as batched products of rows or the fused kernel.
        # On a GPU, scaled_dot_product_attention would do batched products here, at a tenth of the memory's speed.
        scores = (key * query).sum(-1, dtype=torch.promote_types(query.dtype, torch.float32)) + bias
        return (scores.softmax(0).to(value.dtype).unsqueeze(-1) * value).sum(0).flatten(1)
    # On a CPU, batched products are faster once the temporary product is larger than the processor's cache.
    scores = torch.einsum("mhd,wmhd->mhw", query, key) + bias.permute(1, 2, 0)
    return torch.einsum("mhw,wmhd->mhd", scores.softmax(-1).to(value.dtype), value).flatten(1)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward block, in the two halves around the attention.

    Args:
        features: D.
        num_heads: h.
        feedforward: width of the feed-forward layer.
        dropout: dropout probability after attention and feed-forward, in training mode and without a cache.
    """

    def __init__(self, features: int, num_heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)
        self.norm_feedforward = nn.LayerNorm(features)
        self.feedforward = nn.Sequential(nn.Linear(features, feedforward), nn.SiLU(), nn.Linear(feedforward, features))

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn ``[..., D]`` into query, key and value ``[..., h, D/h]``, the first two rotated to their positions."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key = _rotate(qkv[..., :2, :, :], rotary).unbind(-3)
        return query, key, qkv[..., 2, :, :]

    def finish(self, x: Tensor, attended: Tensor, drop: bool = False) -> Tensor:
        """Add to ``x [..., D]`` what was attended to ``[..., D]``, then the feed-forward layers."""
        drop = drop and self.training
        x = x + dropout(self.out(attended), self.dropout, drop)
        return x + dropout(self.feedforward(self.norm_feedforward(x)), self.dropout, drop)


class Transformer(nn.Module):
    """Causal transformer with rotary positions: a whole sequence at once, or step by step over a cache.

    Positions affect attention only through their distances. So they need not start at 0 in every episode, if attention
    is masked to the episode, and a sequence can be continued for ever.

    Args:
        features: D, size of input and output.
        num_layers: number of blocks.
        num_heads: h; must divide D into an even head size.
        feedforward: width of the feed-forward layers; ``2 * features`` by default, as in STORM.
        dropout: see :class:`TransformerBlock`.
        final_norm: normalise the output. Without, the output keeps the input as a summand.

    Raises:
        ValueError: if a number is out of range, or the head size not even; by :meth:`step`, if the cache is full.

    Examples:
        >>> transformer = Transformer(16, num_layers=2, num_heads=2).eval()
        >>> x = torch.randn(3, 5, 16)
        >>> causal = torch.ones(5, 5, dtype=torch.bool).tril()
        >>> whole = transformer(x, causal)
        >>> third, cache = transformer.prefill(x[:, :3], causal[:3, :3], room=2)
        >>> torch.allclose(third, whole[:, 2], atol=1e-5)
        True
        >>> torch.allclose(transformer.step(x[:, 3], cache), whole[:, 3], atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        *,
        num_layers: int,
        num_heads: int,
        feedforward: int | None = None,
        dropout: float = 0.0,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        check_ints(1, features=features, num_layers=num_layers, num_heads=num_heads)
        check_ints(1, feedforward=2 * features if feedforward is None else feedforward)
        check_numbers(minimum=0, below=1, dropout=dropout)
        check_switches(final_norm=final_norm)
        if features % (2 * num_heads):
            raise ValueError(f"features ({features}) must be a multiple of 2 * num_heads ({2 * num_heads})")
        self.features = features
        self.num_heads = num_heads
        blocks = (
            TransformerBlock(features, num_heads, feedforward or 2 * features, dropout) for _ in range(num_layers)
        )
        self.blocks = cast(Sequence[TransformerBlock], nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(features) if final_norm else nn.Identity()

    def _rotary(self, length: int, like: Tensor) -> Tensor:
        """Cosines and signed sines of positions, ``[2, length, D/h]``."""
        half = self.features // self.num_heads // 2
        frequency = torch.arange(half, device=like.device, dtype=torch.float32).mul_(-math.log(10_000.0) / half).exp_()
        angle = torch.arange(length, device=like.device, dtype=torch.float32).unsqueeze(-1) * frequency
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(like.dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run whole sequences in parallel.

        Args:
            x: ``[M, T, D]``.
            mask: bool ``[T, T]`` or ``[M, T, T]``, true where query (row) may attend to key (column).

        Returns:
            ``[M, T, D]``.
        """
        bias = _score_bias(mask, x)
        rotary = self._rotary(x.shape[1], x)[:, :, None, None]
        for block in self.blocks:
            x = block.finish(x, _attend(*block.project(x, rotary), bias), drop=True)
        return self.norm(x)

    def empty_cache(self, num_sequences: int, length: int) -> KVCache:
        """Make a cache for exactly ``length`` positions, with none written."""
        weight = next(self.parameters())
        shape = (len(self.blocks), length, num_sequences, self.num_heads, self.features // self.num_heads)
        # Made by the weight's method, so that under vmap the cache is an ensemble's too.
        key = weight.new_empty(shape, dtype=compute_dtype(weight))
        bias = weight.new_zeros(length, num_sequences, 1)
        return KVCache(key, torch.empty_like(key), bias, self._rotary(length, weight))

    def prefill(self, x: Tensor, mask: Tensor, room: int, visible: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Run ``T >= 1`` positions in parallel and keep their keys and values for later steps.

        Args:
            x: ``[M, T, D]``.
            mask: bool ``[T, T]`` or ``[M, T, T]``, causal.
            room: number of :meth:`step` calls that will follow.
            visible: bool ``[M, T]``, what they may attend to; by default what the last position attends to. The output
                means nothing where the last position is not visible.

        Returns:
            the output at the last position ``[M, D]``, and the cache.
        """
        check_ints(0, room=room)
        if torch.compiler.is_exporting() and not room:
            # An exported program reads no cache afterwards, and writing one would be most of its work.
            return self._last_output(x, mask, visible), self.empty_cache(x.shape[0], 0)
        cache = self.empty_cache(x.shape[0], x.shape[1] + room)
        length = cache.length = x.shape[1]
        bias = _score_bias(mask, x)
        visible = mask.expand(x.shape[0], -1, -1)[:, -1] if visible is None else visible
        cache.bias[:length] = cache.bias[:length].masked_fill(~visible.T.unsqueeze(-1), MASKED)
        rotary = cache.rotary[:, :length, None, None]
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            query, key, value = block.project(x, rotary)
            cache.key[layer, :length] = key.transpose(0, 1)
            cache.value[layer, :length] = value.transpose(0, 1)
            if layer < last:
                x = block.finish(x, _attend(query, key, value, bias))
            else:
                # Only the last position of the last block's output is needed.
                x = block.finish(x[:, -1], self._attend_cached(query[:, -1], cache, layer))
        return self.norm(x), cache

    def _last_output(self, x: Tensor, mask: Tensor, visible: Tensor | None) -> Tensor:
        """Return the output ``[M, D]`` of :meth:`prefill`, without a cache."""
        bias = _score_bias(mask, x)
        rotary = self._rotary(x.shape[1], x)[:, :, None, None]
        *blocks, last = self.blocks
        for block in blocks:
            x = block.finish(x, _attend(*block.project(x, rotary), bias))
        query, key, value = last.project(x, rotary)
        bias = bias[..., -1:, :] if visible is None else _score_bias(visible.unsqueeze(-2), x)
        return self.norm(last.finish(x[:, -1], _attend(query[:, -1:], key, value, bias)[:, 0]))

    def step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Append one position to the cache, in place.

        Args:
            x: ``[M, D]``, the position that follows the cached ones.
            cache: of :meth:`prefill` or :meth:`empty_cache`.

        Returns:
            the output ``[M, D]``.

        Raises:
            ValueError: if the cache is full.
        """
        position = cache.length
        if position == cache.key.shape[1]:
            raise ValueError(f"the cache is full: it was made for {position} positions; make `room` for more")
        cache.length = position + 1
        rotary = cache.rotary[:, position]
        for layer, block in enumerate(self.blocks):
            query, cache.key[layer, position], cache.value[layer, position] = block.project(x, rotary)
            x = block.finish(x, self._attend_cached(query, cache, layer))
        return self.norm(x)

    @staticmethod
    def _attend_cached(query: Tensor, cache: KVCache, layer: int) -> Tensor:
        seen = slice(cache.length)
        return _attend_once(query, cache.key[layer, seen], cache.value[layer, seen], cache.bias[seen])
