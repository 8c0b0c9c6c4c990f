"""Train MATWM on a multi-agent environment; on mpe2's simple_tag unless told otherwise.

    python examples/simple_tag.py                              # minutes on one core
    python examples/simple_tag.py env=vmas/simple_tag seed=1   # any entry of presets.TrainConfig
    python examples/simple_tag.py preset=paper device=cuda     # the paper's sizes; the default where there is a GPU
    python examples/simple_tag.py env=my_package.my_module:make_my_env

The run folder gets summary.json, metrics.csv, TensorBoard events, a checkpoint to resume from, the policy, pictures.
"""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.evaluation import (
    Matches,
    RunLog,
    evaluate_matches,
    find_evaluation,
    plot_learning_curves,
    plot_open_loop,
    record_gif,
)
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.settings import to_plain
from matwm_rl.training import (
    Learner,
    PolicyCard,
    ResumableCollector,
    has_checkpoint,
    load_checkpoint,
    lock_folder,
    prepare_process,
    save_checkpoint,
    save_policy,
    stop_on_signal,
)

presets.store()


@hydra.main(version_base=None, config_name="train")
def main(overridden: DictConfig) -> None:
    started = time.monotonic()
    cfg = presets.to_config(overridden)
    run_dir = Path(cfg.run_dir)
    sys.path.insert(0, str(Path.cwd()))
    for module in cfg.imports:
        importlib.import_module(module)
    torch.manual_seed(cfg.seed)
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)

    env = make_env(cfg.env, seed=cfg.seed, num_envs=cfg.num_envs, device=cfg.device)
    # One world model, shared by all agents; actors and critics are each agent's or each group's, with stacked weights.
    world_model = WorldModel.from_env(env, cfg.world_model).to(cfg.device)
    actor = make_actor(world_model, cfg.actor_critic).to(cfg.device)
    critic = make_critic(world_model, cfg.actor_critic).to(cfg.device)
    policy = WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    learner = Learner(world_model, actor, critic, cfg.learner)
    replay = make_replay(env.num_agents, cfg.replay, num_envs=cfg.num_envs, device=cfg.device, seed=cfg.seed)
    test_env = make_env(cfg.env, seed=cfg.seed + 1, num_envs=cfg.evaluation.num_envs, device=cfg.device)
    test_env = TransformedEnv(test_env, policy.make_tensordict_primer())
    collector = ResumableCollector(
        TransformedEnv(env, policy.make_tensordict_primer()),
        policy,
        seed=cfg.seed,
        frames_per_batch=cfg.frames_per_batch,
        total_frames=cfg.total_steps,
        init_random_frames=cfg.init_random_steps,
        auto_register_policy_transforms=False,
    )
    parts = {"learner": learner, "replay": replay, "collector": collector}

    with lock_folder(run_dir), stop_on_signal() as stop:
        resumes = cfg.resume and has_checkpoint(run_dir)
        first_step = load_checkpoint(run_dir, **parts)["env_steps"] if resumes else 0
        logged = first_step if cfg.resume else None
        with RunLog(run_dir, total_steps=cfg.total_steps, resume_from=logged, progress=cfg.progress) as log:
            OmegaConf.save(overridden, run_dir / "config.yaml")
            if cfg.resume and not resumes:
                log.note(f"no checkpoint in {run_dir}: the run begins anew")
            env_steps = first_step
            for batch in collector:
                # Algorithm 2: store what was seen; then the world model learns, and all agents learn inside it.
                replay.extend(batch)
                env_steps += batch.numel()
                log.advance(batch.numel())
                if env_steps >= cfg.init_random_steps and replay.can_sample:
                    for _ in range(cfg.world_model_warmup if learner.updates == 0 else 0):
                        learner.update_world_model(replay.sequences.sample())
                    for _ in range(cfg.updates_per_batch):
                        metrics = learner.update_world_model(replay.sequences.sample())
                        warm = learner.updates >= cfg.critic_warmup
                        log.accumulate(metrics.update(learner.update_agents(replay.starts.sample(), train_actors=warm)))
                    collector.update_policy_weights_()
                if due(cfg.log_every, env_steps, batch.numel()):
                    log.write(env_steps)
                if due(cfg.evaluation.every, env_steps, batch.numel()) and env_steps < cfg.total_steps:
                    matches = play(cfg, test_env, policy, cfg.evaluation.episodes)
                    log.log(matches.metrics(), env_steps)
                    log.note(f"{env_steps} steps: {matches}")
                    keep_policy(cfg, run_dir, policy, env_steps)
                late = cfg.max_minutes and time.monotonic() - started > 60 * cfg.max_minutes
                # Last: what is resumed from a checkpoint lacks nothing of before.
                if stop or late or env_steps >= cfg.total_steps or due(cfg.checkpoint_every, env_steps, batch.numel()):
                    save_checkpoint(run_dir, **parts, env_steps=env_steps)
                if stop:
                    log.note(f"stopped by {stop} after {env_steps} of {cfg.total_steps} steps; resume=true goes on")
                    raise SystemExit(stop.exit_code)
                if late:
                    log.note(f"stopped by max_minutes={cfg.max_minutes} after {env_steps} of {cfg.total_steps} steps")
                    break
            collector.shutdown()
            if not learner.updates:
                raise RuntimeError(
                    f"nothing was learnt in {env_steps} steps: updates begin after init_random_steps="
                    f"{cfg.init_random_steps}, when replay holds enough for a batch (it holds {len(replay)} steps)"
                )

            matches = play(cfg, test_env, policy, cfg.evaluation.final_episodes)
            if env_steps not in log.evaluated:
                log.log(matches.metrics(), env_steps)
            log.note(f"{env_steps} steps: {matches}")
            command = shlex.join(["python", *sys.argv])
            card = {"env": cfg.env, "seed": cfg.seed, "env_steps": env_steps, "returns": matches.summary()}
            save_policy(run_dir / "policy.pt", policy, card=PolicyCard(**card, command=command))
            keep_policy(cfg, run_dir, policy, env_steps)
            log.write_summary(
                {
                    "env": cfg.env,
                    "seed": cfg.seed,
                    "env_steps": env_steps,
                    "updates": learner.updates,
                    "resumed_from": first_step or None,
                    "wall_seconds": time.monotonic() - started,
                    "evaluation": matches.summary(),
                    "evaluation_per_agent": matches.per_agent(),
                    "evaluation_episodes": matches.episodes,
                    "config": to_plain(cfg),
                }
            )
            draw_pictures(cfg, run_dir, policy, log)
            log.note(f"results in {run_dir}")


def due(every: int, env_steps: int, new_steps: int) -> bool:
    """Return whether the last ``new_steps`` steps passed a multiple of ``every``."""
    return env_steps // every > (env_steps - new_steps) // every


def play(cfg: presets.TrainConfig, test_env: EnvBase, policy: WorldModelPolicy, episodes: int) -> Matches:
    """Evaluate the policy on the same episodes every time, also in a run that was interrupted in between."""
    test_env.set_seed(cfg.seed + 1)
    return evaluate_matches(cfg.env, test_env, policy, episodes=episodes)


def keep_policy(cfg: presets.TrainConfig, run_dir: Path, policy: WorldModelPolicy, env_steps: int) -> None:
    """Save the policy as ``policies/STEPS.pt``, if all are to be kept."""
    if cfg.evaluation.keep_policies:
        (run_dir / "policies").mkdir(exist_ok=True)
        save_policy(run_dir / "policies" / f"{env_steps:08d}.pt", policy)


def draw_pictures(cfg: presets.TrainConfig, run_dir: Path, policy: WorldModelPolicy, log: RunLog) -> None:
    """Draw learning curves, a GIF of real episodes, and open-loop imagination against what really happened."""
    evaluation = find_evaluation(cfg.env)
    plot_learning_curves(run_dir, run_dir / "learning_curves.png", references=evaluation.references)
    env = make_env(cfg.env, seed=cfg.seed + 2, device=cfg.device)
    draw = evaluation.draw(env.layout) if evaluation.draw else None
    env = TransformedEnv(env, policy.make_tensordict_primer())
    try:
        record_gif(env, policy, run_dir / "episodes.gif", episodes=4, draw=draw)
    except Exception as error:  # whatever a renderer raises: the results are saved, and the other picture is to come
        log.note(f"no GIF: {type(error).__name__}: {error}")
    with set_exploration_type(ExplorationType.RANDOM):  # as the world model has seen them play
        episode = env.rollout(1000, policy).reshape(-1)
    context = min(cfg.replay.context_length, len(episode) // 2)
    horizon = min(15, len(episode) - context)
    picture = run_dir / "imagination.png"
    plot_open_loop(policy.world_model, episode, picture, layout=env.layout, context_length=context, horizon=horizon)


if __name__ == "__main__":
    presets.check_names(sys.argv[1:])
    if torch.cuda.is_available() and not any(word.startswith(("preset=", "device=")) for word in sys.argv[1:]):
        sys.argv += ["preset=paper", "device=cuda"]
    main()
