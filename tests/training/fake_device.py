"""Act and learn once on an accelerator that does not exist: python -m tests.training.fake_device PRESET ...

Fake tensors have shapes, types and a device, and no values. An operation on tensors of two devices fails, and so does
whatever would have the host wait for a value. PyTorch 2.13 without CUDA aborts when autograd meets a fake tensor on
"cuda". So these are on PyTorch's backend for devices written in Python, which passes for CUDA where our code asks. A
process can register it only once, and for good.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.training import Learner

DEVICE = "fake:0"


class Backend(backend_registration._DummyBackendModule):
    def synchronize(self, *_: object) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def moved(value: Tensor) -> Tensor:
    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
    return nn.Parameter(fake, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else fake


def moved_batch(batch: TensorDictBase) -> TensorDict:
    entries = {key: moved(value) if isinstance(value, Tensor) else moved_batch(value) for key, value in batch.items()}
    return TensorDict(entries, batch.batch_size, device=DEVICE)


def move(*modules: nn.Module) -> None:
    """Replace parameters and buffers that are on the CPU; one that modules share stays shared."""
    # Values are kept as well, so that no other gets the same id.
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.device.type == "cpu":
                    tensors[name] = done.setdefault(id(value), (value, moved(value)))[1]


def act_and_learn(preset: str) -> None:
    cfg = presets.PRESETS[preset]()
    cfg.learner.horizon = 2  # two steps hold every operation
    env = make_env("mock", seed=0, num_envs=2)
    world_model = WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (make_actor, make_critic))
    policy = WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    replay = make_replay(env.num_agents, cfg.replay, num_envs=2, seed=0)
    replay.extend(env.rollout(400, break_when_any_done=False))
    env = env.append_transform(policy.make_tensordict_primer())
    batches = replay.sequences.sample(), replay.starts.sample(), env.reset()

    with FakeTensorMode(), patch.object(FakeTensor, "is_cuda", True):
        sequences, starts, step = map(moved_batch, batches)
        move(world_model, actor, critic)
        # Neither has an implementation for fake tensors.
        with patch.object(nn.Module, "to", lambda self, _: self), patch.object(Tensor, "is_set_to", lambda *_: False):
            learner = Learner(world_model, actor, critic, cfg.learner)
        move(learner.actor_loss, learner.critic_loss)

        assert policy(step)["agents", "action"].device == torch.device(DEVICE)
        assert learner.imagination(starts)["agents", "action"].device == torch.device(DEVICE)
        learner.update_agents(starts)
        with pytest.raises(RuntimeError, match="data-dependent|_local_scalar_dense"):  # counts the ends of episodes
            learner.update_world_model(sequences)
        world_model.max_boundaries = sequences.numel()
        learner.update_world_model(sequences)
        # What this test is for.
        learner.actor_loss.return_scale.low = torch.zeros(env.num_agents)
        with pytest.raises(RuntimeError, match="same device"):
            learner.update_agents(starts)


def main(*names: str) -> None:
    backend_registration._setup_privateuseone_for_python_backend("fake", backend_module=Backend())
    for name in names:
        act_and_learn(name)
        print("acted and learnt:", name)


if __name__ == "__main__":
    main(*sys.argv[1:])
