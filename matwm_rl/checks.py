"""Checks of what users give: that tensordicts have the entries that are read, and modules write what they must.

Only names, shapes and types are looked at, which Python knows, so that no check waits for a GPU. Numbers, switches and
names that constructors are given are checked by :mod:`matwm_rl.arguments`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

TYPES = {
    **dict.fromkeys(("done", "terminated", "truncated", "alive", "teammate_alive", "action_mask"), torch.bool),
    "length": torch.int64,
    **dict.fromkeys(("reward", "continuation", "weight", "state_value", "slow_value", "lambda_return"), torch.float32),
    **dict.fromkeys(("latent", "hidden", "teammate_logits", "logits", "action_log_prob"), torch.float32),
}
"""What entries of these names hold; another precision will do."""


def read_entry(
    tensordict: TensorDictBase,
    key: NestedKey,
    reader: object,
    shape: Sequence[int | None] | None = None,
    note: str = "",
) -> Tensor:
    """Read an entry, which must be there and be of a certain shape.

    Args:
        tensordict: given to ``reader``.
        key: of the entry.
        reader: the module that reads it, for the message.
        shape: expected; ``None`` where any size will do, and in place of the whole where any shape will.
        note: added to the message: what to do.

    Returns:
        the entry.

    Raises:
        KeyError: if there is no such entry.
        ValueError: if it has another shape.
        TypeError: if it holds another kind of numbers than entries of its name (:data:`TYPES`).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"reward": torch.zeros(4, 3)}, [4])
        >>> read_entry(td, "reward", "SomeLoss", [4, None, 1])
        Traceback (most recent call last):
        ValueError: SomeLoss reads 'reward' of shape [4, *, 1], found [4, 3]
    """
    return _entry(tensordict, key, f"{_name(reader)} reads", shape, note)


def batch_shape(tensordict: TensorDictBase, key: NestedKey, event_dims: int, reader: object) -> torch.Size:
    """Return the batch size of what a module is given: a tensordict's or, for tensors given by keyword, an entry's.

    Args:
        tensordict: given to ``reader``.
        key: of an entry that must be there.
        event_dims: its dimensions behind those of the batch.
        reader: the module that reads it, for the message.

    Raises:
        KeyError: if there is no such entry, and no batch size either.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> batch_shape(TensorDict({"reward": torch.zeros(4, 3, 1)}), "reward", 2, "SomeLoss")
        torch.Size([4])
    """
    return tensordict.batch_size or read_entry(tensordict, key, reader).shape[:-event_dims]


def read_optional(
    tensordict: TensorDictBase, key: NestedKey, reader: object, shape: Sequence[int | None]
) -> Tensor | None:
    """Read an entry that may be missing; see :func:`read_entry`.

    Args:
        tensordict: given to ``reader``.
        key: of the entry.
        reader: the module that reads it, for the message.
        shape: expected; ``None`` where any size will do.

    Returns:
        the entry, or ``None`` where there is none.

    Raises:
        ValueError: if it has another shape.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"alive": torch.ones(4, 3, dtype=torch.bool)}, [4])
        >>> read_optional(td, "alive", "SomeLoss", [4, 3]).shape, read_optional(td, "weight", "SomeLoss", [4, 3])
        (torch.Size([4, 3]), None)
    """
    return None if tensordict.get(key, None) is None else read_entry(tensordict, key, reader, shape)


def read_output(
    tensordict: TensorDictBase, key: NestedKey, writer: object, shape: Sequence[int | None] | None, note: str = ""
) -> Tensor:
    """Read what a module was to write.

    Args:
        tensordict: what ``writer`` returned.
        key: of the entry.
        writer: the module, for the message.
        shape: expected; ``None`` where any size will do, and in place of the whole where any shape will.
        note: added to the message: what to do.

    Returns:
        the entry.

    Raises:
        KeyError: if there is no such entry.
        ValueError: if it has another shape.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> read_output(TensorDict({"logits": torch.zeros(4, 3)}, [4]), "action", "SomeActor", [4])
        Traceback (most recent call last):
        KeyError: "SomeActor must write 'action', which is missing; there are ['logits']"
    """
    return _entry(tensordict, key, f"{_name(writer)} must write", shape, note)


def check_shape(value: Tensor, what: str, shape: Sequence[int | None], note: str = "") -> Tensor:
    """Check a tensor's shape and return the tensor.

    Args:
        value: to be checked.
        what: begins the message.
        shape: expected; ``None`` where any size will do.
        note: added to the message: what to do.

    Raises:
        ValueError: if it has another shape.

    Examples:
        >>> import torch
        >>> check_shape(torch.zeros(4, 3), "rewards", [None, 3, 1])
        Traceback (most recent call last):
        ValueError: rewards of shape [*, 3, 1], found [4, 3]
    """
    found = value.shape
    if len(found) != len(shape) or any(size not in (None, got) for size, got in zip(shape, found, strict=True)):
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} of shape [{expected}], found {list(found)}{note and '; '}{note}")
    return value


def check_writes(module: object, keys: Sequence[NestedKey], role: str) -> None:
    """Check what a module says of its outputs; one without ``out_keys`` is left to :func:`read_output`.

    Args:
        module: to be checked.
        keys: that it must write.
        role: what the module was given as, for the message.

    Raises:
        ValueError: if one of the keys is not among its ``out_keys``.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> check_writes(TensorDictModule(abs, in_keys=["x"], out_keys=["y"]), ["action"], "the actor")
        Traceback (most recent call last):
        ValueError: the actor, a TensorDictModule, must write ['action'], which its out_keys ['y'] lack
    """
    out_keys = getattr(module, "out_keys", None)
    if out_keys is not None and (missing := [key for key in keys if key not in out_keys]):
        raise ValueError(f"{role}, a {_name(module)}, must write {missing}, which its out_keys {list(out_keys)} lack")


def check_reads(module: object, available: Sequence[NestedKey], role: str) -> None:
    """Check what a module says of its inputs.

    Args:
        module: to be checked; one without ``in_keys`` passes.
        available: all keys that it will be given.
        role: what the module was given as, for the message.

    Raises:
        ValueError: if one of its ``in_keys`` is not available.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> check_reads(TensorDictModule(abs, in_keys=["x"], out_keys=["y"]), ["latent", "hidden"], "the actor")
        Traceback (most recent call last):
        ValueError: the actor, a TensorDictModule, reads ['x'], and is given ['latent', 'hidden'] alone
    """
    missing = [key for key in getattr(module, "in_keys", ()) if key not in available]
    if missing:
        raise ValueError(f"{role}, a {_name(module)}, reads {missing}, and is given {list(available)} alone")


def _entry(
    tensordict: TensorDictBase, key: NestedKey, what: str, shape: Sequence[int | None] | None, note: str
) -> Tensor:
    value = tensordict.get(key, None)
    if value is None:
        present = sorted(tensordict.keys(include_nested=True, leaves_only=True), key=str)
        raise KeyError(f"{what} {key!r}, which is missing; there are {present}{note and '; '}{note}")
    if shape is not None:
        check_shape(value, f"{what} {key!r}", shape, note)
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{what} {key!r} as real numbers, found {value.dtype}")
    name = key if isinstance(key, str) else key[-1]
    return check_type(value, f"{what} {key!r}", TYPES[name]) if name in TYPES else value


def check_type(value: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """Check which kind of numbers a tensor holds (truth values, whole, real or complex) and return the tensor.

    Args:
        value: to be checked.
        what: begins the message.
        dtype: of this kind.

    Raises:
        TypeError: if it holds another kind.

    Examples:
        >>> import torch
        >>> check_type(torch.zeros(3), "SomeLoss reads 'done'", torch.bool)
        Traceback (most recent call last):
        TypeError: SomeLoss reads 'done' as torch.bool, found torch.float32
    """
    found = value.dtype
    kinds = (found == torch.bool, found.is_floating_point, found.is_complex)
    if kinds != (dtype == torch.bool, dtype.is_floating_point, dtype.is_complex):
        raise TypeError(f"{what} as {dtype}, found {found}")
    return value


def _name(who: object) -> str:
    return who if isinstance(who, str) else type(who).__name__
