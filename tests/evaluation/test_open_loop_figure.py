from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from matwm_rl.envs import make_env
from matwm_rl.evaluation.figures import COLORS
from matwm_rl.evaluation.open_loop import episode_windows
from matwm_rl.evaluation.open_loop_figure import paint, plot_open_loop
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
        model, episode, path, layout=env.layout, agents=[agent], context_length=C, horizon=H, num_samples=4, num_dims=3
    )
    assert_is_drawn(path)
    shown = panels(figure)
    observation = episode["agents", "observation"][: C + H + 1, agent]
    # The evader's padding never varies; of the rest, the three entries that vary most.
    most = sorted(observation.std(0).topk(3).indices.tolist())
    others = ["reward", "teammates' actions", "error of observations", "error of rewards"]
    assert list(shown) == [*(f"observation {dim}" for dim in most), *others]
    assert {axis.get_xlabel() for axis in figure.axes} == {"step", "steps ahead"}
    (part,) = figure.subfigs
    assert [text.get_text() for text in part.legends[0].get_texts()] == [
        "imagined",
        "imagined, mean",
        "reconstructed",
        "real",
    ]
    for dim in most:
        axis = shown[f"observation {dim}"]
        steps, values = line(axis, "real")
        assert steps == list(range(C + H + 1))
        assert values == pytest.approx(observation[:, dim].tolist())
        imagined = [drawn for drawn in axis.get_lines() if len(drawn.get_xdata()) == H + 1]
        assert len(imagined) == 4 + 1
        assert {tuple(drawn.get_xdata()) for drawn in imagined} == {tuple(range(C, C + H + 1))}
        futures = np.array([drawn.get_ydata() for drawn in imagined if drawn.get_label() != "imagined, mean"])
        assert line(axis, "imagined, mean")[1] == pytest.approx(futures.mean(0).tolist(), abs=1e-6)
        assert line(axis, "reconstructed")[0] == list(range(C + 1))
    steps, values = line(shown["reward"], "real")
    assert (steps[0], steps[-1]) == (1, C + H)
    assert values == pytest.approx(episode["next", "agents", "reward"][: C + H, agent, 0].tolist())
    for name in ("adversary_0", "adversary_1", "adversary_2"):
        steps, values = line(shown["teammates' actions"], name)
        assert steps == list(range(C, C + H))
        assert all(0 < value < 1 for value in values)


@pytest.mark.usefixtures("unsaved")
def test_errors_grow_with_the_horizon_beside_trivial_ones(tmp_path: Path) -> None:
    env = make_env(TAG, seed=0)
    model = WorldModel.from_env(env, replace(SMALL, latent=LATENTS["gaussian"]))
    rollout = env.rollout(75, break_when_any_done=False)
    state = torch.random.get_rng_state()
    figure = plot_open_loop(model, rollout, tmp_path / "a.png", layout=env.layout, agents=["agent_0"], horizon=4)
    assert torch.equal(torch.random.get_rng_state(), state), "a run would go on differently"
    axis = panels(figure)["error of observations"]
    assert axis.get_ylabel() == "RMS of 6 windows"  # two of 12 steps in each of three episodes
    assert line(axis, "model")[0] == [1, 2, 3, 4]
    windows = episode_windows(rollout, 12)
    observation = windows["next", "agents", "observation"][:, 7:, 3]
    kept = (observation[:, 1:] - observation[:, :1]).square().sum(-1).mean(0).sqrt()
    assert line(axis, "last observation")[1] == pytest.approx(kept.tolist(), rel=1e-4)


@pytest.mark.usefixtures("unsaved")
def test_every_group_shows_its_first_agent_unless_the_user_chooses(tmp_path: Path) -> None:
    env = make_env("mock", seed=0, death_step=None)
    model = WorldModel.from_env(env, SMALL)
    rollout = env.rollout(6)

    def drawn(**options: Any) -> list[str]:
        figure = plot_open_loop(model, rollout, tmp_path / "a.png", layout=env.layout, **options)
        return [part.get_suptitle() for part in figure.subfigs]

    # Of the six steps, half is context.
    given = "3 real steps given (grey), 3 imagined from its real actions"
    assert drawn() == [f"hunter_0: {given}", f"prey_0: {given}"]
    assert drawn(agents=["hunter_1", 2], num_samples=1) == [f"hunter_1: {given}", f"prey_0: {given}"]


@pytest.mark.usefixtures("unsaved")
def test_names_constants_and_guesses_of_unequal_actions(tmp_path: Path) -> None:
    env = make_env("mock", seed=0, death_step=None)
    model = WorldModel.from_env(env, SMALL)
    names = {"hunter": ["step", "index", "last action", "episode", "one"], "hunter_0": ["t", "i", "a", "e", "1"]}
    figure = plot_open_loop(
        model,
        env.rollout(6),
        tmp_path / "a.png",
        layout=env.layout,
        agents=["hunter_0"],
        observation_names=names,
        num_dims=5,
    )
    shown = panels(figure)
    # An agent's own names go before its group's. What never changes comes last, and is not magnified.
    assert list(shown)[:5] == ["t", "a", "i (constant)", "e (constant)", "1 (constant)"]
    low, high = shown["1 (constant)"].get_ylim()
    assert low <= 0 and high >= 2
    # hunter_1 has four actions, the prey three.
    guesses = shown["teammates' actions"]
    assert line(guesses, "guess among 4")[1] == [1 / 4] * 2
    assert line(guesses, "guess among 3")[1] == [1 / 3] * 2
    colors = {drawn.get_label(): drawn.get_color() for drawn in guesses.get_lines()}
    assert colors["guess among 4"] == colors["hunter_1"] != colors["guess among 3"] == colors["prey_0"]


@pytest.mark.usefixtures("unsaved")
def test_what_happens_after_an_agents_death_is_not_drawn(tmp_path: Path) -> None:
    env = make_env("mock", seed=0, death_step=4)
    model = WorldModel.from_env(env, SMALL)
    figure = plot_open_loop(
        model, env.rollout(6), tmp_path / "a.png", layout=env.layout, agents=["hunter_1"], context_length=2, horizon=4
    )
    step = panels(figure)["observation 0"]
    assert line(step, "real")[1][:4] == [0, 1, 2, 3]
    assert np.isnan(line(step, "real")[1][4:]).all() and np.isnan(line(step, "imagined, mean")[1][2:]).all()
    assert [text.get_text().strip() for text in step.texts] == ["not alive"]
    assert np.isnan(line(panels(figure)["reward"], "real")[1][4:]).all()


@pytest.mark.usefixtures("unsaved")
def test_many_teammates_are_drawn_as_one(tmp_path: Path) -> None:
    layout = make_layout([3] * 9, [0] * 9, (4,))
    model = WorldModel.from_env(layout, SMALL)
    pictures = torch.randn(7, 9, 4)
    figure = plot_open_loop(model, rollout_of(pictures), tmp_path / "a.png", layout=layout, context_length=2)
    labels = [drawn.get_label() for drawn in panels(figure)["teammates' actions"].get_lines()]
    assert labels == ["mean of 8, and range", "guess among 3"]


def rollout_of(observations: torch.Tensor) -> TensorDict:
    """An episode of ``T+1`` observations ``[T+1, N, *O]``."""
    T, N = len(observations) - 1, observations.shape[1]
    mask = torch.ones(T, N, 3, dtype=torch.bool)
    agents = {"observation": observations[:-1], "action": torch.zeros(T, N, dtype=torch.long), "action_mask": mask}
    after = {"observation": observations[1:], "reward": torch.zeros(T, N, 1)}
    return TensorDict({"agents": agents, "next": {"agents": after, "done": torch.zeros(T, 1, dtype=torch.bool)}}, [T])


def test_open_loop_of_images_shows_strips(tmp_path: Path) -> None:
    layout = make_layout([3, 3], [0, 0], (3, 16, 16))
    # In eval mode, which encodes without chance.
    model = WorldModel.from_env(layout, replace(SMALL, latent=LATENTS["gaussian"])).eval()
    T, C, H = 9, 3, 5
    # Every step's picture has a shade of its own.
    pictures = (torch.arange(T + 1) * 20).to(torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 16, 16)
    path = tmp_path / "imagination.png"
    figure = plot_open_loop(model, rollout_of(pictures), path, layout=layout, context_length=C, horizon=H)
    assert_is_drawn(path)
    (axis,) = (axis for axis in figure.axes if axis.get_images())
    frames = np.asarray(axis.get_images()[0].get_array())
    # A frame of one pixel surrounds each of seven pictures, the last two given and five imagined, in four strips.
    assert frames.shape == (4 * 18, 7 * 18, 3)
    shades = frames[9, 9::18, 0] * 255
    assert shades == pytest.approx([20 * step for step in range(C - 1, C + H + 1)], abs=0.5)
    names = ["real", "reconstructed", "imagined 1", "imagined 2"]
    assert [text.get_text() for text in axis.get_yticklabels()] == names
    assert [text.get_text() for text in axis.get_xticklabels()][1:3] == ["step 3 (given)", "step 4"]
    with torch.no_grad():
        seen = model.decode(model.encode(pictures[C].unsqueeze(1)))[0, 0].clamp(0, 1).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(frames[19:35, 19:35], seen, atol=1e-4)
    assert (frames[37:53, 19:35] == np.float32(0.93)).all(), "the given steps are not imagined"


def shades(*places: int) -> torch.Tensor:
    """Four steps of images ``[4, C, 2, 2]``: channel ``c`` of step ``t`` has the shade ``places[c] + t``."""
    values = torch.tensor([0.0, 0.5, 0.1, 0.9, 0.3, 1.0, 0.2, 0.7])
    index = torch.arange(4).unsqueeze(-1) + torch.tensor(places)
    return values[index].view(4, len(places), 1, 1).expand(-1, -1, 2, 2)


def test_channels_are_read_as_grey_colours_stacked_frames_or_planes() -> None:
    def corner(images: torch.Tensor) -> list[float]:
        """The colour of the first of the steps."""
        return paint(images, images)[0, :, 0, 0].tolist()

    assert corner(shades(3)) == pytest.approx([0.9, 0.9, 0.9])
    assert corner(shades(0, 3, 2)) == pytest.approx([0.0, 0.9, 0.1]), "colours"
    assert corner(shades(0, 1, 2, 3)) == pytest.approx([0.9, 0.9, 0.9]), "four grey frames"
    assert corner(shades(1, 2, 3)) == pytest.approx([0.9, 0.9, 0.9]), "three grey frames"
    first = shades(0, 2, 4)
    two = torch.cat([first[:-1], first[1:]], 1)
    assert corner(two) == pytest.approx([0.5, 0.9, 1.0]), "two frames of colours"
    # Two planes: the brighter one's colour, here the second one's, by its brightness.
    orange = [int(COLORS[1][place : place + 2], 16) / 255 for place in (1, 3, 5)]
    assert corner(shades(0, 3)) == pytest.approx([0.9 * part for part in orange])


@pytest.mark.usefixtures("unsaved")
def test_open_loop_without_teammate_predictor(tmp_path: Path) -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, replace(SMALL, teammate_predictor=False))
    episode = env.rollout(6)
    figure = plot_open_loop(model, episode, tmp_path / "a.png", layout=env.layout, context_length=2, horizon=4)
    assert "no teammate predictor" in [axis.get_title() for axis in figure.axes]


def test_open_loop_of_what_is_no_episode(tmp_path: Path) -> None:
    env = make_env("mock", seed=0)
    model = WorldModel.from_env(env, SMALL)
    episode = env.rollout(6)
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"one rollout \[T\]"):
        plot_open_loop(model, episode.unsqueeze(0), path, layout=env.layout)
    for agents, message in (
        ([3], "agents must be an integer from 0 to 2, got 3"),
        (["dog"], "not one agent called 'dog'; the agents are"),
        ("prey_0", "agents must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_open_loop(model, episode, path, layout=env.layout, agents=agents)
    for names, message in (
        ({"dog": ["x"]}, r"\['dog'\], expected agents or groups"),
        ({"prey": ["x"]}, "1 names for prey_0, which observes 3 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_open_loop(model, episode, path, layout=env.layout, observation_names=names)
    assert not path.exists()
