"""One dense ``"agents"`` group on top of any grouped multi-agent environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import Compose, EnvBase, ParallelEnv, SerialEnv, TransformedEnv

from matwm_rl.envs.layout import AgentLayout
from matwm_rl.envs.merge_groups import MergeGroups
from matwm_rl.envs.render import render_frame
from matwm_rl.keys import ACTION, ACTION_MASK


class _LegalRandomActions(EnvBase):
    """Random actions obey the mask in the tensordict that they are asked for.

    TorchRL's ActionMask writes the mask of the moment into the action spec instead. There it goes stale: copies of the
    spec, such as a batched environment's or an outer TransformedEnv's, never hear of it, and an action that was legal
    when taken is not "in" the spec a step later. So the spec's own mask only ever holds the padding of agents that
    have fewer actions.
    """

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Draws a random legal action for each agent.

        Args:
            tensordict: the current root tensordict with ``("agents", "action_mask")``; the action is written into it.
                Without it a :class:`MultiAgentEnv` draws from the actions that are legal in its present state, and a
                batched one, which sees its environments through tensordicts only, from each agent's own actions.
        """
        mask = None if tensordict is None else tensordict.get(ACTION_MASK, None)
        mask = self._present_mask() if mask is None else mask
        action = torch.multinomial(mask.flatten(0, -2).float(), 1).view(mask.shape[:-1])
        output = TensorDict(batch_size=self.batch_size, device=self.device) if tensordict is None else tensordict
        return output.set(ACTION, action)

    def _present_mask(self) -> Tensor:
        raise NotImplementedError


class _OneGroup(_LegalRandomActions):
    """What environments with a layout tell of their agents, batched ones too."""

    layout: AgentLayout
    """Names, groups and sizes of the agents."""

    def _present_mask(self) -> Tensor:
        counts = torch.tensor(self.layout.action_counts, device=self.device)
        padding = torch.arange(self.layout.num_actions, device=self.device) < counts.unsqueeze(-1)
        return padding.expand(*self.batch_size, *padding.shape)

    @property
    def num_agents(self) -> int:
        """The number of agents N."""
        return self.layout.num_agents

    @property
    def agent_names(self) -> list[str]:
        """The agents' names in agent order."""
        return self.layout.agent_names

    @property
    def group_map(self) -> dict[str, list[str]]:
        """The original groups."""
        return self.layout.group_map

    @property
    def group_index(self) -> list[int]:
        """For each agent the index of its original group."""
        return self.layout.group_index

    @property
    def action_counts(self) -> list[int]:
        """For each agent the number of its actions."""
        return self.layout.action_counts

    @property
    def observation_sizes(self) -> list[int]:
        """For each agent the size of its observation before padding."""
        return self.layout.observation_sizes

    @property
    def is_image(self) -> bool:
        """Whether observations are uint8 images."""
        return self.layout.is_image


class MultiAgentEnv(_OneGroup, TransformedEnv):
    """Turns a grouped multi-agent environment into one with a single dense group ``"agents"``.

    Works on any TorchRL environment that has a ``group_map`` and the keys ``(group, "observation")``,
    ``(group, "action")`` and ``(group, "reward")``: :class:`~torchrl.envs.PettingZooWrapper` on a parallel environment,
    :class:`~torchrl.envs.VmasEnv`, and what follows their conventions. E is the environment's batch size, N agents, A
    the most actions of any agent, D the largest observation:

    ====================================  ==========================  ==============================================
    key                                   shape, dtype                content
    ====================================  ==========================  ==============================================
    ``("agents", "observation")``         ``[*E, N, D]`` float32      flattened and padded with zeros; or, if uint8
                                                                      images, ``[*E, N, 3, S, S]`` uint8
    ``("agents", "action")``              ``[*E, N]`` int64
    ``("agents", "action_mask")``         ``[*E, N, A]`` bool         legal actions; False beyond an agent's own
    ``("agents", "alive")``               ``[*E, N]`` bool            the agent acts, its observation is real
    ``("next", "agents", "reward")``      ``[*E, N, 1]`` float32
    ``("next", "done")`` and the like     ``[*E, 1]`` bool            root ``done``, ``terminated``, ``truncated``
    ====================================  ==========================  ==============================================

    A death does not end the episode: the dead agent observes zeros and has exactly one legal action, which is ignored.
    An episode is ``truncated`` if a time limit ended it for some living agent, else ``terminated``; never both. This
    also mends VMAS, which reports its ``max_steps`` as a termination. Agents that end together with the episode stay
    alive in its last observation.

    Args:
        env: the grouped environment. A PettingZoo environment in which agents die needs
            ``PettingZooWrapper(..., use_mask=True, done_on_any=False)``.
        image_size: side S of the square to which uint8 images are resized.

    To batch environments use :class:`SerialMultiAgentEnv` or :class:`ParallelMultiAgentEnv` (as
    :func:`~matwm_rl.envs.make_env` does): unlike TorchRL's own they draw only legal random actions.

    Raises:
        ValueError: if ``env`` has no groups, actions that are not discrete, observations of several tensors, or agents
            that act in turns.

    Examples:
        >>> from matwm_rl.envs import MockEnv, MultiAgentEnv
        >>> env = MultiAgentEnv(MockEnv())
        >>> env.rollout(3)["agents", "observation"].shape
        torch.Size([3, 3, 5])
        >>> env.layout.group_map
        {'hunter': ['hunter_0', 'hunter_1'], 'prey': ['prey_0']}
    """

    def __init__(self, env: EnvBase, *, image_size: int = 64) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}.")
        transform = MergeGroups.from_env(env, image_size=image_size)
        super().__init__(env, transform)
        self.__dict__["layout"] = transform.layout

    def render_frame(self, env_index: int = 0) -> NDArray[np.uint8]:
        """Draws the present state as an RGB image ``[H, W, 3]`` uint8; see :func:`~matwm_rl.envs.render_frame`."""
        return render_frame(self, env_index)

    def _present_mask(self) -> Tensor:
        transforms = self.transform if isinstance(self.transform, Compose) else [self.transform]
        mask = next(transform for transform in transforms if isinstance(transform, MergeGroups)).legal_actions
        return mask.expand(*self.batch_size, *mask.shape[-2:])


class SerialMultiAgentEnv(_OneGroup, SerialEnv):
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
        self.__dict__["layout"] = _layout_of(create_env)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close all environments.

        TorchRL then gives PyTorch back the threads that worker processes had, and a serial environment has none: a
        process set to one thread would go on with several, which is many times slower where the cores are busy.
        """
        num_threads = torch.get_num_threads()
        super().close(raise_if_closed=raise_if_closed)
        torch.set_num_threads(num_threads)


class ParallelMultiAgentEnv(_OneGroup, ParallelEnv):
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
        self.__dict__["layout"] = _layout_of(create_env)


def _layout_of(create_env: Callable[[], MultiAgentEnv] | Sequence[Callable[[], MultiAgentEnv]]) -> AgentLayout:
    # Environments in other processes cannot be asked, so one is made to look at.
    example = create_env() if callable(create_env) else create_env[0]()
    layout = example.layout
    example.close()
    return layout
