"""Replay in a Ray actor, which workers on any machine of a cluster fill."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import RayReplayBuffer, ReplayBuffer

from matwm_rl.data.replay import Replay
from matwm_rl.files import import_optional


class ReplayActor:
    """What the Ray actor runs: a :class:`Replay`, with the methods that the clients of ``RayReplayBuffer`` call.

    ``RayReplayBuffer`` (TorchRL 0.14.1) serves one buffer; here two share a storage, so that both must be in one actor.

    Args:
        make: makes the replay.
        delayed_init: given by ``RayReplayBuffer``; not used.

    Examples:
        >>> from functools import partial
        >>> from matwm_rl.data import make_replay
        >>> ReplayActor(partial(make_replay, 3)).ask("sequences.can_sample")
        False
    """

    # A class method of TorchRL's buffer, bound to this class: it makes a Ray actor of it.
    as_remote: Any = classmethod(ReplayBuffer.as_remote.__func__)

    def __init__(self, make: Callable[[], Replay], *, delayed_init: bool = False) -> None:
        self._replay = make()

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Read an attribute of the replay by its dotted name, and call it if it is a method."""
        found = attrgetter(name)(self._replay)
        return found(*args, **kwargs) if callable(found) else found

    def extend(self, td: TensorDictBase) -> None:
        """Store a rollout."""
        self._replay.extend(td)

    def sample(self, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Sample sequences."""
        return self._replay.sequences.sample(*args, **kwargs)

    def __len__(self) -> int:
        """Return the number of env steps stored."""
        return len(self._replay)

    def _getattr(self, name: str) -> Any:
        return getattr(self._replay.sequences, name)


class _Starts:
    """``Replay.starts`` of a replay in an actor: it can only be sampled."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def sample(self, *args: Any, **kwargs: Any) -> TensorDictBase:
        return self._client.ask("starts.sample", *args, **kwargs)

    def can_sample(self) -> bool:
        return bool(self._client.ask("starts.can_sample"))


class RayReplay(Replay):
    """A :class:`~matwm_rl.data.Replay` whose data lie in a Ray actor; see :func:`~matwm_rl.data.make_replay`."""

    @classmethod
    def start(cls, make: Callable[[], Replay], remote_config: dict[str, Any], num_agents: int, num_envs: int) -> Replay:
        """Start the actor.

        Args:
            make: makes the replay, in the actor.
            remote_config: options of ``ray.remote``.
            num_agents: N.
            num_envs: E.
        """
        import_optional("ray", extra="ray")
        sequences = RayReplayBuffer(replay_buffer_cls=ReplayActor, make=make, remote_config=remote_config)
        return cls(sequences, _Starts(sequences.client()), num_agents, num_envs)

    def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.sequences.client().ask(name, *args, **kwargs)

    def extend(self, td: TensorDictBase) -> None:
        """Store a rollout, see :meth:`Replay.extend`."""
        self.sequences.extend(td)

    def end_episodes(self) -> None:
        """Mark the newest steps as ends of their episodes, see :meth:`Replay.end_episodes`."""
        self._ask("end_episodes")

    @property
    def capacity(self) -> int:
        """Number of env steps that replay can hold."""
        return int(self._ask("capacity"))

    @property
    def env_steps(self) -> int:
        """Number of env steps ever written."""
        return int(self._ask("env_steps"))

    @property
    def can_sample(self) -> bool:
        """Whether both buffers can serve a batch."""
        return bool(self._ask("can_sample"))

    def __len__(self) -> int:
        """Return the number of env steps stored."""
        return len(self.sequences)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, see :meth:`Replay.state_dict`."""
        state: dict[str, Any] = self._ask("state_dict")
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *, source: str = "the state") -> None:
        """Restore a state, see :meth:`Replay.load_state_dict`."""
        self._ask("load_state_dict", state_dict, source=source)

    def check_state_dict(self, state_dict: Any, *, source: str = "the state") -> None:
        """Check that a state can be restored, see :meth:`Replay.check_state_dict`."""
        self._ask("check_state_dict", state_dict, source=source)
