"""The check that rollouts stored one after the other also happened one after the other."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from matwm_rl.keys import DONE, EPISODE, NEXT_OBSERVATION, OBSERVATION

TRAJECTORY: NestedKey = ("collector", "traj_ids")
VALID: NestedKey = ("collector", "mask")


class Continuity:
    """Refuse rollouts that do not continue the stored ones, since a sampled slice could then join two episodes.

    TorchRL's collectors number trajectories. Inside an episode the number stays the same, also from one batch to the
    next. Workers on a Ray cluster all begin with 0, so a step must also show the observation that the step before it
    led to. Environments count their resets (:class:`~matwm_rl.envs.MultiAgentEnv`): a step in which the count changes
    joins two episodes, because somebody else reset the environment. Data without trajectory numbers does not come from
    a collector. There only the counts before and after each step are compared, and a rollout may begin anywhere.

    Raises:
        ValueError: By :meth:`check`, if a rollout does not continue the one before.

    Examples:
        >>> from tensordict import TensorDict
        >>> def rollout(trajectory: int, length: int) -> TensorDict:
        ...     data = {"traj_ids": torch.full([1, length], trajectory)}
        ...     return TensorDict({"collector": data, "next": {"done": torch.zeros(1, length, 1).bool()}}, [1, length])
        >>> continuity = Continuity()
        >>> continuity.check(rollout(7, 5))
        >>> continuity.check(rollout(7, 5))
        >>> continuity.check(rollout(8, 5))
        Traceback (most recent call last):
        ...
        ValueError: trajectory 8 begins where trajectory 7 of environment 0 has not ended...
    """

    def __init__(self) -> None:
        self._running: Tensor | None = None
        self._following: Tensor | None = None

    def forget(self) -> None:
        """Accept any rollout next."""
        self._running = self._following = None

    def check(self, td: TensorDictBase) -> None:
        """Check that a rollout continues the one checked before, and remember its end.

        Args:
            td: plain rollout, ``[E, T]``. Reads ``("next", "done")`` and, if they are there, ``"episode"`` and
                ``("next", "episode")``, ``("collector", "traj_ids")`` and ``("collector", "mask")``, and the agents'
                ``"observation"`` before and after each step.

        Raises:
            ValueError: If steps are padding, if a trajectory begins where another has not ended, if a step joins two
                episodes, or if it does not begin where the one before it has ended.
        """
        valid = td.get(VALID, None)
        if valid is not None and not valid.all():
            raise ValueError(
                f"{int((~valid).sum())} of {valid.numel()} steps are padding. Collect without split_trajs and "
                'preemptive_threshold, and trajectories with traj_format="cat".'
            )
        before, after = td.get(EPISODE, None), td.get(("next", EPISODE), None)
        if before is not None and after is not None and (torn := (before != after).squeeze(-1)).any():
            env, step = torn.nonzero()[0].tolist()
            raise ValueError(
                f"step {step} of environment {env} begins in its episode {int(before[env, step])} and ends in its "
                f"episode {int(after[env, step])}: somebody else reset the environment in between. While a collector "
                "runs, evaluate and record on an environment of their own, made with another make_env(...)."
            )
        trajectory = td.get(TRAJECTORY, None)
        if trajectory is None:
            return self.forget()
        # -1: no episode has to continue.
        running = torch.where(td.get(DONE).squeeze(-1), -1, trajectory)
        before = torch.full_like(running[:, :1], -1) if self._running is None else self._running.to(running.device)
        before = torch.cat([before, running[:, :-1]], 1)
        if (broken := (before >= 0) & (before != trajectory)).any():
            env, step = broken.nonzero()[0].tolist()
            raise ValueError(
                f"trajectory {int(trajectory[env, step])} begins where trajectory {int(before[env, step])} of "
                f"environment {env} has not ended (step {step} of the batch). {_advice(step)}"
            )
        observation, following = td.get(OBSERVATION, None), td.get(NEXT_OBSERVATION, None)
        if observation is not None and following is not None:
            first = observation[:, :1] if self._following is None else self._following.to(observation.device)
            differs = (torch.cat([first, following[:, :-1]], 1) != observation).flatten(2).any(-1)
            if (broken := (before >= 0) & differs).any():
                env, step = broken.nonzero()[0].tolist()
                raise ValueError(
                    f"step {step} of the batch does not show what the step before it led to, where the episode of "
                    f"environment {env} has not ended: it is of another worker, or observations were changed after the "
                    f"environment gave them. {_advice(step)}"
                )
            self._following = following[:, -1:].clone()
        self._running = running[:, -1:]
        return None


def _advice(step: int) -> str:
    if step:
        return (
            'The batches of workers must not follow one another in time: leave the collector\'s cat_results at "stack".'
        )
    return (
        "Batches must continue one another. A collector with sync=False yields those of one worker at a time: have it "
        'yield whole episodes, with trajs_per_batch=1, traj_format="cat". Where environments are reset in between, '
        "call Replay.end_episodes first: it cuts the episode off."
    )
