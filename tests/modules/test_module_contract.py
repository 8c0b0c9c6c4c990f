"""What users of TorchRL do with a TensorDictModule works with ours: copies, dispatch, functional calls, compiling."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModuleBase
from torch import nn

from matwm_rl import keys
from matwm_rl.modules import (
    ActorCriticConfig,
    Imagination,
    StateEstimator,
    WorldModelFeatures,
    WorldModelPolicy,
    make_actor,
    make_critic,
)
from matwm_rl.objectives import LambdaReturn
from tests.helpers import COUNTS, SIZE, make_model, mock_env, random_batch, random_imagined, randomize

N, HISTORY = len(COUNTS), 4
KINDS = ["world_model", "estimator", "policy", "actor", "critic", "imagination", "returns"]

every_module = pytest.mark.parametrize("kind", KINDS)


LATENT = {kind: "categorical" if kind in ("actor", "critic", "returns") else "gaussian" for kind in KINDS}
"""Where latents are given, they are looked up; the others encode without chance."""


def make_module(kind: str, latent: str | None = None) -> TensorDictModuleBase:
    model = make_model(latent=latent or LATENT[kind], num_layers=1).eval()
    actor, critic = (randomize(make(model, ActorCriticConfig(num_cells=8))) for make in (make_actor, make_critic))
    policy = WorldModelPolicy(model, actor, history_length=HISTORY)
    modules = {
        "world_model": model,
        "estimator": StateEstimator(model, history_length=HISTORY),
        "policy": policy,
        "actor": actor,
        "critic": critic,
        "imagination": Imagination(model, actor, horizon=2),
        "returns": LambdaReturn(critic),
    }
    return modules[kind]


def make_batch(kind: str) -> TensorDict:
    model = make_model(latent=LATENT[kind])
    if kind in ("world_model", "imagination"):
        return random_batch(3, 5)
    if kind in ("actor", "critic", "returns"):
        return random_imagined(3, 5, model=model).exclude(
            keys.ACTION, keys.STATE_VALUE, keys.LAMBDA_RETURN, keys.WEIGHT
        )
    return TensorDict(
        {
            keys.OBSERVATION: torch.randn(5, N, SIZE),
            keys.ACTION_MASK: model.legal.expand(5, -1, -1).clone(),
            keys.ALIVE: torch.rand(5, N) < 0.8,
            ("history", "code"): torch.randn(5, N, HISTORY, model.latent.num_dims),
            ("history", "action"): torch.randint(min(COUNTS), (5, N, HISTORY)),
            ("history", "length"): torch.randint(HISTORY + 1, (5, N)),
        },
        batch_size=[5],
    )


def call(module: nn.Module, batch: TensorDictBase) -> TensorDictBase:
    torch.manual_seed(1)
    return module(batch.copy())


def assert_same(one: TensorDictBase, other: TensorDictBase, out_keys: list[NestedKey], **tolerance: float) -> None:
    for key in out_keys:
        torch.testing.assert_close(one[key], other[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


@every_module
def test_in_keys_are_read_and_out_keys_written(kind: str) -> None:
    module, batch = make_module(kind), make_batch(kind)
    expected, read = call(module, batch), batch.select(*module.in_keys)
    out = call(module, read)
    assert_same(out, expected, module.out_keys)
    before = set() if kind == "imagination" else set(read.keys(True, True))
    assert set(out.keys(True, True)) - before == set(module.out_keys)
    for key in module.in_keys:
        if (kind, key) == ("imagination", keys.ALIVE):
            # By default all are alive.
            assert call(module, batch.exclude(key))[keys.ALIVE].all()
        elif key == keys.ALIVE:
            everybody = batch.clone().set(key, torch.ones_like(batch[key]))
            assert_same(call(module, batch.exclude(key)), call(module, everybody), module.out_keys)
        elif (kind, key) != ("actor", keys.ACTION_MASK):
            with pytest.raises(KeyError, match=key[-1]):
                call(module, batch.exclude(key))


@every_module
def test_tensors_by_keyword(kind: str) -> None:
    module, batch = make_module(kind), make_batch(kind)
    expected = call(module, batch)
    torch.manual_seed(1)
    values = module(**{"_".join(key): batch[key] for key in module.in_keys})
    for key, value in zip(module.out_keys, values, strict=True):
        torch.testing.assert_close(value, expected[key])


@every_module
def test_a_module_goes_on_from_a_state_dict(kind: str) -> None:
    module, other, batch = make_module(kind), make_module(kind), make_batch(kind)
    other.load_state_dict({name: value.clone() for name, value in module.state_dict().items()})
    assert_same(call(other, batch), call(module, batch), module.out_keys)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
@every_module
def test_a_copy_is_a_module_of_its_own(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module, batch = make_module(kind), make_batch(kind)
    expected = call(module, batch)
    other = copied(module)
    assert_same(call(other, batch), expected, module.out_keys)
    state, theirs = module.state_dict(), other.state_dict()
    assert state.keys() == theirs.keys()
    assert not {value.data_ptr() for value in state.values()} & {value.data_ptr() for value in theirs.values()}
    randomize(other, 1.0)
    assert_same(call(module, batch), expected, module.out_keys)
    changed = call(other, batch)
    assert any(not torch.equal(changed[key], expected[key]) for key in module.out_keys)


def test_what_is_copied_together_still_shares_its_model() -> None:
    model = make_model(latent="gaussian")
    actor = make_actor(model, ActorCriticConfig(num_cells=8))
    owners = model, WorldModelPolicy(model, actor), Imagination(model, actor, horizon=3), WorldModelFeatures(model)
    for copied in (copy.deepcopy(owners), pickle.loads(pickle.dumps(owners))):
        model_, policy, imagination, features = copied
        assert policy.world_model is imagination.world_model is features.estimator.world_model is model_ is not model
        assert policy.actor is imagination.actor is not actor


def test_copied_features_are_the_same() -> None:
    features = WorldModelFeatures(make_model(latent="gaussian").eval(), history_length=HISTORY)
    rollouts = []
    for copied in (pickle.loads(pickle.dumps(features)), copy.deepcopy(features), features):
        env = mock_env().append_transform(copied)
        torch.manual_seed(1)
        rollouts.append(env.rollout(4))
    for rollout in rollouts[:2]:
        assert_same(rollout, rollouts[2], [keys.HIDDEN, ("next", *keys.LATENT)])


@every_module
def test_double_precision(kind: str) -> None:
    module, batch = make_module(kind), make_batch(kind)
    expected = call(module, batch)
    wide = batch.apply(lambda value: value.double() if value.is_floating_point() else value)
    module = module.to(torch.float64)
    out = call(module, wide)
    assert all(out[key].dtype == torch.float64 for key in module.out_keys if out[key].is_floating_point())
    # Imagined latents lie elsewhere: other random numbers are drawn.
    if kind != "imagination":
        assert_same(out.float(), expected.float(), module.out_keys, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@every_module
def test_to_a_gpu_and_back(kind: str) -> None:
    module, batch = make_module(kind), make_batch(kind)
    expected = call(module, batch)
    out = call(module.to("cuda"), batch.to("cuda"))
    assert all(out[key].is_cuda for key in module.out_keys)
    assert_same(call(module.to("cpu"), batch), expected, module.out_keys)


@every_module
def test_batches_of_any_shape(kind: str) -> None:
    module, batch = make_module(kind), make_batch(kind)
    expected = call(module, batch)
    nested = call(module, batch.unsqueeze(0))
    assert nested.batch_size == (1, *expected.batch_size)
    assert_same(nested[0], expected, module.out_keys)
    if kind == "imagination":
        with pytest.raises(ValueError, match=r"\[\*S, context \+ 1\]"):
            module(batch[0])
    elif kind in ("world_model", "returns"):
        assert_same(call(module, batch[0]), call(module, batch[:1])[0], module.out_keys)
        with pytest.raises(ValueError):
            module(batch[0, 0])
    else:
        flat = batch.reshape(-1)
        assert_same(call(module, flat[0]), call(module, flat[:1])[0], module.out_keys)


@every_module
def test_lazily_stacked_batches(kind: str) -> None:
    module, batch = make_module(kind), make_batch(kind)
    lazy = lazy_stack([step.clone() for step in batch.unbind(0)])
    assert_same(call(module, lazy), call(module, batch), module.out_keys)


@every_module
def test_calls_with_other_parameters(kind: str) -> None:
    module, other, batch = make_module(kind), make_module(kind), make_batch(kind)
    expected, before = call(module, batch), call(other, batch)
    with TensorDict.from_module(module).to_module(other):
        assert_same(call(other, batch), expected, module.out_keys)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    torch.manual_seed(1)
    assert_same(torch.func.functional_call(other, state, (batch.copy(),)), expected, module.out_keys)
    assert_same(call(other, batch), before, module.out_keys)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
@pytest.mark.parametrize(("kind", "latent"), [*LATENT.items(), ("world_model", "categorical")])
def test_an_ensemble_gives_what_its_members_give(kind: str, latent: str) -> None:
    modules, skeleton = [make_module(kind, latent) for _ in range(2)], make_module(kind, latent)
    batch = make_batch(kind)

    def run(params: TensorDictBase) -> TensorDictBase:
        with params.to_module(skeleton):
            return skeleton(batch.copy())

    torch.manual_seed(1)
    out = torch.vmap(run, randomness="same")(torch.stack([TensorDict.from_module(module).data for module in modules]))
    for i, module in enumerate(modules):
        assert_same(out[i], call(module, batch), module.out_keys, rtol=1e-4, atol=1e-4)


# The others are parts of these.
@pytest.mark.parametrize(
    ("kind", "latent"),
    [
        ("world_model", "categorical"),
        ("imagination", "categorical"),
        pytest.param("policy", "gaussian", marks=pytest.mark.slow),
        ("returns", "categorical"),
    ],
)
def test_a_module_compiles_as_one_graph(kind: str, latent: str) -> None:
    module, batch = make_module(kind, latent), make_batch(kind)
    expected = call(module, batch)
    torch._dynamo.reset()
    out = call(torch.compile(module, backend="eager", fullgraph=True), batch)
    assert_same(out, expected, module.out_keys, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["world_model", "policy", "imagination"])
def test_a_compiled_module_gives_the_same(kind: str) -> None:
    module, batch = make_module(kind), make_batch(kind)
    expected = call(module, batch)
    torch._dynamo.reset()
    out = call(torch.compile(module), batch)
    # Inductor draws other random numbers than eager PyTorch does.
    drawn = {"policy": [keys.LOGITS], "imagination": []}.get(kind, module.out_keys)
    assert_same(out, expected, drawn, rtol=1e-3, atol=1e-3)
    assert all(out[key].shape == expected[key].shape for key in module.out_keys)
