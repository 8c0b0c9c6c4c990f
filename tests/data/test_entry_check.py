"""What replay refuses, by name of the entry and place, and that it then is as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict

from matwm_rl import keys
from matwm_rl.data import Replay, ReplayConfig, make_replay
from tests.data.test_layouts import rollout

NAN, INF = math.nan, math.inf
N = 2
Change = Callable[[TensorDict], object]


def batch(steps: int = 8, features: int = 3) -> TensorDict:
    td = rollout(1, steps, num_agents=N, features=features)
    td[keys.ACTION] = torch.ones(1, steps, N, dtype=torch.int64)
    td[keys.ACTION_MASK] = torch.tensor([True, True, False]).expand(1, steps, N, 3).clone()
    td[keys.ALIVE] = torch.ones(1, steps, N, dtype=torch.bool)
    return td


def replay_of_one_batch() -> Replay:
    replay = make_replay(N, ReplayConfig(capacity=60, sequences=2, sequence_length=4, starts_per_agent=1), seed=0)
    replay.extend(batch())
    return replay


def put(key: object, number: float, *index: int) -> Change:
    def change(td: TensorDict) -> None:
        td[key][index] = number

    return change


def convert(key: object, dtype: torch.dtype) -> Change:
    return lambda td: td.set(key, td[key].to(dtype))


def reshape(key: object, *shape: int) -> Change:
    def change(td: TensorDict) -> None:
        for agents in (td["agents"], td["next", "agents"], td["next"]):
            agents.batch_size = [1, 8]
        td[key] = td[key].reshape(shape)

    return change


PLACE = "of agent 1 in step 5 of environment 0"
CASES: dict[str, tuple[Change, str]] = {
    "nan reward": (put(keys.REWARD, NAN, 0, 5, 1), f"got nan in .*'reward'.* {PLACE}"),
    "inf reward": (put(keys.REWARD, INF, 0, 5, 1), f"got inf in .*'reward'.* {PLACE}"),
    "-inf observation": (put(keys.OBSERVATION, -INF, 0, 5, 1), f"got -inf in .*'observation'.* {PLACE}"),
    "nan next observation": (
        put(keys.NEXT_OBSERVATION, NAN, 0, 5, 1, 2),
        f"got nan in .*'next'.*observation'.* {PLACE}",
    ),
    "action 99": (put(keys.ACTION, 99, 0, 5, 1), f"action 99 {PLACE}.*expected 0 to 2"),
    "action -1": (put(keys.ACTION, -1, 0, 5, 1), f"action -1 {PLACE}.*expected 0 to 2"),
    "illegal action": (put(keys.ACTION, 2, 0, 5, 1), rf"action 2 {PLACE}.* allows \[0, 1\]"),
    "no legal action": (put(keys.ACTION_MASK, False, 0, 5, 1), f"{PLACE}.*allows no action, though it is alive"),
    "float action": (
        convert(keys.ACTION, torch.float32),
        r"'action'\) of torch.float32; expected indices of torch.int64",
    ),
    "int32 action": (convert(keys.ACTION, torch.int32), "of torch.int32; expected indices of torch.int64"),
    "bool action": (convert(keys.ACTION, torch.bool), "of torch.bool; expected indices of torch.int64"),
    "uint8 alive": (convert(keys.ALIVE, torch.uint8), r"'alive'\) as torch.bool, found torch.uint8"),
    "float mask": (convert(keys.ACTION_MASK, torch.float32), "'action_mask'.*as torch.bool, found torch.float32"),
    "int done": (convert(keys.DONE, torch.int64), "'done'.* as torch.bool, found torch.int64"),
    "int terminated": (convert(keys.TERMINATED, torch.int8), "'terminated'.* as torch.bool, found torch.int8"),
    "int reward": (convert(keys.REWARD, torch.int64), "'reward'.* as torch.float32, found torch.int64"),
    "int observation": (
        convert(keys.OBSERVATION, torch.int64),
        "'observation'.* of torch.int64; expected floating-point",
    ),
    "next float64": (
        convert(keys.NEXT_OBSERVATION, torch.float64),
        "float64; expected torch.float32, as the observation",
    ),
    "flat reward": (reshape(keys.REWARD, 1, 8, N), r"'reward'\) of shape \[1, 8, 2, 1\], found \[1, 8, 2\]"),
    "alive of a column": (reshape(keys.ALIVE, 1, 8, N, 1), r"'alive'\) of shape \[1, 8, 2\], found \[1, 8, 2, 1\]"),
    "flat done": (reshape(keys.DONE, 1, 8), r"'done'\) of shape \[1, 8, 1\], found \[1, 8\]"),
    "narrow next": (
        lambda td: td.set(keys.NEXT_OBSERVATION, td[keys.NEXT_OBSERVATION][..., :2]),
        r"of shape \[1, 8, 2, 3\], found \[1, 8, 2, 2\]; as the observation before",
    ),
    "terminated, not done": (
        lambda td: td[keys.DONE].zero_(),
        "'terminated'.* without .*'done'.*in step 0 of environment 0",
    ),
}


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("name", CASES)
def test_refused_before_anything_is_stored(name: str, is_first: bool) -> None:
    change, message = CASES[name]
    replay = replay_of_one_batch()
    if is_first:
        replay = make_replay(N, ReplayConfig(capacity=60, sequences=2, sequence_length=4, starts_per_agent=1), seed=0)
    before = replay.sequences.storage[:].clone() if len(replay) else None
    td = batch()
    change(td)
    # Of types and sizes a second batch may also be told that it is unlike the first.
    with pytest.raises((TypeError, ValueError), match=message if is_first else f"{message}|replay holds"):
        replay.extend(td)
    assert len(replay) == replay.env_steps == (0 if is_first else 8)
    assert before is None or (replay.sequences.storage[:] == before).all()
    replay.extend(batch())
    assert len(replay) == (8 if is_first else 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda td: batch(features=4),
            r"holds .*'observation'\) of \[3\] torch.float32 per agent, got \[4\] torch.float32",
        ),
        (
            lambda td: td.set(keys.REWARD, td[keys.REWARD].double()),
            r"holds .*'reward'\) of \[1\] .*float32.* got \[1\] .*float64",
        ),
        (
            lambda td: td.set(keys.ACTION_MASK, torch.ones(1, 8, N, 5, dtype=torch.bool)),
            r"'action_mask'\) of \[3\] torch.bool per agent, got \[5\]",
        ),
        (
            lambda td: td.set(keys.OBSERVATION, td[keys.OBSERVATION].to(torch.uint8)),
            r"torch.float32 per agent, got \[3\] torch.uint8",
        ),
    ],
    ids=["width", "dtype", "mask", "images"],
)
def test_a_second_batch_must_be_like_the_first(change: Change, message: str) -> None:
    replay = replay_of_one_batch()
    td = change(batch())
    with pytest.raises((TypeError, ValueError), match=message):
        replay.extend(td)
    assert len(replay) == 8


def test_after_loading_too(tmp_path) -> None:
    replay_of_one_batch().dumps(tmp_path)
    replay = make_replay(N, ReplayConfig(capacity=60, sequences=2, sequence_length=4, starts_per_agent=1), seed=0)
    replay.loads(tmp_path)
    with pytest.raises(
        ValueError, match=r"got \[4\] torch.float32. What is stored in one replay must be of one layout"
    ):
        replay.extend(batch(features=4))


def test_what_is_unusual_and_right_is_stored() -> None:
    replay = make_replay(N, ReplayConfig(capacity=60, sequences=2, sequence_length=4, starts_per_agent=1), seed=0)
    td = batch()
    # A dead agent's action need not be legal, and huge numbers are numbers.
    td[keys.ALIVE][0, 3, 1], td[keys.ACTION][0, 3, 1], td[keys.REWARD][0, 3, 1] = False, 2, 3e38
    td[keys.OBSERVATION] = td[keys.OBSERVATION].to(torch.uint8)
    td[keys.NEXT_OBSERVATION] = td[keys.NEXT_OBSERVATION].to(torch.uint8)
    replay.extend(td)
    assert len(replay) == 8


def test_a_buffer_that_a_collector_writes_to_checks_as_well() -> None:
    replay, td = replay_of_one_batch(), batch()
    td[keys.REWARD][0, 0, 0] = NAN
    with pytest.raises(ValueError, match="got nan in .*'reward'.* of agent 0 in step 0"):
        replay.sequences.extend(td)
