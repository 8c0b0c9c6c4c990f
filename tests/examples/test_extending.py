"""Parts of a user's own, in scripts that edit nothing of the library."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from tests.examples.helpers import EXAMPLES, numbers, run_example

SCRIPTS = sorted((EXAMPLES / "extending").glob("*.py"))
SHORT = 60


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_short(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) < SHORT


def test_fsq_is_compared_with_categoricals(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_example("extending/latent", capsys, steps=200, updates=4)
    assert [line.split(",")[0] for line in lines] == ["CategoricalLatent", "FSQ"]
    assert all(0 < error < 100 for line in lines for error in numbers(line))


def test_fsq_rounds_and_lets_gradients_through() -> None:
    space = runpy.run_path(str(EXAMPLES / "extending" / "latent.py"))["FSQ"](3, num_levels=5)
    features = torch.tensor([[0.0, 10.0, -0.6]], requires_grad=True)
    z = space.sample_posterior(features)
    assert torch.allclose(z, torch.tensor([[0.0, 1.0, -0.5]]), atol=1e-6)
    assert torch.equal(space.from_code(space.to_code(z)), z.detach())
    assert space.posterior(features).exp().argmax(-1).tolist() == [[2, 4, 1]]
    z.sum().backward()
    assert features.grad[0, 0] == 1.0 and features.grad[0, 2] > 0


def test_flow_matching_is_learnt(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_example("extending/dynamics", capsys, steps=200, updates=10)
    library, own, still = lines
    assert (library.split(",")[0], own.split(",")[0]) == ("PriorDynamics", "FlowMatching")
    assert all(len(numbers(line)) == 3 for line in lines)
    assert numbers(still) == sorted(numbers(still)), "what was last seen is the less true the longer ago"
    assert numbers(own)[0] < 20 * numbers(still)[0]


def test_the_head_that_reads_transitions_is_learnt(capsys: pytest.CaptureFixture[str]) -> None:
    spread, hidden, observation, own = run_example("extending/reward_head", capsys, steps=400, updates=40)
    names = [line.split(",")[0] for line in (hidden, observation, own)]
    assert names == ["HiddenReward", "ObservationReward", "TransitionReward"]
    # Ways to the goal are rewarded, which are differences of the two observations.
    assert numbers(own)[0] < numbers(spread)[0] and numbers(observation)[0] < numbers(spread)[0]


def test_the_environment_is_known_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ("preset=tiny", "num_threads=1", "total_steps=80", "init_random_steps=60", "progress=false")
    random, trained = run_example("extending/environment", capfd, run_dir=tmp_path, overrides=overrides)[-2:]
    assert random.startswith("random agents") and trained.startswith("trained agents")
    assert len(numbers(random)) == len(numbers(trained)) == 2
    # 25 steps at 0.5, and ten times a way of sqrt(8) at most.
    assert all(-12.5 - 10 * 8**0.5 <= value <= 10 * 8**0.5 for value in numbers(random) + numbers(trained))
    assert (tmp_path / "episodes.gif").stat().st_size > 1000, "the environment's renderer drew nothing"
