"""Train MATWM on simple_tag of mpe2: three pursuers and an evader, in minutes on one core. The loop, on one page.

    python examples/simple_tag.py
    python examples/simple_tag.py total_steps=10000 seed=1   # any entry of presets.TrainConfig

examples/train.py is the same for any environment, and for several seeds; its --help tells what else there is.
"""

import importlib
import sys

import torch
from torchrl.envs import TransformedEnv

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.runs import TrainingRun, command_line
from matwm_rl.training import Learner, ResumableCollector, prepare_process


def train(cfg: presets.TrainConfig) -> None:
    for module in cfg.imports:
        importlib.import_module(module)
    torch.manual_seed(cfg.seed)
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)
    env = make_env(cfg.env, seed=cfg.seed, num_envs=cfg.num_envs, device=cfg.env_device, **cfg.env_kwargs)
    # One world model, shared by all agents; actors and critics are each agent's or each group's, with stacked weights.
    world_model = WorldModel.from_env(env, cfg.world_model).to(cfg.device)
    actor = make_actor(world_model, cfg.actor_critic).to(cfg.device)
    critic = make_critic(world_model, cfg.actor_critic).to(cfg.device)
    policy = WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    learner = Learner(world_model, actor, critic, cfg.learner)
    replay = make_replay(env.num_agents, cfg.replay, num_envs=cfg.num_envs, device=cfg.device, seed=cfg.seed)
    collector = ResumableCollector(
        TransformedEnv(env, policy.make_tensordict_primer()),  # carries the histories that the policy acts by
        policy,
        device=cfg.env_device,  # acts there, with a copy of the policy if the policy is elsewhere
        seed=cfg.seed,
        checkpoint_every=cfg.checkpoint_every,
        frames_per_batch=cfg.frames_per_batch,
        total_frames=cfg.total_steps,
        init_random_frames=cfg.init_random_steps,
        auto_register_policy_transforms=False,
    )

    # The run takes care of everything else: log, evaluations, checkpoints, pictures, Ctrl-C.
    with TrainingRun(cfg, collector.policy, learner=learner, replay=replay, collector=collector) as run:
        for batch in run.batches():
            # Algorithm 2: store what was seen; then the world model learns, and all agents learn inside it.
            replay.extend(batch)
            if run.env_steps < cfg.init_random_steps or not replay.can_sample:
                continue
            for _ in run.track("the world model alone", cfg.world_model_warmup if learner.updates == 0 else 0):
                learner.update_world_model(replay.sequences.sample())
            for _ in range(cfg.updates_per_batch):
                metrics = learner.update_world_model(replay.sequences.sample())
                warm = learner.updates >= cfg.critic_warmup
                metrics.update(learner.update_agents(replay.starts.sample(), train_actors=warm))
                run.log.accumulate(metrics)
            collector.update_policy_weights_()
        run.finish()


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    sys.path.insert(0, "")  # for modules of your own in the folder in which you start the script
    train(presets.compose(command_line(sys.argv[1:])))
