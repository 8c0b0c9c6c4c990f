"""The optimizers' steps: gradients are clipped, and there is no step on numbers that are not finite.

On a CPU a loss or a gradient that is not finite is an error at once. On a GPU this check would make the host wait for
the device. There the optimizers skip the step on the device, and the error is raised later, when the losses are read:
see :meth:`matwm_rl.evaluation.RunLog.write`. In both cases no weight and no state of an optimizer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.finite import find_source, first_non_finite, is_finite, non_finite_entries, shorten
from matwm_rl.loss_functions import clip_grad_norm_per_agent_
from matwm_rl.modules import StackedLinear, StackedNormSiLU


class Gradient(NamedTuple):
    """The result of the backward pass of a loss, which the optimizer's step needs."""

    losses: dict[str, Tensor]
    """The terms of the loss, by name."""
    norm: Tensor
    """Norm of the gradient before it was clipped."""
    optimizer: torch.optim.Optimizer


class Diagnosis(NamedTuple):
    """What is needed to explain numbers that are not finite; see :meth:`explain`."""

    batch: TensorDictBase
    """The batch of the update."""
    networks: Mapping[str, nn.Module]
    """The networks of the update, by name."""
    agents: Sequence[str]
    """Names of the agents."""
    run: Callable[[], object]
    """Computes the losses again, without an optimizer step."""

    def explain(self, problem: str) -> str:
        """Return the message: what the problem is, where it comes from, what to do."""
        weights = [
            entry
            for name, net in self.networks.items()
            for entry in non_finite_entries(dict(net.named_parameters()), name)
        ]
        if entries := list(bad_entries(self.batch, self.agents)):
            cause = f"the batch holds {shorten(entries)}; correct what wrote it into replay"
        elif weights:
            cause = f"these weights are not finite already: {shorten(weights)}; load the last good checkpoint"
        elif (source := find_source(self.networks, self.run)) is not None:
            cause = f"the first part that makes such numbers of finite ones is {source}"
        else:
            cause = "all parts give finite numbers, which grow too large in the losses or in their derivatives"
        return (
            f"{problem}. Cause: {cause}. The optimizers have not taken this step: the weights are as good as before. "
            "If data and parts of your own are in order, scale rewards and observations down or lower the learning rate"
        )


def can_wait(device: torch.device) -> bool:
    """Whether the host can read a number on this device at no cost."""
    return device.type == "cpu"


def backward(
    losses: TensorDictBase,
    optimizer: torch.optim.Optimizer,
    clip_: Callable[[list[Tensor], float], Tensor],
    max_norm: float,
) -> Gradient:
    """Differentiate the sum of the losses and clip the gradient."""
    terms = {str(key): value for key, value in losses.items() if str(key).startswith("loss_")}
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return Gradient(terms, clip_(parameters, max_norm), optimizer)


def clipping_of(network: nn.Module) -> Callable[[list[Tensor], float], Tensor]:
    """Return the function that clips a network's gradient.

    A network whose layers are all :class:`~matwm_rl.modules.StackedLinear` or
    :class:`~matwm_rl.modules.StackedNormSiLU` is a stack of agents' or groups' networks. Each of these is clipped on
    its own, any other network as one.
    """
    layers = [module for module in network.modules() if any(True for _ in module.parameters(recurse=False))]
    is_stack = all(isinstance(layer, StackedLinear | StackedNormSiLU) for layer in layers)
    return clip_grad_norm_per_agent_ if is_stack else nn.utils.clip_grad_norm_


def step(gradients: Sequence[Gradient], diagnosis: Diagnosis) -> None:
    """Let all optimizers take their step, or none of them.

    Args:
        gradients: one for every optimizer.
        diagnosis: for the message.

    Raises:
        FloatingPointError: on a CPU, if a loss or a gradient is not finite; names the losses and the cause.
    """
    numbers = [number.detach() for one in gradients for number in (*one.losses.values(), one.norm.sum())]
    values = torch.stack([number.float() for number in numbers])
    if not can_wait(values.device):
        skipped = values.isfinite().all().logical_not().float()
        for one in gradients:
            # The attribute by which torch.amp.GradScaler, too, tells fused optimizers to skip a step on the device.
            one.optimizer.found_inf = skipped  # type: ignore[attr-defined]
    elif not is_finite(values):
        problem = diagnosis.explain("; ".join(filter(None, map(_problem, gradients))))
        for one in gradients:
            one.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(problem)
    for one in gradients:
        one.optimizer.step()


def bad_entries(batch: TensorDictBase, agents: Sequence[str]) -> Iterator[str]:
    """Describe the entries ``[*batch, N, ...]`` that hold numbers that are not finite."""
    for key, value in batch.items(True, True):
        if isinstance(value, Tensor) and not is_finite(value):
            index, number = first_non_finite(value)
            of_agent = isinstance(key, tuple) and keys.AGENTS in key
            yield f"{number} in {key!r} {f'of agent {agents[index[batch.ndim]]!r} ' if of_agent else ''}at {index}"


def _problem(gradient: Gradient) -> str:
    bad = [f"{name} is {float(value.detach())}" for name, value in gradient.losses.items() if not is_finite(value)]
    if not bad and not is_finite(gradient.norm):
        bad = [f"the gradient of {' + '.join(gradient.losses)} has the norm {gradient.norm.tolist()}"]
    return ", ".join(bad)
