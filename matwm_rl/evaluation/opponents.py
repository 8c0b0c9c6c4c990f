"""Opponents for trained agents: random actions, and matches between two policies.

Any TensorDict module that writes ``("agents", "action")`` can be an opponent: :class:`CrossPlay` lets it act for some
of the agents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from matwm_rl import keys
from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_kinds
from matwm_rl.checks import read_entry
from matwm_rl.envs import AgentLayout
from matwm_rl.evaluation.returns import EvaluationConfig, Matches, evaluate
from matwm_rl.functional import random_index


class RandomActions(TensorDictModuleBase):
    """Policy that draws every agent's action uniformly from its legal actions.

    Args:
        actions: the action space, ``env.layout.actions``. Without it actions are discrete.

    Keys read: ``("agents", "action_mask")``; written: ``("agents", "action")``.

    Raises:
        KeyError: if there is no action mask.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> make_env("mock", seed=0).rollout(3, RandomActions())["agents", "action"].shape
        torch.Size([3, 3])
    """

    def __init__(self, actions: ActionSpace | None = None) -> None:
        super().__init__()
        if actions is not None:
            check_kinds(ActionSpace, actions=actions)
        self._draw = random_index if actions is None else actions.random
        self.in_keys: list[NestedKey] = [keys.ACTION_MASK]
        self.out_keys: list[NestedKey] = [keys.ACTION]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write random legal actions."""
        mask = read_entry(tensordict, keys.ACTION_MASK, self)
        return tensordict.set(keys.ACTION, self._draw(mask))


class CrossPlay(TensorDictModuleBase):
    """Policy in which some agents act by one policy and all others by another.

    Args:
        policy: acts for the agents of ``groups``.
        opponents: acts for all other agents; any module that writes ``("agents", "action")``.
        layout: layout of the environment.
        groups: names of original groups of the environment.

    Keys read: those of both; the opponents get the entries they read and no others. Keys written:
    ``("agents", "action")``, and whatever else ``policy`` writes.

    Raises:
        ValueError: if a group does not exist.
        KeyError: if an entry that is read is missing.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import TagScript
        >>> env = make_env("mpe2/simple_tag_v3", seed=0)
        >>> chasers = CrossPlay(TagScript(env.layout), RandomActions(), env.layout, ["adversary"])
        >>> env.rollout(3, chasers)["agents", "action"].shape
        torch.Size([3, 4])
    """

    acts: Tensor

    def __init__(
        self,
        policy: TensorDictModuleBase,
        opponents: TensorDictModuleBase,
        layout: AgentLayout,
        groups: Sequence[str],
    ) -> None:
        super().__init__()
        check_kinds(nn.Module, policy=policy, opponents=opponents)
        check_kinds(AgentLayout, layout=layout)
        check_kinds((list, tuple), groups=groups)
        names = list(layout.group_map)
        if unknown := [group for group in groups if group not in names]:
            raise ValueError(f"unknown groups {unknown}; the environment has {names}")
        self.policy, self.opponents = policy, opponents
        acts = torch.tensor([names[index] in groups for index in layout.group_index])
        acts = acts.view(-1, *[1] * len(layout.actions.action_shape))
        self.register_buffer("acts", acts, persistent=False)
        self.in_keys = list(dict.fromkeys([*policy.in_keys, *opponents.in_keys]))
        self.out_keys = list(policy.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actions of both sides."""
        theirs = self.opponents(tensordict.select(*self.opponents.in_keys, strict=False)).get(keys.ACTION)
        ours = self.policy(tensordict).get(keys.ACTION)
        return tensordict.set(keys.ACTION, torch.where(self.acts, ours, theirs))


def against_random(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int = EvaluationConfig.episodes,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> Matches:
    """Play one match for every group of agents: the trained agents of the group against random agents in all others.

    Where groups compete and all of them learn, returns of self-play do not tell how good any is. Every match is judged
    by the mean return of the trained group. The function is what :class:`Evaluation` takes as ``play``, for any
    environment with several groups.

    Args:
        env: an environment with two groups or more, with the policy's primer if it has one.
        policy: the trained agents.
        episodes: episodes of every match; see :func:`evaluate`.
        exploration: see :func:`evaluate`.

    Returns:
        the returns of the matches, which are called ``<group>_vs_random``.

    Raises:
        ValueError: if there is a single group, which has no opponents, or ``episodes`` is below 1.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import Evaluation, register_evaluation
        >>> against_random(make_env("mock", seed=0), RandomActions(), episodes=2).summary().keys()
        dict_keys(['hunter_vs_random', 'prey_vs_random'])
        >>> register_evaluation("mine/contest*", Evaluation(against_random))
    """
    layout: AgentLayout = env.layout
    groups, random = list(layout.group_map), RandomActions(layout.actions)
    if len(groups) < 2:
        raise ValueError(f"expected groups that play against each other, got the single group {groups}")
    returns = {
        f"{group}_vs_random": evaluate(
            env, CrossPlay(policy, random, layout, [group]), episodes=episodes, exploration=exploration
        )
        for group in groups
    }
    return Matches(returns, dict(zip(returns, groups, strict=True)))
