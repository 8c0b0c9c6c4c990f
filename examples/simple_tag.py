"""Train MATWM on a multi-agent environment; on mpe2's simple_tag unless told otherwise.

    python examples/simple_tag.py                              # minutes on one core
    python examples/simple_tag.py env=vmas/simple_tag seed=1   # any entry of conf/ can be overridden
    python examples/simple_tag.py preset=paper device=cuda     # the paper's sizes; the default where there is a GPU

The run folder gets summary.json, metrics.csv, TensorBoard events, a checkpoint to resume from, the policy, pictures.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import RandomEpisodes, WorldModel, WorldModelConfig, WorldModelPolicy, make_actor, make_critic
from matwm_rl.training import (
    DrawTag,
    Learner,
    LearnerConfig,
    RunLog,
    evaluate_matches,
    load_checkpoint,
    plot_learning_curves,
    plot_open_loop,
    prepare_process,
    record_gif,
    save_checkpoint,
    save_policy,
)

# Mean returns of mpe2's pursuers, for the picture, from benchmarks/results/sample_efficiency.
REFERENCES = {
    "adversaries_vs_random_prey": {"random": 4.1, "scripted": 48.9, "model-free, 25k": 12.0},
    "adversaries_vs_fleeing_prey": {"random": 0.5, "scripted": 15.3, "model-free, 25k": 4.6},
    "prey_vs_chasing_adversaries": {"random": 47.8, "scripted": 14.3, "model-free, 25k": 29.2},
}


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    started = time.monotonic()
    run_dir = Path(cfg.run_dir)
    torch.manual_seed(cfg.seed)
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)

    env = make_env(cfg.env, seed=cfg.seed, num_envs=cfg.num_envs, device=cfg.device)
    layout = env.layout
    # One world model, shared by all agents; actors and critics are each agent's or each group's, with stacked weights.
    model_config = WorldModelConfig(**cfg.world_model)
    world_model = WorldModel.from_env(env, **asdict(model_config)).to(cfg.device)
    actor = make_actor(world_model, **cfg.actor_critic).to(cfg.device)
    critic = make_critic(world_model, **cfg.actor_critic).to(cfg.device)
    policy = WorldModelPolicy(world_model, actor, **cfg.policy)
    save = partial(save_policy, layout=layout, world_model=model_config, actor=cfg.actor_critic)
    horizon, starts = agent_batch(cfg, layout.num_agents)
    learner = Learner(world_model, actor, critic, LearnerConfig.from_dict({**cfg.learner, "horizon": horizon}))
    replay = make_replay(
        num_agents=layout.num_agents,
        num_envs=cfg.num_envs,
        sequences_per_agent=max(1, round(cfg.sequences / layout.num_agents)),
        starts_per_agent=starts,
        decay=cfg.recency_decay if cfg.recency else 1.0,
        device=cfg.device,
        seed=cfg.seed,
        **cfg.replay,
    )
    first_step = load_checkpoint(run_dir, learner=learner, replay=replay)["env_steps"] if cfg.resume else 0
    if first_step:
        env.set_seed(cfg.seed + first_step)  # no checkpoint holds an environment's: not the run's first episodes again
    explorer = RandomEpisodes(policy, probability=cfg.random_episodes)
    collector = Collector(
        TransformedEnv(env, explorer.make_tensordict_primer()),
        explorer,
        frames_per_batch=cfg.frames_per_batch,
        total_frames=max(0, cfg.total_steps - first_step),
        init_random_frames=max(0, cfg.init_random_steps - first_step),
        auto_register_policy_transforms=False,
    )
    test_env = make_env(cfg.env, seed=cfg.seed + 1, num_envs=cfg.evaluation.num_envs, device=cfg.device)
    test_env = TransformedEnv(test_env, policy.make_tensordict_primer())

    with RunLog(run_dir, total_steps=cfg.total_steps, resume_from=first_step or None, progress=cfg.progress) as log:
        OmegaConf.save(cfg, run_dir / "config.yaml")
        policies = run_dir / "policies"
        if cfg.evaluation.keep_policies:
            policies.mkdir(exist_ok=True)
        env_steps = first_step
        for batch in collector:
            # Algorithm 2: store what was seen; then the world model learns, and all agents learn inside it.
            replay.extend(batch)
            env_steps += batch.numel()
            log.advance(batch.numel())
            if env_steps >= cfg.init_random_steps and replay.can_sample:
                for _ in range(cfg.updates_per_batch):
                    log.accumulate(learner.update(replay))
                collector.update_policy_weights_()
            if due(cfg.log_every, env_steps, batch.numel()):
                log.write(env_steps)
            if due(cfg.evaluation.every, env_steps, batch.numel()) and env_steps < cfg.total_steps:
                matches = evaluate_matches(cfg.env, test_env, policy, episodes=cfg.evaluation.episodes)
                log.log(matches.metrics(), env_steps)
                log.note(f"{env_steps} steps: {matches}")
                if cfg.evaluation.keep_policies:
                    save(policies / f"{env_steps:08d}.pt", policy)
                # Last: what is resumed from it lacks nothing of before.
                save_checkpoint(run_dir, learner=learner, replay=replay, env_steps=env_steps)
            if cfg.max_minutes and time.monotonic() - started > 60 * cfg.max_minutes:
                log.note(f"stopped by max_minutes={cfg.max_minutes} after {env_steps} of {cfg.total_steps} steps")
                break
        collector.shutdown()

        matches = evaluate_matches(cfg.env, test_env, policy, episodes=cfg.evaluation.final_episodes)
        if env_steps > first_step:  # else it is in the log already
            log.log(matches.metrics(), env_steps)
        log.note(f"{env_steps} steps: {matches}")
        save(run_dir / "policy.pt", policy)
        if cfg.evaluation.keep_policies:
            save(policies / f"{env_steps:08d}.pt", policy)
        save_checkpoint(run_dir, learner=learner, replay=replay, env_steps=env_steps)
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
                "config": OmegaConf.to_container(cfg, resolve=True),
            }
        )
        draw_pictures(cfg, run_dir, policy, log)
        log.note(f"results in {run_dir}")


def agent_batch(cfg: DictConfig, num_agents: int) -> tuple[int, int]:
    """Horizon and starts per agent: as configured, else the paper's rule by the number of agents (Table C.6)."""
    starts, horizon = (512, 16) if num_agents <= 3 else (768, 12) if num_agents <= 6 else (1024, 8)
    return cfg.learner.horizon or horizon, cfg.starts_per_agent or starts


def due(every: int, env_steps: int, new_steps: int) -> bool:
    """Whether the last ``new_steps`` steps passed a multiple of ``every``."""
    return env_steps // every > (env_steps - new_steps) // every


def draw_pictures(cfg: DictConfig, run_dir: Path, policy: WorldModelPolicy, log: RunLog) -> None:
    """Learning curves, a GIF of real episodes, and open-loop imagination against what really happened."""
    is_mpe = cfg.env.startswith("mpe2/")
    plot_learning_curves(run_dir, run_dir / "learning_curves.png", references=REFERENCES if is_mpe else None)
    rendering = {} if cfg.env.startswith("vmas/") else {"render_mode": "rgb_array"}
    env = make_env(cfg.env, seed=cfg.seed + 2, device=cfg.device, **rendering)
    draw = DrawTag(env.layout) if "simple_tag" in cfg.env else None
    env = TransformedEnv(env, policy.make_tensordict_primer())
    try:
        record_gif(env, policy, run_dir / "episodes.gif", episodes=4, draw=draw)
    except (RuntimeError, NotImplementedError) as error:
        log.note(f"no GIF: {error}")
    with set_exploration_type(ExplorationType.RANDOM):  # as the world model has seen them play
        episode = env.rollout(1000, policy).reshape(-1)
    context = min(cfg.replay.context_length, len(episode) // 2)
    plot_open_loop(
        policy.world_model,
        episode,
        run_dir / "imagination.png",
        layout=env.layout,
        context_length=context,
        horizon=min(15, len(episode) - context),
    )


if __name__ == "__main__":
    if torch.cuda.is_available() and not any(word.startswith(("preset=", "device=")) for word in sys.argv[1:]):
        sys.argv += ["preset=paper", "device=cuda"]
    main()
