"""A trained policy that knows where it was trained, and plays there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchrl.envs import TransformedEnv

from matwm_rl.arguments import check_kinds, read_text
from matwm_rl.envs import AgentLayout, make_env
from matwm_rl.modules import WorldModel, WorldModelPolicy
from matwm_rl.settings import Settings, setting


@dataclass(kw_only=True)
class PolicyCard(Settings):
    """A description of the training of a policy, stored beside its weights.

    Attributes:
        env: name of the environment, see :func:`~matwm_rl.envs.make_env`.
        env_kwargs: what else :func:`~matwm_rl.envs.make_env` was given that makes it another environment, such as
            ``max_cycles``: plain values.
        seed: of the run.
        env_steps: steps of the environment that it learnt from.
        returns: mean returns of its last evaluation, by match or group.
        command: that trained it.

    Raises:
        TypeError: if an entry is of another type.

    Examples:
        >>> PolicyCard(env="mock", env_steps=20_000, returns={"hunter": 3.5}).seed
        0
    """

    env: str
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = setting(0, minimum=0)
    env_steps: int = setting(0, minimum=0)
    returns: dict[str, float] = field(default_factory=dict)
    command: str | None = None


class TrainedPolicy(WorldModelPolicy):
    """A :class:`~matwm_rl.modules.WorldModelPolicy` that knows where it was trained.

    :func:`load_policy` makes it.

    Args:
        world_model: the shared world model.
        actor: see :class:`~matwm_rl.modules.WorldModelPolicy`.
        history_length: W, steps of history that the policy sees at most.
        card: describes the training; ``None`` where the file has none.

    Keys read and written: those of :class:`~matwm_rl.modules.WorldModelPolicy`.

    Examples:
        >>> from matwm_rl.training import load_policy
        >>> policy = load_policy("simple_spread")
        >>> policy.card.env, policy.card.env_steps
        ('mpe2/simple_spread_v3', 20000)
        >>> policy.make_env(seed=0).rollout(10, policy)["agents", "action"].shape
        torch.Size([10, 3])
    """

    def __init__(
        self, world_model: WorldModel, actor: nn.Module, *, history_length: int, card: PolicyCard | None = None
    ) -> None:
        super().__init__(world_model, actor, history_length=history_length)
        if card is not None:
            check_kinds(PolicyCard, card=card)
        self.card = card

    def make_env(self, name: str | None = None, **kwargs: Any) -> TransformedEnv:
        """Make an environment that the policy can act in, with its history: ``env.rollout(100, policy)``.

        Args:
            name: of an environment with the same agents; by default that of the training. A function,
                ``"package.module:factory"``, has to be named here even so: none is called because a file says so.
            kwargs: for :func:`~matwm_rl.envs.make_env`, such as ``seed`` and ``num_envs``. Without a name, those of the
                card are given too, where these do not replace them.

        Raises:
            ValueError: if the file does not tell the name of the environment, or names a function; or if the
                environment's agents are not those of the training: the message says what differs.
        """
        if name is None:
            name, kwargs = self._trained_in(), {**(self.card.env_kwargs if self.card else {}), **kwargs}
        env = make_env(read_text("name", name), **kwargs)
        if self.world_model.recipe is not None:
            check_layout(self.world_model.recipe[0].to_dict(), env.layout, source="the policy")
        return TransformedEnv(env, self.make_tensordict_primer())

    def _trained_in(self) -> str:
        if self.card is None:
            raise ValueError("the policy was saved without the name of its environment: give it, make_env(NAME)")
        if ":" in self.card.env:
            raise ValueError(
                f"the policy's file names the function {self.card.env!r}, which is not called without your word: if "
                f"you trust it, make_env({self.card.env!r}, **policy.card.env_kwargs)"
            )
        return self.card.env


def check_layout(trained: dict[str, Any], here: AgentLayout, *, source: str) -> None:
    """Check that agents are the same as those that a policy or a world model was trained with.

    Args:
        trained: their layout as plain values, with all its entries.
        here: layout of the agents that it shall be used for.
        source: what the message calls it.

    Raises:
        ValueError: names what differs.

    Examples:
        >>> layout = make_env("mock").layout
        >>> check_layout({**layout.to_dict(), "is_image": True}, layout, source="policy.pt")
        Traceback (most recent call last):
        ValueError: policy.pt was trained in an environment with other is_image: it was True, here it is False
    """
    found = here.to_dict()
    if different := [name for name in found if trained[name] != found[name]]:
        name = different[0]
        which = "it" if len(different) == 1 else name
        raise ValueError(
            f"{source} was trained in an environment with other {', '.join(different)}: {which} was {trained[name]}, "
            f"here it is {found[name]}"
        )
