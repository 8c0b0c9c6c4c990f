"""A small grouped environment whose observations, rewards and ends can be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from matwm_rl.arguments import check_ints, check_kinds, check_switches

GROUPS: dict[str, list[str]] = {"hunter": ["hunter_0", "hunter_1"], "prey": ["prey_0"]}
OBSERVATION_SIZES = {"hunter": 5, "prey": 3}
ACTION_COUNTS = {"hunter": 4, "prey": 3}
FIRST_INDEX = {"hunter": 0, "prey": 2}
BOUNDS = {"hunter": ([-1.0, -1.0], [1.0, 1.0]), "prey": ([0.0], [2.0])}
"""Of continuous actions."""
MORTAL = 1
"""Index of the agent that dies: ``hunter_1``."""

Ending = Literal["truncate", "terminate", "alternate"]


class MockEnv(EnvBase):
    """Two hunters and one prey in two groups, with the conventions of TorchRL's PettingZooWrapper.

    It has the difficult features of real environments: groups of unequal observation sizes and action counts, legal
    actions that change, an agent that dies, both kinds of episode end. After ``t`` steps of an episode, agent ``i``
    (``hunter_0`` 0, ``hunter_1`` 1, ``prey_0`` 2)

    - observes ``[t, i, last action]``, and hunters also ``[episode, 1]``; the last action is -1 at first, episodes
      count from 0;
    - may take every action but ``t % (number of its actions)``; hunters have 4 actions, the prey 3;
    - receives the reward ``(i + 1) * action``.

    ``hunter_1`` dies in step ``death_step``: it is still rewarded for it, and from then on observes zeros.

    With ``continuous`` hunters take two numbers from -1 to 1, the prey one from 0 to 2. The last action that is
    observed is the first of them, and the reward is ``(i + 1)`` times their sum. There is no ``"action_mask"`` then.

    Keys of each group with n agents: ``"observation"`` ``[*E, n, 5 or 3]`` float32, ``"action"`` ``[*E, n]`` int64,
    ``"action_mask"`` ``[*E, n, 4 or 3]`` bool, ``"mask"`` ``[*E, n]`` bool (False for the dead and after the end),
    ``"reward"``, ``"done"``, ``"terminated"`` and ``"truncated"`` ``[*E, n, 1]``, beside the done keys ``[*E, 1]`` of
    the root. As in PettingZooWrapper, the dead are both terminated and truncated.

    Args:
        batch_size: batch size E of the environment.
        episode_length: number of steps of an episode.
        death_step: step in which ``hunter_1`` dies, or None if nobody does.
        ending: how an episode ends: ``"truncate"`` (a time limit), ``"terminate"``, or ``"alternate"``: even episodes
            truncate, odd ones terminate.
        continuous: whether actions are vectors of numbers.
        device: device of the tensors.

    Raises:
        ValueError: if a length or step is below 1, ``ending`` is unknown, or a living agent takes an illegal action.

    Examples:
        >>> MockEnv().reset()["hunter", "observation"]
        tensor([[ 0.,  0., -1.,  0.,  1.],
                [ 0.,  1., -1.,  0.,  1.]])
    """

    def __init__(
        self,
        *,
        batch_size: Sequence[int] = (),
        episode_length: int = 6,
        death_step: int | None = 3,
        ending: Ending = "alternate",
        continuous: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        check_ints(1, episode_length=episode_length)
        check_switches(continuous=continuous)
        if death_step is not None:
            check_ints(1, death_step=death_step)
        check_kinds(Sequence, batch_size=batch_size)
        for place, size in enumerate(batch_size):
            check_ints(1, **{f"batch_size[{place}]": size})
        if ending not in ("truncate", "terminate", "alternate"):
            raise ValueError(f"ending must be 'truncate', 'terminate' or 'alternate', got {ending!r}.")
        super().__init__(device=device, batch_size=torch.Size(batch_size))
        self.group_map = {group: list(names) for group, names in GROUPS.items()}
        self.episode_length = episode_length
        self.death_step = death_step
        self.ending = ending
        self.continuous = continuous
        self._steps = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        self._episodes = torch.full_like(self._steps, -1)
        self._last_actions = torch.full((*self.batch_size, 3), -1, device=self.device)
        self._make_specs()

    def _make_specs(self) -> None:
        groups = [self._group_specs(group) for group in GROUPS]
        observation, action, reward, done = (
            Composite(dict(zip(GROUPS, specs, strict=True)), shape=self.batch_size)
            for specs in zip(*groups, strict=True)
        )
        done.update(self._done_specs(self.batch_size))
        self.observation_spec, self.action_spec, self.reward_spec = observation, action, reward
        self.done_spec = done

    def _group_specs(self, group: str) -> tuple[Composite, Composite, Composite, Composite]:
        shape = torch.Size([*self.batch_size, len(GROUPS[group])])
        actions = ACTION_COUNTS[group]
        observation = {
            "observation": Unbounded([*shape, OBSERVATION_SIZES[group]], dtype=torch.float32, device=self.device),
            "action_mask": Categorical(2, shape=[*shape, actions], dtype=torch.bool, device=self.device),
            "mask": Categorical(2, shape=shape, dtype=torch.bool, device=self.device),
        }
        action = {"action": Categorical(actions, shape=shape, dtype=torch.int64, device=self.device)}
        if self.continuous:
            low, high = (torch.tensor(bound, device=self.device).expand(*shape, -1) for bound in BOUNDS[group])
            action = {"action": Bounded(low, high, shape=low.shape, dtype=torch.float32, device=self.device)}
            del observation["action_mask"]
        reward = {"reward": Unbounded([*shape, 1], dtype=torch.float32, device=self.device)}
        done = Composite(self._done_specs(shape), shape=shape)
        return Composite(observation, shape=shape), Composite(action, shape=shape), Composite(reward, shape=shape), done

    def _done_specs(self, shape: torch.Size) -> dict[str, Categorical]:
        names = ("done", "terminated", "truncated")
        return {name: Categorical(2, shape=[*shape, 1], dtype=torch.bool, device=self.device) for name in names}

    def _set_seed(self, seed: int | None) -> None:
        """Restart the count of episodes; nothing here is random."""
        self._episodes.fill_(-1)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        reset = None if tensordict is None else tensordict.get("_reset", None)
        reset = torch.ones_like(self._steps, dtype=torch.bool) if reset is None else reset.squeeze(-1)
        self._steps = self._steps.masked_fill(reset, 0)
        self._episodes = self._episodes + reset
        self._last_actions = self._last_actions.masked_fill(reset.unsqueeze(-1), -1)
        return self._output(*self._ends())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        taken, dead = [tensordict.get((group, "action")) for group in GROUPS], self._dead()
        for group, action in zip(GROUPS, taken, strict=True):
            self._check_legal(action, group, dead)
        self._steps = self._steps + 1
        self._last_actions = torch.cat([action[..., 0] for action in taken] if self.continuous else taken, -1)
        output = self._output(*self._ends())
        total = torch.cat([action.sum(-1) for action in taken], -1) if self.continuous else self._last_actions
        rewards = (total * torch.arange(1, 4, device=self.device)).masked_fill(dead, 0).float().unsqueeze(-1)
        for group in GROUPS:
            output.set((group, "reward"), rewards[..., self._rows(group), :].clone())
        return output

    def _check_legal(self, action: Tensor, group: str, dead: Tensor) -> None:
        if self.continuous:
            low, high = (torch.tensor(bound, device=self.device) for bound in BOUNDS[group])
            if not ((action >= low) & (action <= high)).all():
                raise ValueError(f"{group} took the actions {action.tolist()}, expected {BOUNDS[group]}.")
            return
        legal = self._legal(group).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        if not (legal | dead[..., self._rows(group)]).all():
            raise ValueError(
                f"{group} took the actions {action.tolist()}, of which some are illegal; in step t of an episode "
                f"action t % {ACTION_COUNTS[group]} is (steps: {self._steps.tolist()})."
            )

    def _rows(self, group: str) -> slice:
        return slice(FIRST_INDEX[group], FIRST_INDEX[group] + len(GROUPS[group]))

    def _dead(self) -> Tensor:
        """Return which agents have died, ``[*E, 3]``."""
        dead = torch.zeros_like(self._last_actions, dtype=torch.bool)
        if self.death_step is not None:
            dead[..., MORTAL] = self._steps >= self.death_step
        return dead

    def _legal(self, group: str) -> Tensor:
        actions = torch.arange(ACTION_COUNTS[group], device=self.device)
        legal = actions != (self._steps % ACTION_COUNTS[group]).unsqueeze(-1)
        return legal.unsqueeze(-2).repeat_interleave(len(GROUPS[group]), dim=-2)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Return for each agent whether it is terminated, and whether truncated, ``[*E, 3]`` each."""
        over = (self._steps >= self.episode_length).unsqueeze(-1)
        odd = (self._episodes % 2 == 1).unsqueeze(-1)
        terminates = {"truncate": torch.zeros_like(odd), "terminate": torch.ones_like(odd), "alternate": odd}
        by_termination = terminates[self.ending]
        dead = self._dead()
        # PettingZooWrapper reports agents that died in an earlier step as both terminated and truncated.
        dead_before = dead & (self._steps != self.death_step).unsqueeze(-1) if self.death_step is not None else dead
        return dead | (over & by_termination), dead_before | (over & ~by_termination & ~dead)

    def _output(self, terminated: Tensor, truncated: Tensor) -> TensorDictBase:
        done = terminated | truncated
        output = TensorDict(
            {
                "done": done.all(-1, keepdim=True),
                "terminated": terminated.all(-1, keepdim=True),
                "truncated": truncated.all(-1, keepdim=True),
            },
            batch_size=self.batch_size,
            device=self.device,
        )
        flags = {"done": done, "terminated": terminated, "truncated": truncated}
        for group in GROUPS:
            rows = self._rows(group)
            legal = self._legal(group)
            entries = {name: flag[..., rows].unsqueeze(-1).clone() for name, flag in flags.items()}
            entries |= {"observation": self._observation(group), "mask": ~done[..., rows]}
            if not self.continuous:
                entries["action_mask"] = legal
                self.full_action_spec[group, "action"].update_mask(legal.clone())
            output.set(group, TensorDict(entries, batch_size=done[..., rows].shape, device=self.device))
        return output

    def _observation(self, group: str) -> Tensor:
        rows = self._rows(group)
        last_action = self._last_actions[..., rows]
        index = torch.arange(3, device=self.device)[rows].expand_as(last_action)
        episode = self._episodes.unsqueeze(-1).expand_as(last_action)
        step = self._steps.unsqueeze(-1).expand_as(last_action)
        features = (step, index, last_action, episode, torch.ones_like(step))
        observation = torch.stack(features[: OBSERVATION_SIZES[group]], -1).float()
        return observation.masked_fill(self._dead()[..., rows].unsqueeze(-1), 0)
