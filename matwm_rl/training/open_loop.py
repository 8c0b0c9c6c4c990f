"""Open-loop prediction: how long does imagination stay true when the real actions are fed to it?

Dimension letters: B windows, C context steps, H horizon, N agents, A actions.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import one_hot

from matwm_rl import keys
from matwm_rl.data import to_focal
from matwm_rl.functional import agents_first, agents_last, segment_ids
from matwm_rl.modules import State, WorldModel


def episode_windows(rollout: TensorDictBase, length: int) -> TensorDictBase:
    """Cut a rollout into windows that lie in one episode each.

    Args:
        rollout: plain, ``[T]`` or ``[E, T]``, with ``("next", "done")``.
        length: steps of a window.

    Returns:
        ``[B, length]``: from every episode as many windows as fit, side by side from its first step on.

    Raises:
        ValueError: if no episode is long enough.

    Examples:
        >>> done = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0]).bool().unsqueeze(-1)
        >>> rollout = TensorDict({"t": torch.arange(8), "next": {"done": done}}, [8])
        >>> episode_windows(rollout, 2)["t"].tolist()
        [[0, 1], [2, 3], [5, 6]]
    """
    rollout = rollout.unsqueeze(0) if rollout.ndim == 1 else rollout
    segments = segment_ids(rollout.get(keys.DONE).squeeze(-1))
    steps = torch.arange(segments.shape[-1], device=segments.device).expand_as(segments)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    since_first = steps - torch.where(first, steps, 0).cummax(-1).values
    fits = torch.zeros_like(first)
    if length <= segments.shape[-1]:
        fits[:, : segments.shape[-1] - length + 1] = (
            segments.unfold(-1, length, 1)[..., -1] == segments[:, : segments.shape[-1] - length + 1]
        )
    env, start = ((since_first % length == 0) & fits).nonzero(as_tuple=True)
    if not len(start):
        raise ValueError(
            f"no episode of the rollout {tuple(rollout.shape)} has {length} steps; collect more or ask less"
        )
    return rollout[env.unsqueeze(-1), start.unsqueeze(-1) + torch.arange(length, device=start.device)]


@torch.no_grad()
def open_loop(world_model: WorldModel, windows: TensorDictBase, *, context_length: int, horizon: int) -> TensorDict:
    """Imagine what followed, given the actions that were really taken.

    The model sees C steps and the observation after them, then only the focal agent's own real actions: latents are
    sampled from the dynamics predictor, and what teammates do is for it to foresee. All agents are predicted at once,
    each from its own history.

    Args:
        world_model: the shared world model.
        windows: plain or focal rollouts ``[B, T]`` with T >= C + H, for example of :func:`episode_windows`. Where an
            episode ends inside, what follows means nothing (:func:`open_loop_errors` leaves it out).
        context_length: C.
        horizon: H.

    Returns:
        ``[B, H]``, starting with the step after the context:

        - ``"real"``: that part of the windows, as :func:`~matwm_rl.data.to_focal` gives it;
        - ``"imagined"``, under the same keys: ``("next", "agents", "observation")`` (images from 0 to 1),
          ``("next", "agents", "reward" | "continuation")``, ``("agents", "teammate_logits")``.

    Raises:
        ValueError: if the windows are not ``[B, T]`` with T >= C + H.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> windows = episode_windows(env.rollout(30, break_when_any_done=False), 6)
        >>> result = open_loop(world_model, windows, context_length=2, horizon=4)
        >>> result["imagined", "next", "agents", "observation"].shape
        torch.Size([5, 4, 3, 5])
    """
    if windows.ndim != 2 or windows.shape[1] < context_length + horizon or context_length < 0 or horizon < 1:
        raise ValueError(
            f"got windows of batch size {tuple(windows.shape)}; expected [B, T] with T >= context_length + horizon = "
            f"{context_length} + {horizon}, the horizon at least 1"
        )
    windows = to_focal(windows) if keys.AGENT_DONE not in windows.keys(include_nested=True) else windows
    seen = windows[:, : context_length + 1]
    observation = agents_first(seen.get(keys.OBSERVATION), world_model.observation_dims)
    action = agents_first(windows.get(keys.ACTION), 0)
    segments = segment_ids(agents_first(seen.get(keys.AGENT_DONE)).squeeze(-1))
    same_episode = segments[..., :-1] == segments[..., -1:]
    state, context = world_model.prefill(
        world_model.encode(observation), action[..., :context_length], same_episode, horizon
    )
    states = [state]
    for t in range(context_length, context_length + horizon):
        states.append(world_model.step(states[-1], action[..., t], context))
    whole = State.stack(states, 2)
    reached = whole[:, :, 1:]
    reward, continuation = world_model.outcome(reached)

    imagined = TensorDict({}, batch_size=[windows.shape[0], horizon], device=windows.device)
    predicted = world_model.decode(reached.latent)
    imagined.set(keys.NEXT_OBSERVATION, agents_last(predicted, world_model.observation_dims))
    imagined.set(keys.REWARD, agents_last(reward, 0).unsqueeze(-1))
    imagined.set(keys.CONTINUATION, agents_last(continuation, 0).unsqueeze(-1))
    imagined.set(keys.TEAMMATE_LOGITS, agents_last(whole.teammate_logits[:, :, :-1], 2))
    real = windows[:, context_length : context_length + horizon]
    return TensorDict({"real": real, "imagined": imagined}, batch_size=imagined.batch_size, device=windows.device)


@torch.no_grad()
def open_loop_errors(
    world_model: WorldModel, windows: TensorDictBase, *, context_length: int, horizon: int, num_samples: int = 8
) -> TensorDict:
    """Errors of :func:`open_loop` at every step ahead, beside those of trivial predictors.

    What the model expects is the mean of several imagined futures. The trivial predictors are the last observation
    kept, the mean reward, and the frequencies of a teammate's actions; the latter two are taken from the very steps
    they are judged by, so they are the best constants there are.

    Args:
        world_model: the shared world model.
        windows: ``[B, T]``, see :func:`open_loop`.
        context_length: C.
        horizon: H.
        num_samples: imagined futures per window.

    Returns:
        ``[H, N]``, means over the windows in which the episode still runs and the focal agent lives:

        - ``("model" | "trivial", "observation")``: squared error, summed over an observation (images from 0 to 1);
        - ``("model" | "trivial", "reward")``: squared error;
        - ``("model" | "trivial", "teammate")``: negative log-probability of a living teammate's action, in nats
          (absent without teammate predictor);
        - ``"count"``: number of windows that counted.

    Raises:
        ValueError: see :func:`open_loop`; or if ``num_samples`` is below 1.

    Examples:
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, hidden_size=32, num_heads=2, num_dims=4, num_classes=4)
        >>> windows = episode_windows(env.rollout(30, break_when_any_done=False), 6)
        >>> errors = open_loop_errors(world_model, windows, context_length=2, horizon=4)
        >>> errors["model", "reward"].shape, errors["count"][0].tolist()
        (torch.Size([4, 3]), [5, 5, 5])
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    expected: dict[str, Tensor] = {}
    for _ in range(num_samples):
        result = open_loop(world_model, windows, context_length=context_length, horizon=horizon)
        imagined = result["imagined"]
        future = {"observation": imagined.get(keys.NEXT_OBSERVATION), "reward": imagined.get(keys.REWARD)}
        if world_model.teammates is not None:
            future["teammate"] = imagined.get(keys.TEAMMATE_LOGITS).softmax(-1)
        expected = {name: expected.get(name, 0) + value / num_samples for name, value in future.items()}
    real = result["real"]
    running = still_running(real)
    seen = running & real.get(keys.NEXT_ALIVE, running)
    target = as_float(real.get(keys.NEXT_OBSERVATION))
    kept = as_float(real.get(keys.OBSERVATION))[:, :1]
    true_reward = real.get(keys.REWARD)
    constant = torch.where(running.unsqueeze(-1), true_reward, 0.0).sum((0, 1)) / running.sum((0, 1)).unsqueeze(-1)
    model = {
        "observation": _mean(_squared(expected["observation"] - target), seen),
        "reward": _mean(_squared(expected["reward"] - true_reward), running),
    }
    trivial = {
        "observation": _mean(_squared(kept - target), seen),
        "reward": _mean(_squared(constant - true_reward), running),
    }
    if "teammate" in expected:
        model["teammate"], trivial["teammate"] = _teammate_errors(expected["teammate"], real, running)
    return TensorDict({"model": model, "trivial": trivial, "count": running.sum(0)}, batch_size=running.shape[1:])


def still_running(real: TensorDictBase) -> Tensor:
    """Steps ``[B, H, N]`` in which the first step's episode goes on and the focal agent lives."""
    running = agents_last(segment_ids(agents_first(real.get(keys.AGENT_DONE)).squeeze(-1)) == 0, 0)
    return running & real.get(keys.ALIVE, running)


def _teammate_errors(probs: Tensor, real: TensorDictBase, running: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-probability ``[H, N]`` of teammates' actions: of ``probs [B, H, N, N-1, A]``, and of frequencies."""
    action = real.get(keys.TEAMMATE_ACTION)
    mask = running.unsqueeze(-1) & real.get(keys.TEAMMATE_ALIVE, torch.ones_like(action, dtype=torch.bool))
    taken = one_hot(action, probs.shape[-1]) * mask.unsqueeze(-1)
    frequency = taken.sum((0, 1)) / mask.sum((0, 1)).clamp(min=1).unsqueeze(-1)
    errors = (
        -probability.expand_as(probs).gather(-1, action.unsqueeze(-1)).squeeze(-1).clamp(min=1e-12).log()
        for probability in (probs, frequency)
    )
    model, trivial = (torch.where(mask, error, 0.0).sum((0, -1)) / mask.sum((0, -1)) for error in errors)
    return model, trivial


def _squared(difference: Tensor) -> Tensor:
    """Squared norm ``[B, H, N]``."""
    return difference.square().flatten(3).sum(-1)


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean over the windows ``[H, N]``; not a number where none counts."""
    return torch.where(mask, value, 0.0).sum(0) / mask.sum(0)


def as_float(observation: Tensor) -> Tensor:
    """Observations as the decoder gives them: images from 0 to 1, vectors as they are."""
    return observation.float() / 255 if observation.dtype == torch.uint8 else observation
