"""An exported policy decides what the policy decides, over whole episodes, in any number of environments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch.export import ExportedProgram
from torchrl.envs.utils import ExplorationType, set_exploration_type

from matwm_rl import keys, presets
from matwm_rl.envs import make_env
from matwm_rl.modules import GaussianLatentConfig, WorldModel, make_actor
from matwm_rl.training import PolicyCard, TrainedPolicy, export_policy
from matwm_rl.training.export import OUTPUTS, trace
from tests.helpers import randomize

pytest.importorskip("onnxscript", reason='needs pip install "matwm_rl[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "matwm_rl[onnx]"')

from examples.numpy_policy import NumpyPolicy  # noqa: E402 - it imports onnxruntime

ROOT = Path(__file__).parents[2]
HISTORY = {"code": "history_code", "action": "history_action", "length": "history_length"}


@dataclass
class Exported:
    policy: TrainedPolicy
    program: ExportedProgram
    path: Path


def make_policy(name: str) -> TrainedPolicy:
    """The networks of the presets ``vectors`` and ``tiny`` (the paper's kind), small, with random weights."""
    if name == "vectors":
        cfg, env = presets.vectors(), "mpe2/simple_spread_v3"
        sizes = {"hidden_size": 32, "teammate_hidden_size": 16}
        cfg.world_model = replace(cfg.world_model, **sizes, latent=GaussianLatentConfig(num_dims=24))
        cfg.actor_critic = replace(cfg.actor_critic, num_cells=16)
    else:
        cfg, env = presets.tiny(), "mock"
    torch.manual_seed(0)
    model = randomize(WorldModel.from_env(make_env(env), cfg.world_model), 0.05)
    actor, card = randomize(make_actor(model, cfg.actor_critic)), PolicyCard(env=env)
    return TrainedPolicy(model, actor, history_length=4, card=card).eval()


@pytest.fixture(scope="module", params=["vectors", "tiny"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    policy = make_policy(request.param)
    path = tmp_path_factory.mktemp(request.param) / "policy.onnx"
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    program = trace(policy)
    with patch("matwm_rl.training.export.trace", return_value=program):  # seconds
        export_policy(policy, path)
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    yield Exported(policy, program, path)


def play(
    exported: Exported, steps: int
) -> Iterator[tuple[TensorDictBase, dict[str, torch.Tensor], list[torch.Tensor]]]:
    """Play with actions that the exported policy draws; yield what the policy says at every step, and the exported one.

    Each carries its own history, over several episodes of two environments.
    """
    policy, decide = exported.policy, exported.program.module()
    player, mirror = NumpyPolicy(exported.path, seed=5), np.random.default_rng(5)
    env = policy.make_env(seed=0, num_envs=2)
    assert env.batch_size == (2,)
    inputs, tensordict = player.reset(2), env.reset()
    for _ in range(steps):
        for name in ("observation", "action_mask", "alive"):
            inputs[name] = tensordict["agents", name].numpy()
        if "noise" in inputs:
            inputs["noise"] = mirror.random(inputs["noise"].shape, np.float32)  # as player.act will
        uniform = torch.as_tensor(inputs.get("noise", np.zeros(()))).movedim(-2, 0) if "noise" in inputs else None
        with (
            set_exploration_type(ExplorationType.DETERMINISTIC),
            patch("torch.rand_like", side_effect=lambda _, noise=uniform: noise.unsqueeze(-1)),
        ):
            tensordict = policy(tensordict)
        expected = {
            "logits": tensordict[keys.LOGITS].masked_fill(~tensordict[keys.ACTION_MASK], -torch.inf),
            "action": tensordict[keys.ACTION],
            **{f"next_{new}": tensordict["next", "history", old] for old, new in HISTORY.items()},
        }
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
        given = [[outputs[name] for name in OUTPUTS] for outputs in (decide(**tensors),)]
        given.append([torch.as_tensor(value) for value in player.session.run(list(OUTPUTS), inputs)])
        yield tensordict, expected, given
        drawn = torch.as_tensor(player.act(inputs))
        mirror.gumbel(size=expected["logits"].shape)
        tensordict[keys.ACTION] = tensordict["next", "history", "action"][..., -1] = drawn
        step, tensordict = env.step_and_maybe_reset(tensordict)
        for name in HISTORY.values():
            inputs[name][step["next", "done"].squeeze(-1).numpy()] = 0


def test_it_decides_as_the_policy_over_whole_episodes(exported: Exported) -> None:
    ends, dead, most = 0, 0, 0
    for tensordict, expected, given in play(exported, steps=30):
        for outputs in given:
            for name, value in zip(OUTPUTS, outputs, strict=True):
                tolerance = 0 if value.dtype == torch.int64 else 1e-5
                torch.testing.assert_close(
                    value, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
                )
        ends += int((expected["next_history_length"] == 1).any())
        dead += int((~tensordict[keys.ALIVE]).any())
        most = max(most, int(expected["next_history_length"].max()))
    assert ends >= 2, "episodes must have begun anew"
    assert most == exported.policy.history_length, "the history must have been full"
    assert dead or exported.policy.card.env != "mock", "agents must have died"


def test_the_file_tells_what_it_takes_and_whose_it_is(exported: Exported) -> None:
    session = onnxruntime.InferenceSession(exported.path)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    model = exported.policy.world_model
    assert shapes["observation"] == ["batch", model.num_agents, *model.observation_shape]
    assert ("noise" in shapes) == (exported.policy.card.env == "mock"), "where latents are drawn"
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["layout"]) == model.recipe[0].to_dict()
    assert json.loads(metadata["card"])["env"] == exported.policy.card.env
    assert str(ROOT).encode() not in exported.path.read_bytes(), "paths of the machine that wrote it"


@pytest.mark.parametrize("exported", ["tiny"], indirect=True)
def test_pt2_is_the_same_program(exported: Exported, tmp_path: Path) -> None:
    with patch("matwm_rl.training.export.trace", return_value=exported.program):
        export_policy(exported.policy, tmp_path / "policy.pt2")
    files = {"card.json": ""}
    loaded = torch.export.load(tmp_path / "policy.pt2", extra_files=files)
    assert json.loads(files["card.json"])["env"] == exported.policy.card.env
    inputs = {name: torch.as_tensor(value) for name, value in NumpyPolicy(exported.path).reset(3).items()}
    inputs["action_mask"] |= True
    for name, value in loaded.module()(**inputs).items():
        assert torch.equal(value, exported.program.module()(**inputs)[name])


@pytest.mark.parametrize("exported", ["vectors"], indirect=True)
def test_the_example_needs_no_pytorch(exported: Exported) -> None:
    script = "import sys; sys.modules['torch'] = None; from examples.numpy_policy import main; "
    script += f"main({str(exported.path)!r}, episodes=2)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("mean return of 2 episodes: -")


def test_other_suffixes_and_missing_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("tiny")
    with pytest.raises(ValueError, match=r"exported as 'NAME.onnx' or 'NAME.pt2', got '.*policy\.pt'"):
        export_policy(policy, tmp_path / "policy.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'needs the package .onnxscript.: pip install "matwm_rl\[onnx\]"'):
        export_policy(policy, tmp_path / "policy.onnx")
    policy.actor = TensorDictModule(lambda latent: latent[..., 0].long(), [keys.LATENT], [keys.ACTION])
    with pytest.raises(ValueError, match="only actors of make_actor are saved and exported"):
        export_policy(policy, tmp_path / "policy.pt2")
    assert not list(tmp_path.iterdir())
