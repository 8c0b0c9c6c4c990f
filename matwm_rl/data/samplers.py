"""Samplers of time slices: recency-weighted for the world model, uniform for the starts of imagination.

Legend: L stored time steps, E environments, W steps of a slice, V = L - W + 1 starts per environment.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator

import torch
from torch import Tensor

from matwm_rl.arguments import check_numbers
from matwm_rl.data.config import ReplayConfig
from matwm_rl.data.slices import SliceSamplerBase, Timeline


class UniformSliceSampler(SliceSamplerBase):
    """Draw slices uniformly and with replacement, for the starts of imagination (Algorithm 1).

    Every position of every environment is equally likely. A slice never crosses the write cursor of a full storage; it
    may cross the end of an episode. Use it in a second buffer on the storage of the first, as
    :func:`~matwm_rl.data.make_replay` does.

    Args:
        slice_len: steps of a slice: the context and the step that imagination starts from.
        num_shares: equal parts of a batch, one per agent. With a [time, env, agent] storage, part i reads agent i.
        generator: source of randomness, saved with the sampler; by default the buffer's.

    Raises:
        ValueError: If ``slice_len`` or ``num_shares`` is not positive.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(10), sampler=UniformSliceSampler(3), batch_size=6)
        >>> _ = rb.extend(TensorDict({"step": torch.arange(10)}, [10]))
        >>> rb.sample()["step"].reshape(2, 3).diff(dim=-1)
        tensor([[1, 1],
                [1, 1]])
    """

    def _fits(self, now: Timeline, per_share: int) -> bool:
        return self._num_starts(now) > 0

    def _needed(self, per_share: int, num_envs: int) -> str:
        return f"At least {self.slice_len} steps are needed."

    def _draw(self, now: Timeline, per_share: int) -> tuple[Tensor, Tensor]:
        num = self.num_shares * per_share
        return self._randint(self._num_starts(now), num), self._randint(now.num_envs, num)


class RecencySliceSampler(SliceSamplerBase):
    r"""Draw slices that favour new data and do not overlap, for the world model (docs/algorithm.md, Training).

    The slices of a share are drawn one after another. A start at step s (0 is the oldest) of any environment has weight

    .. math:: w_s = \text{decay}^{\,\text{age}_s}, \qquad \text{age}_s = E \, (V - 1 - s),

    its age in *environment steps*: the newest possible start of each of the E environments has age 0, and one time step
    of all of them makes all starts older by E. A slice is drawn from these weights, restricted to the starts that
    overlap no earlier slice of the share and that leave room for the slices still to come (the latter matters only if
    the storage barely holds them). Different shares are independent and may overlap. A slice never crosses the write
    cursor of a full storage; it may cross the end of an episode, which the model masks.

    Args:
        slice_len: steps of a slice.
        decay: weight per env step of age, in (0, 1]; by default that of :class:`~matwm_rl.data.ReplayConfig`. 1.0
            samples uniformly: the ablation without recency (Table 5).
        num_shares: equal parts of a batch, one per agent. With a [time, env, agent] storage, part i reads agent i.
        generator: source of randomness, saved with the sampler; by default the buffer's.

    Raises:
        ValueError: If ``slice_len`` or ``num_shares`` is not positive or ``decay`` is not in (0, 1].

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> sampler = RecencySliceSampler(3, generator=torch.Generator().manual_seed(0))
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(10), sampler=sampler, batch_size=9)
        >>> _ = rb.extend(TensorDict({"step": torch.arange(10)}, [10]))
        >>> rb.sample()["step"].unique().numel()  # three slices of three steps, none of them twice
        9
    """

    def __init__(
        self,
        slice_len: int,
        *,
        decay: float = ReplayConfig.recency_decay,
        num_shares: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(slice_len, num_shares=num_shares, generator=generator)
        check_numbers(above=0, maximum=1, decay=decay)
        self.decay = decay

    def _fits(self, now: Timeline, per_share: int) -> bool:
        return now.num_envs * (now.length // self.slice_len) >= per_share

    def _needed(self, per_share: int, num_envs: int) -> str:
        steps = math.ceil(per_share / num_envs) * self.slice_len
        return f"Slices of a share do not overlap, so at least {steps} steps of each environment are needed."

    def _draw(self, now: Timeline, per_share: int) -> tuple[Tensor, Tensor]:
        # A slice takes the room of at most two others. With room for 2 * per_share - 1, those still to come therefore
        # always fit, and rejection draws from the same distribution as the exact method.
        ample = now.num_envs * (now.length // self.slice_len) >= 2 * per_share - 1
        proposals = self._proposals(now, 2 * self.num_shares * per_share)
        drawn: list[tuple[int, int]] = []
        for _ in range(self.num_shares):
            share = _Share(now, self.slice_len)
            if ample:
                # Rejections are few unless decay is small; the cap bounds the time of a bad case.
                for _, (start, env) in zip(range(8 * per_share), proposals, strict=False):
                    if share.is_free(start, env):
                        share.take(start, env)
                        if len(share.slices) == per_share:
                            break
            while len(share.slices) < per_share:
                share.take(*self._draw_exact(share, per_share - len(share.slices)))
            drawn += share.slices
        start_env = torch.tensor(drawn)
        return start_env[:, 0], start_env[:, 1]

    def _proposals(self, now: Timeline, chunk: int) -> Iterator[tuple[int, int]]:
        """Draw independent (start, environment) pairs by their weight, whether or not they overlap other slices."""
        num_starts = self._num_starts(now)
        log_rate = now.num_envs * math.log(self.decay)
        while True:
            if self.decay == 1.0:
                start = self._randint(num_starts, chunk)
            else:
                # Inverse of the distribution function of the geometric distribution, truncated at the oldest start.
                # torch.multinomial over 50,000 weights takes a thousand times as long.
                mass = -math.expm1(num_starts * log_rate)
                steps_back = (torch.log1p(-mass * self._rand(chunk)) / log_rate).long()
                start = num_starts - 1 - steps_back.clamp(0, num_starts - 1)
            env = self._randint(now.num_envs, chunk)
            yield from zip(start.tolist(), env.tolist(), strict=True)

    def _draw_exact(self, share: _Share, num_left: int) -> tuple[int, int]:
        """Draw one slice from the list of all starts that are free and leave room for the others: O(E L)."""
        start, env = share.free_starts(num_left)
        steps_back = (start.max() - start).double()
        weight = torch.exp(share.now.num_envs * math.log(self.decay) * steps_back)
        cumulative = weight.cumsum(0)
        drawn = int(torch.searchsorted(cumulative, self._rand(1) * cumulative[-1], right=True))
        drawn = min(drawn, start.numel() - 1)
        return int(start[drawn]), int(env[drawn])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(slice_len={self.slice_len}, decay={self.decay}, num_shares={self.num_shares})"


class _Share:
    """The slices of one share drawn so far, and the room between them."""

    def __init__(self, now: Timeline, slice_len: int) -> None:
        self.now = now
        self.slice_len = slice_len
        self.slices: list[tuple[int, int]] = []
        self._starts: list[list[int]] = [[] for _ in range(now.num_envs)]

    def is_free(self, start: int, env: int) -> bool:
        starts = self._starts[env]
        at = bisect(starts, start)
        after_previous = at == 0 or starts[at - 1] + self.slice_len <= start
        return after_previous and (at == len(starts) or start + self.slice_len <= starts[at])

    def take(self, start: int, env: int) -> None:
        starts = self._starts[env]
        starts.insert(bisect(starts, start), start)
        self.slices.append((start, env))

    def free_starts(self, num_left: int) -> tuple[Tensor, Tensor]:
        """Return all starts of a slice after which ``num_left - 1`` others still fit, and their environments."""
        W = self.slice_len
        gaps = [
            (begin, end, env)
            for env, starts in enumerate(self._starts)
            for begin, end in zip([0] + [s + W for s in starts], starts + [self.now.length], strict=True)
            if end - begin >= W
        ]
        room = sum((end - begin) // W for begin, end, _ in gaps)
        free, envs = [], []
        for begin, end, env in gaps:
            before = torch.arange(end - begin - W + 1)
            after = end - begin - W - before
            room_used = (end - begin) // W - before // W - after // W
            allowed = before[room - room_used >= num_left - 1] + begin
            free.append(allowed)
            envs.append(torch.full_like(allowed, env))
        return torch.cat(free), torch.cat(envs)
