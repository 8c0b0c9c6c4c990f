"""What the losses have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key_list
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn
from torchrl.objectives import LossModule

from matwm_rl.torchrl_internals import padding_masks, show_out_keys


class KeyedLoss(LossModule):
    """A ``LossModule`` that knows its keys: ``in_keys`` and ``out_keys`` follow :meth:`set_keys`.

    In addition, all our losses can leave out steps that TorchRL marks as padding (``loss_mask_key``), select their
    outputs, take tensors by keyword (``loss(agents_action=..., ...)``), and be called functionally
    (``with params.to_module(loss): loss(batch)``). They can be deep-copied: the copy of a loss holds the copied
    networks' tensors, so that an object that owns both the loss and the networks can be copied as a whole.

    Subclasses say what they read and write, call :meth:`_set_in_keys` at the end of their constructor, and end
    ``forward`` with :meth:`_written`.
    """

    two_hot: Any

    def _read_keys(self) -> list[NestedKey]:
        raise NotImplementedError

    def _written_keys(self) -> list[NestedKey]:
        raise NotImplementedError

    def _set_in_keys(self) -> None:
        # TorchRL calls this at the end of set_keys. What select_out_keys left out stays out.
        before = (self.out_keys_source, self.out_keys) if hasattr(self, "_out_keys") else ((), ())  # type: ignore[has-type]
        self.in_keys = self._read_keys()
        self.out_keys = self._written_keys()
        show_out_keys(self, [key for key in self.out_keys if key in before[1] or key not in before[0]])

    def select_out_keys(self, *out_keys: NestedKey) -> KeyedLoss:
        """Choose what :meth:`forward` writes; :meth:`reset_out_keys` takes the choice back.

        TensorDict's own works for modules that read all of their ``in_keys``; some of a loss's may be missing.

        Raises:
            ValueError: if the loss does not write one of the keys.
        """
        selected = unravel_key_list(list(out_keys))
        if unknown := [key for key in selected if key not in self.out_keys_source]:
            raise ValueError(f"{type(self).__name__} does not write {unknown}; it writes {self.out_keys_source}")
        show_out_keys(self, selected)
        return self

    def reset_out_keys(self) -> KeyedLoss:
        """Write everything again."""
        show_out_keys(self, self.out_keys_source)
        return self

    def _written(self, outputs: dict[str, Tensor]) -> TensorDictBase:
        return TensorDict({key: outputs[key] for key in self.out_keys})

    def _valid_mask(self, tensordict: TensorDictBase, alive: NestedKey, like: Tensor) -> Tensor:
        """Return which steps of which agents count, bool as ``like [*batch, N]``: of living agents, and no padding."""
        valid = tensordict.get(alive, None)
        valid = torch.ones_like(like, dtype=torch.bool) if valid is None else valid
        for mask in padding_masks(self, tensordict, like):
            valid = valid & mask
        return valid

    def _hold_two_hot(self, two_hot: nn.Module, network: nn.Module) -> None:
        """Register the loss's own two-hot module; one that belongs to the network is not listed twice."""
        if any(two_hot is module for module in network.modules()):
            self.__dict__["two_hot"] = two_hot
        else:
            self.two_hot = two_hot

    def _functional(self) -> Iterator[tuple[str, TensorDictModuleBase, TensorDictParams]]:
        """Names, networks and parameters of what ``convert_to_functional`` took apart."""
        for name, network in self.__dict__.items():
            if (params := dict(self.named_children()).get(f"{name}_params")) is not None:
                yield name, network, params

    @staticmethod
    def _using(params: TensorDictParams, network: nn.Module) -> AbstractContextManager:
        """Let a network compute with these; TensorDict would else make trainable parameters of what is none."""
        return params.to_module(network, preserve_module_state=False)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """PyTorch's. TorchRL's lacks the last argument, which ``torch.func.functional_call`` gives.

        Raises:
            TypeError: where that call would quietly compute with the parameters that it was to replace.
        """
        if not remove_duplicate and any(isinstance(module, TensorDictParams) for module in self.children()):
            raise TypeError(
                "named_parameters(remove_duplicate=False) is what torch.func.functional_call asks for, which does not "
                f"reach the parameters of {type(self).__name__}: they lie in a TensorDictParams. Use "
                "`params = TensorDict.from_module(loss)` and `with params.to_module(loss):`"
            )
        return nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # TensorDictParams would copy its entries itself, and they would no longer be the copied network's tensors.
        for _, _, params in self._functional():
            entries = TensorDict.to_dict(params, convert_tensors=False)
            memo[id(params)] = TensorDictParams(TensorDict(copy.deepcopy(entries, memo)), no_convert=True)
        loss = type(self).__new__(type(self))
        memo[id(self)] = loss
        # By way of the state, which leaves out what `loss.compile()` has made of the original.
        loss.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return loss

    def reset_parameters_recursive(self) -> None:
        """Draw the parameters of all networks anew; copies of them, such as an EMA, start equal again."""
        for name, network, params in self._functional():
            with self._using(params, network):
                network.reset_parameters_recursive()
            if (target := dict(self.named_children()).get(f"target_{name}_params")) is not None:
                target.data.update_(params.data)
        for module in self.children():
            if isinstance(module, TensorDictModuleBase):
                module.reset_parameters_recursive()
