"""Image observations: which observations are images, and bringing them into one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchrl.data import TensorSpec

Images = Literal["auto", "channels_first", "channels_last", "none"]
"""Which observations are images; see :class:`~matwm_rl.envs.MultiAgentEnv`."""

SMALLEST_SIDE = 16
"""Pixels. Unless the user says otherwise, the sides of an image are at least so long, and it has fewer channels."""

FLOAT_BOUNDS = ((0, 1), (-1, 1), (0, 255))
"""Unless the user says otherwise, images of floats have one of these bounds: wider ones may be no more than a guess."""

LARGE = 1e30
"""Bounds from here on are none."""


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """How an agent's images come.

    Args:
        channels: number of channels C.
        channel_axis: -1 for ``[H, W, C]``, -3 for ``[C, H, W]``, None for ``[H, W]`` of one channel.
        low: value that becomes 0.
        high: value that becomes 255.

    Examples:
        >>> grey = ImageFormat(channels=1, channel_axis=None, low=0.0, high=1.0)
        >>> grey.to_bytes(torch.ones(20, 457, 120), 64).shape
        torch.Size([20, 1, 64, 64])
    """

    channels: int
    channel_axis: int | None
    low: float
    high: float

    def to_bytes(self, image: Tensor, size: int) -> Tensor:
        """Bring images into the form in which they are stored: all channels kept, resized, 0 to 255.

        Args:
            image: ``[..., H, W, C]``, ``[..., C, H, W]`` or ``[..., H, W]``.
            size: side of the square.

        Returns:
            ``[..., C, size, size]`` uint8.

        Raises:
            ValueError: if there are values beyond ``low`` and ``high``.
        """
        image = image.unsqueeze(-3) if self.channel_axis is None else image.movedim(self.channel_axis, -3)
        if image.dtype != torch.uint8 or (self.low, self.high) != (0, 255):
            image = self._scale(image)
        batch = image.shape[:-3]
        image = image.reshape(-1, *image.shape[-3:])
        if image.shape[-2:] != (size, size):
            # TorchRL's Resize does the same, but needs torchvision.
            image = interpolate(image, size=(size, size), mode="bilinear", antialias=True)
        return image.reshape(*batch, self.channels, size, size)

    def _scale(self, image: Tensor) -> Tensor:
        # Dead agents may observe zeros, whatever the bounds. NaN lies nowhere.
        inside = ((image >= self.low) & (image <= self.high)) | (image == 0)
        if not inside.all():
            raise ValueError(
                f"observed an image with values from {image.min().item():g} to {image.max().item():g}, where its spec "
                f"says {self.low:g} to {self.high:g}. Correct the bounds of the observation space: they decide the "
                "scale."
            )
        scaled = (image.double() - self.low) * (255 / (self.high - self.low))
        return scaled.round().clamp(0, 255).to(torch.uint8)


def read_image_spec(spec: TensorSpec, images: Images, owner: str) -> ImageFormat | None:
    """Read from its spec how an agent's images come; see :func:`read_image`."""
    low, high = getattr(spec.space, "low", None), getattr(spec.space, "high", None)
    bounds = None
    if isinstance(low, Tensor) and isinstance(high, Tensor) and low.numel():
        ends = [[float(value) for value in bound.double().aminmax()] for bound in (low, high)]
        # Only bounds that are the same everywhere tell one scale. Unbounded specs have the largest numbers there are.
        is_one_scale = all(least == most and abs(most) < LARGE for least, most in ends)
        bounds = (ends[0][0], ends[1][0]) if is_one_scale else (-math.inf, math.inf)
    return read_image(spec.shape, spec.dtype, images, owner, bounds)


def read_image(
    shape: Sequence[int],
    dtype: torch.dtype | None,
    images: Images,
    owner: str,
    bounds: tuple[float, float] | None = None,
) -> ImageFormat | None:
    """Decide how an agent's images come, or that it observes none: then its observation is a vector.

    With ``"auto"``, images are uint8 of the bounds 0 and 255, and floats of one of :data:`FLOAT_BOUNDS`, that have two
    sides of :data:`SMALLEST_SIDE` pixels or more, and fewer channels; uint8 images may have no channel axis. Smaller
    arrays, booleans, and integers of other bounds are grids of symbols.

    Args:
        shape: of one observation.
        dtype: of the observation.
        images: what the user says of it.
        owner: whose observation it is, for errors.
        bounds: smallest and largest value, infinite where not known; by default the whole range of a byte.

    Raises:
        ValueError: if the channels or the scale cannot be told.

    Examples:
        >>> read_image((84, 84, 4), torch.uint8, "auto", "agent_0")
        ImageFormat(channels=4, channel_axis=-1, low=0.0, high=255.0)
        >>> read_image((10, 10, 5), torch.uint8, "auto", "agent_0") is None
        True
    """
    if images not in get_args(Images):
        raise ValueError(f"images must be one of {list(get_args(Images))}, got {images!r}.")
    if bounds is None:
        bounds = {torch.uint8: (0.0, 255.0)}.get(dtype or torch.float32, (-math.inf, math.inf))
    if images == "none" or len(shape) < 2 or (images == "auto" and not _may_be_image(shape, dtype, bounds)):
        return None
    axis = _channel_axis(shape, images, owner)
    fits = math.isfinite(bounds[0]) and math.isfinite(bounds[1]) and bounds[0] < bounds[1]
    if images == "auto" and dtype != torch.uint8:
        fits = bounds in FLOAT_BOUNDS
    if not fits:
        raise ValueError(
            f"{owner} observes {list(shape)} {dtype}, which looks like an image, with the bounds {list(bounds)}, which "
            f"decide what is black and white. Give all entries of the observation space one of the bounds "
            f"{list(FLOAT_BOUNDS)}; or say images='channels_first' or 'channels_last' with any finite ones, or "
            "images='none' to read the observation as a vector."
        )
    return ImageFormat(channels=1 if axis is None else shape[axis], channel_axis=axis, low=bounds[0], high=bounds[1])


def read_stored_image(shape: Sequence[int], dtype: torch.dtype, channels: int, owner: str) -> ImageFormat:
    """Decide how stored images of so many channels come.

    Raises:
        ValueError: if they are not bytes, or have other channels.
    """
    fitting: list[int | None] = [axis for axis in (-3, -1) if len(shape) == 3 and shape[axis] == channels]
    if len(shape) == 2 and channels == 1:
        fitting = [None]
    if dtype != torch.uint8 or not fitting:
        raise ValueError(
            f"the stored observation of {owner} is {list(shape)} {dtype}; the layout says uint8 images of {channels} "
            "channels. Store observations as bytes, or correct the layout."
        )
    axis = fitting[0] if len(fitting) == 1 else _channel_axis(shape, "auto", owner)
    return ImageFormat(channels=channels, channel_axis=axis, low=0.0, high=255.0)


def _may_be_image(shape: Sequence[int], dtype: torch.dtype | None, bounds: tuple[float, float]) -> bool:
    """Return whether an observation has the sides and the values of an image."""
    is_bytes = dtype == torch.uint8 and bounds == (0, 255)
    is_float = dtype is not None and dtype.is_floating_point and len(shape) > 2  # [H, W] may be a list of things
    return (is_bytes or is_float) and sum(side >= SMALLEST_SIDE for side in shape) >= 2


def _channel_axis(shape: Sequence[int], images: Images, owner: str) -> int | None:
    if len(shape) == 2:
        return None
    if len(shape) == 3 and images != "auto":
        return -1 if images == "channels_last" else -3
    small = [axis for axis in (-3, -2, -1) if shape[axis] < SMALLEST_SIDE]
    if len(shape) == 3 and small in ([-1], [-3]):
        return small[0]
    advice = (
        "Say images='channels_first' or images='channels_last' to MultiAgentEnv or make_env"
        if len(shape) == 3
        else "Stack frames along the channels, as [H, W, C] or [C, H, W]"
    )
    raise ValueError(
        f"{owner} observes {list(shape)}, which looks like an image; which axis holds the channels cannot be told. "
        f"{advice}, or images='none' to read the observation as a vector."
    )
