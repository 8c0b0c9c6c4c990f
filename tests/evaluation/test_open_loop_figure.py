from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from matwm_rl.envs import make_env
from matwm_rl.evaluation.open_loop_figure import plot_open_loop
from matwm_rl.modules import MLPEncoderConfig, WorldModel, WorldModelConfig
from tests.evaluation.helpers import assert_is_drawn, line, panels
from tests.helpers import LATENTS, make_layout

TAG = "mpe2/simple_tag_v3"
SMALL = WorldModelConfig(
    hidden_size=16, num_heads=2, latent=LATENTS["categorical"], dropout=0.0, encoder=MLPEncoderConfig(depth=1)
)


def test_open_loop_of_vectors_shows_reality_and_imagination(tmp_path: Path) -> None:
    env = make_env(TAG, seed=0)
    model = WorldModel.from_env(env, SMALL)
    episode = env.rollout(25)
    C, H, agent = 5, 7, 3
    path = tmp_path / "imagination.png"
    figure = plot_open_loop(
        model, episode, path, layout=env.layout, agent=agent, context_length=C, horizon=H, num_samples=4, num_dims=3
    )
    assert_is_drawn(path)
    shown = panels(figure)
    observation = episode["agents", "observation"][: C + H + 1, agent]
    # The evader's padding never varies; of the rest, the three entries that vary most.
    most = sorted(observation.std(0).topk(3).indices.tolist())
    assert list(shown) == [
        *(f"observation {dim}" for dim in most),
        "reward",
        "predicted probability of teammates' actions",
    ]
    for dim in most:
        axis = shown[f"observation {dim}"]
        steps, values = line(axis, "real")
        assert steps == list(range(C + H + 1))
        assert values == pytest.approx(observation[:, dim].tolist())
        imagined = [drawn for drawn in axis.get_lines() if len(drawn.get_xdata()) == H + 1]
        assert len(imagined) == 4
        assert {tuple(drawn.get_xdata()) for drawn in imagined} == {tuple(range(C, C + H + 1))}
        assert line(axis, "reconstructed")[0] == list(range(C + 1))
    steps, values = line(shown["reward"], "real")
    assert (steps[0], steps[-1]) == (1, C + H)
    assert values == pytest.approx(episode["next", "agents", "reward"][: C + H, agent, 0].tolist())
    teammates = shown["predicted probability of teammates' actions"]
    for name in ("adversary_0", "adversary_1", "adversary_2"):
        steps, values = line(teammates, name)
        assert steps == list(range(C, C + H))
        assert all(0 < value < 1 for value in values)


def test_open_loop_of_images_shows_strips(tmp_path: Path) -> None:
    layout = make_layout([3, 3], [0, 0], (3, 16, 16))
    # In eval mode, which encodes without chance.
    model = WorldModel.from_env(layout, replace(SMALL, latent=LATENTS["gaussian"])).eval()
    T, C, H = 9, 3, 5
    # Every step's picture has a shade of its own.
    pictures = (torch.arange(T + 1) * 20).to(torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 16, 16)
    agents = {"observation": pictures[:-1], "action": torch.zeros(T, 2, dtype=torch.long)}
    after = {"observation": pictures[1:], "reward": torch.zeros(T, 2, 1)}
    done = torch.zeros(T, 1, dtype=torch.bool)
    episode = TensorDict({"agents": agents, "next": {"agents": after, "done": done}}, [T])
    path = tmp_path / "imagination.png"
    figure = plot_open_loop(model, episode, path, layout=layout, context_length=C, horizon=H)
    assert_is_drawn(path)
    (image,) = figure.axes[0].get_images()
    frames = np.asarray(image.get_array())
    # A frame of one pixel surrounds each of six pictures, the last seen and five imagined, in four strips.
    assert frames.shape == (4 * 18, 6 * 18, 3)
    shades = frames[9, 9::18, 0] * 255
    assert shades == pytest.approx([20 * step for step in range(C, C + H + 1)], abs=0.5)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()][0] == "real"
    with torch.no_grad():
        seen = model.decode(model.encode(pictures[C].unsqueeze(1)))[0, 0].clamp(0, 1).permute(1, 2, 0).numpy()
    for strip in range(1, 4):
        np.testing.assert_allclose(frames[18 * strip + 1 : 18 * strip + 17, 1:17], seen, atol=1e-4)


def test_stacked_frames_are_drawn_by_their_newest(tmp_path: Path) -> None:
    layout = make_layout([3, 3], [0, 0], (4, 16, 16))
    model = WorldModel.from_env(layout, SMALL).eval()
    pictures = torch.tensor([0, 50, 100, 200], dtype=torch.uint8).view(4, 1, 1).expand(8, 2, 4, 16, 16)
    agents = {"observation": pictures, "action": torch.zeros(8, 2, dtype=torch.long)}
    after = {"observation": pictures, "reward": torch.zeros(8, 2, 1)}
    done = torch.zeros(8, 1, dtype=torch.bool)
    episode = TensorDict({"agents": agents, "next": {"agents": after, "done": done}}, [8])
    figure = plot_open_loop(model, episode, tmp_path / "a.png", layout=layout, context_length=3, horizon=5)
    frames = np.asarray(figure.axes[0].get_images()[0].get_array())
    assert frames[9, 9] * 255 == pytest.approx([200] * 3, abs=0.5)


def test_open_loop_without_teammate_predictor(tmp_path: Path) -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, replace(SMALL, teammate_predictor=False))
    episode = env.rollout(6)
    figure = plot_open_loop(model, episode, tmp_path / "a.png", layout=env.layout, context_length=2, horizon=4)
    assert "no teammate predictor" in panels(figure)


def test_open_loop_of_what_is_no_episode(tmp_path: Path) -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, SMALL)
    episode = env.rollout(6)
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"one rollout \[T\]"):
        plot_open_loop(model, episode.unsqueeze(0), path, layout=env.layout)
    with pytest.raises(ValueError, match="agent must be an integer from 0 to 2, got 3"):
        plot_open_loop(model, episode, path, layout=env.layout, agent=3)
    with pytest.raises(ValueError, match="6 steps.*4 \\+ 3"):
        plot_open_loop(model, episode, path, layout=env.layout, context_length=4, horizon=3)
    assert not path.exists()
