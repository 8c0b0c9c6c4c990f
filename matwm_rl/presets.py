"""Complete configurations of a training run: one dataclass, and functions that return it filled in.

Every default stands beside the part that it configures; a preset says what it changes. Scripts read presets through
Hydra (:func:`store`), which refuses names and types that the dataclasses do not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import product
from typing import Any

from matwm_rl.data import ReplayConfig
from matwm_rl.evaluation import EvaluationConfig, LoggerName
from matwm_rl.files import import_optional
from matwm_rl.modules import (
    ActorCriticConfig,
    CategoricalLatentConfig,
    CoordinateEncoderConfig,
    GaussianLatentConfig,
    Interpolation,
    MLPEncoderConfig,
    ObservationRewardConfig,
    PolicyConfig,
    WorldModelConfig,
)
from matwm_rl.objectives import ActorLossConfig, Advantage, PolicyObjective, WorldModelLossWeights
from matwm_rl.settings import Settings, entry_names, setting, unknown_entry
from matwm_rl.training.config import LearnerConfig
from matwm_rl.training.process import MatmulPrecision


@dataclass(kw_only=True)
class TrainConfig(Settings):
    """Everything that a training script needs to know; the defaults are the paper's, where it says anything.

    Attributes:
        env: name of the environment, see :func:`~matwm_rl.envs.make_env`.
        env_kwargs: further arguments of ``make_env``, for all environments that the run makes: ``max_cycles``.
        imports: modules to import first, such as one that registers an environment.
        seed: of everything random.
        device: of networks, replay and updates.
        env_device: of the environments, where a copy of the policy acts if it is not ``device``.
        run_dir: folder of the run; on the command line, by default one named after environment, seed and time.
        resume: go on from the newest checkpoint in ``run_dir``.
        progress: show how far the run is.
        logger: where scalars go besides ``metrics.csv``: one of TorchRL's loggers by its name, or ``null``.
        total_steps: env steps of the run.
        max_minutes: end after so long, evaluation and pictures included; ``None``: no limit.
        num_envs: environments that step together.
        num_threads: of PyTorch on the CPU.
        matmul_precision: of float32 products.
        init_random_steps: env steps with random actions, before training begins.
        frames_per_batch: env steps of all environments together, between updates.
        updates_per_batch: updates after every such batch.
        world_model_warmup: updates of the world model alone before the first update of the agents (ours).
        critic_warmup: updates in which the world model and the critics learn, and the actors do not yet (ours).
        log_every: env steps between entries of the log.
        checkpoint_every: env steps between checkpoints.
        world_model: the world model.
        actor_critic: networks of actors and critics.
        policy: the acting policy.
        learner: losses and optimizers.
        replay: replay and its batches.
        evaluation: evaluations.

    Raises:
        TypeError: if an entry is of another type, or there is none of a name.
        ValueError: if an entry is out of range, or entries together could never lead to an update.

    Examples:
        >>> from dataclasses import replace
        >>> replace(vectors(), seed=3).learner.horizon
        10
    """

    env: str = "mpe2/simple_tag_v3"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    seed: int = setting(0, minimum=0, maximum=2**31 - 1)
    device: str = setting("cpu", is_device=True)
    env_device: str = setting("cpu", is_device=True)
    run_dir: str = "runs/${last_part:${env}}-seed${seed}-${now:%Y-%m-%d_%H-%M-%S}"
    resume: bool = False
    progress: bool = True
    logger: LoggerName | None = LoggerName.tensorboard
    total_steps: int = setting(50_000, minimum=1)
    max_minutes: float | None = setting(None, above=0)
    num_envs: int = setting(1, minimum=1)
    num_threads: int = setting(2, minimum=1)
    matmul_precision: MatmulPrecision = MatmulPrecision.high
    init_random_steps: int = setting(1000, minimum=0)
    frames_per_batch: int = setting(1, minimum=1)
    updates_per_batch: int = setting(1, minimum=1)
    world_model_warmup: int = setting(0, minimum=0)
    critic_warmup: int = setting(0, minimum=0)
    log_every: int = setting(100, minimum=1)
    checkpoint_every: int = setting(1000, minimum=1)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    actor_critic: ActorCriticConfig = field(default_factory=ActorCriticConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        """Refuse a run that could never make an update, as far as that can be known before it begins."""
        if given := sorted({"name", "seed", "num_envs", "device"} & set(self.env_kwargs)):
            raise ValueError(f"TrainConfig.env_kwargs has {given[0]!r}, which is set by an entry of its own")
        frames, envs = self.frames_per_batch, self.num_envs
        if frames % envs:
            raise ValueError(f"TrainConfig.frames_per_batch must be a multiple of num_envs, {envs}, got {frames}")
        collected = -(-self.total_steps // frames) * frames
        rooms = {"total_steps": collected, "replay.capacity": self.replay.capacity}
        needs = {
            "init_random_steps": -(-self.init_random_steps // envs) if collected < self.init_random_steps else 0,
            "frames_per_batch": frames // envs,
            "replay.sequence_length": self.replay.sequence_length,
            "replay.context_length + 1": self.replay.context_length + 1,
        }
        for (need, length), (room, steps) in product(needs.items(), rooms.items()):
            if length > steps // envs:
                raise ValueError(
                    f"TrainConfig.{need} asks for {length} steps of each of {envs} environments, and {room} has room "
                    f"for {steps // envs}: nothing would ever be learnt"
                )


def paper() -> TrainConfig:
    """Return the paper's algorithm and sizes (Table C.6, STORM's values where it is silent). For a GPU.

    Examples:
        >>> paper().world_model.hidden_size
        512
    """
    return TrainConfig()


def vectors() -> TrainConfig:
    """Return what learns environments of short vector observations in minutes on one core.

    It is small and quick, and departs from the paper in the settings that docs/presets.md lists, each with its reason.

    Examples:
        >>> vectors().world_model.latent
        GaussianLatentConfig(num_dims=64)
    """
    return TrainConfig(
        total_steps=20_000,
        max_minutes=10.0,  # on a slow machine: fewer steps
        num_envs=4,
        num_threads=1,  # two are 15% faster alone, and three times as slow beside another process
        matmul_precision=MatmulPrecision.medium,
        frames_per_batch=20,
        updates_per_batch=4,
        world_model_warmup=200,
        critic_warmup=100,
        log_every=500,
        world_model=WorldModelConfig(
            hidden_size=128,
            num_layers=1,
            num_heads=4,
            dropout=0.0,
            latent=GaussianLatentConfig(),
            encoder=CoordinateEncoderConfig(),
            head_depth=1,
            reward=ObservationRewardConfig(),
            reward_interpolation=Interpolation.raw,
            reencode=True,
            normalize=True,
            group_layers=True,
            teammate_hidden_size=64,
        ),
        actor_critic=ActorCriticConfig(num_cells=128, share_by_group=True),
        policy=PolicyConfig(history_length=16),
        learner=LearnerConfig(
            world_model_lr=3e-3,
            loss_weights=WorldModelLossWeights(reconstruction=1000.0, reward=50.0),
            actor_lr=1e-3,
            critic_lr=3e-3,
            horizon=10,
            gamma=0.95,
            actor=ActorLossConfig(
                entropy_coeff=0.03,
                advantage=Advantage.standardize,
                objective=PolicyObjective.ppo,
                mean_policy_entropy_coeff=0.1,
                signalling_coeff=1.0,
            ),
            agent_epochs=2,
            agent_minibatches=4,
            lr_decay_updates=1000,
        ),
        replay=ReplayConfig(sequences=32, sequence_length=16, starts_per_agent=48),
    )


def tiny() -> TrainConfig:
    """Return the paper's algorithm in the smallest sizes, for tests and examples in docstrings. It learns nothing.

    Examples:
        >>> tiny().world_model.latent
        CategoricalLatentConfig(num_dims=4, num_classes=4)
    """
    return TrainConfig(
        env="mock",
        total_steps=60,
        init_random_steps=40,
        frames_per_batch=10,
        log_every=20,
        world_model=WorldModelConfig(
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            dropout=0.0,
            latent=CategoricalLatentConfig(num_dims=4, num_classes=4),
            encoder=MLPEncoderConfig(depth=1),
            head_depth=1,
        ),
        actor_critic=ActorCriticConfig(num_cells=16, depth=1),
        policy=PolicyConfig(history_length=4),
        learner=LearnerConfig(horizon=3),
        replay=ReplayConfig(capacity=200, sequences=6, sequence_length=8, starts_per_agent=4, context_length=2),
        evaluation=EvaluationConfig(every=1000, episodes=2, final_episodes=2, num_envs=2),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"paper": paper, "vectors": vectors, "tiny": tiny}
"""By the names that scripts know; add yours before :func:`store`."""


def store(**hydra_settings: Any) -> None:
    """Register the presets with Hydra, for ``@hydra.main(version_base=None, config_name="train")``.

    ``preset=NAME`` then chooses one on the command line, and every entry of :class:`TrainConfig` can be overridden.

    Args:
        hydra_settings: Hydra's own, by the name below ``hydra``, such as ``callbacks``.

    Raises:
        ImportError: if Hydra is not installed (``pip install "matwm_rl[train]"``).

    Examples:
        >>> store()
        >>> from hydra.core.config_store import ConfigStore
        >>> ConfigStore.instance().list("preset")
        ['cpu.yaml', 'paper.yaml', 'tiny.yaml', 'vectors.yaml']
    """
    config_store = import_optional("hydra.core.config_store").ConfigStore.instance()
    omegaconf = import_optional("omegaconf").OmegaConf
    omegaconf.register_new_resolver("last_part", lambda name: re.split("[/:]", str(name))[-1], replace=True)
    # No log file: nothing is logged by way of Python's logging, so that it would stay empty.
    quiet = [{f"override hydra/{name}_logging": "none"} for name in ("job", "hydra")]
    defaults = [{"preset": "vectors"}, "_self_", *quiet]
    hydra_settings = {"run": {"dir": "${run_dir}"}, "output_subdir": None, **hydra_settings}
    config_store.store(name="train", node={"defaults": defaults, "hydra": hydra_settings}, package="_global_")
    for name, preset in PRESETS.items():
        config_store.store(group="preset", name=name, node=preset(), package="_global_")
    config_store.store(group="preset", name="cpu", node=vectors(), package="_global_")  # the name of before


def compose(overrides: Sequence[str] = ()) -> TrainConfig:
    """Compose a configuration as a script's command line does.

    Args:
        overrides: ``name=value``, as on the command line.

    Raises:
        ImportError: if Hydra is not installed.
        ValueError: if there is no such entry, or its value is refused; the message names what is allowed.

    Examples:
        >>> compose(["preset=paper", "learner.gamma=0.9"]).learner.gamma
        0.9
    """
    hydra = import_optional("hydra")
    store()
    with hydra.initialize(version_base=None, config_path=None):
        try:
            composed = hydra.compose("train", overrides=[*map(open_override, overrides)])
        except import_optional("hydra.errors").ConfigCompositionException as error:
            raise ValueError(_problem(error)) from error
    return to_config(composed)


def to_config(composed: Any) -> TrainConfig:
    """Turn what Hydra has composed into the dataclass.

    Hydra lets a command line add entries, ``+name=value``, which nothing would read.

    Args:
        composed: what ``hydra.main`` gives to its function.

    Raises:
        TypeError: if it is not composed of a preset.
        ValueError: if it has entries that the dataclasses do not have, or one's value is refused.

    Examples:
        >>> from omegaconf import OmegaConf
        >>> to_config(OmegaConf.structured(TrainConfig(run_dir="runs/mine"))).env
        'mpe2/simple_tag_v3'
    """
    omegaconf = import_optional("omegaconf").OmegaConf
    if not (omegaconf.is_dict(composed) and issubclass(omegaconf.get_type(composed), TrainConfig)):
        raise TypeError(f"composed must be what Hydra composes of a preset, got {composed!r}")
    _refuse_added(omegaconf, composed)
    config: TrainConfig = omegaconf.to_object(composed)
    return config


def open_override(override: str) -> str:
    """Let an override add an entry where entries are free: ``env_kwargs.max_cycles=50``, for which Hydra wants ``++``.

    Args:
        override: of a command line.

    Examples:
        >>> open_override("env_kwargs.max_cycles=50"), open_override("seed=1")
        ('++env_kwargs.max_cycles=50', 'seed=1')
    """
    return f"++{override}" if override.partition("=")[0].partition(".")[0] == "env_kwargs" else override


def _refuse_added(omegaconf: Any, composed: Any, prefix: str = "") -> None:
    for name, value in composed.items():
        if name not in [entry.name for entry in fields(omegaconf.get_type(composed))]:
            raise ValueError(_unknown(prefix + name))
        if omegaconf.is_dict(value) and is_dataclass(omegaconf.get_type(value)):
            _refuse_added(omegaconf, value, f"{prefix}{name}.")


def _known_names() -> set[str]:
    return {name for preset in PRESETS.values() for name in entry_names(preset())}


def _unknown(name: str) -> str:
    return unknown_entry(name, sorted(_known_names()))


def _problem(error: Exception) -> str:
    """Say what was wrong with an override, in one line."""
    cause = error.__cause__
    name, kind = getattr(cause, "full_key", None), getattr(cause, "object_type", None)
    if not name or name not in _known_names():
        return _unknown(name) if name else str(error)
    what = f"{name}: {str(cause).partition(chr(10))[0]}"
    lacks = is_dataclass(kind) and name.rpartition(".")[2] not in (names := [entry.name for entry in fields(kind)])
    return f"{what}, which has {', '.join(names)}" if lacks else what
