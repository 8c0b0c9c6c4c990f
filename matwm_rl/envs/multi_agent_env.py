"""One dense ``"agents"`` group on top of any grouped multi-agent environment."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrl.envs import Compose, EnvBase, ExcludeTransform, ParallelEnv, SerialEnv, TransformedEnv
from torchrl.envs.libs.meltingpot import MeltingpotWrapper

from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints, check_kinds
from matwm_rl.envs.images import Images
from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.merge_groups import MergeGroups
from matwm_rl.envs.random_actions import LegalRandomActions
from matwm_rl.envs.registry import unwrap
from matwm_rl.envs.render import render_frame


class _WithLayout(LegalRandomActions):
    """What single and batched environments share: their agents, read from a layout."""

    layout: AgentLayout
    """Names, groups and sizes of the agents."""

    def agent_actions(self) -> ActionSpace:
        """Return the action space of all agents."""
        return self.layout.actions

    def present_mask(self) -> Tensor:
        """Return each agent's own actions, bool ``[*E, N, A]``."""
        padding = self.layout.actions.legal().to(self.device)
        return padding.expand(*self.batch_size, *padding.shape)

    @property
    def num_agents(self) -> int:
        """The number of agents N."""
        return self.layout.num_agents

    @property
    def group_map(self) -> dict[str, list[str]]:
        """The original groups."""
        return self.layout.group_map

    @property
    def action_counts(self) -> list[int]:
        """For each agent the number of its actions."""
        return self.layout.action_counts


class MultiAgentEnv(_WithLayout, TransformedEnv):
    """Turn a grouped multi-agent environment into one with a single dense group ``"agents"``.

    Works on any TorchRL environment that has a ``group_map`` and the keys ``(group, "observation")``,
    ``(group, "action")`` and ``(group, "reward")`` (or one ``"reward"`` at the root, or of a whole group, which
    each agent then receives): :class:`~torchrl.envs.PettingZooWrapper` on a parallel environment,
    :class:`~torchrl.envs.VmasEnv`, and environments that follow their conventions. E is the environment's batch size, N
    the number of agents, A the most actions of any agent, D the size of the largest observation:

    ====================================  ==========================  ==============================================
    key                                   shape, dtype                content
    ====================================  ==========================  ==============================================
    ``("agents", "observation")``         ``[*E, N, D]`` float32      flattened and padded with zeros; or, if images,
                                                                      ``[*E, N, C, S, S]`` uint8
    ``("agents", "action")``              ``[*E, N]`` int64           an index; continuous actions are vectors
                                                                      ``[*E, N, A]`` float32, see below
    ``("agents", "action_mask")``         ``[*E, N, A]`` bool         legal actions; False beyond an agent's own
    ``("agents", "alive")``               ``[*E, N]`` bool            the agent acts, its observation is real
    ``("next", "agents", "reward")``      ``[*E, N, 1]`` float32
    ``("next", "agents", "truncated")``   ``[*E, N, 1]`` bool         a time limit of its own took the agent out of an
                                                                      episode that goes on; where agents can die
    ``("next", "done")`` and the like     ``[*E, 1]`` bool            root ``done``, ``terminated``, ``truncated``
    ``"episode"``                         ``[*E, 1]`` int64           how often the environment was reset since it was
                                                                      made or seeded
    ====================================  ==========================  ==============================================

    Continuous actions are numbers from -1 to 1, which stand for the bounds of the environment's own actions, and zeros
    beyond an agent's own numbers. A is then the most numbers in an agent's action, and ``"action_mask"`` tells which of
    them an agent has: none if it is dead. All agents must have one kind of actions.

    A death does not end the episode: the dead agent observes zeros and has one legal action, which is ignored.
    Agents may also join late, leave, and return: ``"alive"`` tells. An episode is ``truncated`` if a time limit ended
    it for some living agent, else ``terminated``; never both. VMAS reports its ``max_steps`` as a termination; here it
    is a truncation, as are limits of transforms around ``env``, such as ``StepCounter``. Agents that end together with
    the episode stay alive in its last observation. Environments with other conventions get a rule of their own, see
    :func:`~matwm_rl.envs.register_end_rule`.

    Args:
        env: the grouped environment. Give PettingZoo's to :func:`~matwm_rl.envs.wrap_env`, which also knows what their
            wrapper needs for agents that die: ``PettingZooWrapper(..., use_mask=True, done_on_any=False)``.
        image_size: side S of the square to which images are resized.
        images: ``"auto"``, see above; ``"channels_first"`` or ``"channels_last"``: observations of three dimensions are
            images of so many channels, whatever their sizes; ``"none"``: all observations are vectors.

    An observation may be a ``Dict`` of vectors, which are joined in alphabetical order of their names, and of an
    ``"action_mask"``, as PettingZoo documents it.

    Images are stored as bytes, with all their channels: colours, an alpha channel, or stacked frames in their order.
    ``images="auto"`` takes for images what has two sides of at least 16 pixels, fewer channels, first or last, and the
    bounds of an image: uint8 from 0 to 255 (with or without a channel axis), or floats from 0 to 1, -1 to 1 or 0 to
    255, of which 256 levels are kept. The bounds of the observation space decide the scale. Small grids, booleans and
    other integers are vectors, in the units of the environment. What may be an image and cannot be read is refused.

    To batch environments use :class:`SerialMultiAgentEnv` or :class:`ParallelMultiAgentEnv` (as
    :func:`~matwm_rl.envs.make_env` does): unlike TorchRL's own they draw only legal random actions.

    Raises:
        ValueError: if ``env`` has no groups, actions that are neither discrete nor vectors between finite bounds, or of
            both kinds, images whose channels or scale cannot be
            told, images beside vectors, or agents that act in turns.

    Examples:
        >>> from matwm_rl.envs import MockEnv, MultiAgentEnv
        >>> env = MultiAgentEnv(MockEnv())
        >>> env.rollout(3)["agents", "observation"].shape
        torch.Size([3, 3, 5])
        >>> env.layout.group_map
        {'hunter': ['hunter_0', 'hunter_1'], 'prey': ['prey_0']}
    """

    def __init__(self, env: EnvBase, *, image_size: int = 64, images: Images = "auto") -> None:
        check_kinds(EnvBase, env=env)
        check_ints(1, image_size=image_size)
        if images != "none" and isinstance(unwrap(env), MeltingpotWrapper):
            env = _only_pictures(env)
        transform = MergeGroups.from_env(env, image_size=image_size, images=images)
        super().__init__(env, transform)
        self.layout = transform.layout

    def render_frame(self, env_index: int = 0) -> NDArray[np.uint8]:
        """Draw the present state as an RGB image ``[H, W, 3]`` uint8; see :func:`~matwm_rl.envs.render_frame`."""
        return render_frame(self, env_index)

    @property
    def _merge(self) -> MergeGroups:
        transforms = self.transform if isinstance(self.transform, Compose) else [self.transform]
        return next(transform for transform in transforms if isinstance(transform, MergeGroups))

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """Seed the environment, and count its episodes anew.

        An environment that cannot be seeded, as SMACv2 and MeltingPot, warns and goes on as it was.
        """
        try:
            following: int | None = super().set_seed(seed, static_seed)
        except NotImplementedError as error:
            name = type(unwrap(self)).__name__
            warnings.warn(f"{name} cannot be seeded, so its episodes do not repeat ({error})", stacklevel=2)
            following = seed if seed is None or static_seed else seed + 1
        self._merge.count_episodes_anew()
        return following

    def present_mask(self) -> Tensor:
        """Return the actions that are legal now, bool ``[*E, N, A]``."""
        mask = self._merge.legal_actions
        return mask.to(self.device).expand(*self.batch_size, *mask.shape[-2:])


def _only_pictures(env: EnvBase) -> EnvBase:
    """Leave of what MeltingPot's players observe their picture, as its authors' agents see it.

    Beside it are numbers, which do not fit into a picture, and of which the collective reward is for evaluation only.
    """
    keys = [key for key in env.observation_spec.keys(True, True) if isinstance(key, tuple) and key[-1] != "RGB"]
    return TransformedEnv(env, ExcludeTransform(*keys)) if keys else env


class SerialMultiAgentEnv(_WithLayout, SerialEnv):
    """A :class:`~torchrl.envs.SerialEnv` of :class:`MultiAgentEnv` that keeps their layout and draws legal actions.

    Args:
        num_envs: number of environments, the batch size.
        create_env: makes one environment, or a list of ``num_envs`` that each make one. All
            must have the same layout.
        kwargs: passed to :class:`~torchrl.envs.SerialEnv`.

    Examples:
        >>> from matwm_rl.envs import MockEnv, MultiAgentEnv
        >>> env = SerialMultiAgentEnv(2, lambda: MultiAgentEnv(MockEnv()))
        >>> env.reset()["agents", "observation"].shape, env.num_agents
        (torch.Size([2, 3, 5]), 3)
    """

    def __init__(
        self,
        num_envs: int,
        create_env: Callable[[], MultiAgentEnv] | Sequence[Callable[[], MultiAgentEnv]],
        **kwargs: Any,
    ) -> None:
        super().__init__(num_envs, create_env, **kwargs)
        self.layout = _layout_of(create_env)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close all environments.

        TorchRL's ``close`` raises PyTorch's number of threads by what worker processes had, but a serial environment
        has no workers: a process set to one thread would go on with several, which is much slower on busy cores.
        """
        num_threads = torch.get_num_threads()
        super().close(raise_if_closed=raise_if_closed)
        torch.set_num_threads(num_threads)


class ParallelMultiAgentEnv(_WithLayout, ParallelEnv):
    """A :class:`~torchrl.envs.ParallelEnv` of :class:`MultiAgentEnv`: each environment in a process of its own.

    Args:
        num_envs: number of environments, the batch size.
        create_env: makes one environment, or a list of ``num_envs`` that each make one; must be picklable. All
            must have the same layout.
        kwargs: passed to :class:`~torchrl.envs.ParallelEnv`.

    Examples:
        >>> from functools import partial
        >>> from matwm_rl.envs import make_env
        >>> env = ParallelMultiAgentEnv(2, partial(make_env, "mock"), mp_start_method="fork")
        >>> env.rollout(3)["next", "agents", "reward"].shape
        torch.Size([2, 3, 3, 1])
        >>> env.close()
    """

    def __init__(
        self,
        num_envs: int,
        create_env: Callable[[], MultiAgentEnv] | Sequence[Callable[[], MultiAgentEnv]],
        **kwargs: Any,
    ) -> None:
        super().__init__(num_envs, create_env, **kwargs)
        self.layout = _layout_of(create_env)


def _layout_of(create_env: Callable[[], MultiAgentEnv] | Sequence[Callable[[], MultiAgentEnv]]) -> AgentLayout:
    # Environments in other processes cannot be asked, so one is made to look at.
    example = create_env() if callable(create_env) else create_env[0]()
    layout = example.layout
    example.close()
    return layout
