"""The distribution of an agent's choice among its legal actions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrl.modules import MaskedCategorical

from matwm_rl.checks import check_shape, check_type
from matwm_rl.functional import sample_index, softmax_over_few


class ActionDistribution(MaskedCategorical):
    """TorchRL's ``MaskedCategorical``, drawn by :func:`~matwm_rl.functional.sample_index`.

    ``torch.multinomial`` takes four times as long, and distributions' own checks make a GPU wait at every step.

    Args:
        logits: ``[*batch, A]``.
        mask: bool ``[*batch, A]``, which actions are legal.

    Raises:
        ValueError: without a mask, or with one of another shape than the logits'.

    Examples:
        >>> mask = torch.tensor([False, True, False])
        >>> ActionDistribution(logits=torch.zeros(3), mask=mask).sample()
        tensor(1)
    """

    _validate_args = False

    def __init__(self, *, logits: Tensor, mask: Tensor) -> None:
        if mask is None:
            raise ValueError("'action_mask' is missing: it says which actions are legal")
        check_type(mask, "'action_mask' is read", torch.bool)
        super().__init__(logits=logits, mask=check_shape(mask, "'action_mask' is read", logits.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probabilities ``[*batch]`` of actions ``[*batch]``."""
        check_type(value, what := "a discrete agent's action is read", torch.int64)
        shape = (*value.shape[: value.ndim + 1 - self.logits.ndim], *self.logits.shape[:-1])
        return super().log_prob(check_shape(value, what, shape))

    def sample(self, sample_shape: torch.Size | Sequence[int] | None = None) -> Tensor:
        """Draw actions ``[*sample_shape, *batch]``."""
        probs = softmax_over_few(self.logits)
        return sample_index(probs.expand(*(sample_shape or ()), *probs.shape))

    @property
    def deterministic_sample(self) -> Tensor:
        """The likeliest actions ``[*batch]``; TorchRL asks for them under deterministic exploration."""
        return self.logits.argmax(-1)
