from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn

from matwm_rl import keys
from matwm_rl.data import add_agent_entries
from matwm_rl.envs import make_env
from matwm_rl.evaluation import RandomActions, evaluate
from matwm_rl.modules import (
    ActorCriticConfig,
    CoordinateEncoderConfig,
    Dynamics,
    DynamicsLoss,
    GaussianLatentConfig,
    ObservationRewardConfig,
    TwoHot,
    WorldModel,
    WorldModelConfig,
    WorldModelPolicy,
    make_actor,
)
from matwm_rl.state_files import read_state, write_state
from matwm_rl.training import (
    PolicyCard,
    TrainedPolicy,
    load_policy,
    load_world_model,
    save_policy,
    save_world_model,
)
from matwm_rl.training.model_files import SHELF
from tests.helpers import LATENTS, mock_env, randomize

CONFIG = WorldModelConfig(hidden_size=16, num_heads=2, latent=LATENTS["categorical"], dropout=0.0)
GAUSSIAN = replace(CONFIG, latent=LATENTS["gaussian"])
SWITCHES = replace(
    CONFIG,
    latent=GaussianLatentConfig(num_dims=12),
    encoder=CoordinateEncoderConfig(fourier_features=2),
    reward=ObservationRewardConfig(point_size=0),
    reencode=True,
)


def make_policy(config: WorldModelConfig = CONFIG, *, share_by_group: bool = False) -> WorldModelPolicy:
    model = randomize(WorldModel.from_env(mock_env(), config))
    actor = make_actor(model, ActorCriticConfig(num_cells=8, share_by_group=share_by_group))
    return WorldModelPolicy(model, randomize(actor), history_length=3).eval()


@pytest.mark.parametrize(
    ("share_by_group", "config"),
    [(False, CONFIG), (True, CONFIG), (True, GAUSSIAN), (True, SWITCHES)],
    ids=["own", "shared", "gaussian", "switches"],
)
def test_a_saved_policy_acts_as_the_original(tmp_path: Path, share_by_group: bool, config: WorldModelConfig) -> None:
    policy = make_policy(config, share_by_group=share_by_group)
    env = make_env("mock", seed=0)
    path = tmp_path / "policy.pt"
    before = torch.get_rng_state()
    save_policy(path, policy)
    assert torch.equal(before, torch.get_rng_state()), "saving must not change the run"
    loaded = load_policy(path, layout=env.layout)
    assert len(next(loaded.actor.parameters())) == (2 if share_by_group else 3)
    assert loaded.world_model.recipe == policy.world_model.recipe

    rollouts = []
    for acting in (policy, loaded):
        torch.manual_seed(3)
        env = make_env("mock", seed=0).append_transform(acting.make_tensordict_primer())
        rollouts.append(env.rollout(12, acting, break_when_any_done=False)["agents", "logits"])
    torch.testing.assert_close(*rollouts, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]


def test_an_actor_of_ones_own_is_refused(tmp_path: Path) -> None:
    policy = make_policy()
    network = TensorDictModule(lambda latent: latent[..., :4], in_keys=[keys.LATENT], out_keys=[keys.LOGITS])
    policy.actor = ProbabilisticTensorDictSequential(network, policy.actor[-1])
    with pytest.raises(ValueError, match="only actors of make_actor are saved and exported"):
        save_policy(tmp_path / "policy.pt", policy)
    assert not list(tmp_path.iterdir())


def test_a_policy_for_other_agents_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "policy.pt"
    save_policy(path, make_policy())
    with pytest.raises(ValueError, match="other agent_names"):
        load_policy(path, layout=make_env("mpe2/simple_tag_v3").layout)


@pytest.mark.parametrize(
    "config", [CONFIG, GAUSSIAN, SWITCHES, replace(CONFIG, teammate_predictor=False, group_layers=True)], ids=str
)
def test_a_saved_world_model_predicts_as_the_original(tmp_path: Path, config: WorldModelConfig) -> None:
    layout = mock_env().layout
    model = randomize(WorldModel.from_env(layout, config)).eval()
    save_world_model(tmp_path / "model.pt", model)
    torch.load(tmp_path / "model.pt", weights_only=True)
    loaded = load_world_model(tmp_path / "model.pt", layout=layout)
    assert not loaded.training
    rollout = add_agent_entries(mock_env().rollout(12, break_when_any_done=False))
    outputs = []
    for one in (model, loaded):
        torch.manual_seed(3)
        outputs.append(one(rollout.clone()))
    for key in model.out_keys:
        assert torch.equal(outputs[0][key], outputs[1][key]), key


def test_a_policy_file_holds_a_world_model_but_not_the_other_way_round(tmp_path: Path) -> None:
    policy = make_policy()
    save_policy(tmp_path / "policy.pt", policy)
    loaded, expected = load_world_model(tmp_path / "policy.pt").state_dict(), policy.world_model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    save_world_model(tmp_path / "model.pt", policy.world_model)
    with pytest.raises(ValueError, match=r"a world model and no actor.*load_world_model"):
        load_policy(tmp_path / "model.pt")


def test_a_world_model_that_was_changed_after_it_was_built_is_refused(tmp_path: Path) -> None:
    model = make_policy().world_model
    model.decoder = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"no longer as it was built, .*decoder\.[\w.]+ is missing"):
        save_world_model(tmp_path / "model.pt", model)
    assert not list(tmp_path.iterdir())


class Still(Dynamics):
    def loss(self, hidden: Tensor, latent: Tensor, posterior: Tensor) -> DynamicsLoss:
        return DynamicsLoss(hidden.sum(-1), hidden.sum(-1))

    def sample(self, hidden: Tensor, latent: Tensor) -> Tensor:
        return latent


def test_a_world_model_with_parts_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = WorldModel.from_env(mock_env(), CONFIG, dynamics=Still())
    with pytest.raises(ValueError, match="parts of your own, which a file cannot build again"):
        save_world_model(tmp_path / "model.pt", model)
    assert not list(tmp_path.iterdir())


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.pt"
    save_policy(path, make_policy())
    state = {**torch.load(path, weights_only=True), "version": 0}
    write_state(path, state)
    for load in (load_policy, load_world_model):
        with pytest.raises(ValueError, match="has version 0; this release reads version 8"):
            load(path)
    torch.save({**state, "version": 4}, path)  # files of that version had no checksum
    with pytest.raises(ValueError, match=r"policy.pt has version 4: it does not end with a checksum"):
        load_policy(path)


class OtherModel(WorldModel):
    """One's own, whose weights have the same shapes."""


def changed_models() -> dict[str, WorldModel]:
    layout = mock_env().layout
    models = {name: WorldModel.from_env(layout, CONFIG) for name in ("switched", "replaced", "heads")}
    models["switched"].reencode = True
    models["replaced"].two_hot = TwoHot(interpolation="raw")
    models["heads"].transformer.blocks[0].num_heads = 4
    models["subclass"] = OtherModel.from_env(layout, CONFIG)
    return models


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("switched", "reencode was True, here it is False"),
        ("replaced", "two_hot.interpolation was 'raw', here it is 'symlog'"),
        ("heads", r"num_heads was 4, here it is 2"),
        ("subclass", r"was a .*OtherModel, here it is a .*WorldModel"),
    ],
)
def test_a_model_that_would_load_as_another_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"no longer as it was built, does not fit: .*{message}"):
        save_world_model(tmp_path / "model.pt", changed_models()[name])
    assert not list(tmp_path.iterdir())


def test_a_model_remembers_what_it_was_built_from(tmp_path: Path) -> None:
    config = replace(CONFIG, reencode=True)
    model = WorldModel.from_env(mock_env(), config)
    config.reencode, config.num_heads = False, 4  # for the next model
    save_world_model(tmp_path / "model.pt", model)
    loaded = load_world_model(tmp_path / "model.pt")
    assert loaded.reencode and loaded.transformer.num_heads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("recipe"), r"policy\.pt does not fit: recipe is missing"),
        (lambda saved: saved["state"].pop("actor"), r"policy\.pt, state, does not fit: actor is missing"),
        (lambda saved: saved["state"]["actor"].popitem(), r"policy\.pt, actor, does not fit: .* is missing"),
        (lambda saved: saved["recipe"].pop("card"), r"policy\.pt does not fit: card is missing"),
        (lambda saved: saved["recipe"].update(history_length="3"), r"policy\.pt: history_length must be"),
        (lambda saved: saved["recipe"]["world_model"].update(num_heads=4), r"num_heads was 2, here it is 4"),
        (lambda saved: saved["recipe"]["world_model"].update(kind="os"), r"policy\.pt describes networks that cannot"),
        (lambda saved: saved["recipe"].update(layout={}), r"policy\.pt describes networks that cannot"),
    ],
)
def test_entries_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "policy.pt"
    save_policy(path, make_policy())
    saved = read_state(path)
    change(saved)
    write_state(path, saved)
    with pytest.raises(ValueError, match=message):
        load_policy(path)


# -- cards, environments and the shelf ---------------------------------------------------------------------------------

CARD = PolicyCard(
    env="mock", env_kwargs={"episode_length": 3}, seed=2, env_steps=50, returns={"hunter": 1.5}, command="x"
)


def saved_and_loaded(tmp_path: Path, card: PolicyCard | None) -> TrainedPolicy:
    save_policy(tmp_path / "policy.pt", make_policy(), card=card)
    return load_policy(tmp_path / "policy.pt")


def test_a_policy_knows_its_environment(tmp_path: Path) -> None:
    policy = saved_and_loaded(tmp_path, CARD)
    assert policy.card == CARD
    assert policy.make_env(num_envs=2).rollout(9, policy, break_when_any_done=True).shape == (2, 3)
    assert policy.make_env(episode_length=5).rollout(9, policy).shape == (5,)
    save_policy(tmp_path / "copy.pt", policy)
    assert load_policy(tmp_path / "copy.pt").card == CARD


def test_another_environment_has_to_have_the_same_agents(tmp_path: Path) -> None:
    policy = saved_and_loaded(tmp_path, CARD)
    assert policy.make_env("matwm_rl.envs:MockEnv", episode_length=2).rollout(9, policy).shape == (2,)
    with pytest.raises(ValueError, match="the policy was trained in an environment with other agent_names, group_map"):
        policy.make_env("mpe2/simple_spread_v3")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "saved without the name of its environment"),
        (PolicyCard(env="os:getcwd"), r"names the function 'os:getcwd', which is not called without your word"),
    ],
)
def test_no_environment_is_made_of_what_a_file_cannot_know(
    tmp_path: Path, card: PolicyCard | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        saved_and_loaded(tmp_path, card).make_env()


@pytest.mark.parametrize("change", [{"env": 3}, {"env_steps": -1}, {"returns": []}, {"more": 1}])
def test_a_card_that_cannot_be_read_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    saved_and_loaded(tmp_path, CARD)
    saved = read_state(tmp_path / "policy.pt")
    saved["recipe"]["card"].update(change)
    write_state(tmp_path / "policy.pt", saved)
    with pytest.raises(ValueError, match=r"policy\.pt has a card that cannot be read"):
        load_policy(tmp_path / "policy.pt")


def test_a_card_has_plain_values(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"card\.env_kwargs\.device"):
        save_policy(
            tmp_path / "policy.pt",
            make_policy(),
            card=PolicyCard(env="mock", env_kwargs={"device": torch.device("cpu")}),
        )
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_on_the_shelf_is_refused_with_those_that_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a file simple_tga nor a trained policy .*: .*simple_spread"):
        load_policy("simple_tga")
    with pytest.raises(FileNotFoundError, match=r"No such file"):
        load_policy("runs/simple_tga")


def test_a_policy_of_the_shelf_plays_well() -> None:
    policy, returns = load_policy("simple_spread"), []
    for acting in (policy, RandomActions()):  # in the same episodes
        env = policy.make_env(seed=0, num_envs=10)
        returns.append(evaluate(env, acting, episodes=10).per_group()["agent"])
    assert returns[0] > returns[1] + 5  # -18.1 and -27.9


def test_the_shelf_is_small_and_tells_where_it_is_from() -> None:
    files = sorted(SHELF.glob("*.pt"))
    assert sum(path.stat().st_size for path in files) < 12e6
    for path in files:
        card = load_policy(path.stem).card
        assert card is not None and card.env_steps >= 10_000 and card.returns and card.command
        assert card.env.rpartition("/")[2].startswith(path.stem.removeprefix("vmas_"))
