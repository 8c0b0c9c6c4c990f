"""Observation spaces as users write them: nothing dropped, nothing guessed in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium.spaces as sp
import numpy as np
import pytest
import torch
from pettingzoo import ParallelEnv
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, ExcludeTransform, PettingZooWrapper, TransformedEnv, check_env_specs

from matwm_rl.envs import AgentLayout, MultiAgentEnv, make_env, merge_rollout
from matwm_rl.keys import ACTION_MASK, ALIVE, NEXT_OBSERVATION, OBSERVATION
from tests.envs.helpers import assert_legal

Observe = Callable[[int, int], Any]


class Observing(ParallelEnv):
    """Agents ``a_0``, ``b_0`` and so on, who observe what they are told to, for four steps."""

    metadata = {"name": "observing"}

    def __init__(self, spaces: dict[str, sp.Space[Any]], observe: Observe | None = None, die: str = "") -> None:
        self.possible_agents = list(spaces)
        self.spaces, self.observe, self.die = spaces, observe, die

    def observation_space(self, agent: str) -> sp.Space[Any]:
        return self.spaces[agent]

    def action_space(self, agent: str) -> sp.Space[Any]:
        return sp.Discrete(3)

    def _observations(self) -> dict[str, Any]:
        if self.observe is None:
            return {agent: self.spaces[agent].sample() for agent in self.agents}
        return {agent: self.observe(self.possible_agents.index(agent), self.steps) for agent in self.agents}

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        self.steps, self.agents = 0, list(self.possible_agents)
        return self._observations(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        self.steps += 1
        observations, acting, over = self._observations(), list(self.agents), self.steps == 4
        dying = [agent for agent in acting if agent == self.die]
        self.agents = [] if over else [agent for agent in acting if agent not in dying]
        return (
            observations,
            {agent: 1.0 for agent in acting},
            {agent: agent in dying for agent in acting},
            {agent: over for agent in acting},
            {agent: {} for agent in acting},
        )


def grouped(space: sp.Space[Any] | dict[str, sp.Space[Any]], observe: Observe | None = None, **kwargs: Any) -> EnvBase:
    spaces = space if isinstance(space, dict) else {"a_0": space, "a_1": space}
    return PettingZooWrapper(Observing(spaces, observe, **kwargs), use_mask=True, done_on_any=False)


def play(base: EnvBase, **kwargs: Any) -> TensorDictBase:
    """Play an environment on top of ``base``, whose stored data must give the same."""
    env = MultiAgentEnv(base, **kwargs)
    check_env_specs(env)
    return env.rollout(3)


def constant(value: Any) -> Observe:
    return lambda agent, step: value


# ---------------------------------------------------------------------- Dict, and other kinds


@pytest.mark.parametrize("image", [False, True])
def test_pettingzoos_documented_action_mask(image: bool) -> None:
    inner = sp.Box(0, 255, (20, 20, 3), np.uint8) if image else sp.Box(-9, 9, (3,))
    space = sp.Dict({"observation": inner, "action_mask": sp.Box(0, 1, (3,), np.int8)})
    value = np.full(inner.shape, 7, inner.dtype)

    def observe(agent: int, step: int) -> dict[str, Any]:
        mask = np.ones(3, np.int8)
        mask[(agent + step) % 3] = 0
        return {"observation": value, "action_mask": mask}

    base = grouped(space, observe, die="a_1")
    env = MultiAgentEnv(base, image_size=20)
    check_env_specs(env)
    data = env.rollout(3)
    assert env.layout.has_action_mask and env.layout.is_image == image
    assert data[OBSERVATION].shape[2:] == ((3, 20, 20) if image else (3,))
    assert (data[OBSERVATION][data[ALIVE]] == 7).all()
    assert data[ACTION_MASK][:, 0].tolist() == [[step != agent for agent in range(3)] for step in range(3)]
    assert_legal(data)
    stored = base.rollout(3, break_when_any_done=False)
    merged = merge_rollout(stored, AgentLayout.from_rollout(stored, image_size=20))
    assert torch.equal(merged[OBSERVATION], data[OBSERVATION])
    assert torch.equal(merged[ACTION_MASK], data[ACTION_MASK])


def test_vectors_of_a_dict_are_joined() -> None:
    space = sp.Dict(
        {"velocity": sp.Box(-9, 9, (2,)), "place": sp.Box(-9, 9, (1, 2), np.float64), "kind": sp.Discrete(3)}
    )
    observed = {"velocity": np.float32([1, 2]), "place": np.array([[3.0, 4.0]]), "kind": 1}
    base = grouped(space, constant(observed))
    assert play(base)[OBSERVATION][0, 0].tolist() == [0, 1, 0, 3, 4, 1, 2]
    stored = base.rollout(3)
    assert torch.equal(
        merge_rollout(stored, AgentLayout.from_rollout(stored, num_actions={"a": 3}))[OBSERVATION][0, 0],
        play(base)[OBSERVATION][0, 0],
    )


def test_dicts_of_groups_may_differ() -> None:
    spaces = {"a_0": sp.Dict({"x": sp.Box(-9, 9, (2,)), "y": sp.Box(-9, 9, (2,))}), "b_0": sp.Box(-9, 9, (3,))}
    values = [{"x": np.float32([1, 2]), "y": np.float32([3, 4])}, np.float32([5, 6, 7])]
    data = play(grouped(spaces, lambda agent, step: values[agent]))
    assert data[OBSERVATION][0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]


def test_an_image_beside_other_entries_is_refused_with_a_way_out() -> None:
    base = grouped(sp.Dict({"RGB": sp.Box(0, 255, (20, 20, 3), np.uint8), "ready": sp.Box(0, 1, (1,))}))
    with pytest.raises(
        ValueError, match=r"'RGB'\)\] are images.*ExcludeTransform\(\*\[\('a', 'observation', 'ready'\)\]"
    ):
        MultiAgentEnv(base)
    alone = TransformedEnv(base, ExcludeTransform(*[("a", "observation", "ready")]))
    assert play(alone)[OBSERVATION].shape == (3, 2, 3, 64, 64)
    assert play(base, images="none")[OBSERVATION].shape == (3, 2, 1201)


def test_texts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected numbers under \('a', 'observation'\) for each of the agents"):
        MultiAgentEnv(grouped(sp.Text(3), constant("a")))


@pytest.mark.parametrize(
    ("space", "value", "expected"),
    [
        (sp.Discrete(4), 2, [0, 0, 1, 0]),
        (sp.MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0]),
        (sp.MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        (sp.Box(0, 100_000, (2,), np.int64), np.array([3, 99_999]), [3, 99_999]),
        (sp.Box(-1, 1, (2,), np.float64), np.array([0.5, -0.25]), [0.5, -0.25]),
        (sp.Box(0, 255, (2, 2), np.uint8), np.array([[0, 1], [254, 255]], np.uint8), [0, 1, 254, 255]),
        (sp.Box(0, 1, (2,), bool), np.array([True, False]), [1, 0]),
        (sp.Tuple((sp.Box(0, 9, (1,)), sp.Box(0, 9, (1,)))), (np.float32([1]), np.float32([2])), [1, 2]),
    ],
    ids=["discrete", "multi-discrete", "multi-binary", "int64", "float64", "bytes", "bool", "tuple"],
)
def test_other_spaces_are_vectors_of_their_values(space: sp.Space[Any], value: Any, expected: list[float]) -> None:
    data = play(grouped(space, constant(value)))
    assert data[OBSERVATION].dtype == torch.float32
    assert data[OBSERVATION][0].tolist() == [expected, expected]


# ---------------------------------------------------------------------- images


def shades(*values: float, side: int = 20, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    """An image ``[H, W, C]`` whose channels have a shade each."""
    return np.broadcast_to(np.array(values, dtype), (side, side, len(values))).copy()


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("values", [(30,), (30, 40), (30, 40, 50), (30, 40, 50, 60), tuple(range(12))], ids=len)
def test_every_channel_is_kept_in_order(values: tuple[int, ...], first: bool) -> None:
    image = shades(*values)
    image = image.transpose(2, 0, 1).copy() if first else image
    base = grouped(sp.Box(0, 255, image.shape, np.uint8), constant(image))
    data = play(base, image_size=32)
    assert data[OBSERVATION].shape == (3, 2, len(values), 32, 32) and data[OBSERVATION].dtype == torch.uint8
    assert data[NEXT_OBSERVATION].flatten(3).float().mean(-1)[-1, -1].tolist() == list(values)
    stored = base.rollout(3)
    live_layout = MultiAgentEnv(base, image_size=32).layout
    assert torch.equal(merge_rollout(stored, live_layout)[OBSERVATION], data[OBSERVATION])
    assert (
        AgentLayout.from_rollout(stored, num_actions={"a": 3}, image_size=32).observation_shape
        == live_layout.observation_shape
    )


def test_a_grey_image_without_channel_axis() -> None:
    gradient = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    data = play(grouped(sp.Box(0, 255, gradient.shape, np.uint8), constant(gradient)), image_size=16)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(gradient)[None, None], size=(16, 16), mode="bilinear", antialias=True
    )
    assert torch.equal(data[OBSERVATION][0, 0], wanted[0])


@pytest.mark.parametrize(
    "space",
    [
        sp.Box(0, 1, (10, 10, 5), bool),
        sp.Box(0, 255, (10, 10, 5), np.uint8),
        sp.Box(0, 1, (10, 10, 3), np.float32),
        sp.Box(0, 10, (7, 7, 3), np.uint8),
        sp.Box(0, 1, (19, 19, 17), bool),
        sp.Box(0, 10, (25, 25, 3), np.uint8),
        sp.Box(-np.inf, np.inf, (40, 18), np.float32),
    ],
    ids=str,
)
def test_grids_and_lists_are_vectors_in_their_own_units(space: sp.Box) -> None:
    value = space.sample()
    data = play(grouped(space, constant(value)))
    assert data[OBSERVATION].dtype == torch.float32
    np.testing.assert_array_equal(data[OBSERVATION][0, 0].numpy(), value.reshape(-1).astype(np.float32))


@pytest.mark.parametrize(
    ("low", "high", "values", "expected"),
    [
        (0, 1, (0.0, 0.2, 1.0), [0, 51, 255]),
        (-1, 1, (-1.0, 0.0, 1.0), [0, 128, 255]),
        (0, 255, (0.0, 51.0, 255.0), [0, 51, 255]),
    ],
)
def test_bounds_decide_the_scale_of_floats(
    low: float, high: float, values: tuple[float, ...], expected: list[int]
) -> None:
    space = sp.Box(low, high, (20, 20, 3), np.float32)
    data = play(grouped(space, constant(shades(*values, dtype=np.float32))))
    assert data[OBSERVATION].dtype == torch.uint8
    assert data[OBSERVATION][0, 0, :, 0, 0].tolist() == expected


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan])
def test_values_beyond_the_bounds_are_refused(value: float) -> None:
    env = MultiAgentEnv(grouped(sp.Box(0, 1, (20, 20, 3)), constant(shades(0, value, 1, dtype=np.float32))))
    with pytest.raises(ValueError, match=r"observed an image with values from .*, where its spec says 0 to 1"):
        env.reset()


def test_the_user_knows_better() -> None:
    wide = sp.Box(0, 255, (20, 20, 16), np.uint8)
    assert play(grouped(wide), images="channels_last")[OBSERVATION].shape == (3, 2, 16, 64, 64)
    assert play(grouped(wide), images="channels_first")[OBSERVATION].shape == (3, 2, 20, 64, 64)
    small = sp.Box(0, 10, (8, 8, 3), np.int64)
    observed = play(grouped(small, constant(shades(0, 2, 10, side=8, dtype=np.int64))), images="channels_last")
    assert observed[OBSERVATION][0, 0, :, 0, 0].tolist() == [0, 51, 255]
    picture = sp.Box(0, 255, (20, 20, 3), np.uint8)
    assert play(grouped(picture), images="none")[OBSERVATION].shape == (3, 2, 1200)


@pytest.mark.parametrize(
    ("space", "images", "message"),
    [
        (sp.Box(0, 255, (20, 20, 16), np.uint8), "auto", r"which axis holds .*images='channels_first'"),
        (sp.Box(0, 255, (20, 3, 20), np.uint8), "auto", r"which axis holds the channels cannot be told"),
        (sp.Box(0, 255, (4, 20, 20, 3), np.uint8), "auto", r"Stack frames along the channels"),
        (sp.Box(0, 255, (4, 20, 20, 3), np.uint8), "channels_last", r"Stack frames along the channels"),
        (sp.Box(-np.inf, np.inf, (64, 64, 3)), "auto", r"bounds \[-inf, inf\].*images='none'"),
        (sp.Box(-np.inf, np.inf, (64, 64, 3)), "channels_last", r"bounds \[-inf, inf\]"),
        (sp.Box(-1e9, 1e9, (64, 64, 3)), "auto", r"decide what is black and white"),
        (sp.Box(0, 1, (3,)), "first", r"images must be one of \['auto', 'channels_first'"),
        ({"a_0": sp.Box(0, 255, (20, 20, 3), np.uint8), "b_0": sp.Box(0, 1, (3,))}, "auto", r"'a_0': 3, 'b_0': None"),
        (
            {"a_0": sp.Box(0, 255, (20, 20, 3), np.uint8), "b_0": sp.Box(0, 255, (20, 20), np.uint8)},
            "auto",
            r"images of equally many channels.*'a_0': 3, 'b_0': 1",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(space: Any, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiAgentEnv(grouped(space), images=images)


def test_images_of_unequal_sizes_and_axes_come_to_one_form() -> None:
    spaces = {"a_0": sp.Box(0, 255, (20, 30, 3), np.uint8), "b_0": sp.Box(0, 1, (3, 25, 25))}
    values = [np.full((20, 30, 3), 51, np.uint8), np.full((3, 25, 25), 0.2, np.float32)]
    data = play(grouped(spaces, lambda agent, step: values[agent]))
    assert data[OBSERVATION].shape == (3, 2, 3, 64, 64) and (data[OBSERVATION] == 51).all()


def test_stored_images_that_the_layout_does_not_describe() -> None:
    stored = grouped(sp.Box(0, 1, (20, 20, 3))).rollout(3)
    with pytest.raises(ValueError, match=r"bounds \[-inf, inf\]"):
        AgentLayout.from_rollout(stored, num_actions={"a": 3})
    layout = MultiAgentEnv(grouped(sp.Box(0, 1, (20, 20, 3)))).layout
    with pytest.raises(ValueError, match="layout says uint8 images of 3 channels. Store observations as bytes"):
        merge_rollout(stored, layout)


def test_a_named_environment_takes_images() -> None:
    env = make_env("tests.envs.test_spaces:small_pictures", images="channels_last", image_size=16)
    assert env.layout.observation_shape == (3, 16, 16)


def small_pictures() -> EnvBase:
    return grouped(sp.Box(0, 255, (8, 8, 3), np.uint8))
