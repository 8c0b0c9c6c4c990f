"""A latent space of your own: finite scalar quantisation (arXiv:2309.15505), K numbers rounded to one of C levels."""

import torch
from torch import Tensor

import matwm_rl as mw
from matwm_rl.evaluation import episode_windows, open_loop_errors
from matwm_rl.modules import CategoricalLatent, LatentSpace, MLPEncoderConfig


class FSQ(LatentSpace):
    def __init__(self, num_dims: int, num_levels: int) -> None:
        super().__init__(num_dims)
        self.encoder_size, self.latent_size, self.dynamics_size = num_dims, num_dims, num_dims * num_levels
        self.code_dtype, self.levels, self.half = torch.int16, torch.arange(num_levels), (num_levels - 1) / 2

    def posterior(self, features: Tensor) -> Tensor:  # rounding has no density: a bell over the levels stands in for it
        level = (features.tanh().unsqueeze(-1) + 1) * self.half
        return (-8 * (level - self.levels.to(level.device)).square()).log_softmax(-1)

    def sample_posterior(self, features: Tensor) -> Tensor:
        z = features.tanh()  # below, gradients pass as if nothing were rounded
        return z + (self.from_code(self.to_code(z)) - z).detach()

    def prior(self, output: Tensor, latent: Tensor) -> Tensor:
        return output.unflatten(-1, (self.num_dims, -1)).log_softmax(-1)

    def draw(self, parameters: Tensor) -> Tensor:
        return self.from_code(torch.distributions.Categorical(logits=parameters).sample())

    def to_code(self, latent: Tensor) -> Tensor:
        return ((latent + 1) * self.half).round()

    def from_code(self, code: Tensor) -> Tensor:
        return code / self.half - 1


def main(steps: int = 4_000, updates: int = 200) -> None:
    torch.manual_seed(0)
    cfg, env = mw.presets.vectors(), mw.make_env("mpe2/simple_spread_v3", seed=0)
    cfg.world_model.encoder = MLPEncoderConfig()  # the preset's copies coordinates, which one-hots cannot hold
    data, test = (env.rollout(length, break_when_any_done=False) for length in (steps, steps // 4))
    windows, seen = episode_windows(test, 6), test["agents", "observation"].movedim(1, 0)  # agents first
    for latent in (CategoricalLatent(32, 32), FSQ(32, 16)):
        model = mw.WorldModel.from_env(env, cfg.world_model, latent=latent)
        agents = (make(model, cfg.actor_critic) for make in (mw.make_actor, mw.make_critic))
        learner, replay = mw.Learner(model, *agents, cfg.learner), mw.make_replay(3, cfg.replay, seed=0)
        replay.extend(data)
        for _ in range(updates):
            learner.update_world_model(replay.sequences.sample())
        error = (model.decode(model.encode(seen)) - seen).square().sum(-1).mean()
        ahead = open_loop_errors(model, windows, context_length=5, horizon=1)["model", "observation"].mean()
        print(f"{type(latent).__name__}, squared errors: reconstruction {error:.3f}, next step {ahead:.3f}")


if __name__ == "__main__":
    main()
