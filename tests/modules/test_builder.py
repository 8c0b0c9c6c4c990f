"""What a configuration builds, parts of a user in place of others, and what does not go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.action_space import DiscreteActions
from matwm_rl.envs import make_env
from matwm_rl.modules import (
    CategoricalLatent,
    CategoricalLatentConfig,
    CNNDecoder,
    CNNEncoder,
    CoordinateEncoder,
    CoordinateEncoderConfig,
    EncoderConfig,
    GaussianLatent,
    GaussianLatentConfig,
    Head,
    HiddenReward,
    Imagination,
    Interpolation,
    LatentSpace,
    MLPEncoderConfig,
    ObservationReward,
    ObservationRewardConfig,
    TwoHot,
    WorldModel,
    WorldModelConfig,
    build_parts,
    make_actor,
)
from matwm_rl.modules.builder import PARTS
from matwm_rl.objectives import WorldModelLoss
from tests.helpers import COUNTS, SIZE, SMALL, make_layout, make_model, random_batch, total

N = len(COUNTS)


def config(**overrides: Any) -> WorldModelConfig:
    return WorldModelConfig(**(SMALL | overrides))


def lives(model: WorldModel, **data: Any) -> TensorDict:
    """A model is trained on and dreams; return what it writes."""
    batch = random_batch(2, 4, **data)
    total(WorldModelLoss(model)(batch)).backward()
    imagined = Imagination(model, make_actor(model), horizon=2)(batch)
    assert all(value.isfinite().all() for value in imagined.values(True, True))
    return model(batch)


# -- from an environment ---------------------------------------------------------------------------------------------


def test_from_env_fits_the_environment() -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, config())
    assert model.legal.sum(-1).tolist() == env.layout.action_counts
    assert model.encoder.input.weight.shape == (2, SIZE, 16) and model.group_index == [0, 0, 1]
    assert model.action_mask is not None
    same = WorldModel.from_env(env.layout, config())
    for (name, one), other in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert one.shape == other.shape, name
    with pytest.raises(AttributeError, match="Linear has no `layout`; wrap it"):
        WorldModel.from_env(nn.Linear(1, 1))


def test_the_papers_model_is_the_default() -> None:
    model = WorldModel.from_env(make_layout())
    assert isinstance(model.latent, CategoricalLatent) and model.latent.latent_size == 32 * 32
    assert model.encoder.input.weight.shape == (1, SIZE, 512)
    assert isinstance(model.reward, HiddenReward) and model.two_hot.interpolation == Interpolation.symlog
    assert model.recipe == (make_layout(), WorldModelConfig())


def test_a_model_with_parts_of_a_user_has_no_recipe() -> None:
    """A file that holds the recipe alone could not build it again."""
    assert WorldModel.from_env(make_layout(), config()).recipe == (make_layout(), config())
    assert WorldModel.from_env(make_layout(), config(), two_hot=TwoHot(41)).recipe is None


# -- switches --------------------------------------------------------------------------------------------------------


def test_masks_are_learnt_where_the_environment_has_them() -> None:
    assert make_model(has_action_mask=True).action_mask is not None
    assert make_model(has_action_mask=False).action_mask is None
    assert make_model(has_action_mask=True, parts={"action_mask": None}).action_mask is None


@torch.no_grad()
def test_without_teammate_predictor() -> None:
    for model in (make_model(teammate_predictor=False), make_model(parts={"teammates": None})):
        out = model(random_batch())
        assert out[keys.TEAMMATE_LOGITS].shape == (3, 7, N, 0, max(COUNTS))
        assert not any("teammates" in name for name, _ in model.named_parameters())


def test_the_teammate_predictor_may_be_narrower() -> None:
    assert make_model().teammates.transformer.features == 16
    assert make_model(teammate_hidden_size=8).teammates.transformer.features == 8


@torch.no_grad()
def test_action_scaling_alone_tells_who_is_focal() -> None:
    batch = random_batch(action_counts=(3, 3, 3), done=torch.zeros(3, 7, N, dtype=torch.bool))
    alike = batch.apply(lambda x: x[:, :, :1].expand_as(x).contiguous())
    for scaling in (True, False):
        options = {"action_counts": (3, 3, 3), "group_index": (0, 0, 0), "latent": "gaussian"}
        prior = make_model(**options, action_scaling=scaling).eval()(alike)[keys.PRIOR]
        assert torch.allclose(prior[:, :, 0], prior[:, :, 1], atol=1e-5) is not scaling


def test_group_layers() -> None:
    own, shared = (
        {name for name, p in make_model(group_layers=switch).named_parameters() if p.ndim == 3 and p.shape[0] == 2}
        for switch in (True, False)
    )
    heads = ("decoder", "dynamics.head", "reward.head", "continuation", "action_mask", "teammates")
    assert own == {"encoder.input.weight", *(f"{name}.output.weight" for name in heads)}
    assert not shared


@pytest.mark.parametrize("group_layers", [True, False])
def test_the_model_knows_the_groups_of_its_agents(group_layers: bool) -> None:
    """Whether or not its own layers follow them: actors may be shared by group in either case."""
    assert make_model(group_index=(0, 1, 1), group_layers=group_layers).group_index == [0, 1, 1]


def test_depths_sizes_and_interpolation_reach_their_parts() -> None:
    def depth(net: nn.Module) -> int:
        return sum(isinstance(module, nn.LayerNorm) for module in net.modules())

    model = make_model(
        encoder=MLPEncoderConfig(depth=1), head_depth=3, num_layers=4, num_heads=4, reward_interpolation="symlog"
    )
    assert depth(model.encoder) == depth(model.decoder) == 1
    assert [depth(net) for net in (model.dynamics, model.continuation, model.reward, model.action_mask)] == [3] * 4
    assert len(model.transformer.blocks) == len(model.teammates.transformer.blocks) == 4
    assert model.transformer.num_heads == model.teammates.transformer.num_heads == 4
    assert model.two_hot.interpolation == Interpolation.symlog
    dropped = make_model(dropout=0.3)
    assert {b.dropout for t in (dropped.transformer, dropped.teammates.transformer) for b in t.blocks} == {0.3}


def test_one_agent() -> None:
    model = make_model(action_counts=(3,), group_index=(0,))
    assert model.teammates is None
    out = lives(model, action_counts=(3,))
    assert out[keys.TEAMMATE_LOGITS].shape == (2, 4, 1, 0, 3)
    assert out[keys.PRIOR].shape == (2, 4, 1, 4, 5)


@torch.no_grad()
@pytest.mark.parametrize(("num_agents", "latent"), [(1, "gaussian"), (3, "categorical")])
def test_images(num_agents: int, latent: str) -> None:
    """They have the CNN, whatever the encoder of vectors; nothing is encoded again, and no layer is a group's own."""
    counts, shape = COUNTS[:num_agents], (3, 32, 32)
    options = {"encoder": CoordinateEncoderConfig(), "reencode": True}
    model = make_model(counts, (0, 0, 1)[:num_agents], shape, latent=latent, **options)
    assert isinstance(model.encoder, CNNEncoder) and isinstance(model.decoder, CNNDecoder)
    assert not model.reencode and model.dynamics.head.skip is None and model.dynamics.head.output.weight.shape[0] == 1
    batch = random_batch(2, 4, action_counts=counts, observation_shape=shape)
    out = model(batch)
    assert out[keys.RECONSTRUCTION].shape == (2, 4, num_agents, *shape)
    posterior = model.latent.posterior(model.encoder(batch[keys.NEXT_OBSERVATION].movedim(2, 0))).movedim(0, 2)
    torch.testing.assert_close(out[keys.POSTERIOR], posterior, rtol=1e-4, atol=1e-4)
    assert batch[keys.AGENT_DONE].any()


@torch.no_grad()
def test_coordinates_pass_linearly_through_the_model() -> None:
    """The dynamics have a linear map, and the transformer no layer norm at its end."""
    layout, options = make_layout(), {"latent": GaussianLatentConfig(num_dims=10)}
    model = WorldModel.from_env(layout, config(encoder=CoordinateEncoderConfig(), **options)).eval()
    assert isinstance(model.encoder, CoordinateEncoder)
    assert model.dynamics.head.skip is not None and isinstance(model.transformer.norm, nn.Identity)
    observation = 10 * torch.randn(N, 50, SIZE)
    torch.testing.assert_close(model.decode(model.encode(observation)), observation)
    ordinary = WorldModel.from_env(layout, config(**options))
    assert ordinary.dynamics.head.skip is None and isinstance(ordinary.transformer.norm, nn.LayerNorm)


# -- parts of a user -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_a_given_part_takes_the_place_of_the_built_one(name: str) -> None:
    options = config(reward=ObservationRewardConfig(), normalize=True)
    part = build_parts(make_layout(), options)[name]
    assert isinstance(part, nn.Module)
    parts = build_parts(make_layout(), options, **{name: part})
    assert parts[name] is part
    model = WorldModel(**parts)
    assert getattr(model, name) is part
    lives(model)


def test_the_other_parts_are_built_to_fit_a_given_one() -> None:
    model = make_model(parts={"latent": GaussianLatent(6), "two_hot": TwoHot(41)})
    assert model.dynamics.space is model.latent and model.action_mixer.latent.num_classes is None
    out = lives(model)
    assert out[keys.LATENT].shape[-1] == 6 and out[keys.REWARD_LOGITS].shape[-1] == 41
    sizes = {"group_index": (0, 0, 1), "num_cells": 8, "depth": 1, "fourier_features": 0, "point_size": 0}
    reward = ObservationReward(SIZE, 255, actions=DiscreteActions(COUNTS), **sizes)
    assert lives(make_model(parts={"reward": reward}))[keys.END_REWARD_LOGITS].shape[-1] == 255
    assert keys.END_REWARD_LOGITS not in make_model().out_keys


def test_one_end_of_a_pair_may_be_given_even_if_it_is_empty() -> None:
    """An empty sequence of layers is the identity, and false."""
    model = make_model(latent=GaussianLatentConfig(num_dims=SIZE), parts={"encoder": nn.Sequential()})
    assert len(model.encoder) == 0
    observation = torch.randn(N, 4, SIZE)
    assert torch.equal(model.eval().encode(observation), observation)
    lives(model)


def test_an_unknown_part_is_named_with_those_that_there_are() -> None:
    with pytest.raises(TypeError, match=r"no parts \['critic', 'enocder'\]; its parts are \['latent', 'encoder', "):
        build_parts(make_layout(), config(), enocder=nn.Linear(1, 1), critic=None)
    with pytest.raises(TypeError, match=r"no parts \['hidden_size'\]"):
        WorldModel.from_env(make_layout(), hidden_size=16)


@dataclass(kw_only=True)
class LinearConfig(EncoderConfig):
    """A pair of encoder and decoder of a user: linear maps."""

    linear = True
    gain: float = 1.0

    def build(self, observation_size: int, latent: LatentSpace, **sizes: Any) -> tuple[nn.Module, nn.Module]:
        encoder = nn.Linear(observation_size, latent.encoder_size)
        nn.init.constant_(encoder.weight, self.gain)
        return encoder, nn.Linear(latent.latent_size, observation_size)


@pytest.mark.parametrize("latent", [CategoricalLatentConfig(num_dims=2, num_classes=3), GaussianLatentConfig()])
def test_a_configuration_of_a_user_builds_encoder_and_decoder(latent: Any) -> None:
    model = WorldModel.from_env(make_layout(), config(latent=latent, encoder=LinearConfig(gain=0.5)))
    assert isinstance(model.encoder, nn.Linear) and (model.encoder.weight == 0.5).all()
    assert model.dynamics.head.skip is not None
    assert lives(model)[keys.RECONSTRUCTION].shape[-1] == SIZE


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_interpolation": "linear"}, "interpolation must be 'raw' or 'symlog', got 'linear'"),
        ({"encoder": CoordinateEncoderConfig()}, "CategoricalLatent holds no numbers: take a GaussianLatent"),
        ({"num_heads": 3}, r"hidden_size must be a multiple of 2 \* num_heads, 6, got 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_images_have_no_reward_of_the_next_observation() -> None:
    with pytest.raises(ValueError, match="is for vector observations; for images take HiddenRewardConfig"):
        make_model(observation_shape=(3, 32, 32), reward=ObservationRewardConfig())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("latent", "LatentSpace"),
        ("dynamics", "Dynamics"),
        ("reward", "RewardHead"),
        ("teammates", "TeammatePredictorBase"),
    ],
)
def test_a_part_of_the_wrong_kind_is_named(name: str, kind: str) -> None:
    parts: dict[str, Any] = build_parts(make_layout(), config())
    wrong: nn.Module = Head(16, 255, group_index=[0, 0, 1], num_cells=8, depth=1)
    with pytest.raises(TypeError, match=rf"{name} must be a {kind} \(subclass it\), got a Head"):
        WorldModel(**(parts | {name: wrong}))


def test_groups_that_do_not_fit_the_agents_are_named() -> None:
    with pytest.raises(ValueError, match=r"group_index must have an index for each of 3 agents, got \[0, 1\]"):
        WorldModel(**(build_parts(make_layout(), config()) | {"group_index": [0, 1]}))


def test_most_parts_may_be_any_module_of_tensors(float64: None) -> None:
    """All parts given by hand, as functions of tensors ``[N, *batch, F]``."""

    class Mixer(nn.Module):
        def forward(self, latent: Tensor, action: Tensor) -> Tensor:
            return torch.cat([latent, action.unsqueeze(-1).to(latent)], -1).repeat(1, 1, 1, 4)[..., :16]

    parts = build_parts(make_layout(), config(latent=GaussianLatentConfig(num_dims=SIZE)))
    del parts["group_index"], parts["reencode"], parts["end_reward"]
    parts |= {"encoder": nn.Identity(), "decoder": nn.Identity(), "continuation": nn.Linear(16, 1)}
    model = WorldModel(**(parts | {"action_mask": None, "teammates": None})).eval()
    assert model.group_index == [0] * N
    batch = random_batch(2, 4)
    torch.testing.assert_close(model(batch)[keys.RECONSTRUCTION], batch[keys.OBSERVATION])
