"""Parts of one's own in the world model and the losses: an actor of TorchRL's, a teammate predictor without memory."""

import torch
from tensordict.nn import TensorDictModule
from torchrl.envs import TransformedEnv
from torchrl.modules import MLP, MaskedCategorical, MultiAgentMLP, ProbabilisticActor

import matwm_rl as mw
from matwm_rl import keys
from matwm_rl.modules import Latent, TeammatePredictorBase
from matwm_rl.training import RandomActions, evaluate


class PresentTeammates(TeammatePredictorBase):
    def __init__(self, latent_size: int, action_counts: list[int]) -> None:
        super().__init__(action_counts)
        self.network = MLP(latent_size, self.num_outputs, num_cells=[64, 64])

    def logits(self, latent: Latent) -> torch.Tensor:
        return self.network(latent.value)


def make_own_actor(model: mw.WorldModel) -> ProbabilisticActor:
    sizes = (model.latent.latent_size + model.transformer.features, model.num_actions, model.num_agents)
    network = MultiAgentMLP(*sizes, centralized=False, share_params=True, depth=2, num_cells=128)
    logits = TensorDictModule(network, in_keys=[keys.LATENT, keys.HIDDEN], out_keys=[keys.LOGITS])
    inputs = {"logits": keys.LOGITS, "mask": keys.ACTION_MASK}
    return ProbabilisticActor(logits, in_keys=inputs, out_keys=[keys.ACTION], distribution_class=MaskedCategorical)


def main(rounds: int = 5, steps: int = 400, updates: int = 40, warmup: int = 200, episodes: int = 30) -> None:
    torch.manual_seed(0)
    env = mw.make_env("mpe2/simple_spread_v3", seed=0)
    model = mw.WorldModel.from_env(env, mw.WorldModelConfig.small())
    model.teammates = PresentTeammates(model.latent.latent_size, env.action_counts)
    actor, critic = make_own_actor(model), mw.make_critic(model, num_cells=128, share_by_group=True)
    # The learner puts them into WorldModelLoss, Imagination, ActorLoss and the rest, as it does its own.
    config = mw.LearnerConfig.small(world_model_warmup=warmup, critic_warmup=warmup // 5)
    learner = mw.Learner(model, actor, critic, config)
    replay = mw.make_replay(num_agents=3, sequences_per_agent=10, starts_per_agent=48, sequence_length=16)
    policy = mw.WorldModelPolicy(model, actor)
    env = TransformedEnv(env, policy.make_tensordict_primer())
    for _ in range(rounds):
        replay.extend(env.rollout(steps, policy, break_when_any_done=False))
        replay.end_episodes()
        errors = [learner.update(replay)["loss_teammate"] / 2 for _ in range(updates)]  # of two teammates

    found, guess = torch.stack(errors).mean(), torch.tensor(5.0).log()
    print(f"a teammate's action, cross-entropy: own predictor {found:.3f}, uniform guess {guess:.3f} nats")
    for name, acting in (("random", RandomActions()), ("trained", policy)):
        print(f"{name} agents, mean return: {evaluate(env, acting, episodes=episodes).per_group()['agent']:.1f}")


if __name__ == "__main__":
    main()
