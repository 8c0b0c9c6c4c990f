"""Image observations: how to recognize and resize them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchrl.data import TensorSpec

IMAGE_CHANNELS = (1, 3, 4)


def is_image_spec(spec: TensorSpec) -> bool:
    """Return whether one agent's observation is a uint8 image ``[H, W, C]`` or ``[C, H, W]`` of 1, 3 or 4 channels."""
    return is_image(spec.shape, spec.dtype)


def is_image(shape: Sequence[int], dtype: torch.dtype | None) -> bool:
    """Return whether an observation of this shape is an image; see :func:`is_image_spec`."""
    is_cube = dtype == torch.uint8 and len(shape) == 3
    return is_cube and (shape[-1] in IMAGE_CHANNELS or shape[-3] in IMAGE_CHANNELS)


def resize_images(image: Tensor, size: int) -> Tensor:
    """Resize uint8 images to ``size`` x ``size``, channels first, three channels.

    Args:
        image: ``[..., H, W, C]`` or ``[..., C, H, W]`` uint8 with 1, 3 or 4 channels (the fourth, alpha, is dropped).
        size: side of the square.

    Returns:
        ``[..., 3, size, size]`` uint8.

    Examples:
        >>> resize_images(torch.zeros(20, 457, 120, 3, dtype=torch.uint8), 64).shape
        torch.Size([20, 3, 64, 64])
    """
    if image.shape[-1] in IMAGE_CHANNELS:
        image = image.movedim(-1, -3)
    batch = image.shape[:-3]
    image = image.reshape(-1, *image.shape[-3:])[:, :3]
    if image.shape[-2:] != (size, size):
        # TorchRL's Resize does the same, but needs torchvision.
        image = interpolate(image, size=(size, size), mode="bilinear", antialias=True)
    return image.expand(-1, 3, -1, -1).reshape(*batch, 3, size, size)
