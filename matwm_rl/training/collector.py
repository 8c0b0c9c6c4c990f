"""A collector that goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from matwm_rl import keys
from matwm_rl.arguments import check_ints
from matwm_rl.checks import check_shape
from matwm_rl.functional import keep_random_state
from matwm_rl.state_files import check_entries, check_same
from matwm_rl.torchrl_internals import collector_carrier
from matwm_rl.training.process import random_states, set_random_states

RESTART_EVERY = 10_000
"""Env steps after which all environments begin new episodes, so that no more than these have to be played again."""
_COUNTERS = ("frames", "iter", "traj_pool")
_CHANGING = ("replay_buffer", "split_trajs", "reset_at_each_iter", "trajs_per_batch", "postproc", "return_same_td")
_TOLD = (keys.OBSERVATION, keys.ACTION_MASK, keys.ALIVE, "done")
"""Entries that the environments themselves write; the others are the policy's history and the collector's counts."""


class ResumableCollector(Collector):
    """TorchRL's collector, with a state from which collection continues bit by bit.

    TorchRL's ``Collector.load_state_dict`` begins new episodes, because an environment cannot tell its state in
    general. Here the environments get back to where they were by playing the same actions from the same seed again:
    the state holds all actions since the environments were last seeded. Every :data:`RESTART_EVERY` env steps they are
    seeded anew and begin new episodes, which is stored as a truncation of those before. It is the same in a run that
    is interrupted and in one that is not.

    An environment that does not repeat itself, such as one with NumPy's global random state, begins new episodes at
    every checkpoint instead, in both runs. Before collection begins, a test of a few steps tells whether it repeats
    itself. If an environment fails to do so only in a later episode, or if the state of one that does not repeat
    itself was saved between checkpoints, :attr:`continues` is False after loading, and only the resumed run begins new
    episodes. Running statistics of transforms, such as the means of TorchRL's ``VecNormV2``, are part of the state.

    Args:
        env: made with ``seed``, and with the policy's primer if it has one.
        policy: the acting policy. With ``device``, a copy of it acts there, :attr:`policy`, if the policy is elsewhere.
        seed: of the environments; at a restart they are seeded with ``seed`` plus the env steps so far.
        checkpoint_every: env steps between checkpoints, if there are any; a checkpoint is saved after the batch that
            reaches a multiple of them.
        kwargs: passed to :class:`~torchrl.collectors.Collector`, which must yield plain batches ``[*E, T]``.

    Raises:
        ValueError: with options that change what is yielded, or begin new episodes at other times.

    Attributes:
        policy: what acts: the given policy, or its copy.
        continues: whether the episodes that were running when the state was saved go on, or had ended there.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.evaluation import RandomActions
        >>> def collector():
        ...     env, sizes = make_env("mock", seed=0), {"frames_per_batch": 4, "total_frames": 12}
        ...     return ResumableCollector(env, RandomActions(), seed=0, auto_register_policy_transforms=False, **sizes)
        >>> first = collector()
        >>> batches = iter(first)
        >>> batch = next(batches)
        >>> state, random_state = first.state_dict(), torch.get_rng_state()
        >>> expected = next(batches)
        >>> second = collector()
        >>> second.load_state_dict(state)
        >>> _ = torch.set_rng_state(random_state)
        >>> (next(iter(second))["agents", "action"] == expected["agents", "action"]).all()
        tensor(True)
    """

    def __init__(self, env: Any, policy: Any, *, seed: int, checkpoint_every: int | None = None, **kwargs: Any) -> None:
        if given := [name for name in _CHANGING if kwargs.get(name)]:
            raise ValueError(
                f"ResumableCollector yields plain batches of running episodes, got {given}. Store what it yields with "
                "Replay.extend, or use torchrl.collectors.Collector, which begins new episodes when a run is resumed"
            )
        self._restart_every = RESTART_EVERY
        if checkpoint_every is not None:
            check_ints(1, checkpoint_every=checkpoint_every)
            if not repeats_itself(env, seed):
                self._restart_every = checkpoint_every
        super().__init__(env, policy, **kwargs)
        self._has_schemes = bool(kwargs.get("weight_sync_schemes"))
        self._weights: tuple[list[Tensor], list[Tensor]] | None = None
        if isinstance(policy, nn.Module) and self.policy is not policy:
            self.policy.eval()
            self._weights = _tensors(self.policy), _tensors(policy)
        self._seed = seed
        self._env_steps = self._seeded_at = 0
        self._actions: list[Tensor] = []
        self._restarts = False
        self.continues = True
        # What the policy writes anew in every step is no part of the state.
        self._kept = list(collector_carrier(self).keys(include_nested=True, leaves_only=True))

    @torch.no_grad()
    def update_policy_weights_(self, policy_or_weights: Any = None, **kwargs: Any) -> None:
        """Copy the weights of the policy into the copy that acts; if there is no copy, nothing has to be done.

        Args:
            policy_or_weights: other weights to act with, in a form that TorchRL's collector takes.
            kwargs: of TorchRL's collector.
        """
        if policy_or_weights is not None or kwargs or self._has_schemes:
            super().update_policy_weights_(policy_or_weights, **kwargs)
            return
        if self._weights is not None:
            # TorchRL gathers the weights anew at every call: 40 ms in place of 1.
            for acting, given in zip(*self._weights, strict=True):
                acting.copy_(given)
        self.increment_version()

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield batches, as :class:`~torchrl.collectors.Collector` does."""
        self._restart_if_due()
        for batch in super().iterator():
            self._env_steps += batch.numel()
            self._actions.append(batch.get(keys.ACTION).cpu().clone())
            before = self._env_steps - batch.numel()
            is_due = self._env_steps // self._restart_every > before // self._restart_every
            if is_due and self._env_steps < self.total_frames:
                last = batch["next"][..., -1]
                last["truncated"].logical_or_(~last["done"])
                last["done"].fill_(True)
                self._begin_anew()
            yield batch
            # After what is done with the batch, such as a checkpoint: with the random state that is stored there.
            self._restart_if_due()

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs; loads with ``torch.load(weights_only=True)``."""
        counters = super().state_dict()
        return {
            **{name: counters[name] for name in _COUNTERS},
            "seeded_at": self._seeded_at,
            "actions": torch.cat(self._actions, dim=self.env.ndim) if self._actions else None,
            "carrier": self._flat_carrier(),
            "transforms": deepcopy(self.env.state_dict()),
        }

    def check_state_dict(self, state: Any, *, source: str) -> None:
        """Check that :meth:`load_state_dict` can restore a state, and change nothing.

        Args:
            state: what :meth:`state_dict` returned, perhaps in another process.
            source: what the message calls it.

        Raises:
            ValueError: if an entry is missing, unknown, or of another shape or type than here.
        """
        expected = self.state_dict()
        check_entries(state, list(expected), source=source)
        # There are as many actions as steps, here and there.
        check_same({**state, "actions": None}, {**expected, "actions": None}, source=source)
        actions = state["actions"]
        if actions is None and int(state["frames"]) == state["seeded_at"] >= 0:
            return
        space = self.env.layout.actions
        shape = [*self.env.batch_size, None, space.num_agents, *space.action_shape]
        if not isinstance(actions, Tensor) or actions.dtype != space.dtype:
            found = f"{actions.dtype} tensor" if isinstance(actions, Tensor) else type(actions).__name__
            raise ValueError(f"{source} actions must be a {space.dtype} tensor, found a {found}")
        check_shape(actions, f"{source} actions must be", shape)
        steps = actions.shape[: self.env.ndim + 1].numel()
        if not 0 <= state["seeded_at"] <= int(state["frames"]) == state["seeded_at"] + steps:
            raise ValueError(
                f"{source} has the actions of {steps} steps; expected those of the steps from {state['seeded_at']} to "
                f"{int(state['frames'])}"
            )
        if (problem := space.problem(actions.cpu())) is not None:
            raise ValueError(f"{source} actions: {problem}")

    def _flat_carrier(self) -> dict[str, Tensor]:
        carrier: dict[str, Tensor] = (
            collector_carrier(self).select(*self._kept).flatten_keys(".").clone().cpu().to_dict()
        )
        return carrier

    def load_state_dict(self, state_dict: dict[str, Any], **kwargs: Any) -> None:
        """Bring the environments and the policy's history back to where :meth:`state_dict` was called.

        The global random state stays what it is. If a copy of the policy acts, it gets the weights that the policy has.

        Args:
            state_dict: of a collector of the same environments, built with the same seed.
            kwargs: not used.
        """
        carrier = TensorDict(state_dict["carrier"], self.env.batch_size).cpu().unflatten_keys(".")
        self._env_steps, self._seeded_at = int(state_dict["frames"]), state_dict["seeded_at"]
        actions = None if state_dict["actions"] is None else state_dict["actions"].cpu()
        with keep_random_state(self.env.device):
            super().load_state_dict({"env_state_dict": {}, **state_dict}, strict=False)
            begins_anew = 0 < self._env_steps == self._seeded_at
            if not begins_anew:
                self.continues = self._play_again(actions, carrier)
            self.env.load_state_dict(state_dict["transforms"])
        self._actions = [] if actions is None else [actions]
        if begins_anew or not self.continues:
            self._begin_anew()
        else:
            collector_carrier(self).update(carrier.to(self.env.device or "cpu"))
        self.update_policy_weights_()

    def _play_again(self, actions: Tensor | None, carrier: TensorDictBase) -> bool:
        """Play the stored actions again; return whether the environments then show what they showed."""
        if self._seeded_at:
            self._restart()
        try:
            played = self._play(actions)
        except Exception:  # whatever an environment raises if actions do not fit: it does not repeat itself
            return False
        return all(torch.equal(carrier[key], played[key].cpu()) for key in _TOLD)

    @torch.no_grad()
    def _play(self, actions: Tensor | None) -> TensorDictBase:
        """Play the actions ``[*E, T, N, ...]`` from where the environments are."""
        tensordict = collector_carrier(self).exclude("collector")
        for action in () if actions is None else actions.unbind(self.env.ndim):
            _, tensordict = self.env.step_and_maybe_reset(
                tensordict.set(keys.ACTION, action.to(self.env.device or "cpu"))
            )
        return tensordict

    def _begin_anew(self) -> None:
        """Let new episodes begin in all environments with the next batch."""
        self._seeded_at, self._actions, self._restarts = self._env_steps, [], True

    def _restart_if_due(self) -> None:
        if self._restarts:
            self._restarts = False
            self._restart()

    def _restart(self) -> None:
        """Begin new episodes in all environments, with the seed for the step that they were last seeded at."""
        self.set_seed(self._seed + self._seeded_at)
        self.reset()


def _tensors(module: nn.Module) -> list[Tensor]:
    named = *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    return [tensor for _, tensor in named]


def repeats_itself(env: EnvBase, seed: int, steps: int = 5) -> bool:
    """Whether an environment plays the same again from the same seed with the same actions.

    It is then seeded as before, and all random states are what they were.

    Args:
        env: an environment with one ``"agents"`` group, seeded with ``seed``.
        seed: its seed.
        steps: how many it plays, each time.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> repeats_itself(make_env("mock", seed=3), seed=3)
        True
    """
    random = random_states()
    env.set_seed(seed)
    first = env.rollout(steps, break_when_any_done=False)
    actions = iter(first[keys.ACTION].unbind(env.ndim))
    env.set_seed(seed)
    again = env.rollout(steps, lambda tensordict: tensordict.set(keys.ACTION, next(actions)), break_when_any_done=False)
    env.set_seed(seed)
    set_random_states(random)
    told = [keys.REWARD, *(("next", key) for key in _TOLD)]
    return all(torch.equal(first.get(key), again.get(key)) for key in told)
