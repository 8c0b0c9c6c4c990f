from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from matwm_rl.data import to_focal
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, WorldModelConfig, WorldModelPolicy, make_actor
from matwm_rl.training import load_policy, load_world_model, save_policy, save_world_model
from tests.helpers import mock_env, randomize

CONFIG = WorldModelConfig(hidden_size=16, num_heads=2, num_dims=4, num_classes=4, dropout=0.0)

SWITCHES = {
    "latent": "fsq",
    "num_dims": 12,
    "linear_skips": True,
    "coordinate_code": True,
    "reward_input": "next_observation",
}


def make_policy(config: WorldModelConfig = CONFIG, **actor: Any) -> WorldModelPolicy:
    model = randomize(WorldModel.from_env(mock_env(), config))
    return WorldModelPolicy(model, randomize(make_actor(model, **({"num_cells": 8} | actor))), context_length=3).eval()


@pytest.mark.parametrize(
    ("share_by_group", "switches"),
    [(False, {}), (True, {}), (True, SWITCHES), (True, SWITCHES | {"latent": "gaussian", "latent_width": 0.1})],
    ids=["own", "shared", "switches", "gaussian"],
)
def test_a_saved_policy_acts_as_the_original(tmp_path: Path, share_by_group: bool, switches: dict[str, Any]) -> None:
    config, actor = replace(CONFIG, **switches), {"num_cells": 8, "share_by_group": share_by_group}
    policy = make_policy(config, **actor)
    env = make_env("mock", seed=0)
    path = tmp_path / "policy.pt"
    before = torch.get_rng_state()
    save_policy(path, policy, layout=env.layout, world_model=config, actor=actor)
    assert torch.equal(before, torch.get_rng_state()), "saving must not change the run"
    loaded = load_policy(path, layout=env.layout)
    assert len(next(loaded.actor.parameters())) == (2 if share_by_group else 3)
    assert getattr(loaded.world_model.latent, "width", None) == getattr(policy.world_model.latent, "width", None)

    rollouts = []
    for acting in (policy, loaded):
        torch.manual_seed(3)
        env = make_env("mock", seed=0).append_transform(acting.make_tensordict_primer())
        rollouts.append(env.rollout(12, acting, break_when_any_done=False)["agents", "logits"])
    torch.testing.assert_close(*rollouts, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt"]


def test_a_policy_that_the_configuration_does_not_describe_is_refused(tmp_path: Path) -> None:
    policy = make_policy()
    layout = make_env("mock").layout
    with pytest.raises(ValueError, match=r"actor\.[\w.]+ has shape"):
        save_policy(tmp_path / "policy.pt", policy, layout=layout, world_model=CONFIG, actor={"num_cells": 9})
    assert not (tmp_path / "policy.pt").exists()


def test_a_policy_for_other_agents_says_what_differs(tmp_path: Path) -> None:
    policy = make_policy()
    path = tmp_path / "policy.pt"
    save_policy(path, policy, layout=make_env("mock").layout, world_model=CONFIG, actor={"num_cells": 8})
    with pytest.raises(ValueError, match="other agent_names"):
        load_policy(path, layout=make_env("mpe2/simple_tag_v3").layout)


@pytest.mark.parametrize("switches", [{}, SWITCHES, {"teammate_predictor": False, "predict_mask": False}], ids=str)
def test_a_saved_world_model_predicts_as_the_original(tmp_path: Path, switches: dict[str, Any]) -> None:
    config, layout = replace(CONFIG, **switches), mock_env().layout
    model = randomize(WorldModel.from_env(layout, config)).eval()
    save_world_model(tmp_path / "model.pt", model, layout=layout, config=config)
    torch.load(tmp_path / "model.pt", weights_only=True)
    loaded = load_world_model(tmp_path / "model.pt", layout=layout)
    assert not loaded.training
    rollout = to_focal(mock_env().rollout(12, break_when_any_done=False))
    outputs = []
    for one in (model, loaded):
        torch.manual_seed(3)
        outputs.append(one(rollout.clone()))
    for key in model.out_keys:
        assert torch.equal(outputs[0][key], outputs[1][key]), key


def test_a_policy_file_holds_a_world_model_but_not_the_other_way_round(tmp_path: Path) -> None:
    policy, layout = make_policy(), mock_env().layout
    save_policy(tmp_path / "policy.pt", policy, layout=layout, world_model=CONFIG, actor={"num_cells": 8})
    loaded, expected = load_world_model(tmp_path / "policy.pt").state_dict(), policy.world_model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    save_world_model(tmp_path / "model.pt", policy.world_model, layout=layout, config=CONFIG)
    with pytest.raises(ValueError, match=r"a world model and no actor.*load_world_model"):
        load_policy(tmp_path / "model.pt")


def test_a_world_model_that_the_configuration_does_not_describe_is_refused(tmp_path: Path) -> None:
    model, layout = make_policy().world_model, mock_env().layout
    model.decoder = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"decoder\.[\w.]+ is missing"):
        save_world_model(tmp_path / "model.pt", model, layout=layout, config=CONFIG)
    assert not (tmp_path / "model.pt").exists()
