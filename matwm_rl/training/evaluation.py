"""Mean returns over whole episodes, and the cross-play of simple_tag."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.envs import AgentLayout
from matwm_rl.training.opponents import CrossPlay, RandomActions, TagScript


@dataclass(frozen=True)
class Returns:
    """Undiscounted returns of whole episodes.

    Attributes:
        values: ``[episodes, N]``.
        layout: who the agents are.
    """

    values: Tensor
    layout: AgentLayout

    def per_agent(self) -> dict[str, float]:
        """Mean return of each agent, by name."""
        return dict(zip(self.layout.agent_names, self.values.mean(0).tolist(), strict=True))

    def per_group(self) -> dict[str, float]:
        """Mean return of an agent of each original group."""
        means = self.per_agent()
        return {group: sum(means[name] for name in names) / len(names) for group, names in self.layout.group_map.items()}


@torch.no_grad()
def evaluate(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int = 50,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> Returns:
    """Play whole episodes.

    Every environment of a batched one plays the same number, so that short episodes are not over-represented.

    Args:
        env: made by :func:`~matwm_rl.envs.make_env`, with the policy's primer if it has one; any number of environments.
        policy: writes ``("agents", "action")``.
        episodes: at least so many; rounded up to a multiple of the number of environments.
        exploration: sample actions (default) or take the likeliest (``ExplorationType.DETERMINISTIC``).

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> evaluate(env, RandomActions(), episodes=2).values.shape
        torch.Size([2, 3])
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    num_envs = env.batch_size.numel()
    quota = -(-episodes // num_envs)
    layout: AgentLayout = env.layout
    returns = torch.zeros(num_envs, quota, layout.num_agents)
    played = torch.zeros(num_envs, dtype=torch.long)
    running = torch.zeros(num_envs, layout.num_agents)
    tensordict = env.reset()
    with set_exploration_type(exploration):
        while bool((played < quota).any()):
            step, tensordict = env.step_and_maybe_reset(policy(tensordict))
            running += step.get(keys.REWARD).reshape(num_envs, -1).cpu()
            done = step.get(keys.DONE).reshape(num_envs).cpu()
            ended = (done & (played < quota)).nonzero().squeeze(-1)
            returns[ended, played[ended]] = running[ended]
            played += done
            running[done] = 0.0
    return Returns(returns.flatten(0, 1), layout)


def evaluate_tag(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int = 50,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> dict[str, Returns]:
    """Cross-play of simple_tag, where returns of self-play mean little since both sides learn.

    Trained pursuers against a random and a fleeing evader, and random and chasing pursuers against the trained evader.
    To be judged by the *pursuers'* mean return, in the last two lower is better.

    Args:
        env: simple_tag of mpe2 or VMAS, with the policy's primer.
        policy: the trained agents.
        episodes: see :func:`evaluate`.
        exploration: see :func:`evaluate`.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> sorted(evaluate_tag(env, RandomActions(), episodes=1))[:2]
        ['adversaries_vs_fleeing_prey', 'adversaries_vs_random_prey']
    """
    script, random = TagScript(env.layout), RandomActions()
    matches = {
        "adversaries_vs_random_prey": (random, "adversary"),
        "adversaries_vs_fleeing_prey": (script, "adversary"),
        "prey_vs_random_adversaries": (random, "agent"),
        "prey_vs_chasing_adversaries": (script, "agent"),
    }
    return {
        name: evaluate(
            env, CrossPlay(policy, opponents, env.layout, [group]), episodes=episodes, exploration=exploration
        )
        for name, (opponents, group) in matches.items()
    }


def is_tag(layout: AgentLayout, env_name: str) -> bool:
    """Whether cross-play applies: simple_tag with one evader."""
    return "simple_tag" in env_name and len(layout.group_map.get("agent", ())) == 1
