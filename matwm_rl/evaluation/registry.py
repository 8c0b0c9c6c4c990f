"""How each environment is evaluated and drawn, registered by the name that ``make_env`` is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Protocol

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Size
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType

from matwm_rl.arguments import check_kinds, read_text
from matwm_rl.envs import AgentLayout, MultiAgentEnv
from matwm_rl.envs.entries import agent_specs, observation_keys
from matwm_rl.evaluation.gif import Frame
from matwm_rl.evaluation.returns import EvaluationConfig, Matches, evaluate


class Play(Protocol):
    """Play all matches of an evaluation."""

    def __call__(
        self, env: EnvBase, policy: TensorDictModuleBase, *, episodes: int, exploration: ExplorationType
    ) -> Matches:
        """Return the returns of ``episodes`` episodes of every match."""
        ...


def self_play(
    env: EnvBase, policy: TensorDictModuleBase, *, episodes: int, exploration: ExplorationType = ExplorationType.RANDOM
) -> Matches:
    """Play one match, ``"self_play"``, in which the policy acts for all agents; see :func:`evaluate`."""
    return Matches({"self_play": evaluate(env, policy, episodes=episodes, exploration=exploration)}, {})


@dataclass(frozen=True)
class Evaluation:
    """How an environment is evaluated and drawn; by default in self-play, drawn by the environment itself.

    Attributes:
        play: called as ``play(env, policy, episodes=..., exploration=...)``, returns a :class:`Matches`. ``env.layout``
            tells which agents there are.
        draw: given the environment's layout, returns what :func:`record_gif` takes as ``draw``, for environments that
            cannot render themselves, or not well.
        references: known returns for :func:`plot_learning_curves`, as ``{match: {label: value}}``.
        observation_names: given the environment's layout, returns the names of the entries of the observations for
            :func:`plot_open_loop`, as ``{agent or group: names}``; see :func:`observation_names`.

    Examples:
        >>> Evaluation(references={"self_play": {"random": -1.0}}).play.__name__
        'self_play'
    """

    play: Play = self_play
    draw: Callable[[AgentLayout], Callable[[TensorDictBase], Frame] | None] | None = None
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    observation_names: Callable[[AgentLayout], Mapping[str, Sequence[str]]] | None = None


_REGISTERED: list[tuple[str, Evaluation]] = []


def register_evaluation(pattern: str, evaluation: Evaluation) -> None:
    """Set how the environments whose names match a pattern are evaluated and drawn.

    If several patterns match a name, the one registered last applies.

    Args:
        pattern: for names as given to :func:`~matwm_rl.envs.make_env`, with the wildcards of :mod:`fnmatch`, for
            example ``"*/simple_tag*"``. Upper and lower case differ.
        evaluation: what to do for these environments.

    Examples:
        Evaluate trained hunters against random prey. Any TensorDict module that writes the action can be the opponent:

        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import CrossPlay, RandomActions, evaluate_matches
        >>> def play(env, policy, *, episodes, exploration):
        ...     hunters = CrossPlay(policy, RandomActions(), env.layout, ["hunter"])
        ...     returns = evaluate(env, hunters, episodes=episodes, exploration=exploration)
        ...     return Matches({"hunters_vs_random": returns}, {"hunters_vs_random": "hunter"})
        >>> register_evaluation("mine/hunt*", Evaluation(play))
        >>> env = make_env("mock", seed=0)
        >>> evaluate_matches("mine/hunt_v0", env, RandomActions(), episodes=2).summary().keys()
        dict_keys(['hunters_vs_random'])
    """
    read_text("pattern", pattern)
    check_kinds(Evaluation, evaluation=evaluation)
    _REGISTERED.append((pattern, evaluation))


def find_evaluation(env_name: str) -> Evaluation:
    """Return the evaluation registered for an environment.

    Args:
        env_name: as given to :func:`~matwm_rl.envs.make_env`.

    Returns:
        the last one registered with a pattern that matches, ``Evaluation()`` if there is none.

    Examples:
        >>> find_evaluation("vmas/simple_tag").draw
        <class 'matwm_rl.evaluation.simple_tag.DrawTag'>
        >>> find_evaluation("mock") == Evaluation()
        True
    """
    matching = (found for pattern, found in reversed(_REGISTERED) if fnmatchcase(env_name, pattern))
    return next(matching, Evaluation())


def evaluate_matches(
    env_name: str,
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int = EvaluationConfig.episodes,
    exploration: ExplorationType = ExplorationType.RANDOM,
) -> Matches:
    """Play the matches that are registered for an environment, or self-play if none are registered.

    Args:
        env_name: as given to :func:`~matwm_rl.envs.make_env`.
        env: see :func:`evaluate`.
        policy: see :func:`evaluate`.
        episodes: episodes of every match; see :func:`evaluate`.
        exploration: see :func:`evaluate`.

    Returns:
        the returns of every match, and the group that each is judged by.

    Raises:
        ValueError: if ``episodes`` is below 1.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import RandomActions
        >>> evaluate_matches("mock", make_env("mock", seed=0), RandomActions(), episodes=2).summary().keys()
        dict_keys(['hunter', 'prey'])
    """
    return find_evaluation(env_name).play(env, policy, episodes=episodes, exploration=exploration)


def observation_names(env_name: str, env: EnvBase) -> dict[str, Sequence[str]]:
    """Return the names of the entries of the agents' vector observations, where they are known.

    They are those that are registered for the environment (:class:`Evaluation`). Else they are read from its specs: an
    observation of several named entries, or with several dimensions, tells what its numbers are.

    Args:
        env_name: as given to :func:`~matwm_rl.envs.make_env`.
        env: the environment, with any transforms around it.

    Returns:
        ``{agent or group: names}``, for :func:`plot_open_loop`; nothing for those of which nothing is known.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> names = observation_names("mpe2/simple_tag_v3", make_env("mpe2/simple_tag_v3"))
        >>> names["adversary_0"][:5]
        ['own velocity x', 'own velocity y', 'own position x', 'own position y', 'obstacle 1 x']
        >>> observation_names("mock", make_env("mock"))
        {}
    """
    registered = find_evaluation(env_name).observation_names
    if registered is not None:
        return dict(registered(env.layout))
    while isinstance(env, TransformedEnv) and not isinstance(env, MultiAgentEnv):
        env = env.base_env
    if not isinstance(env, MultiAgentEnv) or env.layout.is_image:
        return {}
    names: dict[str, Sequence[str]] = {}
    spec = env.base_env.full_observation_spec
    for group, agents in env.layout.group_map.items():
        keys = observation_keys(spec.keys(True, True), group)
        shapes = {key: [entry.shape for entry in agent_specs(env.base_env, spec, key, agents)] for key in keys}
        if len(keys) == 1 and all(len(shape) == 1 for shape in shapes[keys[0]]):
            continue
        for agent, name in enumerate(agents):
            entries = [_entry_names(key[1:], shapes[key][agent]) for key in keys]
            names[name] = [name for entry in entries for name in entry]
    return names


def _entry_names(key: Sequence[str], shape: Size) -> list[str]:
    """Return a name for every number of an entry: ``position 1``, or ``observation 3, 4`` of several dimensions."""
    name = " ".join(key[1:] or key)
    if shape == (1,):
        return [name]
    places = product(*(range(side) for side in shape))
    return [f"{name} {', '.join(map(str, place))}" for place in places]
