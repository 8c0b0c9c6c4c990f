"""Exploration in the real environment: some agents play whole episodes at random."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torchrl.data import Unbounded
from torchrl.envs import Compose, TensorDictPrimer

from matwm_rl import keys
from matwm_rl.checks import read_entry
from matwm_rl.modules.policy import WorldModelPolicy
from matwm_rl.modules.state_estimator import CONTEXT_ACTION

ROLE: NestedKey = ("context", "role")
_UNDECIDED, _BY_POLICY, _AT_RANDOM = 0, 1, 2


class RandomEpisodes(TensorDictModuleBase):
    """Let every agent play an episode at random with some probability, for the collector (ours).

    Agents that learn against each other see only what the present opponents allow: once an evader has learnt to flee,
    its pursuers see no contact, and the world model forgets what leads to it. Drawn for each agent and episode apart,
    random episodes keep all pairings in the data. Evaluate with the policy itself.

    Args:
        policy: acts otherwise; its carried context records what was really done.
        probability: of an agent to play an episode at random; 0 is the paper's.

    Keys read and written: the policy's, and ``("context", "role")`` ``[*batch, N]``, carried with the episode.

    Raises:
        ValueError: if ``probability`` does not lie in [0, 1], or an entry that is read has another shape.
        KeyError: if an entry that is read is missing.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_actor
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> policy = WorldModelPolicy(world_model, make_actor(world_model, num_cells=16), context_length=4)
        >>> exploring = RandomEpisodes(policy, probability=0.25)
        >>> env = env.append_transform(exploring.make_tensordict_primer())
        >>> env.rollout(3, exploring)["agents", "action"].shape
        torch.Size([3, 3])
    """

    def __init__(self, policy: WorldModelPolicy, *, probability: float) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {probability}")
        self.policy = policy
        self.probability = probability
        self.in_keys: list[NestedKey] = [*policy.in_keys, ROLE]
        self.out_keys: list[NestedKey] = [*policy.out_keys, ("next", *ROLE)]

    def make_tensordict_primer(self) -> Compose:
        """The policy's primer, and the one that draws roles anew with every episode."""
        roles = Unbounded((self.policy.world_model.num_agents,), dtype=torch.int64)
        primer = TensorDictPrimer({ROLE: roles}, default_value=_UNDECIDED, reset_key="_reset", expand_specs=True)
        return Compose(self.policy.make_tensordict_primer(), primer)

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Choose an action for every agent."""
        self.policy(tensordict)
        legal, action = tensordict.get(keys.ACTION_MASK), tensordict.get(keys.ACTION)
        note = "append make_tensordict_primer() to the environment, so that roles are drawn with every episode"
        role = read_entry(tensordict, ROLE, self, action.shape, note)
        drawn = 1 + (torch.rand(role.shape, device=role.device) < self.probability).long()
        role = torch.where(role == _UNDECIDED, drawn, role)
        random = torch.multinomial(legal.flatten(0, -2).float(), 1).view(legal.shape[:-1])
        action = torch.where(role == _AT_RANDOM, random, action)
        tensordict.set(keys.ACTION, action)
        # Not in place: an entry of a lazily stacked batch is a copy.
        following = ("next", *CONTEXT_ACTION)
        tensordict.set(following, torch.cat([tensordict.get(following)[..., :-1], action.unsqueeze(-1)], -1))
        return tensordict.set(("next", *ROLE), role)
