"""What tests of evaluation share: constant policies, and looking at pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase


class Constant(TensorDictModuleBase):
    """All agents always take the same action."""

    def __init__(self, action: int) -> None:
        super().__init__()
        self.in_keys, self.out_keys, self.action = [("agents", "action_mask")], [("agents", "action")], action

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict["agents", "action_mask"].shape[:-1]
        return tensordict.set(("agents", "action"), torch.full(shape, self.action))


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(): axis for axis in figure.axes}


def line(axis: Any, label: str) -> tuple[list[float], list[float]]:
    (found,) = (drawn for drawn in axis.get_lines() if drawn.get_label() == label)
    return [float(x) for x in found.get_xdata()], [float(y) for y in found.get_ydata()]


def assert_is_drawn(path: Path) -> None:
    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5
