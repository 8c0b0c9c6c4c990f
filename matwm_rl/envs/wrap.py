"""One function that wraps a multi-agent environment of any library."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torchrl.envs import EnvBase, MarlGroupMapType

from matwm_rl.envs.families import TupleGame, wrap_pettingzoo
from matwm_rl.envs.images import Images
from matwm_rl.envs.multi_agent_env import MultiAgentEnv

EXPECTED = (
    "a grouped TorchRL environment, a MultiAgentEnv, a PettingZoo parallel environment or a Gymnasium environment with "
    "Tuple spaces"
)


def wrap_env(
    env: Any,
    *,
    group_map: dict[str, list[str]] | MarlGroupMapType | None = None,
    device: torch.device | str | None = None,
    image_size: int = 64,
    images: Images = "auto",
) -> MultiAgentEnv:
    """Wrap an environment of your own as one dense ``"agents"`` group; see :class:`~matwm_rl.envs.MultiAgentEnv`.

    Nothing has to be said of masks, groups and deaths:

    - of **PettingZoo**, the parallel environment. Masks of legal actions may be in ``Dict(observation, action_mask)``
      or in the infos; agents may differ in observations and actions, die, join and return.
    - of **Gymnasium**, an environment whose action and observation spaces are of the kind ``Tuple``, of one space for
      each agent, as those of rware and lbforaging. Rewards are a list, or one number that is each agent's.
    - of **TorchRL**, an environment with a ``group_map``, as its wrappers of SMACv2 and MeltingPot have it.

    To have it by name, in several environments at once, or in the scripts, write a function that returns it, and call
    :func:`~matwm_rl.envs.make_env` with the function, or with its name ``"package.module:function"``.

    Args:
        env: the environment; a :class:`~matwm_rl.envs.MultiAgentEnv` is returned as it is.
        group_map: of PettingZoo and Gymnasium, the groups ``{group: [agent names]}``. By default agents ``name_0``,
            ``name_1`` are the group ``name``, if they have equal spaces; those of unequal spaces get groups of their
            own.
        device: device of the tensors given and received; by default the environment's own.
        image_size: side of the square to which images are resized.
        images: which observations are images; see :class:`~matwm_rl.envs.MultiAgentEnv`.

    Raises:
        TypeError: if ``env`` is none of these.
        ValueError: if its agents act in turns, its actions are neither discrete nor vectors between finite bounds, or
            its groups or spaces cannot be read.

    Examples:
        >>> from mpe2 import simple_tag_v3
        >>> env = wrap_env(simple_tag_v3.parallel_env(max_cycles=10))
        >>> env.rollout(30)["next", "agents", "reward"].shape
        torch.Size([10, 4, 1])
        >>> import gymnasium, lbforaging
        >>> env = wrap_env(gymnasium.make("Foraging-5x5-2p-1f-v3", disable_env_checker=True))
        >>> env.layout.agent_names, env.action_counts
        (['agent_0', 'agent_1'], [6, 6])
    """
    if isinstance(env, EnvBase):
        if group_map is not None:
            raise ValueError("group_map is of PettingZoo and Gymnasium; a TorchRL environment has a group_map itself.")
        grouped = env if device is None else env.to(device)
    else:
        gymnasium = sys.modules.get("gymnasium")
        game = TupleGame(env) if gymnasium is not None and isinstance(env, gymnasium.Env) else env
        methods = (getattr(game, name, None) for name in ("observation_space", "action_space", "reset", "step"))
        if isinstance(env, type) or not all(map(callable, methods)):
            raise TypeError(f"got {_describe(env)}; expected {EXPECTED}.")
        grouped = wrap_pettingzoo(game, group_map=group_map, device=device)
    if isinstance(grouped, MultiAgentEnv):
        return grouped
    return MultiAgentEnv(grouped, image_size=image_size, images=images)


def _describe(env: Any) -> str:
    if isinstance(env, type):
        return f"the class {env.__name__}, which has to be called"
    return "a function, which has to be called" if callable(env) else f"a {type(env).__name__}"
