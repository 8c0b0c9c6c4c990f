"""A policy as a program that runs without this library: by ``torch.export``, or in the format ONNX."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from matwm_rl.arguments import check_kinds
from matwm_rl.files import import_optional, new_file
from matwm_rl.functional import agents_first, agents_last, sample_index
from matwm_rl.modules import CategoricalLatent, WorldModelPolicy
from matwm_rl.settings import to_plain
from matwm_rl.training.model_files import actor_network

OUTPUTS = ("logits", "action", "next_history_code", "next_history_action", "next_history_length")
"""Names of what an exported policy gives, in this order."""


def export_policy(policy: WorldModelPolicy, path: str | Path) -> None:
    """Write one decision of a policy as a program: ``policy.onnx`` by ONNX, ``policy.pt2`` by ``torch.export``.

    The program is run in a loop that the caller writes: ``examples/numpy_policy.py`` plays whole episodes in NumPy. E
    is the number of environments, any number from 1 on; N agents, A actions of the agent that has most, W steps of
    history, K numbers that are stored of a latent.

    ==========================  ==================  ==========================================================
    input                       shape, type
    ==========================  ==================  ==========================================================
    ``observation``             ``[E, N, D]``       as ``("agents", "observation")``: padded with zeros, or images
    ``action_mask``             ``[E, N, A]`` bool  legal actions, as ``("agents", "action_mask")``
    ``alive``                   ``[E, N]`` bool     an agent that is not alive forgets its history
    ``history_code``            ``[E, N, W, K]``    zeros at the start of an episode, then what came out
    ``history_action``          ``[E, N, W]``       the same, int64; of continuous actions ``[E, N, W, A]`` float32
    ``history_length``          ``[E, N]``          the same, int64
    ``noise``                   ``[E, N, K]``       uniform numbers from 0 to less than 1, float32, new in every step;
                                                    only where latents are drawn, as the paper's are
    ==========================  ==================  ==========================================================

    Outputs: ``logits`` ``[E, N, A]``, minus infinity where an action is illegal; ``action`` ``[E, N]``, the most
    probable; and the history of the next step, ``next_history_code``, ``next_history_action`` and
    ``next_history_length``. Of continuous actions ``logits`` are ``[E, N, 2 A]``, the parameters of a
    :class:`~matwm_rl.action_distribution.BoxDistribution`, and ``action`` is ``[E, N, A]``, from -1 to 1; the layout in
    the file has the bounds that these stand for. Who draws actions from the logits writes them into the last step of
    the history: ``next_history_action[:, :, -1] = drawn``.

    Names, shapes and types of all these are in the file. Its metadata, JSON texts, hold the ``layout`` of the agents
    (names, groups, numbers of actions, sizes of observations) and, of a :class:`TrainedPolicy`, its ``card``.

    Args:
        policy: with an actor of :func:`~matwm_rl.modules.make_actor`. It is not changed.
        path: the file, ``*.onnx`` or ``*.pt2``; replaced as a whole if it exists.

    Raises:
        ValueError: if the file has another suffix, or the actor is another.
        ImportError: if a package is not installed: ``pip install "matwm_rl[onnx]"``.

    Examples:
        >>> import tempfile
        >>> from matwm_rl.training import load_policy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_policy(load_policy("simple_spread"), f"{folder}/policy.pt2")
        ...     decide = torch.export.load(f"{folder}/policy.pt2").module()
        >>> inputs = {"observation": torch.zeros(5, 3, 18), "action_mask": torch.ones(5, 3, 5).bool()}
        >>> inputs |= {"alive": torch.ones(5, 3).bool(), "history_code": torch.zeros(5, 3, 16, 64)}
        >>> inputs |= {"history_action": torch.zeros(5, 3, 16).long(), "history_length": torch.zeros(5, 3).long()}
        >>> decide(**inputs)["action"].shape
        torch.Size([5, 3])
    """
    check_kinds(WorldModelPolicy, policy=policy)
    suffix = Path(path).suffix
    if suffix not in (".onnx", ".pt2"):
        raise ValueError(f"a policy is exported as 'NAME.onnx' or 'NAME.pt2', got {str(path)!r}")
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            import_optional(package, extra="onnx")
    program = trace(policy)
    with new_file(path) as partial:
        if suffix == ".onnx":
            write_onnx(program, partial, _metadata(policy))
        else:
            files = {f"{name}.json": text for name, text in _metadata(policy).items()}
            torch.export.save(program, partial, extra_files=files)


class _Decision(nn.Module):
    """What :class:`~matwm_rl.modules.WorldModelPolicy` computes, from tensors to tensors; see :func:`export_policy`."""

    def __init__(self, policy: WorldModelPolicy) -> None:
        super().__init__()
        self.history_length = policy.history_length
        self.actor = actor_network(policy)
        self.model = policy.world_model
        for part in ("decoder", "dynamics", "reward", "continuation", "action_mask", "end_reward"):
            setattr(self.model, part, None)  # what only imagination needs

    def forward(
        self,
        observation: Tensor,
        action_mask: Tensor,
        alive: Tensor,
        history_code: Tensor,
        history_action: Tensor,
        history_length: Tensor,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        model, length = self.model, agents_first(history_length, 0)
        latent = self._encode(agents_first(observation, model.observation_dims), noise)
        newest = model.latent.to_code(latent).unsqueeze(2).to(history_code.dtype)
        codes = torch.cat([agents_first(history_code, 2), newest], 2)
        # The history is right-aligned: its last `length` steps are this episode's.
        valid = torch.arange(self.history_length) >= self.history_length - length.unsqueeze(-1)
        taken = agents_first(history_action, 1 + len(model.actions.action_shape))
        state, _ = model.prefill(model.latent.from_code(codes), taken, valid)
        logits = model.actions.mask_parameters(self.actor(*state.entries().values()), action_mask, -torch.inf)
        action = model.actions.mode(logits)
        following = (
            agents_last(codes[:, :, 1:], 2),
            torch.cat([history_action[:, :, 1:], action.unsqueeze(2)], 2),
            (history_length + 1).clamp(max=self.history_length).masked_fill(~alive, 0),
        )
        return dict(zip(OUTPUTS, (logits, action, *following), strict=True))

    def _encode(self, observation: Tensor, noise: Tensor | None) -> Tensor:
        model = self.model
        if noise is None:
            return model.encode(observation)
        assert isinstance(model.latent, CategoricalLatent), "no other latents are given noise"
        probs = model.latent.probs(model.features(observation))
        return model.latent.from_code(sample_index(probs, agents_first(noise).unsqueeze(-1)))


def trace(policy: WorldModelPolicy) -> ExportedProgram:
    """Trace one decision of a policy by ``torch.export``, for any number of environments.

    Raises:
        ValueError: if the actor is not of :func:`~matwm_rl.modules.make_actor`.
    """
    decision = _Decision(deepcopy(policy).cpu().eval()).requires_grad_(False)
    inputs = example_inputs(policy, num_envs=2)
    shapes = {name: {0: Dim("batch")} for name in inputs}
    return torch.export.export(decision, (), inputs, dynamic_shapes=shapes)


def example_inputs(policy: WorldModelPolicy, *, num_envs: int) -> dict[str, Tensor]:
    """Return inputs of an exported policy at the start of an episode, by name; observations are zeros."""
    model, agents = policy.world_model, policy.world_model.num_agents
    is_image = model.observation_dims == 3
    code, action, length = (
        torch.zeros(num_envs, *spec.shape, dtype=spec.dtype) for spec in policy.history_specs().values()
    )
    inputs = {
        "observation": torch.zeros(
            num_envs, agents, *model.observation_shape, dtype=torch.uint8 if is_image else torch.float32
        ),
        "action_mask": model.actions.legal().expand(num_envs, -1, -1).clone(),
        "alive": torch.ones(num_envs, agents, dtype=torch.bool),
        "history_code": code,
        "history_action": action,
        "history_length": length,
    }
    if isinstance(model.latent, CategoricalLatent):
        inputs["noise"] = torch.rand(num_envs, agents, model.latent.num_dims)
    return inputs


def write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Translate a traced program to ONNX, and write it with metadata."""
    with _quiet():
        translated = torch.onnx.export(
            program, dynamo=True, output_names=OUTPUTS, optimize=True, external_data=False, verbose=False
        )
    assert translated is not None
    (batch,) = {str(size) for value in translated.model.graph.inputs for size in (value.shape or ())[:1]}
    translated.rename_axes({batch: "batch"})
    for node in translated.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of this machine
    translated.model.metadata_props.update(metadata)
    translated.save(path, external_data=False)


def _metadata(policy: WorldModelPolicy) -> dict[str, str]:
    """Return what an exported file tells of the policy, as JSON."""
    recipe, card = policy.world_model.recipe, getattr(policy, "card", None)
    found = {"layout": None if recipe is None else recipe[0].to_dict(), "card": to_plain(card)}
    return {name: json.dumps(value) for name, value in found.items() if value is not None}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what PyTorch says about packages that are not needed, and about its own deprecated calls."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
