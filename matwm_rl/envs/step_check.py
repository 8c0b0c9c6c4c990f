"""The check of what an environment gives: no NaN and no infinity passes."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from matwm_rl.envs.layout import AgentLayout
from matwm_rl.finite import first_non_finite, is_finite
from matwm_rl.keys import AGENTS


class StepCheck:
    """Refuse a NaN or an infinity among the observations and rewards of the merged agents.

    Entries on a GPU pass, since the host would wait for them at every step; replay looks at them batch by batch.

    Args:
        layout: who the agents are.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> check, td = StepCheck(env.layout), env.reset()
        >>> check.after_reset(td, None) is td
        True
        >>> td["agents", "observation"][2, 1] = float("nan")
        >>> check.after_step(td)
        Traceback (most recent call last):
        ValueError: the environment gave nan as observation of agent 'prey_0' at step 1 of the episode...
    """

    def __init__(self, layout: AgentLayout) -> None:
        self._layout = layout
        self._steps = torch.zeros((), dtype=torch.int64, device="cpu")

    def after_reset(self, output: TensorDictBase, reset: Tensor | None) -> TensorDictBase:
        """Check and return the first observations of new episodes.

        Args:
            output: merged, ``[*E]``.
            reset: bool ``[*E, 1]``, the environments that were reset; ``None``: all.

        Raises:
            ValueError: if an observation is not finite.
        """
        if reset is None or self._steps.shape != output.batch_size:
            self._steps = torch.zeros(output.batch_size, dtype=torch.int64, device="cpu")
        elif reset.device.type == "cpu":
            self._steps = self._steps.masked_fill(reset.view(output.batch_size), 0)
        return self._check(output)

    def after_step(self, output: TensorDictBase) -> TensorDictBase:
        """Check and return observations and rewards of a step, merged, ``[*E]``.

        Raises:
            ValueError: if one is not finite; names entry, agent, environment and step.
        """
        self._steps = self._steps + 1
        return self._check(output)

    def _check(self, output: TensorDictBase) -> TensorDictBase:
        agents = output.get(AGENTS)
        for name in ("observation", "reward"):
            value = agents.get(name, None)
            if value is not None and value.device.type == "cpu" and not is_finite(value):
                index, number = first_non_finite(value)
                env, agent = index[: output.ndim], self._layout.agent_names[index[output.ndim]]
                where = f"at step {int(self._steps[tuple(env)])} of the episode"
                where += f" of environment {', '.join(map(str, env))}" if env else ""
                raise ValueError(
                    f"the environment gave {number} as {name} of agent {agent!r} {where} (read as "
                    f"{value.dtype}). Nothing can be learned from it: correct the environment, or replace such numbers "
                    "in a transform below MultiAgentEnv"
                )
        return output
