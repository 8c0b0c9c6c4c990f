"""Every kind of environment that docs/environments.md names, from its specs to a few updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import gymnasium.spaces as sp
import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs import TransformedEnv, check_env_specs

from examples.extending.meeting import Meeting
from examples.own_game import Corridor
from matwm_rl import presets
from matwm_rl.data import make_replay
from matwm_rl.envs import MultiAgentEnv, make_env, wrap_env
from matwm_rl.keys import ACTION_MASK, ALIVE, DONE, OBSERVATION, REWARD, TERMINATED, TRUNCATED
from matwm_rl.modules import WorldModel, WorldModelPolicy, make_actor, make_critic
from matwm_rl.training import Learner
from tests.envs.helpers import KAZ, assert_legal
from tests.envs.stand_ins import meltingpot, smac

STEPS = 40


class Fruit(gymnasium.Env):
    """Gymnasium, of two agents who see unlike things; one may not move in its second step, and leaves in its third."""

    observation_space = sp.Tuple((sp.Box(-9, 9, (2,)), sp.Dict({"seen": sp.Box(0, 1, (3,)), "kind": sp.Discrete(2)})))
    action_space = sp.Tuple((sp.Discrete(3, start=1), sp.Discrete(4)))
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, length: int = 5) -> None:
        self.length, self.render_mode = length, "rgb_array"

    def _observe(self) -> Any:
        return [self.np_random.uniform(-9, 9, 2).astype(np.float32), {"seen": np.ones(3, np.float32), "kind": 1}]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._observe(), {"action_mask": [np.ones(3, np.int8), np.ones(4, np.int8)]}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.time += 1
        masks = [np.ones(3, np.int8), np.array([1, *[self.time != 1] * 3], np.int8)]
        return self._observe(), 2.0, [False, self.time == 3], self.time == self.length, {"action_mask": masks}

    def render(self) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is true of an environment beyond what is true of all.

    Args:
        make: makes it.
        package: that has to be installed.
        groups: how many agents each of its groups has.
        counts: of actions, or of the numbers of an action.
        observation: of one agent.
        masks: whether it has masks of legal actions.
        deaths: whether agents die in ``STEPS`` random steps.
        varies: whether another seed gives another beginning.
    """

    make: Callable[[pytest.MonkeyPatch], Any]
    package: str = ""
    groups: list[int]
    counts: list[int]
    observation: tuple[int, ...]
    masks: bool = False
    deaths: bool = False
    varies: bool = True


def named(name: str, **kwargs: Any) -> Callable[[pytest.MonkeyPatch], Any]:
    return lambda monkeypatch: make_env(name, **kwargs)


def own(make: Callable[..., Any], **kwargs: Any) -> Callable[[pytest.MonkeyPatch], Any]:
    return lambda monkeypatch: wrap_env(make(**kwargs))


ROWS = {
    "mpe2": Row(
        make=named("mpe2/simple_speaker_listener_v4"), package="mpe2", groups=[1, 1], counts=[3, 5], observation=(11,)
    ),
    "butterfly": Row(
        make=named(KAZ, max_cycles=38),
        package="pymunk",
        groups=[2, 2],
        counts=[6] * 4,
        observation=(135,),
        varies=False,
    ),
    "sisl": Row(
        make=named("sisl/pursuit_v5", n_pursuers=3, n_evaders=2, max_cycles=15),
        package="pygame",
        groups=[3],
        counts=[5] * 3,
        observation=(147,),
    ),
    "sisl, continuous": Row(
        make=named("sisl/multiwalker_v9", n_walkers=2, max_cycles=15),
        package="Box2D",
        groups=[2],
        counts=[4] * 2,
        observation=(31,),
    ),
    "mpe2, continuous": Row(
        make=named("mpe2/simple_speaker_listener_v4", continuous_actions=True),
        package="mpe2",
        groups=[1, 1],
        counts=[3, 5],
        observation=(11,),
    ),
    "magent2": Row(
        make=named("magent2/combined_arms_v6", map_size=16, max_cycles=38),
        package="magent2",
        groups=[3, 3, 3, 3],
        counts=[9] * 3 + [25] * 3 + [9] * 3 + [25] * 3,
        observation=(1521,),
        deaths=True,
        varies=False,
    ),
    "vmas": Row(
        make=named("vmas/simple_tag", max_steps=15), package="vmas", groups=[3, 1], counts=[9] * 4, observation=(16,)
    ),
    "vmas, continuous": Row(
        make=named("vmas/balance", max_steps=15, continuous_actions=True),
        package="vmas",
        groups=[3],
        counts=[2] * 3,
        observation=(16,),
    ),
    "mamujoco": Row(
        make=named("mamujoco/HalfCheetah-2x3", max_episode_steps=15),
        package="gymnasium_robotics",
        groups=[2],
        counts=[3] * 2,
        observation=(12,),
    ),
    "rware": Row(
        make=named("rware/rware-tiny-2ag-v2", max_steps=15),
        package="rware",
        groups=[2],
        counts=[5] * 2,
        observation=(71,),
    ),
    "lbforaging": Row(
        make=named("lbforaging/Foraging-5x5-2p-1f-v3", max_episode_steps=15),
        package="lbforaging",
        groups=[2],
        counts=[6] * 2,
        observation=(9,),
    ),
    "SMACv2": Row(
        make=lambda monkeypatch: wrap_env(smac(monkeypatch)),
        groups=[3],
        counts=[9] * 3,
        observation=(10,),
        masks=True,
        deaths=True,
        varies=False,
    ),
    "MeltingPot": Row(
        make=lambda monkeypatch: wrap_env(meltingpot(monkeypatch), image_size=16),
        groups=[2],
        counts=[8] * 2,
        observation=(3, 16, 16),
        varies=False,
    ),
    "own PettingZoo": Row(make=own(Corridor), groups=[1, 1], counts=[3, 2], observation=(2,), masks=True),
    "own Gymnasium": Row(make=own(Fruit), groups=[1, 1], counts=[3, 4], observation=(5,), masks=True, deaths=True),
    "own TorchRL": Row(make=own(Meeting, num_envs=2), groups=[1, 1], counts=[5, 5], observation=(4,)),
}


def first_steps(env: MultiAgentEnv, seed: int) -> TensorDictBase:
    torch.manual_seed(0)  # of the actions
    env.set_seed(seed)
    return env.rollout(3)


def learn(env: MultiAgentEnv, data: TensorDictBase) -> None:
    """Make two updates of everything from these steps, and act with the result."""
    cfg = presets.tiny()
    world_model = WorldModel.from_env(env, cfg.world_model)
    actor, critic = (make(world_model, cfg.actor_critic) for make in (make_actor, make_critic))
    learner = Learner(world_model, actor, critic, cfg.learner)
    replay = make_replay(env.num_agents, cfg.replay, num_envs=max(1, env.batch_size.numel()), seed=0)
    replay.extend(data)
    for _ in range(2):
        metrics = learner.update_world_model(replay.sequences.sample())
        metrics.update(learner.update_agents(replay.starts.sample()))
        assert all(value.isfinite().all() for value in metrics.values())
    policy = WorldModelPolicy(world_model, actor, history_length=cfg.policy.history_length)
    assert_legal(TransformedEnv(env, policy.make_tensordict_primer()).rollout(3, policy))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_it_is_played_and_learnt_from(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    if row.package:
        pytest.importorskip(row.package, reason=f"{row.package} is not installed")
    env = row.make(monkeypatch)
    assert type(env) is MultiAgentEnv
    assert [len(agents) for agents in env.group_map.values()] == row.groups
    assert (env.action_counts, env.layout.observation_shape) == (row.counts, row.observation)
    assert env.layout.has_action_mask == row.masks
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be seeded")
        check_env_specs(env)
        seeded = [first_steps(env, seed)[OBSERVATION] for seed in (1, 1, 2)]
        torch.manual_seed(0)
        env.set_seed(0)
    assert torch.equal(seeded[0], seeded[1]) and torch.equal(seeded[0], seeded[2]) == (not row.varies)
    data = env.rollout(STEPS, break_when_any_done=False)
    assert data[OBSERVATION].dtype == (torch.uint8 if env.layout.is_image else torch.float32)
    assert data[REWARD].dtype == torch.float32 and data[REWARD].isfinite().all()
    assert_legal(data)
    alive = data[ALIVE]
    assert alive.all() == (not row.deaths)
    spared = int(env.layout.actions.has_probs)
    assert not data[OBSERVATION][~alive].any() and (data[ACTION_MASK][~alive].sum(-1) == spared).all()
    assert data[DONE].any() and torch.equal(data[DONE], data[TERMINATED] ^ data[TRUNCATED])
    learn(env, data)
