"""The table of trained policies is what their cards say, and a run's policy goes there with its card."""

from __future__ import annotations

from pathlib import Path

import pytest
import shelf

from matwm_rl import presets
from matwm_rl.envs import make_env
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor
from matwm_rl.training import PolicyCard, load_policy, save_policy


def test_the_table_is_up_to_date() -> None:
    assert shelf.table() in shelf.PAGE.read_text(encoding="utf-8"), "run python benchmarks/comparison/shelf.py"


def test_the_policy_of_a_run_goes_to_the_shelf_with_its_card(tmp_path: Path) -> None:
    model = WorldModel.from_env(make_env("mock"), presets.tiny().world_model)
    policy = WorldModelPolicy(model, make_actor(model, presets.tiny().actor_critic))
    card = PolicyCard(env="mock", env_steps=12_000, returns={"hunter": 1.25, "prey": -3.0}, command="python train.py")
    save_policy(tmp_path / "policy.pt", policy)
    with pytest.raises(ValueError, match=r"policy\.pt has no card with returns"):
        shelf.put("mock", tmp_path, tmp_path)
    save_policy(tmp_path / "policy.pt", policy, card=card)
    (tmp_path / "shelf").mkdir()
    assert load_policy(shelf.put("mock", tmp_path, tmp_path / "shelf")).card == card
    row = shelf.table(tmp_path / "shelf").splitlines()[-1]
    assert row.startswith("| `mock` | `mock` | 12,000 | hunter 1.2; prey -3.0 | ")
    assert row.endswith(" MB | `python train.py` |")
