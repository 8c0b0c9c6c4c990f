"""Gives Gymnasium environments with Tuple spaces the methods of PettingZoo's parallel environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matwm_rl.envs.actions import to_simulator


class TupleGame:
    """A Gymnasium environment of several agents, with the methods of a PettingZoo parallel environment.

    Action and observation spaces are of the kind ``Tuple``, of one space for each agent; ``step`` takes a tuple of
    actions and returns sequences of observations and rewards. A reward that is one number is each agent's.
    ``terminated`` and ``truncated`` are of the whole episode or sequences; an agent that ended alone has left. Masks of
    legal actions are ``info["action_mask"]``, one for each agent, if there are any. The agents are called ``agent_0``,
    ``agent_1`` and so on.

    Args:
        env: the Gymnasium environment.

    Raises:
        ValueError: if a space is no ``Tuple``, or they are not of equally many agents.

    Examples:
        >>> import gymnasium, lbforaging
        >>> game = TupleGame(gymnasium.make("Foraging-5x5-2p-1f-v3", disable_env_checker=True))
        >>> game.possible_agents
        ['agent_0', 'agent_1']
    """

    def __init__(self, env: Any) -> None:
        spaces = {name: getattr(env, name) for name in ("observation_space", "action_space")}
        for name, space in spaces.items():
            if type(space).__name__ != "Tuple":
                raise ValueError(
                    f"the Gymnasium environment {env} has the {name} {space}; expected a Tuple space, of one space for "
                    "each agent."
                )
        self._observation_spaces, self._action_spaces = (tuple(space.spaces) for space in spaces.values())
        if len(self._observation_spaces) != len(self._action_spaces):
            raise ValueError(
                f"the Gymnasium environment {env} has {len(self._observation_spaces)} observation spaces and "
                f"{len(self._action_spaces)} action spaces; expected as many, one for each agent."
            )
        self.env = env
        self.metadata = env.metadata
        self.possible_agents = [f"agent_{index}" for index in range(len(self._action_spaces))]
        self.agents: list[str] = []

    @property
    def render_mode(self) -> Any:
        """How the environment was made to be drawn."""
        return self.env.render_mode

    @property
    def unwrapped(self) -> Any:
        """The Gymnasium environment without wrappers."""
        return self.env.unwrapped

    def observation_space(self, agent: str) -> Any:
        """Return what an agent observes."""
        return self._observation_spaces[self.possible_agents.index(agent)]

    def action_space(self, agent: str) -> Any:
        """Return what an agent can do."""
        return self._action_spaces[self.possible_agents.index(agent)]

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode, in which all agents are there."""
        observations, info = self._parts(self.env.reset(seed=seed, options=options), 2)
        self.agents = list(self.possible_agents)
        return self._each("observations", observations), self._infos(info)

    def step(self, actions: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """Take a step with the actions of all agents; those of agents that left are passed on too."""
        joint = tuple(to_simulator(actions[agent]) for agent in self.possible_agents)
        observations, rewards, terminated, truncated, info = self._parts(self.env.step(joint), 5)
        acting = self.agents
        seen = self._of(acting, self._each("observations", observations))
        earned, died, cut = (
            self._of(acting, self._each(what, given, is_shared=np.ndim(given) == 0))
            for what, given in (("rewards", rewards), ("terminated", terminated), ("truncated", truncated))
        )
        self.agents = [agent for agent in acting if not (died[agent] or cut[agent])]
        return seen, earned, died, cut, self._of(acting, self._infos(info))

    def render(self) -> Any:
        """Draw the environment, as its own ``render`` does."""
        return self.env.render()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _infos(self, info: Mapping[str, Any]) -> dict[str, Any]:
        if "action_mask" not in info:
            return {agent: {} for agent in self.possible_agents}
        masks = self._each("info['action_mask']", info["action_mask"])
        return {agent: {"action_mask": mask} for agent, mask in masks.items()}

    def _parts(self, given: Any, number: int) -> Sequence[Any]:
        if not isinstance(given, tuple) or len(given) != number or not isinstance(given[-1], Mapping):
            call = "reset" if number == 2 else "step"
            raise ValueError(
                f"{type(self.unwrapped).__name__}.{call} returned {str(given)[:80]!r}; expected a tuple of {number}, "
                "of which the last is the dict of infos, as Gymnasium has it"
            )
        return given

    def _each(self, what: str, given: Any, *, is_shared: bool = False) -> dict[str, Any]:
        """Give each agent its part of a sequence, or what is shared."""
        if is_shared:
            return dict.fromkeys(self.possible_agents, given)
        if not isinstance(given, Sequence | np.ndarray) or len(given) != len(self.possible_agents):
            raise ValueError(
                f"{type(self.unwrapped).__name__} gave the {what} {str(given)[:80]!r}; expected a sequence of "
                f"{len(self.possible_agents)}, one for each agent"
            )
        return dict(zip(self.possible_agents, given, strict=True))

    @staticmethod
    def _of(agents: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
        return {agent: given[agent] for agent in agents}
