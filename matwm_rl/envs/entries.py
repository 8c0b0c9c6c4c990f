"""Where the entries of an original group are, and what its agents observe.

Legend: E batch size, n agents of the group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec
from torchrl.envs import EnvBase

from matwm_rl.envs.images import ImageFormat, Images, read_image, read_image_spec, read_stored_image

Key = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ObservationEntries:
    """What the n agents of a group observe: one tensor, or several vectors that are joined in alphabetical order.

    Args:
        keys: of the tensors, such as ``(group, "observation")`` or ``(group, "observation", "position")``.
        sizes: for each agent the number of all entries together.
        formats: for each agent how its images come, or None if it observes vectors.
        is_ragged: whether agents differ, so that they can only be read one by one.
    """

    keys: list[Key]
    sizes: list[int]
    formats: list[ImageFormat | None]
    is_ragged: bool

    @classmethod
    def of_env(cls, env: EnvBase, group: str, names: Sequence[str], images: Images) -> ObservationEntries:
        """Read the entries of a group from the specs of an environment.

        Raises:
            ValueError: if there are none, or what is an image cannot be told.
        """
        spec = env.full_observation_spec
        keys = observation_keys(spec.keys(True, True), group)
        _check_alike(env, group, names)
        specs = {key: agent_specs(env, spec, key, names) for key in keys}
        formats: list[ImageFormat | None] = []
        for agent, name in enumerate(names):
            agent_formats = [read_image_spec(specs[key][agent], images, _owner(name, key)) for key in keys]
            formats.append(_only_format(name, keys, agent_formats))
        shapes = [[entry[agent].shape for entry in specs.values()] for agent in range(len(names))]
        return cls(
            keys=keys,
            sizes=[sum(map(math.prod, agent)) for agent in shapes],
            formats=formats,
            is_ragged=any(agent != shapes[0] for agent in shapes) or len(set(formats)) > 1,
        )

    @classmethod
    def of_rollout(
        cls, rollout: TensorDictBase, group: str, names: Sequence[str], images: Images | int
    ) -> ObservationEntries:
        """Read the entries of a group from stored data.

        Args:
            rollout: ``[*B]``, with entries ``[*B, n, *O]``.
            group: name of the group.
            names: of its agents.
            images: what the user says of images, or the number of their channels.

        Raises:
            ValueError: if there are none, or what is an image cannot be told.
        """
        keys = observation_keys(rollout.keys(True, True), group)
        formats: list[ImageFormat | None] = []
        size = 0
        for key in keys:
            value, owner = rollout.get(key), _owner(names[0], key)
            shape = value.shape[rollout.ndim + 1 :]
            size += math.prod(shape)
            formats.append(
                read_stored_image(shape, value.dtype, images, owner)
                if isinstance(images, int)
                else read_image(shape, value.dtype, images, owner)
            )
        count = len(names)
        image = _only_format(group, keys, formats)
        return cls(keys=keys, sizes=[size] * count, formats=[image] * count, is_ragged=False)

    def read(self, tensordict: TensorDictBase, image_size: int) -> Iterator[Tensor]:
        """Read the observations of these agents in parts: ``[*E, k, D]`` of some k of them, or ``[*E, k, C, S, S]``."""
        ndim = tensordict.ndim
        if not self.is_ragged:
            yield _in_one_form([tensordict.get(key) for key in self.keys], self.formats[0], ndim, image_size)
            return
        group = tensordict.get(self.keys[0][0])
        # Tensors of unequal sizes are stacked lazily, along the agents' dimension.
        agents: Sequence[Any] = group.unbind(ndim) if group.ndim > ndim else ()
        for agent, image in enumerate(self.formats):
            if agents:
                entries = [agents[agent].get(key[1:]).unsqueeze(ndim) for key in self.keys]
            else:
                entries = [tensordict.get(key).narrow(ndim, agent, 1) for key in self.keys]
            yield _in_one_form(entries, image, ndim, image_size)


def _in_one_form(entries: list[Tensor], image: ImageFormat | None, ndim: int, image_size: int) -> Tensor:
    if image is not None:
        return image.to_bytes(entries[0], image_size)
    vectors = [entry.reshape(*entry.shape[: ndim + 1], -1) for entry in entries]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)


def agent_specs(env: EnvBase, spec: Composite, key: Key, names: Sequence[str]) -> list[TensorSpec]:
    """Return the spec of the group's entry ``key`` for each agent ``names``, without batch dimensions.

    Raises:
        ValueError: if there is no such entry, or it is not one tensor of numbers for each agent.
    """
    if key not in spec.keys(True, True):
        found = sorted(str(found) for found in spec.keys(True, True))
        raise ValueError(
            f"expected one tensor under {key}, found {found}. The environment must make one action of actions "
            "of several tensors (Dict or Tuple spaces)."
        )
    batch = len(env.batch_size)
    first_env = (0,) * batch
    if spec[key[0]].ndim > batch:
        # Unbind the agents first: a spec of unlike agents is stacked along their dimension, not indexed by others.
        specs = [agent_spec[key[1:]][first_env] for agent_spec in spec[key[0]].unbind(batch)]
    else:
        specs = [agent_spec[first_env] for agent_spec in spec[key].unbind(batch)]
    if len(specs) != len(names) or any(spec.dtype is None for spec in specs):
        raise ValueError(
            f"expected numbers under {key} for each of the agents {list(names)}, found {spec[key]}; the environment "
            "must encode texts as numbers first."
        )
    return specs


def action_mask_key(keys: Collection[Any], group: str) -> Key | None:
    """Return the key of a group's action mask: in the group, or in its observation, as PettingZoo documents it."""
    places = ((group, "action_mask"), (group, "observation", "action_mask"))
    return next((key for key in places if key in keys), None)


def observation_keys(keys: Collection[Any], group: str) -> list[Key]:
    """Return the keys of what a group's agents observe: one tensor, or those of a Dict in alphabetical order.

    Raises:
        ValueError: if there are none.
    """
    found = [key for key in keys if isinstance(key, tuple) and key[:2] == (group, "observation")]
    found = sorted(key for key in found if key != (group, "observation", "action_mask"))
    if not found:
        raise ValueError(
            f"expected a tensor, or several, under {(group, 'observation')}, found {sorted(map(str, keys))}."
        )
    return found


def _check_alike(env: EnvBase, group: str, names: Sequence[str]) -> None:
    """Check that all agents of the group have the same entries: TorchRL leaves out those that some lack."""
    spec, batch = env.full_observation_spec[group], len(env.batch_size)
    if spec.ndim <= batch:
        return
    entries = [sorted(str(key) for key in agent.keys(True, True)) for agent in spec.unbind(batch)]
    if different := [index for index, keys in enumerate(entries) if keys != entries[0]]:
        first, other = 0, different[0]
        raise ValueError(
            f"agents of group {group!r} observe different entries: {names[first]} {entries[first]}, {names[other]} "
            f"{entries[other]}. Put them into groups of their own (group_map=...); MultiAgentEnv merges all groups."
        )


def _only_format(owner: str, keys: Sequence[Key], formats: Sequence[ImageFormat | None]) -> ImageFormat | None:
    """Return the format of the one entry; of several, all of which must be vectors, None."""
    if len(keys) > 1 and any(formats):
        pictures = [key for key, image in zip(keys, formats, strict=True) if image]
        others = [key for key in keys if key != pictures[0]]
        raise ValueError(
            f"{owner} observes several tensors, of which {pictures} are images: {list(keys)}. Leave one image, as by "
            f"TransformedEnv(env, ExcludeTransform(*{others})), or say images='none' to join all as one vector."
        )
    return formats[0]


def _owner(name: str, key: Key) -> str:
    return f"{name} (entry {key})"
