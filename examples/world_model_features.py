"""Features for model-free agents: TorchRL's own PPO, which sees through the states of a frozen world model."""

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import TransformedEnv
from torchrl.modules import MaskedCategorical, MultiAgentMLP, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss, LossModule

import matwm_rl as mw
from matwm_rl import keys
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.modules import WorldModelFeatures


def step(loss: LossModule, optimizer: torch.optim.Optimizer, batch: TensorDictBase) -> None:
    optimizer.zero_grad()
    sum(value for key, value in loss(batch).items() if key.startswith("loss_")).backward()
    optimizer.step()


def main(random_steps: int = 2_000, updates: int = 200, steps: int = 10_000, episodes: int = 50) -> None:
    torch.manual_seed(0)
    cfg, num_envs = mw.presets.vectors(), 10
    env = mw.make_env("mpe2/simple_speaker_listener_v4", seed=0, num_envs=num_envs)
    model = mw.WorldModel.from_env(env, cfg.world_model)
    replay = mw.make_replay(env.num_agents, cfg.replay, num_envs=num_envs)
    replay.extend(env.rollout(random_steps // num_envs, break_when_any_done=False))
    loss = mw.WorldModelLoss(model, weights=cfg.learner.loss_weights)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(updates):
        step(loss, optimizer, replay.sequences.sample())

    env = TransformedEnv(env, WorldModelFeatures(model.eval(), history_length=cfg.policy.history_length))
    inputs, agents = [keys.LATENT, keys.HIDDEN], model.num_agents
    size = model.latent.latent_size + model.transformer.features
    options = {"centralized": False, "share_params": False, "activation_class": torch.nn.ReLU}
    options |= {"num_cells": cfg.actor_critic.num_cells, "depth": cfg.actor_critic.depth}
    logits = TensorDictModule(MultiAgentMLP(size, model.num_actions, agents, **options), inputs, [keys.LOGITS])
    critic = TensorDictModule(MultiAgentMLP(size, 1, agents, **options), inputs, [keys.STATE_VALUE])
    ends = {"in_keys": {"logits": keys.LOGITS, "mask": keys.ACTION_MASK}, "out_keys": [keys.ACTION]}
    actor = ProbabilisticActor(logits, **ends, distribution_class=MaskedCategorical, return_log_prob=True)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    per_agent = {name: ("agents", name) for name in ("action", "reward", "done", "terminated")}
    loss.set_keys(**per_agent, sample_log_prob=keys.ACTION_LOG_PROB, value=keys.STATE_VALUE)
    loss.make_value_estimator(gamma=cfg.learner.gamma, lmbda=cfg.learner.lmbda)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(steps // 10), batch_size=250)
    frames = {"frames_per_batch": steps // 10, "total_frames": steps}
    for batch in Collector(env, actor, **frames, auto_register_policy_transforms=False):
        batch = mw.add_agent_entries(batch.exclude("history", ("next", "history")))  # writes the ends of every agent
        buffer.extend(loss.value_estimator(batch).detach().reshape(-1))
        for _ in range(updates // 5):
            step(loss, optimizer, buffer.sample())
    for name, acting in (("random", RandomActions()), ("trained", actor)):
        print(f"{name} agents, mean return: {evaluate(env, acting, episodes=episodes).per_group()['listener']:.1f}")


if __name__ == "__main__":
    main()
