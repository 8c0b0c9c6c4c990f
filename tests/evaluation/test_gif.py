from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv

from matwm_rl import presets
from matwm_rl.envs import make_env
from matwm_rl.evaluation import gif
from matwm_rl.evaluation.gif import record_gif
from matwm_rl.evaluation.opponents import RandomActions
from matwm_rl.evaluation.simple_tag import DrawTag
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor

TAG = "mpe2/simple_tag_v3"


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
    with Image.open(path) as found:
        for index in range(found.n_frames):
            found.seek(index)
            shade = found.convert("RGB").getpixel((4, 4))[0]
            frames.append((30 * round(shade / 30), found.info["duration"]))  # common colours are nearly the same
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
def test_gif_of_a_policy_with_history(tmp_path: Path, name: str) -> None:
    env = make_env(name, seed=0)
    model = WorldModel.from_env(env, presets.tiny().world_model)
    policy = WorldModelPolicy(model, make_actor(model, presets.tiny().actor_critic), history_length=2)
    draw = DrawTag(env.layout, size=32)
    env = TransformedEnv(env, policy.make_tensordict_primer())
    returns = record_gif(env, policy, tmp_path / "tag.gif", episodes=1, max_steps=3, draw=draw)
    assert len(returns[0]) == 4
    assert (tmp_path / "tag.gif").stat().st_size > 100


def test_gif_of_what_the_environment_renders(tmp_path: Path) -> None:
    env = make_env(TAG, seed=0, render_mode="rgb_array")
    path = tmp_path / "tag.gif"
    record_gif(env, RandomActions(), path, episodes=1, max_steps=3)
    with Image.open(path) as found:
        # Reduced, with three lines of text below.
        assert found.size == (gif.SIDE, gif.SIDE + 3 * gif.LINE + 4)
        assert np.asarray(found.convert("L"))[: gif.SIDE].std() > 5
    assert path.stat().st_size < 4 * 4096


def captions(path: Path, height: int) -> list[np.ndarray]:
    """What stands below the picture of every frame."""
    with Image.open(path) as found:
        frames = []
        for index in range(found.n_frames):
            found.seek(index)
            frames.append(np.asarray(found.convert("RGB"), dtype=int)[height:])
    return frames


def test_texts_stand_below_the_picture_and_events_in_their_colour(tmp_path: Path) -> None:
    env = make_env("mock", seed=0, episode_length=6, death_step=3)
    path = tmp_path / "a.gif"
    record_gif(env, First(), path, episodes=2, draw=Shades())
    frames = captions(path, gif.SIDE)
    assert len(frames) == 2 * 7
    for before, after in zip(frames, frames[1:], strict=False):
        assert (before != after).any(), "the number of the step changes"
    in_color = [(np.abs(frame - gif.EVENT).max(-1) < 8).sum() for frame in frames]
    # A reward in every episode's first step, of the prey in the fourth too; a death; the end.
    assert [count > 0 for count in in_color] == [False, True, False, True, True, False, True] * 2


def test_events_are_large_rewards_deaths_and_ends() -> None:
    layout = make_env("mock", seed=0).layout  # two hunters, one prey
    rewards = torch.tensor([[0.0, 0.0, -8.0], [10.0, 10.0, -3.0], [2.0, 6.0, 0.0], [0.0, 0.0, 0.0]])
    alive = torch.ones(5, 3, dtype=torch.bool)
    alive[3:, 1] = False
    episode = gif.Episode([], rewards=list(rewards), alive=list(alive), end="time limit")
    large = gif.large_from(rewards), gif.large_from(-rewards)
    assert large == (5.0, 4.0)
    assert [gif.events(episode, step, large, layout) for step in range(5)] == [
        [],
        ["prey -8"],
        ["hunter +10"],
        ["hunter +6", "hunter_1 is out"],
        ["end: time limit"],
    ]


def test_rewards_of_many_sizes_are_no_events() -> None:
    distances = torch.linspace(0.5, 2.0, 25).unsqueeze(-1).expand(25, 3)
    assert gif.large_from(distances) == gif.large_from(-distances) == gif.large_from(torch.zeros(25, 3)) == math.inf
    # But a goal beside them is.
    distances = distances.clone()
    distances[-1] = 10.0
    assert gif.large_from(distances) == 5.0


def test_long_episodes_are_shown_in_larger_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gif, "MAX_FRAMES", 3)
    env = make_env("mock", seed=0, episode_length=7, death_step=None)
    path = tmp_path / "a.gif"
    state = torch.random.get_rng_state()
    (returns,) = record_gif(env, RandomActions(), path, episodes=1, draw=Shades())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(returns) == 3
    assert [shade for shade, _ in read_gif(path)] == [0, 90, 180, 210]


def test_texts_that_do_not_fit_are_cut() -> None:
    tall = np.zeros((64, 8, 3), np.uint8)
    frame = np.asarray(gif.captioned(gif.fitted(tall), ["step 1", "return: " + "many groups " * 20], ""))
    assert frame.shape == (64 * 5 + 3 * gif.LINE + 4, gif.TEXT_WIDTH, 3)
    assert (frame[320:, -3:] == 255).all()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (TAG, {"render_mode": None}, RuntimeError, 'render_mode="rgb_array"'),
        ("mock", {}, NotImplementedError, "MockEnv"),
    ],
)
def test_what_cannot_be_rendered_is_said_before_anything_is_played(
    tmp_path: Path, name: str, options: dict[str, None], error: type[RuntimeError], message: str
) -> None:
    class Untouched(RandomActions):
        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            raise AssertionError("an episode was played")

    with pytest.raises(error, match=message):
        record_gif(make_env(name, seed=0, **options), Untouched(), tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_gif_arguments(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    with pytest.raises(ValueError, match="num_envs=1"):
        record_gif(make_env("mock", num_envs=2), RandomActions(), path)
    for name in ("episodes", "max_steps", "fps"):
        with pytest.raises(ValueError, match=f"{name} must be an? (positive )?integer"):
            record_gif(make_env("mock"), RandomActions(), path, **{name: 0})


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"matwm_rl\[train\]"):
        record_gif(make_env("mock"), First(), tmp_path / "a.gif", draw=Shades())


def test_small_agents_keep_their_colours_in_a_picture_of_many(tmp_path: Path) -> None:
    colors = [(0, 114, 178), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233), (230, 159, 0)]
    scene = np.full((320, 320, 3), 255, np.uint8)
    scene[160:] = np.random.default_rng(0).integers(60, 200, (160, 320, 1), np.uint8)
    for place, color in enumerate(colors):
        scene[10:16, 40 * place + 10 : 40 * place + 16] = color
    path = tmp_path / "a.gif"
    record_gif(make_env("mock", seed=0), First(), path, episodes=1, max_steps=1, draw=lambda _: scene)
    with Image.open(path) as found:
        shown = np.asarray(found.convert("RGB"), dtype=int)
    for place, color in enumerate(colors):
        assert np.abs(shown[13, 40 * place + 13] - color).max() < 8
    assert (shown[80] == 255).all()
