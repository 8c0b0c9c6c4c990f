"""Undiscounted returns over whole episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys
from matwm_rl.arguments import check_ints
from matwm_rl.envs import AgentLayout
from matwm_rl.finite import check_finite
from matwm_rl.functional import keep_random_state
from matwm_rl.modules.actor_critic import check_logits
from matwm_rl.settings import Settings, setting


@dataclass(kw_only=True)
class EvaluationConfig(Settings):
    """How a run is evaluated.

    Attributes:
        every: env steps between evaluations; ``None``: a tenth of the run's.
        episodes: of every match, while training; few, because there are ten evaluations.
        final_episodes: of every match, at the end.
        num_envs: environments that play side by side.
        keep_policies: save the policy at every evaluation, as ``policies/STEPS.pt``.

    Examples:
        >>> EvaluationConfig(every=1000).episodes
        20
    """

    every: int | None = setting(None, minimum=1)
    episodes: int = setting(20, minimum=1)
    final_episodes: int = setting(100, minimum=1)
    num_envs: int = setting(10, minimum=1)
    keep_policies: bool = False


@dataclass(frozen=True)
class Returns:
    """Undiscounted returns of whole episodes.

    Attributes:
        values: ``[episodes, N]``.
        layout: layout of the environment, with the names and groups of its agents.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> returns = Returns(torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]]), make_env("mock").layout)
        >>> returns.per_agent(), returns.per_group()
        ({'hunter_0': 2.0, 'hunter_1': 4.0, 'prey_0': 6.0}, {'hunter': 3.0, 'prey': 6.0})
    """

    values: Tensor
    layout: AgentLayout

    def per_agent(self) -> dict[str, float]:
        """Return each agent's mean return, by its name; by ``group/name`` where groups have names in common."""
        names = self.layout.agent_names
        if len(set(names)) < len(names):
            names = [f"{group}/{name}" for group, members in self.layout.group_map.items() for name in members]
        return dict(zip(names, self.values.mean(0).tolist(), strict=True))

    def per_group(self) -> dict[str, float]:
        """Return the mean return of an agent of each original group, by the group's name."""
        means = iter(self.values.mean(0).tolist())
        return {group: sum(next(means) for _ in names) / len(names) for group, names in self.layout.group_map.items()}


@dataclass(frozen=True)
class Matches:
    """Returns of all matches of an evaluation.

    Attributes:
        returns: the returns of every match, by the match's name.
        judged: for a match in which only one group is tested, the group whose return is the result.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> returns = Returns(torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 7.0]]), make_env("mock").layout)
        >>> print(Matches({"self_play": returns, "against_random_prey": returns}, {"against_random_prey": "hunter"}))
        hunter 3.0, prey 6.0, against_random_prey 3.0
    """

    returns: dict[str, Returns]
    judged: dict[str, str] = field(default_factory=dict)

    @property
    def episodes(self) -> int:
        """Number of episodes of every match."""
        return min(len(returns.values) for returns in self.returns.values())

    def summary(self) -> dict[str, float]:
        """Return one flat table of mean returns.

        A match that is judged by a group has one entry, ``match``. Any other has one for every group: ``group``, or
        ``match/group`` if there are several such matches.
        """
        several = len(self.returns.keys() - self.judged.keys()) > 1
        out: dict[str, float] = {}
        for match, returns in self.returns.items():
            groups = returns.per_group()
            if match in self.judged:
                out[match] = groups[self.judged[match]]
            else:
                out.update({f"{match}/{group}" if several else group: value for group, value in groups.items()})
        return out

    def metrics(self) -> dict[str, float]:
        """Return the mean returns of all groups under the names for the log: ``evaluation/<match>/<group>``."""
        return {
            f"evaluation/{match}/{group}": value
            for match, returns in self.returns.items()
            for group, value in returns.per_group().items()
        }

    def per_agent(self) -> dict[str, dict[str, float]]:
        """Return every agent's mean return in every match, as ``{match: {agent: return}}``."""
        return {match: returns.per_agent() for match, returns in self.returns.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1f}" for name, value in self.summary().items())


ReportEpisodes = Callable[[int, int, int], None]
"""Called with the number of episodes played, the number of all episodes, and the number of steps so far."""
_report: ContextVar[ReportEpisodes | None] = ContextVar("report", default=None)


@contextmanager
def report_episodes(report: ReportEpisodes) -> Iterator[None]:
    """Have :func:`evaluate` tell how far it is, also where an environment's own play function calls it.

    Args:
        report: called as ``report(played, episodes, steps)`` before the first step and after every step. What it raises
            ends the evaluation.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import RandomActions
        >>> told = []
        >>> with report_episodes(lambda played, episodes, steps: told.append((played, episodes, steps))):
        ...     returns = evaluate(make_env("mock", seed=0), RandomActions(), episodes=2)
        >>> told[0], told[-1][:2]
        ((0, 2, 0), (2, 2))
    """
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


MAX_STEPS = 10_000
"""Steps after which :func:`evaluate` takes an episode for one that never ends."""


# TorchRL's Evaluator (0.14.1) does not serve: of a group of agents it returns NaN, or with reward_keys the sum over all
# agents, and it moves the global random state.
@torch.no_grad()
def evaluate(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int = EvaluationConfig.episodes,
    max_steps: int = MAX_STEPS,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> Returns:
    """Play whole episodes.

    Every environment of a batch plays the same number of episodes, so that short episodes are not over-represented.
    torch's global random state is what it was before, so that a training run does not depend on when it is evaluated.

    Args:
        env: made by :func:`~matwm_rl.envs.make_env`, one or a batch, with the policy's primer if it has one. Not one
            that a collector goes on with: it is reset, and left in the middle of an episode.
        policy: writes ``("agents", "action")``.
        episodes: smallest number of episodes; rounded up to a multiple of the number of environments.
        max_steps: an episode that is longer is an error, since the return of a part is not that of the whole.
        exploration: sample actions (default) or take the most probable (``ExplorationType.DETERMINISTIC``).

    Returns:
        the returns of all episodes.

    Raises:
        ValueError: if ``episodes`` or ``max_steps`` is below 1, or a return is not finite.
        RuntimeError: if an episode has not ended after ``max_steps`` steps.
        FloatingPointError: if the policy writes logits that are no distribution over the legal actions.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import RandomActions
        >>> env = make_env("mock", seed=0)
        >>> evaluate(env, RandomActions(), episodes=2).values.shape
        torch.Size([2, 3])
    """
    check_ints(1, episodes=episodes, max_steps=max_steps)
    num_envs = env.batch_size.numel()
    quota = -(-episodes // num_envs)
    layout: AgentLayout = env.layout
    returns = torch.zeros(num_envs, quota, layout.num_agents)
    played = torch.zeros(num_envs, dtype=torch.long)
    running = torch.zeros(num_envs, layout.num_agents)
    steps = torch.zeros(num_envs, dtype=torch.long)
    all_steps, report = 0, _report.get() or (lambda *_: None)
    report(0, quota * num_envs, all_steps)
    with keep_random_state(env.device), set_exploration_type(exploration):
        tensordict = env.reset()
        while bool((played < quota).any()):
            acting = policy(tensordict)
            check_logits(acting, env.layout.actions, acting.get(keys.ACTION_MASK), policy)
            step, tensordict = env.step_and_maybe_reset(acting)
            running += step.get(keys.REWARD).reshape(num_envs, -1).cpu()
            done = step.get(keys.DONE).reshape(num_envs).cpu()
            ended = (done & (played < quota)).nonzero().squeeze(-1)
            returns[ended, played[ended]] = running[ended]
            played += done
            running[done] = 0.0
            all_steps += 1
            report(int(played.clamp(max=quota).sum()), quota * num_envs, all_steps)
            steps = (steps + 1).masked_fill(done, 0)
            if (endless := (steps >= max_steps) & (played < quota)).any():
                raise RuntimeError(
                    f"an episode of environment {int(endless.nonzero()[0])} has not ended after max_steps={max_steps} "
                    "steps. Give the environment a limit, such as make_env's max_steps or max_cycles, or TorchRL's "
                    "StepCounter around it; or raise max_steps, in the call of evaluate or in a play function of your "
                    "own (register_evaluation)."
                )
    result = Returns(returns.flatten(0, 1), layout)
    check_finite(result.per_agent(), "the returns")
    return result
