"""Train a policy that reads observations with TorchRL's multi-agent PPO, on nothing but the world model's dreams."""

import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.modules import MaskedCategorical, MultiAgentMLP, ProbabilisticActor
from torchrl.objectives.multiagent import IPPOLoss

import matwm_rl as mw
from matwm_rl.keys import ACTION, ACTION_MASK, LOGITS, OBSERVATION, REWARD
from matwm_rl.training import RandomActions, evaluate, prepare_process

SIZES = {"hidden_size": 128, "num_layers": 1, "num_heads": 4, "encoder_depth": 2, "head_depth": 1, "dropout": 0.0}
VECTORS = {"latent": "gaussian", "num_dims": 64, "fourier_features": 4, "linear_skips": True, "coordinate_code": True}
DREAMS = {"reward_input": "next_observation", "reencode": True, "teammate_predictor": False}  # nobody reads its logits
# Real steps, updates of the world model, batches of dreams. Random agents take the first real steps.
ROUNDS = ((2000, 500, 80), (1000, 250, 80), (1000, 250, 80))


def main(rounds=ROUNDS, starts: int = 48, horizon: int = 10, episodes: int = 50, seed: int = 0) -> list[float]:
    prepare_process(num_threads=1, matmul_precision="medium")
    torch.manual_seed(seed)
    real = mw.make_env("mpe2/simple_spread_v3", seed=seed)
    agents, actions, (size,) = real.num_agents, real.layout.num_actions, real.layout.observation_shape
    world_model = mw.WorldModel.from_env(real, **SIZES, **VECTORS, **DREAMS)
    model_loss = mw.WorldModelLoss(world_model, weights=mw.WorldModelLossWeights(reconstruction=1000.0, reward=50.0))
    replay = mw.make_replay(num_agents=agents, sequences_per_agent=10, starts_per_agent=starts, sequence_length=16)

    # Independent critics, not MAPPO's central one: the agents of a row dream apart, each from a moment of its own, so
    # that what the others observe in theirs says nothing of an agent's return.
    mlp = {"n_agents": agents, "centralized": False, "share_params": True, "num_cells": (128, 128)}
    policy = TensorDictModule(MultiAgentMLP(size, actions, **mlp), in_keys=[OBSERVATION], out_keys=[LOGITS])
    critic = TensorDictModule(MultiAgentMLP(size, 1, **mlp), in_keys=[OBSERVATION], out_keys=["state_value"])
    dist = {"in_keys": {"logits": LOGITS, "mask": ACTION_MASK}, "distribution_class": MaskedCategorical}
    actor = ProbabilisticActor(policy, **dist, out_keys=[ACTION], return_log_prob=True)
    ppo = IPPOLoss(actor, critic, entropy_coeff=0.03)
    ppo.set_keys(reward=REWARD[1:])
    ppo.make_value_estimator(gamma=0.95, lmbda=0.95)
    lrs = [{"params": actor.parameters(), "lr": 1e-3}, {"params": critic.parameters(), "lr": 3e-3}]
    optimizer, acting = torch.optim.Adam(lrs, fused=True), RandomActions()
    returns = [evaluate(real, acting, episodes=episodes).values.mean().item()]
    for steps, updates, batches in rounds:
        for batch in Collector(real, acting, frames_per_batch=steps, total_frames=steps):
            replay.extend(batch)
        replay.end_episodes()  # the next real steps do not go on where these stopped
        model_optimizer = torch.optim.Adam(world_model.train().parameters(), lr=3e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(model_optimizer, 1.0, 0.0, updates)
        for _ in range(updates):
            minimise(model_loss(replay.sequences.sample()), model_optimizer)
            schedule.step()
        dreams = mw.ImaginationEnv(world_model.eval(), replay.starts, max_steps=horizon, decode=True, end_threshold=0.0)
        frames = starts * horizon
        for batch in Collector(dreams, actor, frames_per_batch=frames, total_frames=batches * frames):
            ppo.value_estimator(batch, params=ppo.critic_network_params, target_params=ppo.target_critic_network_params)
            for _ in range(4):
                minimise(ppo(batch), optimizer)
        acting = actor
        returns.append(evaluate(real, acting, episodes=episodes).values.mean().item())
    print(f"real return: random agents {returns[0]:.1f}, trained in dreams {returns[-1]:.1f}")
    return returns


def minimise(losses, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 100.0)
    optimizer.step()


if __name__ == "__main__":
    main()
