from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv

from matwm_rl import presets
from matwm_rl.envs import make_env
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
    with Image.open(path) as gif:
        assert gif.size == (700, 700)
        assert np.asarray(gif.convert("L")).std() > 5


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
