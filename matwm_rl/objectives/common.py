"""What the losses have in common."""

from __future__ import annotations

from tensordict import NestedKey
from torchrl.objectives import LossModule


class KeyedLoss(LossModule):
    """A ``LossModule`` whose ``in_keys`` follow ``set_keys``; subclasses say which keys they read."""

    def _read_keys(self) -> list[NestedKey]:
        raise NotImplementedError

    def _set_in_keys(self) -> None:
        self._in_keys = self._read_keys()

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys read."""
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        # TorchRL's hook at the end of set_keys.
        self._set_in_keys()
