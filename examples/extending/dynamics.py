"""Dynamics of your own: conditional flow matching (arXiv:2210.02747) in place of a normal distribution of z_{t+1}."""

import torch
from torch import Tensor
from torchrl.modules import MLP

import matwm_rl as mw
from matwm_rl.evaluation import episode_windows, open_loop_errors
from matwm_rl.modules import Dynamics, DynamicsLoss


class FlowMatching(Dynamics):
    scale, num_steps = 0.4, 8  # of how far z moves in a step; of the integration

    def __init__(self, hidden_size: int, latent_size: int, num_cells: int) -> None:
        super().__init__()
        self.field = MLP(hidden_size + 2 * latent_size + 1, latent_size, depth=2, num_cells=num_cells)

    def velocity(self, moved: Tensor, time: Tensor, hidden: Tensor, latent: Tensor) -> Tensor:
        return self.field(torch.cat([moved, time.expand_as(moved[..., :1]), hidden, latent], -1))

    def loss(self, hidden: Tensor, latent: Tensor, posterior: Tensor) -> DynamicsLoss:
        target = ((posterior[..., 0] - latent) / self.scale).detach()  # of a GaussianLatent: [..., 0] are the means
        noise, time = torch.randn_like(target), torch.rand_like(target[..., :1])
        velocity = self.velocity(noise.lerp(target, time), time, hidden, latent.detach())
        error = (velocity - (target - noise)).square().sum(-1)
        return DynamicsLoss(error, torch.zeros_like(error))  # the encoder is left to the reconstruction

    def sample(self, hidden: Tensor, latent: Tensor) -> Tensor:
        moved = torch.randn_like(latent)
        for step in range(self.num_steps):
            time = torch.full_like(moved[..., :1], step / self.num_steps)
            moved = moved + self.velocity(moved, time, hidden, latent) / self.num_steps
        return (latent + self.scale * moved).detach()


def main(steps: int = 4_000, updates: int = 400) -> None:
    torch.manual_seed(0)
    cfg, env = mw.presets.vectors(), mw.make_env("mpe2/simple_spread_v3", seed=0)
    data, test = (env.rollout(length, break_when_any_done=False) for length in (steps, steps // 4))
    windows = episode_windows(test, length=20)
    own = FlowMatching(cfg.world_model.hidden_size, cfg.world_model.latent.num_dims, cfg.world_model.hidden_size)
    for parts in ({}, {"dynamics": own}):
        model = mw.WorldModel.from_env(env, cfg.world_model, **parts)
        agents = (make(model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
        learner, replay = mw.Learner(model, *agents, cfg.learner), mw.make_replay(3, cfg.replay, seed=0)
        replay.extend(data)
        for _ in range(updates):
            learner.update_world_model(replay.sequences.sample())
        errors = open_loop_errors(model, windows, context_length=5, horizon=15)
        error, kept = (errors[source, "observation"].mean(-1)[[0, 4, 14]].tolist() for source in ("model", "trivial"))
        print(f"{type(model.dynamics).__name__}, error 1, 5 and 15 steps ahead:", *(f"{value:.3f}" for value in error))
    print("last observation kept, error 1, 5 and 15 steps ahead:", *(f"{value:.3f}" for value in kept))


if __name__ == "__main__":
    main()
