"""Several games of PettingZoo in one environment of TorchRL, without a wrapper around each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.libs.pettingzoo import PettingZooWrapper

from matwm_rl.envs.actions import to_simulator
from matwm_rl.envs.episode_ends import end_by_agents
from matwm_rl.envs.registry import register_end_rule, register_renderer
from matwm_rl.envs.render import render_game
from matwm_rl.torchrl_internals import simulator


# TorchRL's way is a SerialEnv of wrapped games. There a step of mpe2's simple_tag takes 5 ms, of which the game
# itself needs 1. The rest is the work of the wrapper, the transforms and the batch, done once for all games here.
class GameBatch(EnvBase):
    """A batch ``[E]`` of PettingZoo games, which all step at once; it has the entries of ``PettingZooWrapper``.

    It is for games in which all agents act in every step and end together, as in mpe2, with vector observations.

    Args:
        make: makes one wrapped game; all must be alike.
        num_envs: number of games E.

    Raises:
        ValueError: if an agent is missing in what a game returns, or ends before the others.

    Examples:
        >>> from mpe2 import simple_tag_v3
        >>> from matwm_rl.envs.families import wrap_pettingzoo
        >>> env = GameBatch(lambda: wrap_pettingzoo(simple_tag_v3.parallel_env(max_cycles=5)), num_envs=3)
        >>> env.rollout(10)["adversary", "observation"].shape
        torch.Size([3, 5, 3, 16])
    """

    def __init__(self, make: Callable[[], PettingZooWrapper], num_envs: int) -> None:
        self._wrapped = [make() for _ in range(num_envs)]
        first = self._wrapped[0]
        super().__init__(device=first.device, batch_size=torch.Size([num_envs]))
        self.games = [simulator(env) for env in self._wrapped]
        self.group_map: dict[str, list[str]] = first.group_map
        self.observation_spec = first.full_observation_spec.expand(num_envs)
        self.full_action_spec = first.full_action_spec.expand(num_envs)
        self.full_reward_spec = first.full_reward_spec.expand(num_envs)
        self.full_done_spec = first.full_done_spec.expand(num_envs)
        self._observed = {group: self.observation_spec[group, "observation"].zero().cpu() for group in self.group_map}

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """Seed all games, with the seeds that ``SerialEnv`` would give them."""
        for env in self._wrapped:
            seed = env.set_seed(seed, static_seed)
        return seed

    def _set_seed(self, seed: int | None) -> None:
        self.set_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        indices = range(len(self.games)) if chosen is None else chosen.view(-1).nonzero().view(-1).tolist()
        for index in indices:
            observations, _ = self.games[index].reset(**kwargs)
            self._keep(index, observations)
        never = torch.zeros(len(self.games), dtype=torch.bool)
        return self._output(terminated=never, truncated=never)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        chosen = {group: tensordict.get((group, "action")).cpu().numpy() for group in self.group_map}
        rewards = {group: np.zeros((len(self.games), len(names), 1), "f4") for group, names in self.group_map.items()}
        ends = {name: np.zeros(len(self.games), dtype=bool) for name in ("terminated", "truncated")}
        for index, game in enumerate(self.games):
            actions = {
                agent: to_simulator(chosen[group][index, number])
                for group, names in self.group_map.items()
                for number, agent in enumerate(names)
            }
            observations, reward, terminations, truncations, _ = game.step(actions)
            self._keep(index, observations)
            for group, names in self.group_map.items():
                rewards[group][index, :, 0] = [reward[agent] for agent in names]
            for name, told in (("terminated", terminations), ("truncated", truncations)):
                ends[name][index] = self._common(told, name)
        output = self._output(**{name: torch.from_numpy(ended) for name, ended in ends.items()})
        for group, reward in rewards.items():
            output.set((group, "reward"), torch.from_numpy(reward).to(self.device))
        return output

    def _keep(self, index: int, observations: dict[str, Any]) -> None:
        for group, names in self.group_map.items():
            if missing := [agent for agent in names if agent not in observations]:
                raise ValueError(f"agents {missing} observe nothing; in a GameBatch all agents act in every step.")
            seen = np.stack([observations[agent] for agent in names])
            self._observed[group][index] = torch.from_numpy(seen)

    def _common(self, told: dict[str, bool], name: str) -> bool:
        values = {bool(value) for value in told.values()}
        if len(values) > 1:
            raise ValueError(f"{name} is {told}; in a GameBatch the lives of all agents end together.")
        return values.pop()

    def _output(self, *, terminated: torch.Tensor, truncated: torch.Tensor) -> TensorDict:
        flags = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        entries: dict[str, Any] = {name: flag.unsqueeze(-1) for name, flag in flags.items()}
        for group, names in self.group_map.items():
            shape = (len(self.games), len(names))
            of_agents = {name: flag.view(-1, 1, 1).expand(*shape, 1).clone() for name, flag in flags.items()}
            mask = torch.ones(shape, dtype=torch.bool)
            entries[group] = TensorDict(
                {"observation": self._observed[group].clone(), "mask": mask, **of_agents}, shape
            )
        return TensorDict(entries, self.batch_size).to(self.device)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close all games."""
        if not self.is_closed:
            for game in self.games:
                game.close()
        super().close(raise_if_closed=raise_if_closed)


def _render(env: EnvBase, env_index: int) -> NDArray[np.uint8]:
    assert isinstance(env, GameBatch)
    return render_game(env.games[env_index])


register_end_rule(GameBatch, end_by_agents)
register_renderer(GameBatch, _render)
