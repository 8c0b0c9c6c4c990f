"""Algorithm 2 of MATWM (arXiv:2506.18537) on one page, from the environment to trained agents, without `Learner`."""

import sys

import torch
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.objectives import SoftUpdate

from matwm_rl import keys, presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.evaluation import Matches, evaluate_matches
from matwm_rl.loss_functions import clip_grad_norm_per_agent_
from matwm_rl.modules import Imagination, WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.objectives import ActorLoss, CriticLoss, LambdaReturn, WorldModelLoss
from matwm_rl.training import prepare_process


def main(cfg: presets.TrainConfig) -> tuple[WorldModelPolicy, Matches]:
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)
    torch.manual_seed(cfg.seed)
    env, hyper = make_env(cfg.env, seed=cfg.seed, num_envs=cfg.num_envs, **cfg.env_kwargs), cfg.learner
    world_model = WorldModel.from_env(env, cfg.world_model)  # one, shared by all agents
    actor, critic = make_actor(world_model, cfg.actor_critic), make_critic(world_model, cfg.actor_critic)
    policy = WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    imagination = Imagination(world_model, actor, horizon=hyper.horizon)
    returns = LambdaReturn(critic, gamma=hyper.gamma, lmbda=hyper.lmbda, reward_norm=world_model.two_hot.norm)
    model_loss = WorldModelLoss(world_model, weights=hyper.loss_weights)
    actor_loss, critic_loss = ActorLoss(actor, **hyper.actor.arguments(world_model.actions)), CriticLoss(critic)
    slow_critic = SoftUpdate(critic_loss, eps=hyper.critic_decay)
    rates = {model_loss: hyper.world_model_lr, actor_loss: hyper.actor_lr, critic_loss: hyper.critic_lr}
    trained = {loss: [p for p in loss.parameters() if p.requires_grad] for loss in rates}
    optimizers = {loss: torch.optim.Adam(trained[loss], lr, fused=True) for loss, lr in rates.items()}
    replay, updates = make_replay(env.num_agents, cfg.replay, num_envs=cfg.num_envs, seed=cfg.seed), 0

    def learn(loss, batch, clip_=clip_grad_norm_per_agent_, max_norm=hyper.actor_critic_clip) -> None:
        optimizers[loss].zero_grad()
        sum(value for key, value in loss(batch).items() if key.startswith("loss_")).backward()
        clip_(trained[loss], max_norm)
        decay = (1 + updates / hyper.lr_decay_updates) ** -0.5 if hyper.lr_decay_updates else 1.0
        optimizers[loss].param_groups[0]["lr"] = rates[loss] * decay
        optimizers[loss].step()

    test_env = make_env(cfg.env, seed=cfg.seed + 1, num_envs=cfg.evaluation.num_envs, **cfg.env_kwargs)
    env, test_env = (TransformedEnv(e, policy.make_tensordict_primer()) for e in (env, test_env))  # carries histories
    frames = {"frames_per_batch": cfg.frames_per_batch, "total_frames": cfg.total_steps}
    frames |= {"init_random_frames": cfg.init_random_steps, "auto_register_policy_transforms": False}
    for batch in Collector(env, policy, **frames):  # act on s_t: the posterior of o_t, h_t, predicted teammates
        replay.extend(batch)  # store what all agents saw and did
        for _ in range(cfg.updates_per_batch if replay.env_steps >= cfg.init_random_steps else 0):
            for _ in range(1 if updates else 1 + cfg.world_model_warmup):
                world_model.train()  # the world model learns from recent sequences of all agents
                learn(model_loss, replay.sequences.sample(), torch.nn.utils.clip_grad_norm_, hyper.world_model_clip)
                world_model.eval()
            imagined = returns(imagination(replay.starts.sample()))  # Algorithm 1 from uniform starts; lambda-returns
            with torch.no_grad():  # what PPO's ratio and the critic's second target compare with
                imagined.set(keys.ACTION_LOG_PROB, actor.get_dist(imagined).log_prob(imagined[keys.ACTION]))
                imagined.set(keys.SLOW_VALUE, critic_loss.slow_value(imagined))
            parts = [imagined[first :: hyper.agent_minibatches] for first in range(hyper.agent_minibatches)]
            for part in hyper.agent_epochs * parts:  # PPO's steps, each on a part of the starts
                for loss in [actor_loss, critic_loss] if updates >= cfg.critic_warmup else [critic_loss]:
                    learn(loss, part)  # each agent learns from its own imagined rollouts only
            slow_critic.step()
            updates += 1
    return policy, evaluate_matches(cfg.env, test_env, policy, episodes=cfg.evaluation.final_episodes)


if __name__ == "__main__":
    print(main(presets.compose(["total_steps=10000", *sys.argv[1:]]))[1])  # or seed=1 env=mpe2/simple_spread_v3
