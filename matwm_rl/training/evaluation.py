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

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> returns = Returns(torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]]), make_env("mock").layout)
        >>> returns.per_agent(), returns.per_group()
        ({'hunter_0': 2.0, 'hunter_1': 4.0, 'prey_0': 6.0}, {'hunter': 3.0, 'prey': 6.0})
    """

    values: Tensor
    layout: AgentLayout

    def per_agent(self) -> dict[str, float]:
        """Mean return of each agent, by name."""
        return dict(zip(self.layout.agent_names, self.values.mean(0).tolist(), strict=True))

    def per_group(self) -> dict[str, float]:
        """Mean return of an agent of each original group."""
        means = self.per_agent()
        return {
            group: sum(means[name] for name in names) / len(names) for group, names in self.layout.group_map.items()
        }


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
        env: made by :func:`~matwm_rl.envs.make_env`, one or a batch, with the policy's primer if it has one.
        policy: writes ``("agents", "action")``.
        episodes: at least so many; rounded up to a multiple of the number of environments.
        exploration: sample actions (default) or take the likeliest (``ExplorationType.DETERMINISTIC``).

    Returns:
        the returns of all episodes.

    Raises:
        ValueError: if there are no episodes to play.

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

    Returns:
        match to returns.

    Raises:
        ValueError: if the environment is not simple_tag with one evader, or there are no episodes to play.

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


@dataclass(frozen=True)
class Matches:
    """Returns of all matches of an evaluation.

    Attributes:
        returns: match to returns.
        judged: match to the group it is judged by, where it is judged by one.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> returns = Returns(torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]]), make_env("mock").layout)
        >>> print(Matches({"self_play": returns, "against_random_prey": returns}, {"against_random_prey": "hunter"}))
        hunter 3.0, prey 6.0, against_random_prey 3.0
    """

    returns: dict[str, Returns]
    judged: dict[str, str]

    @property
    def episodes(self) -> int:
        """Episodes of every match."""
        return min(len(returns.values) for returns in self.returns.values())

    def summary(self) -> dict[str, float]:
        """Flat: the judged group's mean return of every match, or ``{group: mean return}`` of self-play."""
        out: dict[str, float] = {}
        for match, returns in self.returns.items():
            groups = returns.per_group()
            out.update({match: groups[self.judged[match]]} if match in self.judged else groups)
        return out

    def metrics(self) -> dict[str, float]:
        """Names for the log: ``evaluation/<match>/<group>``."""
        return {
            f"evaluation/{match}/{group}": value
            for match, returns in self.returns.items()
            for group, value in returns.per_group().items()
        }

    def per_agent(self) -> dict[str, dict[str, float]]:
        """Mean return of every agent in every match."""
        return {match: returns.per_agent() for match, returns in self.returns.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in self.summary().items())


def evaluate_matches(
    env_name: str,
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int = 50,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> Matches:
    """Evaluate as fits the environment: cross-play for simple_tag with one evader, self-play for all others.

    Args:
        env_name: as given to :func:`~matwm_rl.envs.make_env`.
        env: see :func:`evaluate`.
        policy: see :func:`evaluate`.
        episodes: of every match; see :func:`evaluate`.
        exploration: see :func:`evaluate`.

    Returns:
        the returns of every match, and what they are judged by.

    Raises:
        ValueError: if there are no episodes to play.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> evaluate_matches("mock", make_env("mock", seed=0), RandomActions(), episodes=2).summary().keys()
        dict_keys(['hunter', 'prey'])
    """
    if "simple_tag" in env_name and len(env.layout.group_map.get("agent", ())) == 1:
        tag = evaluate_tag(env, policy, episodes=episodes, exploration=exploration)
        return Matches(tag, dict.fromkeys(tag, "adversary"))
    return Matches({"self_play": evaluate(env, policy, episodes=episodes, exploration=exploration)}, {})
