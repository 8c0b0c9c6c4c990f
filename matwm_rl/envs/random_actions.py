"""Random actions that obey the mask of legal actions."""

from __future__ import annotations

from abc import abstractmethod

from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from matwm_rl.action_space import ActionSpace
from matwm_rl.keys import ACTION, ACTION_MASK


class LegalRandomActions(EnvBase):
    """Base class of environments whose random actions obey the mask in the tensordict that they are asked for.

    TorchRL's ActionMask writes the mask of the current step into the action spec instead. There it goes stale: copies
    of the spec, such as a batched environment's or an outer TransformedEnv's, do not receive it, and an action that was
    legal when taken is not "in" the spec a step later. So here the spec's own mask only holds the padding of agents
    that have fewer actions.

    Subclasses define :meth:`agent_actions` and :meth:`present_mask`.
    """

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Draw a random legal action for each agent.

        Args:
            tensordict: the current root tensordict with ``("agents", "action_mask")``; the action is written into it.
                Without it a :class:`~matwm_rl.envs.MultiAgentEnv` draws from the actions that are legal in its present
                state, and a batched one, which knows its environments' states through tensordicts only, from each
                agent's own actions.

        Returns:
            the tensordict, or a new one, with ``("agents", "action")``.
        """
        mask = None if tensordict is None else tensordict.get(ACTION_MASK, None)
        mask = self.present_mask() if mask is None else mask
        action = self.agent_actions().random(mask)
        output = TensorDict(batch_size=self.batch_size, device=self.device) if tensordict is None else tensordict
        return output.set(ACTION, action)

    @abstractmethod
    def agent_actions(self) -> ActionSpace:
        """Return the action space of all agents."""

    @abstractmethod
    def present_mask(self) -> Tensor:
        """Return the actions that are legal in the present state, as far as it is known, bool ``[*E, N, A]``."""
