"""Model-free methods are trained, learn, and show their policies at checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import model_free
import pytest
import torch
from learners import METHODS, Settings
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType

from matwm_rl.envs import make_env
from matwm_rl.evaluation import RandomActions, evaluate


def small(method: str, **overrides: Any) -> Settings:
    return replace(METHODS[method], **({"num_cells": (16,), "frames_per_batch": 20} | overrides))


def tensors(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def trained_policy(method: str, seed: int = 0, draw: bool = False, **overrides: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def on_checkpoint(env_steps: int, policy: nn.Module) -> None:
        if draw:
            torch.rand(7)
        found.extend(tensors(policy.parameters()))

    settings = small(method, **overrides)
    plan = {"seed": seed, "total_steps": 60, "checkpoints": [40, 60], "settings": settings}
    model_free.train(method, "mock", **plan, on_checkpoint=on_checkpoint)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_are_shown_when_first_reached(method: str) -> None:
    shown: list[int] = []
    settings = small(method, frames_per_batch=20)
    points = {"total_steps": 70, "checkpoints": [50, 20, 70]}
    model_free.train(method, "mock", seed=0, settings=settings, **points, on_checkpoint=lambda n, _: shown.append(n))
    assert shown == [20, 60, 80]


@pytest.mark.parametrize("method", METHODS)
def test_seeds_repeat_whatever_a_checkpoint_draws(method: str) -> None:
    first, again, other = trained_policy(method), trained_policy(method, draw=True), trained_policy(method, seed=1)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str) -> None:
    # Reward grows with the action: 17 + 18 + 30 at best, 39 for random actions.
    env, found = make_env("mock", seed=1), []

    def on_checkpoint(_: int, policy: nn.Module) -> None:
        found.append(float(evaluate(env, policy, exploration=ExplorationType.DETERMINISTIC).values.sum(-1).mean()))

    faster = {"minibatch_size": 50} if "ppo" in method else {"updates_per_step": 0.3}
    settings = small(method, frames_per_batch=100, lr=5e-3, **faster)
    plan = {"seed": 0, "total_steps": 800, "checkpoints": [800], "settings": settings}
    model_free.train(method, "mock", **plan, on_checkpoint=on_checkpoint)
    random = float(evaluate(env, RandomActions()).values.sum(-1).mean())
    assert found[0] > random + 0.6 * (65.0 - random)


def test_bad_input_is_refused() -> None:
    nothing: Any = {"seed": 0, "on_checkpoint": lambda *_: None}
    with pytest.raises(ValueError, match="unknown method 'dqn'"):
        model_free.train("dqn", "mock", total_steps=10, checkpoints=[10], **nothing)
    with pytest.raises(ValueError, match=r"got \[0, 11\]"):
        model_free.train("iql", "mock", total_steps=10, checkpoints=[0, 10, 11], **nothing)


def test_settings_can_be_stored() -> None:
    stored = json.loads(json.dumps({name: asdict(settings) for name, settings in METHODS.items()}))
    assert stored["mappo"]["central_critic"] and not stored["ippo"]["central_critic"]


def test_command_prints_sampled_and_greedy_returns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(model_free, "prepare_process", lambda **_: None)  # of the whole process, which others use
    monkeypatch.setattr(model_free, "METHODS", {"ippo": small("ippo")})
    options = ["--method", "ippo", "--environment", "mock", "--total-steps", "40", "--every", "20", "--episodes", "10"]
    model_free.main(options)
    lines = [line for line in capsys.readouterr().out.splitlines() if " steps, " in line]
    assert [line.split()[0] for line in lines] == ["20", "20", "40", "40"]
    assert all("hunter" in line and "prey" in line for line in lines)


def test_the_command_hands_arguments_to_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(model_free, "prepare_process", lambda **_: None)
    settings = replace(model_free.BOX_METHODS["ippo"], num_cells=(16,), frames_per_batch=20, epochs=1)
    monkeypatch.setattr(model_free, "BOX_METHODS", {"ippo": settings})
    options = ["--method", "ippo", "--environment", "mock", "--total-steps", "20", "--every", "20", "--episodes", "10"]
    model_free.main([*options, "--env-kwargs", "continuous=true", "episode_length=3"])
    printed = capsys.readouterr().out
    assert str(asdict(settings)) in printed and "20 steps, " in printed
    with pytest.raises(SystemExit, match="2"):
        model_free.main([*options, "--env-kwargs", "continuous"])
    assert "expected NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--total-steps", "--every", "--episodes"])
def test_the_command_refuses_less_than_one(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        model_free.main(["--method", "ippo", "--environment", "mock", option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
