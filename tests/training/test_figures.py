from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv

from matwm_rl.envs import AgentLayout, make_env
from matwm_rl.modules import WorldModel, WorldModelConfig, WorldModelPolicy, make_actor
from matwm_rl.training.figures import plot_learning_curves
from matwm_rl.training.gif import DrawTag, record_gif
from matwm_rl.training.open_loop_figure import plot_open_loop
from matwm_rl.training.opponents import RandomActions, TagScript
from matwm_rl.training.run_log import RunLog

TAG = "mpe2/simple_tag_v3"
SMALL = {"hidden_size": 16, "num_heads": 2, "num_dims": 4, "num_classes": 4, "dropout": 0.0, "encoder_depth": 1}


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(): axis for axis in figure.axes}


def line(axis: Any, label: str) -> tuple[list[float], list[float]]:
    (found,) = (drawn for drawn in axis.get_lines() if drawn.get_label() == label)
    return [float(x) for x in found.get_xdata()], [float(y) for y in found.get_ydata()]


def assert_is_drawn(path: Path) -> None:
    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    with RunLog(tmp_path / "my run", total_steps=1, progress=False, tensorboard=False) as log:
        log.log({"loss_reward": 100.0, "gradient_norm": 2.0, "entropy": 1.6}, 10)
        log.log({"evaluation/self_play/hunter": -1.0, "evaluation/self_play/prey": 4.0}, 10)
        log.log({"loss_reward": 0.5, "gradient_norm": -1.0, "entropy": 1.1, "evaluation/self_play/hunter": 3.0}, 20)
    return tmp_path / "my run"


def test_learning_curves_show_what_was_logged(run_dir: Path) -> None:
    path = run_dir / "curves.png"
    references = {"self_play": {"scripted": 7.0, "random": -2.0}, "not played": {"scripted": 1.0}}
    figure = plot_learning_curves(run_dir, path, references=references)
    assert_is_drawn(path)
    shown = panels(figure)
    assert list(shown) == ["self play", "entropy", "loss: reward", "gradient norm"]
    assert line(shown["self play"], "hunter") == ([10, 20], [-1, 3])
    assert line(shown["self play"], "prey") == ([10], [4])
    assert line(shown["self play"], "scripted (7)")[1] == [7, 7]
    assert line(shown["self play"], "random (-2)")[1] == [-2, -2]
    assert line(shown["loss: reward"], "loss_reward") == ([10, 20], [100, 0.5])
    assert [text.get_text() for text in shown["self play"].get_legend().get_texts()] == [
        "hunter",
        "prey",
        "scripted (7)",
        "random (-2)",
    ]
    assert figure.get_suptitle() == "my run"
    assert {axis.get_xlabel() for axis in figure.axes} == {"env steps"}


def test_only_curves_over_magnitudes_have_a_logarithmic_axis(run_dir: Path) -> None:
    shown = panels(plot_learning_curves(run_dir / "metrics.csv", run_dir / "curves.png", title="mine"))
    scales = {name: axis.get_yscale() for name, axis in shown.items()}
    expected = {"self play": "linear", "entropy": "linear", "loss: reward": "log", "gradient norm": "linear"}
    assert scales == expected


def test_returns_without_a_match_share_a_panel(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, progress=False, tensorboard=False) as log:
        log.log({"evaluation/hunter": 1.0, "evaluation/prey": 2.0}, 1)
    references = {"evaluation": {"best": 3.0}}
    (axis,) = plot_learning_curves(tmp_path, tmp_path / "curves.png", references=references).axes
    assert [drawn.get_label() for drawn in axis.get_lines()] == ["hunter", "prey", "best (3)"]


def test_a_run_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_learning_curves(tmp_path, tmp_path / "curves.png")
    RunLog(tmp_path, total_steps=1, progress=False, tensorboard=False)
    with pytest.raises(ValueError, match="no metrics have been logged"):
        plot_learning_curves(tmp_path, tmp_path / "curves.png")


def test_open_loop_of_vectors_shows_reality_and_imagination(tmp_path: Path) -> None:
    env = make_env(TAG, seed=0)
    model = WorldModel.from_env(env, **SMALL)
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
    assert list(shown) == [*(f"observation {dim}" for dim in most), "reward", "probability given to what teammates did"]
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
    teammates = shown["probability given to what teammates did"]
    for name in ("adversary_0", "adversary_1", "adversary_2"):
        steps, values = line(teammates, name)
        assert steps == list(range(C, C + H))
        assert all(0 < value < 1 for value in values)


def test_open_loop_of_images_shows_strips(tmp_path: Path) -> None:
    layout = AgentLayout(
        agent_names=["left", "right"],
        group_map={"agents": ["left", "right"]},
        group_index=[0, 0],
        action_counts=[3, 3],
        observation_shape=(3, 16, 16),
        observation_sizes=[768, 768],
        is_image=True,
    )
    model = WorldModel.from_layout(
        observation_shape=layout.observation_shape,
        action_counts=layout.action_counts,
        group_index=layout.group_index,
        config=WorldModelConfig(**SMALL, latent="fsq", channels=2),
    )
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


def test_open_loop_without_teammate_predictor(tmp_path: Path) -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, **SMALL, teammate_predictor=False)
    episode = env.rollout(6)
    figure = plot_open_loop(model, episode, tmp_path / "a.png", layout=env.layout, context_length=2, horizon=4)
    assert "no teammate predictor" in panels(figure)


def test_open_loop_of_what_is_no_episode(tmp_path: Path) -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, **SMALL)
    episode = env.rollout(6)
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"one rollout \[T\]"):
        plot_open_loop(model, episode.unsqueeze(0), path, layout=env.layout)
    with pytest.raises(ValueError, match="index below 3"):
        plot_open_loop(model, episode, path, layout=env.layout, agent=3)
    with pytest.raises(ValueError, match="6 steps.*4 \\+ 3"):
        plot_open_loop(model, episode, path, layout=env.layout, context_length=4, horizon=3)
    assert not path.exists()


class Shades:
    """Draws MockEnv's step as a shade."""

    def __call__(self, tensordict: TensorDictBase) -> np.ndarray:
        step = int(tensordict["agents", "observation"][0, 0])
        return np.full((8, 8, 3), 30 * step, dtype=np.uint8)


class First(TensorDictModuleBase):
    """The first legal action."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [("agents", "action_mask")], [("agents", "action")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(("agents", "action"), tensordict["agents", "action_mask"].int().argmax(-1))


def read_gif(path: Path) -> list[tuple[int, int]]:
    """Shade and duration in milliseconds of every frame."""
    frames = []
    with Image.open(path) as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append((gif.convert("RGB").getpixel((4, 4))[0], gif.info["duration"]))
    return frames


def test_gif_shows_every_state_of_every_episode(tmp_path: Path) -> None:
    env = make_env("mock", seed=0, episode_length=4, death_step=None)
    path = tmp_path / "episodes.gif"
    returns = record_gif(env, First(), path, episodes=2, fps=20, draw=Shades())
    episode = [(0, 50), (30, 50), (60, 50), (90, 50), (120, 250)]
    assert read_gif(path) == episode * 2
    # In step t all actions but t are legal, so the first is 1 at t = 0 and, for the prey with three actions, t = 3.
    assert returns == [[1.0, 2.0, 3.0 + 3.0]] * 2


def test_gif_of_an_episode_cut_off(tmp_path: Path) -> None:
    env = make_env("mock", seed=0)
    path = tmp_path / "episodes.gif"
    returns = record_gif(env, First(), path, episodes=1, max_steps=2, draw=Shades())
    assert [shade for shade, _ in read_gif(path)] == [0, 30, 60]
    assert returns == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("name", [TAG, "vmas/simple_tag"])
def test_gif_of_a_policy_with_context(tmp_path: Path, name: str) -> None:
    env = make_env(name, seed=0)
    model = WorldModel.from_env(env, **SMALL)
    policy = WorldModelPolicy(model, make_actor(model, num_cells=8), context_length=2)
    draw = DrawTag(env.layout, size=32)
    env = TransformedEnv(env, policy.make_tensordict_primer())
    returns = record_gif(env, policy, tmp_path / "tag.gif", episodes=1, max_steps=3, draw=draw)
    assert len(returns[0]) == 4
    assert (tmp_path / "tag.gif").stat().st_size > 100


def test_gif_of_what_the_environment_renders(tmp_path: Path) -> None:
    env = make_env(TAG, seed=0, render_mode="rgb_array")
    path = tmp_path / "tag.gif"
    record_gif(env, RandomActions(), path, episodes=1, max_steps=3)
    with Image.open(path) as gif:
        assert gif.size == (700, 700)
        assert np.asarray(gif.convert("L")).std() > 5


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [(TAG, RuntimeError, 'render_mode="rgb_array"'), ("mock", NotImplementedError, "MockEnv")],
)
def test_what_cannot_be_rendered_is_said_before_anything_is_played(
    tmp_path: Path, name: str, error: type[RuntimeError], message: str
) -> None:
    class Untouched(RandomActions):
        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            raise AssertionError("an episode was played")

    with pytest.raises(error, match=message):
        record_gif(make_env(name, seed=0), Untouched(), tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_gif_arguments(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    with pytest.raises(ValueError, match="num_envs=1"):
        record_gif(make_env("mock", num_envs=2), RandomActions(), path)
    for name in ("episodes", "max_steps", "fps"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            record_gif(make_env("mock"), RandomActions(), path, **{name: 0})


def test_draw_tag_puts_everybody_in_place() -> None:
    env = make_env(TAG, seed=0)
    # Two obstacles and four agents; the first agent sees the obstacles relative to itself.
    positions = torch.tensor([[-0.5, 0.0], [0.0, 0.5], [0.5, 0.0], [0.0, -0.5]])
    obstacles = torch.tensor([[-0.9, 0.9], [0.9, -0.9]])
    observation = torch.zeros(4, 16)
    observation[:, 2:4] = positions
    observation[0, 4:8] = (obstacles - positions[0]).flatten()
    picture = DrawTag(env.layout, size=280, arena=1.4)(TensorDict({"agents": {"observation": observation}}))

    def color(place: torch.Tensor) -> tuple[int, ...]:
        x, y = place.tolist()
        return tuple(picture[round((1.4 - y) * 100), round((x + 1.4) * 100)].tolist())

    colors = [color(place) for place in [*positions, *obstacles, torch.zeros(2)]]
    pursuer, evader, obstacle, ground = colors[0], colors[3], colors[4], colors[6]
    assert colors == [pursuer] * 3 + [evader] + [obstacle] * 2 + [ground]
    assert len({pursuer, evader, obstacle, ground}) == 4 and ground == (255, 255, 255)


def test_draw_tag_agrees_with_the_environment_about_obstacles() -> None:
    for name in (TAG, "vmas/simple_tag"):
        env = make_env(name, seed=0)
        assert DrawTag(env.layout).num_obstacles == 2
        assert TagScript(env.layout).others_start == 4 + 2 * 2
    with pytest.raises(ValueError, match="DrawTag draws simple_tag"):
        DrawTag(make_env("mock").layout)


@pytest.mark.parametrize("package", ["matplotlib.figure", "PIL.Image"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"matwm_rl\[train\]"):
        if package.startswith("PIL"):
            record_gif(make_env("mock"), First(), tmp_path / "a.gif", draw=Shades())
        else:
            plot_learning_curves(run_dir, tmp_path / "a.png")
