"""The table of keys in the documentation is what modules read and write.

Dimension letters: E environments, B sequences, T time, S starts, C context steps, H horizon.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.envs import EnvBase, Transform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from matwm_rl import keys
from matwm_rl.data import REPLAY_KEYS, ReplayConfig, add_agent_entries, make_replay
from matwm_rl.envs import ImaginationEnv, make_env
from matwm_rl.evaluation import CrossPlay, RandomActions, TagScript
from matwm_rl.modules import (
    ActorCriticConfig,
    Imagination,
    StateEstimator,
    WorldModelFeatures,
    WorldModelPolicy,
    make_actor,
    make_critic,
)
from matwm_rl.objectives import ActorLoss, CriticLoss, LambdaReturn, WorldModelLoss
from tests.helpers import LATENTS, make_model, mock_env, random_batch, random_imagined, randomize

PAGE = Path(__file__).resolve().parents[1] / "docs" / "keys.md"


SIZES = {"E": 2, "B": 2, "T": 8, "S": 4, "C+1": 3, "H": 5}
"""Of the batches that the pieces are called with."""
INNER = {
    "FocalSlices": "what make_replay's buffers do",
    "MockEnv": "has groups of its own, before they are merged",
    "MultiAgentEnv": "what make_env makes",
    "ParallelMultiAgentEnv": "what make_env makes",
    "SerialMultiAgentEnv": "what make_env makes",
    "TrainedPolicy": "a WorldModelPolicy",
}
"""Public modules, transforms and environments that have no row, and why."""
PLACES = ("agents", "next agents", "", "next", "history", "next history")
"""In what order a cell of the table names them."""


@dataclass
class Piece:
    """One row: what a user composes with, the keys that it says it has, and how to see whether they are true."""

    name: str
    batch: str
    in_keys: list[NestedKey]
    out_keys: list[NestedKey]
    run: Callable[[TensorDictBase], TensorDictBase] | None = None
    """``None``: an environment, whose keys are those of its specs, or a transform of one."""
    given: TensorDictBase | None = None
    """All that it could read, and more."""


def pieces(latent: str = "categorical", *, bare: bool = False) -> list[Piece]:
    """All rows: of modules that have all there is, or ``bare``: without action masks, logits, decoded observations."""
    torch.manual_seed(0)
    model = make_model(latent=latent, has_action_mask=not bare).eval()
    actor, critic = (randomize(make(model, ActorCriticConfig(num_cells=8))) for make in (make_actor, make_critic))
    acting = TensorDictModule(lambda mask: mask.int().argmax(-1), in_keys=[keys.ACTION_MASK], out_keys=[keys.ACTION])
    policy = WorldModelPolicy(model, acting if bare else actor, history_length=4)

    env, tag = mock_env(num_envs=SIZES["E"]), make_env("mpe2/simple_tag_v3", num_envs=SIZES["E"], seed=0)
    rollout = env.rollout(SIZES["T"], break_when_any_done=False)
    step = mock_env(num_envs=SIZES["E"]).append_transform(policy.make_tensordict_primer()).reset()
    focal, starts = random_batch(SIZES["B"], SIZES["T"]), random_batch(SIZES["S"], SIZES["C+1"])
    imagined = random_imagined(SIZES["S"], SIZES["H"], model=model)
    imagined.set(keys.ACTION_LOG_PROB, -torch.rand(SIZES["S"], SIZES["H"], 3))
    imagined.set(keys.SLOW_VALUE, torch.randn(SIZES["S"], SIZES["H"], 3, 1))
    added = [keys.TEAMMATE_ACTION, keys.TEAMMATE_ALIVE, keys.AGENT_DONE, keys.AGENT_TERMINATED]
    sampled = [*(key for key in REPLAY_KEYS if "agents" in key), *added, "index"]

    def store(td: TensorDictBase) -> TensorDictBase:
        sizes = {"sequence_length": SIZES["T"], "sequences": 3, "starts_per_agent": SIZES["S"]}
        config = ReplayConfig(context_length=SIZES["C+1"] - 1, **sizes)
        replay = make_replay(3, config, num_envs=SIZES["E"], seed=0)
        replay.extend(td)
        return replay.starts.sample()

    def module(name: str, batch: str, module: TensorDictModuleBase, given: TensorDictBase) -> Piece:
        return Piece(name, batch, list(module.in_keys), list(module.out_keys), module, given)

    def environment(name: str, batch: str, env: EnvBase) -> Piece:
        after = (*env.reward_keys, *env.done_keys)
        following: list[NestedKey] = [("next", *((key,) if isinstance(key, str) else key)) for key in after]
        return Piece(name, batch, list(env.action_keys), [*env.observation_keys, *following])

    features = WorldModelFeatures(model, history_length=4)
    dreams = ImaginationEnv(model, lambda: starts, max_steps=3, decode=not bare)
    critic_loss = CriticLoss(critic)
    SoftUpdate(critic_loss, eps=0.98)  # TorchRL warns of a loss that has none
    focal_reads = [keys.ACTION, keys.ALIVE, keys.NEXT_ALIVE, keys.AGENT_TRUNCATED, keys.DONE, keys.TERMINATED]
    stored = [*REPLAY_KEYS, keys.AGENT_TRUNCATED]
    return [
        environment("envs.make_env", "[*E]", env),
        module("modules.WorldModelPolicy", "[*E]", policy, step),
        Piece("data.make_replay", "[E, T] → [B, T], [S, C+1]", stored, sampled, store, rollout),
        Piece("data.add_agent_entries", "[*]", focal_reads, added, add_agent_entries, rollout),
        module("modules.WorldModel", "[*B, T]", model, focal),
        module("objectives.WorldModelLoss", "[*B, T]", WorldModelLoss(model), focal),
        module("modules.Imagination", "[*S, C+1] → [*S, H]", Imagination(model, actor, horizon=SIZES["H"]), starts),
        module("modules.make_actor", "[*]", actor, imagined),
        module("modules.make_critic", "[*]", critic, imagined),
        module("objectives.LambdaReturn", "[*S, H]", LambdaReturn(critic), imagined),
        module("objectives.ActorLoss", "[*S, H]", ActorLoss(actor, num_agents=3).eval(), imagined),
        module("objectives.CriticLoss", "[*S, H]", critic_loss, imagined),
        environment("envs.ImaginationEnv", "[S]", dreams),
        module("modules.StateEstimator", "[*E]", StateEstimator(model, history_length=4), step),
        Piece("modules.WorldModelFeatures", "[*E]", list(features.in_keys), list(features.out_keys)),
        module("evaluation.RandomActions", "[*E]", RandomActions(), step),
        module("evaluation.TagScript", "[*E]", TagScript(tag.layout), tag.reset()),
        module("evaluation.CrossPlay", "[*E]", CrossPlay(policy, RandomActions(), env.layout, ["hunter"]), step),
    ]


def leaves(td: TensorDictBase) -> set[NestedKey]:
    return set(td.keys(include_nested=True, leaves_only=True))


def called(piece: Piece, given: Iterable[NestedKey]) -> TensorDictBase:
    """What a module returns, of some of the entries that it could read."""
    assert piece.run is not None and piece.given is not None
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        return piece.run(piece.given.select(*given).clone())


def optional(piece: Piece) -> set[NestedKey]:
    """Those of its ``in_keys`` without which a module does not complain."""
    found = set()
    for key in piece.in_keys if piece.run else ():
        try:
            called(piece, [other for other in piece.in_keys if other != key])
        except (KeyError, ValueError):  # the latter by TorchRL's masked distribution, without its mask
            continue
        found.add(key)
    return found


def conditional(piece: Piece) -> set[NestedKey]:
    """Those of its ``out_keys`` that it does not write where what is optional is missing."""
    if piece.run is None:
        return set()
    return set(piece.out_keys) - leaves(called(piece, set(piece.in_keys) - optional(piece)))


def cell(entries: Iterable[NestedKey], maybe: set[NestedKey]) -> str:
    """Keys by the place where they are: ``agents: latent, hidden``."""
    places: dict[str, list[str]] = {place: [] for place in PLACES}
    for key in entries:
        *place, name = (key,) if isinstance(key, str) else key
        places[" ".join(place)].append(name + "?" * (key in maybe))
    lines = (f"{place}: {', '.join(names)}" if place else ", ".join(names) for place, names in places.items() if names)
    return "; ".join(f"`{line}`" for line in lines)


def table() -> str:
    lines = ["| piece | batch | `in_keys` | `out_keys` |", "|---|---|---|---|"]
    for piece, bare in zip(pieces(), pieces(bare=True), strict=True):
        reads = cell(piece.in_keys, optional(piece) | set(piece.in_keys) - set(bare.in_keys))
        writes = cell(piece.out_keys, conditional(piece) | set(piece.out_keys) - set(bare.out_keys))
        lines.append(f"| `{piece.name}` | `{piece.batch}` | {reads} | {writes} |")
    return "\n".join(lines)


def test_table_of_keys_is_what_modules_read_and_write() -> None:
    printed = "\n".join(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    expected = table()
    assert printed == expected, f"docs/keys.md should have this table:\n\n{expected}\n"


@pytest.mark.parametrize("room", ["data", "envs", "evaluation", "modules", "objectives", "training"])
def test_table_of_keys_is_complete(room: str) -> None:
    public = {name: value for name, value in vars(importlib.import_module(f"matwm_rl.{room}")).items()}
    kinds = (TensorDictModuleBase, Transform, EnvBase)
    have_keys = {n for n in public["__all__"] if inspect.isclass(public[n]) and issubclass(public[n], kinds)}
    listed = {piece.name.rpartition(".")[2] for piece in pieces() if piece.name.startswith(f"{room}.")}
    assert have_keys - listed <= set(INNER), "these need a row in docs/keys.md: add them to `pieces` above"
    assert listed <= set(public["__all__"]) - set(INNER)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("latent", LATENTS)
def test_nothing_but_in_keys_is_read_and_just_out_keys_are_written(latent: str, bare: bool) -> None:
    for piece in pieces(latent, bare=bare):
        if piece.run is None or piece.given is None:
            continue
        enough = called(piece, piece.in_keys)
        # Some add to what they are given, the others return something new.
        added_to = set(piece.in_keys) <= leaves(enough)
        assert leaves(enough) - set(piece.in_keys if added_to else ()) == set(piece.out_keys), piece.name
        assert len(set(piece.in_keys)) == len(piece.in_keys), piece.name
        assert len(set(piece.out_keys)) == len(piece.out_keys), piece.name
        everything = called(piece, leaves(piece.given))
        for key in piece.out_keys:
            assert torch.equal(everything[key], enough[key]), f"{piece.name} reads more than its in_keys for {key}"


def test_batches_are_of_the_dimensions_that_the_table_names() -> None:
    for piece in pieces():
        named = [part.replace("*", "").split(", ") for part in re.findall(r"\[(.*?)\]", piece.batch)]
        if piece.run is None or piece.given is None or named == [[""]]:
            continue
        returned = called(piece, piece.in_keys)
        assert list(piece.given.shape) == [SIZES[letter] for letter in named[0]], piece.name
        # What losses return has no batch dimensions.
        shape = [] if piece.name.endswith("Loss") else [SIZES[letter] for letter in named[-1]]
        assert list(returned.shape) == shape, piece.name


def test_features_are_what_the_transform_adds_to_an_environment() -> None:
    features = WorldModelFeatures(make_model().eval(), history_length=4)
    env = mock_env().append_transform(features)
    assert set(env.observation_keys) - set(mock_env().observation_keys) == set(features.out_keys)
    rollout = env.rollout(2)
    assert set(features.out_keys) <= leaves(rollout) & leaves(rollout["next"])


@pytest.mark.parametrize("name", ["envs.make_env", "envs.ImaginationEnv"])
def test_environments_give_the_keys_of_their_specs(name: str) -> None:
    (piece,) = (piece for piece in pieces() if piece.name == name)
    starts = random_batch(SIZES["S"], SIZES["C+1"])
    env = (
        mock_env()
        if name == "envs.make_env"
        else ImaginationEnv(make_model(), lambda: starts, max_steps=3, decode=True)
    )
    rollout = env.rollout(2)
    first = {key for key in piece.out_keys if key[0] != "next"}
    dones: set[NestedKey] = {"done", "terminated", "truncated"}
    assert leaves(rollout.exclude("next")) == first | dones | set(piece.in_keys)
    assert leaves(rollout["next"]) == first | {
        key[1:] if len(key) > 2 else key[1] for key in piece.out_keys[len(first) :]
    }
