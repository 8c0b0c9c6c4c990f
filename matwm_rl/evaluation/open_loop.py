"""Open-loop prediction: the error of imagined futures that follow the real actions.

Dimension letters: B windows, C context steps, H horizon, N agents, A actions.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from matwm_rl import keys
from matwm_rl.action_space import ActionSpace
from matwm_rl.arguments import check_ints
from matwm_rl.data import add_agent_entries
from matwm_rl.functional import agents_first, agents_last, segment_ids
from matwm_rl.modules import WorldModel


def episode_windows(rollout: TensorDictBase, length: int) -> TensorDictBase:
    """Cut a rollout into windows that each lie within one episode.

    Args:
        rollout: plain rollout ``[T]`` or ``[E, T]``, with ``("next", "done")``.
        length: number of steps of a window.

    Returns:
        windows ``[B, length]``: from every episode as many as fit without overlap, beginning at its first step.

    Raises:
        ValueError: if no episode is long enough.

    Examples:
        >>> done = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0]).bool().unsqueeze(-1)
        >>> rollout = TensorDict({"t": torch.arange(8), "next": {"done": done}}, [8])
        >>> episode_windows(rollout, 2)["t"].tolist()
        [[0, 1], [2, 3], [5, 6]]
    """
    check_ints(1, length=length)
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
            f"no episode of the rollout {tuple(rollout.shape)} has {length} steps; "
            "collect longer episodes or ask for shorter windows"
        )
    return rollout[env.unsqueeze(-1), start.unsqueeze(-1) + torch.arange(length, device=start.device)]


@torch.no_grad()
def open_loop(world_model: WorldModel, windows: TensorDictBase, *, context_length: int, horizon: int) -> TensorDict:
    """Imagine futures that follow the real actions.

    The model gets C real steps and the observation after them, then only the focal agent's own real actions. Latents
    are sampled from the dynamics predictor, and teammates' actions are predicted. All agents are predicted at once,
    each from its own history.

    Args:
        world_model: the shared world model.
        windows: plain or focal rollouts ``[B, T]`` with T >= C + H, for example from :func:`episode_windows`. If an
            episode ends within a window, the steps after its end are meaningless (:func:`open_loop_errors` excludes
            them).
        context_length: C, number of real steps before the first imagined one.
        horizon: H, number of imagined steps.

    Returns:
        ``[B, H]``, starting with the step after the context:

        - ``"real"``: these steps of the windows, as :func:`~matwm_rl.data.add_agent_entries` returns them;
        - ``"imagined"``, under the same keys: ``("next", "agents", "observation")`` (images from 0 to 1),
          ``("next", "agents", "reward" | "continuation")``, ``("agents", "teammate_logits")``.

    Raises:
        ValueError: if the windows are not ``[B, T]`` with T >= C + H.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> windows = episode_windows(env.rollout(30, break_when_any_done=False), 6)
        >>> result = open_loop(world_model, windows, context_length=2, horizon=4)
        >>> result["imagined", "next", "agents", "observation"].shape
        torch.Size([5, 4, 3, 5])
    """
    check_ints(1, horizon=horizon)
    check_ints(0, context_length=context_length)
    if windows.ndim != 2 or windows.shape[1] < context_length + horizon:
        raise ValueError(
            f"got windows of batch size {tuple(windows.shape)}; expected [B, T] with T >= context_length + horizon = "
            f"{context_length} + {horizon}"
        )
    windows = add_agent_entries(windows) if keys.AGENT_DONE not in windows.keys(include_nested=True) else windows
    actions = iter(
        agents_first(windows.get(keys.ACTION)[:, context_length:], windows.get(keys.ACTION).ndim - 3).unbind(2)
    )
    state, caches = world_model.start_from(windows[:, : context_length + 1], horizon)
    rollout = world_model.imagine(state, caches, lambda state, mask: next(actions), horizon)
    imagined = rollout.pack()
    decoded = torch.stack([world_model.decode(state.latent) for state in rollout.states[1:]], 2)
    imagined.set(keys.NEXT_OBSERVATION, agents_last(decoded, world_model.observation_dims))
    real = windows[:, context_length : context_length + horizon]
    return TensorDict({"real": real, "imagined": imagined}, batch_size=imagined.batch_size, device=windows.device)


@torch.no_grad()
def open_loop_errors(
    world_model: WorldModel, windows: TensorDictBase, *, context_length: int, horizon: int, num_samples: int = 8
) -> TensorDict:
    """Compare the errors of :func:`open_loop` at every step ahead with those of trivial predictors.

    The model's prediction is the mean of several imagined futures. The trivial predictors are the last real
    observation, the mean reward, and the likeliest constant distribution of each teammate's actions, which are
    frequencies if they are discrete. The last two are computed from the
    steps that they are tested on, so no constant is better.

    Args:
        world_model: the shared world model.
        windows: ``[B, T]``, see :func:`open_loop`.
        context_length: C, number of real steps before the first imagined one.
        horizon: H, number of imagined steps.
        num_samples: number of imagined futures per window.

    Returns:
        ``[H, N]``, means over the windows in which the episode still runs and the focal agent is alive:

        - ``("model" | "trivial", "observation")``: squared error, summed over an observation (images from 0 to 1);
        - ``("model" | "trivial", "reward")``: squared error;
        - ``("model" | "trivial", "teammate")``: negative log-likelihood of a living teammate's action, in nats;
          of continuous actions it may be below 0
          (absent without teammate predictor);
        - ``"count"``: number of these windows.

    Raises:
        ValueError: see :func:`open_loop`; or if ``num_samples`` is below 1.

    Examples:
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> env = make_env("mock", seed=0)
        >>> world_model = WorldModel.from_env(env, presets.tiny().world_model)
        >>> windows = episode_windows(env.rollout(30, break_when_any_done=False), 6)
        >>> errors = open_loop_errors(world_model, windows, context_length=2, horizon=4)
        >>> errors["model", "reward"].shape, errors["count"][0].tolist()
        (torch.Size([4, 3]), [5, 5, 5])
    """
    check_ints(1, num_samples=num_samples)
    expected: dict[str, Tensor] = {}
    likelihoods: list[Tensor] = []
    for _ in range(num_samples):
        result = open_loop(world_model, windows, context_length=context_length, horizon=horizon)
        imagined = result["imagined"]
        future = {"observation": imagined.get(keys.NEXT_OBSERVATION), "reward": imagined.get(keys.REWARD)}
        if world_model.teammates is not None:
            predicted, action = imagined.get(keys.TEAMMATE_LOGITS), result["real"].get(keys.TEAMMATE_ACTION)
            likelihoods.append(-world_model.actions.negative_log_likelihood(predicted, action))
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
    if likelihoods:
        mixture = torch.stack(likelihoods).logsumexp(0) - math.log(num_samples)
        model["teammate"], trivial["teammate"] = _teammate_errors(world_model.actions, -mixture, real, running)
    return TensorDict({"model": model, "trivial": trivial, "count": running.sum(0)}, batch_size=running.shape[1:])


def still_running(real: TensorDictBase) -> Tensor:
    """Return the mask ``[B, H, N]`` of the steps in the first step's episode in which the focal agent is alive."""
    running = agents_last(segment_ids(agents_first(real.get(keys.AGENT_DONE)).squeeze(-1)) == 0, 0)
    return running & real.get(keys.ALIVE, running)


def _teammate_errors(
    actions: ActionSpace, error: Tensor, real: TensorDictBase, running: Tensor
) -> tuple[Tensor, Tensor]:
    """Return means ``[H, N]`` of the model's errors ``[B, H, N, N-1]`` and of the best constant prediction's."""
    action = real.get(keys.TEAMMATE_ACTION)
    mask = running.unsqueeze(-1) & real.get(keys.TEAMMATE_ALIVE, torch.ones_like(running).unsqueeze(-1))
    constant = actions.fit_constant(action.flatten(0, 1), mask.expand_as(error).flatten(0, 1))
    constant = actions.mask_parameters(constant, actions.legal_of_teammates().to(action.device))
    trivial = actions.negative_log_likelihood(constant.expand(*error.shape, -1), action)
    means = (
        torch.where(mask, value, 0.0).sum((0, -1)) / mask.expand_as(error).sum((0, -1)) for value in (error, trivial)
    )
    model_error, trivial_error = means
    return model_error, trivial_error


def _squared(difference: Tensor) -> Tensor:
    """Return the squared norm ``[B, H, N]``."""
    return difference.square().flatten(3).sum(-1)


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    """Return the mean ``[H, N]`` over the windows in the mask, NaN if there are none."""
    return torch.where(mask, value, 0.0).sum(0) / mask.sum(0)


def as_float(observation: Tensor) -> Tensor:
    """Return observations in the decoder's range: images from 0 to 1, vectors unchanged."""
    return observation.float() / 255 if observation.dtype == torch.uint8 else observation
