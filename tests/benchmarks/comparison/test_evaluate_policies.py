"""Policies that are trained already are judged by the protocol of the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate_policies
import protocol
import pytest
import torch
from protocol import ENVIRONMENTS, Environment

from matwm_rl.envs import make_env
from matwm_rl.modules import ActorCriticConfig, WorldModel, WorldModelConfig, WorldModelPolicy, make_actor
from matwm_rl.training import save_policy
from tests.helpers import SMALL, randomize

SPREAD = Environment("mpe2/simple_spread_v3", episodes=2, num_envs=2)


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, WorldModelPolicy]:
    monkeypatch.setitem(ENVIRONMENTS, "simple_spread", SPREAD)
    monkeypatch.setattr(evaluate_policies, "prepare_process", lambda **_: None)
    found = {}
    for index in range(3):
        torch.manual_seed(index)
        world_model = randomize(WorldModel.from_env(make_env(SPREAD.env), WorldModelConfig(**SMALL)))
        policy = WorldModelPolicy(world_model, randomize(make_actor(world_model, ActorCriticConfig(num_cells=8)), 1.0))
        found[tmp_path / f"{index}.pt"] = policy.eval()
        save_policy(tmp_path / f"{index}.pt", policy)
    return found


def test_every_policy_is_judged_and_the_median_printed(
    tmp_path: Path, policies: dict[Path, WorldModelPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "figures.json"
    evaluate_policies.main(["simple_spread", *map(str, policies), "--output", str(output)])
    figures = json.loads(output.read_text())
    assert figures == {str(path): protocol.evaluate_policy(SPREAD, policy) for path, policy in policies.items()}
    values = [found["return/greedy"] for found in figures.values()]
    assert len(set(values)) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("return/greedy "))
    assert line.split()[1:] == [f"{value:.2f}" for value in [*values, sorted(values)[1]]]


def test_world_models_are_measured_if_asked(
    policies: dict[Path, WorldModelPolicy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int, int]] = []

    def measured(policy: WorldModelPolicy, env_name: str, *, episodes: int, seed: int) -> dict[str, float]:
        asked.append((env_name, episodes, seed))
        return {"open_loop/reward/1": float(seed)}

    monkeypatch.setattr(evaluate_policies, "world_model_quality", measured)
    evaluate_policies.main(["simple_spread", *map(str, policies), "--world-model"])
    # As sample_efficiency.py measures the seeds 0, 1 and 2.
    assert asked == [(SPREAD.env, 100, seed) for seed in (1_000, 1_001, 1_002)]
    assert "1001.00" in capsys.readouterr().out


def test_a_policy_of_another_environment_is_refused(policies: dict[Path, WorldModelPolicy]) -> None:
    with pytest.raises(ValueError, match="trained in an environment with other"):
        evaluate_policies.main(["simple_tag", str(next(iter(policies)))])
