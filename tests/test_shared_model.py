"""The invariant that everything hangs on: one world model, trained once, by all agents, for all agents."""

from __future__ import annotations

import copy
import io
import itertools
from collections import Counter
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.collectors import Collector

from matwm_rl import keys
from matwm_rl.modules import WorldModel, WorldModelPolicy
from matwm_rl.training.learner import Learner
from tests.helpers import (
    COUNTS,
    grads,
    make_learner,
    make_model,
    mock_env,
    mock_replay,
    random_batch,
    total,
)
from tests.training.helpers import update

N = len(COUNTS)


def make_policy(learner: Learner) -> WorldModelPolicy:
    return WorldModelPolicy(learner.world_model, learner.actor, history_length=4)


def tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(value)


def storages(values: Iterable[Tensor]) -> Counter[int]:
    """How often each piece of memory occurs (tensors of no elements have none)."""
    return Counter(value.untyped_storage().data_ptr() for value in values if value.numel())


def pointers(module: nn.Module) -> set[int]:
    return set(storages(module.parameters()))


def listed_parameters(learner: Learner) -> list[nn.Parameter]:
    """What all losses together list."""
    losses = (learner.world_model_loss, learner.actor_loss, learner.critic_loss)
    return [parameter for loss in losses for parameter in loss.parameters()]


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- one object ------------------------------------------------------------------------------------------------------


def test_acting_imagining_and_training_use_the_same_object() -> None:
    learner = make_learner()
    policy = make_policy(learner)
    model = learner.world_model
    for user in (learner.world_model_loss, learner.imagination, policy):
        assert user.world_model is model
    assert learner.imagination.actor is learner.actor is policy.actor
    assert pointers(learner.actor_loss) == pointers(learner.actor)
    assert learner.returns.critic is learner.critic
    assert pointers(learner.critic_loss) == pointers(learner.critic)
    for root in (learner.world_model_loss, learner.imagination, policy):
        assert sum(isinstance(module, WorldModel) for module in root.modules()) == 1
    for root in (learner.actor_loss, learner.critic_loss, learner.returns, learner.actor, learner.critic):
        assert not any(isinstance(module, WorldModel) for module in root.modules())


def test_parameters_stand_once_in_the_losses() -> None:
    learner = make_learner()
    listed = listed_parameters(learner)
    assert max(Counter(map(id, listed)).values()) == 1
    assert max(storages(listed).values()) == 1
    own = {id(p) for p in learner.world_model.parameters()}
    assert {id(p) for p in learner.world_model_loss.parameters()} == own
    assert len(list(learner.world_model_loss.parameters())) == len(own)
    for loss in (learner.actor_loss, learner.critic_loss):
        assert not {id(p) for p in loss.parameters()} & own
        assert not set(storages([*loss.parameters(), *loss.buffers()])) & pointers(learner.world_model)


def test_parameters_stand_once_in_the_optimizers() -> None:
    learner = make_learner()
    held = {
        name: [p for group in getattr(learner, f"{name}_optimizer").param_groups for p in group["params"]]
        for name in ("world_model", "actor", "critic")
    }
    assert max(storages(itertools.chain(*held.values())).values()) == 1
    for name, parameters in held.items():
        assert {id(p) for p in parameters} == {id(p) for p in getattr(learner, name).parameters()}


def test_a_checkpoint_stores_every_tensor_once() -> None:
    learner, replay = make_learner(), mock_replay()
    update(learner, replay)
    for state in (learner.state_dict(), through_file(learner.state_dict())):
        assert max(storages(tensors(state)).values()) == 1
        trained = ("world_model", "actor", "critic")
        sizes = {name: sum(p.numel() for p in getattr(learner, name).parameters()) for name in trained}
        for name, size in sizes.items():
            assert sum(value.numel() for value in tensors(state[name])) == size
            # Two moments of each number, and one count of steps for each tensor.
            moments = [v for v in tensors(state[f"{name}_optimizer"]["state"]) if v.ndim]
            assert sum(value.numel() for value in moments) == 2 * size
        # Anything else that holds weights is the critic's EMA copy (with the critic's constants).
        rest = set(state) - set(sizes) - {f"{name}_optimizer" for name in sizes}
        assert rest == {"target_critic", "return_scale", "updates"}
        constants = sum(value.numel() for value in learner.critic.buffers())
        assert sum(v.numel() for v in tensors(state["target_critic"])) - sizes["critic"] in (0, constants)


def test_after_resuming_it_is_still_one_model() -> None:
    trained, replay = make_learner(), mock_replay()
    update(trained, replay)
    resumed = make_learner()
    policy = make_policy(resumed)
    resumed.load_state_dict(through_file(trained.state_dict()))
    for user in (resumed.world_model_loss, resumed.imagination, policy):
        assert user.world_model is resumed.world_model
    assert max(storages(listed_parameters(resumed)).values()) == 1
    assert max(storages(tensors(resumed.state_dict())).values()) == 1
    assert_same_behaviour(resumed, policy, trained, make_policy(trained), same=True)
    update(resumed, replay)
    assert_same_behaviour(resumed, policy, trained, make_policy(trained), same=False)


# -- trained by all, for all -----------------------------------------------------------------------------------------


def act(policy: WorldModelPolicy) -> Tensor:
    """Action logits [32, N] of random observations and histories, the same at every call."""
    generator = torch.Generator().manual_seed(11)
    model, length = policy.world_model, policy.history_length
    td = TensorDict(
        {
            keys.OBSERVATION: torch.randn(32, N, 5, generator=generator),
            keys.ACTION_MASK: model.legal.expand(32, -1, -1),
            ("history", "code"): torch.randint(5, (32, N, length, 4), generator=generator),
            ("history", "action"): torch.randint(3, (32, N, length), generator=generator),
            ("history", "length"): torch.randint(length + 1, (32, 1), generator=generator).expand(32, N),
        },
        batch_size=[32],
    )
    torch.manual_seed(13)
    return policy(td)[keys.LOGITS]


def dream(learner: Learner) -> TensorDict:
    torch.manual_seed(11)
    return learner.imagination(random_batch(8, 4))


def assert_same_behaviour(
    one: Learner, one_policy: WorldModelPolicy, other: Learner, other_policy: WorldModelPolicy, *, same: bool
) -> None:
    """All agents of both act and dream alike, or every agent of one acts and dreams unlike that of the other."""
    acts = (act(one_policy) == act(other_policy)).all(-1)
    hidden = [dream(learner)["next", "agents", "hidden"] for learner in (one, other)]
    dreams = (hidden[0] == hidden[1]).all(-1)
    for n in range(N):
        assert acts[:, n].all() if same else not acts[:, n].any()
        assert dreams[:, :, n].all() if same else not dreams[:, :, n].any()


def test_after_one_update_every_agent_acts_and_dreams_with_the_new_weights() -> None:
    learner = make_learner(world_model_lr=1e-2)
    policy = make_policy(learner)
    before = copy.deepcopy(learner), copy.deepcopy(policy)
    assert_same_behaviour(learner, policy, *before, same=True)
    learner.update_world_model(mock_replay().sequences.sample())
    assert_same_behaviour(learner, policy, *before, same=False)
    # And with nothing but these: a model built anew from the trained weights behaves alike.
    rebuilt = make_learner()
    rebuilt.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert_same_behaviour(learner, policy, rebuilt, make_policy(rebuilt), same=True)


def shares(batch: TensorDict, kept: list[int]) -> TensorDict:
    """The batch with the shares of all agents but ``kept`` taken out."""
    batch = batch.clone()
    for n in set(range(N)) - set(kept):
        batch[keys.ALIVE][:, :, n] = False
    return batch


def gradient(model: WorldModel, learner: Learner, batch: TensorDict) -> Tensor:
    torch.manual_seed(4)
    return torch.cat([g.flatten() for g in grads(total(learner.world_model_loss(batch)), model.parameters())])


def test_every_agents_share_contributes_and_all_count_the_same(float64: None) -> None:
    learner = make_learner()
    learner.world_model_loss.free_nats = 0.0
    model, batch = learner.world_model, random_batch(4, 6, deaths=False)
    whole = gradient(model, learner, batch)
    alone = [gradient(model, learner, shares(batch, [n])) for n in range(N)]
    of_everyone = {name: p.numel() for name, p in model.named_parameters()}
    of_some = ("action.rows", "input.", "output.")
    shared = torch.cat(
        [torch.full((size,), not any(part in name for part in of_some)) for name, size in of_everyone.items()]
    )
    for n in range(N):
        # Nearly all weights that agents share hear of every agent. (Some units of a tiny model are silent.)
        assert (alone[n][shared] != 0).double().mean() > 0.9
        without = gradient(model, learner, shares(batch, [j for j in range(N) if j != n]))
        assert not torch.allclose(whole, without)
    torch.testing.assert_close(whole, torch.stack(alone).mean(0))


def test_replayed_batches_hold_an_equal_share_of_every_agent() -> None:
    sample = mock_replay().sequences.sample()
    observation = sample[keys.OBSERVATION][sample[keys.ALIVE]]
    agent = torch.arange(N).expand(sample[keys.ALIVE].shape)[sample[keys.ALIVE]]
    # The mock environment's observation tells whose it is.
    assert torch.equal(observation[:, 1].long(), agent)
    assert sample.batch_size == (2, 8) and sample[keys.ACTION].shape == (2, 8, N)


def test_the_model_serves_agents_by_their_place_alone() -> None:
    """Swapping two agents of a group with all they saw and did swaps the outputs but for the action rows."""
    model = make_model(latent="gaussian", action_scaling=False).eval()
    batch = random_batch(deaths=False).exclude(keys.TEAMMATE_ACTION)
    swap = torch.tensor([1, 0, 2])
    swapped = model(batch.apply(lambda x: x[:, :, swap]))
    out = model(batch.clone())
    for key in (keys.LATENT, keys.HIDDEN, keys.PRIOR, keys.RECONSTRUCTION):
        torch.testing.assert_close(swapped[key], out[key][:, :, swap], rtol=1e-4, atol=1e-5)


# -- size ------------------------------------------------------------------------------------------------------------

A, D, F, Z, KC, BINS = 4, 5, 16, 20, 20, 255


def size(num_agents: int, num_groups: int, **options: Any) -> int:
    groups = [min(n, num_groups - 1) for n in range(num_agents)]
    model = make_model([A] * num_agents, groups, (D,), **options)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("num_agents", [2, 3, 8])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_size_grows_by_action_rows_group_layers_and_teammate_outputs_alone(num_agents: int, num_groups: int) -> None:
    action_rows = num_agents * A * F
    own_layers = (D + 1) * F + (F + 1) * (D + KC + BINS + 1 + A)
    teammate_outputs = (F + 1) * (num_agents - 1) * A
    common = size(2, 1) - 2 * A * F - own_layers - (F + 1) * A
    expected = common + action_rows + num_groups * (own_layers + teammate_outputs)
    assert size(num_agents, num_groups) == expected


def test_without_what_names_agents_size_is_the_same_for_any_number() -> None:
    options = {"teammate_predictor": False, "action_scaling": False, "group_layers": False}
    assert size(2, 1, **options) == size(3, 2, **options) == size(8, 4, **options)


# -- workers ---------------------------------------------------------------------------------------------------------


def test_workers_receive_the_model_once() -> None:
    policy = make_policy(make_learner())
    count = sum(p.numel() for p in (*policy.world_model.parameters(), *policy.actor.parameters()))
    state = policy.state_dict()
    assert max(storages(state.values()).values()) == 1
    assert sum(value.numel() for value in state.values()) == count
    # What weight updates send.
    assert max(storages(TensorDict.from_module(policy).values(True, True)).values()) == 1
    # What a worker is started with.
    policy.share_memory()
    arrived = ForkingPickler.loads(ForkingPickler.dumps(policy))
    assert len(list(arrived.parameters())) == len(list(policy.parameters()))
    assert max(storages(arrived.parameters()).values()) == 1
    torch.testing.assert_close(act(arrived), act(policy))


def test_a_collectors_policy_follows_the_training() -> None:
    learner, replay = make_learner(world_model_lr=1e-2), mock_replay()
    policy = make_policy(learner)
    env = mock_env().append_transform(policy.make_tensordict_primer())
    collector = Collector(
        env, policy, frames_per_batch=6, total_frames=-1, auto_register_policy_transforms=False, reset_at_each_iter=True
    )
    collector.next()
    learner.update_world_model(replay.sequences.sample())
    collector.update_policy_weights_()
    for weight, trained in zip(collector.policy.parameters(), policy.parameters(), strict=True):
        assert torch.equal(weight, trained)
    assert pointers(learner.world_model) <= pointers(collector.policy)
    collector.shutdown()
