"""Train a policy that reads observations with TorchRL's multi-agent PPO, on nothing but the world model's dreams."""

from dataclasses import replace

import torch
from tensordict.nn import TensorDictModule
from torchrl.modules import MaskedCategorical, MultiAgentMLP, ProbabilisticActor
from torchrl.objectives.multiagent import IPPOLoss

import matwm_rl as mw
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.keys import ACTION, ACTION_MASK, LOGITS, OBSERVATION, REWARD
from matwm_rl.training import prepare_process


def step(losses, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    optimizer.step()


def main(rounds=((2000, 400, 80), (1000, 200, 80), (1000, 200, 80)), episodes: int = 50) -> None:
    cfg, hyper = mw.presets.vectors(), mw.presets.vectors().learner
    prepare_process(num_threads=cfg.num_threads, matmul_precision=cfg.matmul_precision)
    torch.manual_seed(0)
    real = mw.make_env("mpe2/simple_spread_v3", seed=0)
    model = mw.WorldModel.from_env(real, replace(cfg.world_model, teammate_predictor=False))  # nobody reads its logits
    model_loss = mw.WorldModelLoss(model, weights=hyper.loss_weights)
    replay = mw.make_replay(real.num_agents, cfg.replay)

    # No central critic as in MAPPO: each agent imagines alone, so that others' imagined states tell nothing of its own.
    mlp = {"centralized": False, "share_params": True, "activation_class": torch.nn.ReLU}
    mlp |= {"num_cells": cfg.actor_critic.num_cells, "depth": cfg.actor_critic.depth}
    size, num_actions = real.layout.observation_shape[0], real.layout.num_actions
    policy = TensorDictModule(MultiAgentMLP(size, num_actions, 3, **mlp), [OBSERVATION], [LOGITS])
    critic = TensorDictModule(MultiAgentMLP(size, 1, 3, **mlp), [OBSERVATION], ["state_value"])
    dist = {"in_keys": {"logits": LOGITS, "mask": ACTION_MASK}, "distribution_class": MaskedCategorical}
    actor = ProbabilisticActor(policy, **dist, out_keys=[ACTION], return_log_prob=True)
    ppo = IPPOLoss(actor, critic, entropy_coeff=hyper.actor.entropy_coeff)
    ppo.set_keys(reward=REWARD[1:])
    ppo.make_value_estimator(gamma=hyper.gamma, lmbda=hyper.lmbda)
    rates = {actor: hyper.actor_lr, critic: hyper.critic_lr}
    optimizer = torch.optim.Adam([{"params": part.parameters(), "lr": lr} for part, lr in rates.items()])
    acting = RandomActions()
    for real_steps, updates, dreams in rounds:
        replay.extend(real.rollout(real_steps, acting, break_when_any_done=False))
        replay.end_episodes()  # the next real steps do not go on where these stopped
        model_optimizer = torch.optim.Adam(model.train().parameters(), lr=hyper.world_model_lr)
        schedule = torch.optim.lr_scheduler.LinearLR(model_optimizer, 1.0, 0.0, updates)
        for _ in range(updates):
            step(model_loss(replay.sequences.sample()), model_optimizer)
            schedule.step()
        env = mw.ImaginationEnv(model.eval(), replay.starts, max_steps=hyper.horizon, decode=True, end_threshold=0.0)
        for _ in range(dreams):
            with torch.no_grad():
                dreamt = ppo.value_estimator(env.rollout(hyper.horizon, actor))
            for part in hyper.agent_epochs * dreamt.chunk(hyper.agent_minibatches):
                step(ppo(part), optimizer)
        acting = actor
    for name, acting in (("random agents", RandomActions()), ("agents trained in dreams", actor)):
        print(f"{name}, mean return: {evaluate(real, acting, episodes=episodes).per_group()['agent']:.1f}")


if __name__ == "__main__":
    main()
