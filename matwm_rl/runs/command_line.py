"""The command line of training scripts: overrides of settings, checked before anything begins; help; sweeps."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from matwm_rl import presets
from matwm_rl.envs.registry import families
from matwm_rl.files import import_optional

MULTIRUN = ("-m", "--multirun")
SWEEP_FOLDER = "hydra.sweep.dir"
JOBLIB = "hydra/launcher=joblib"
HELP = """Train MATWM on a multi-agent environment.

    python {script} env=mpe2/simple_spread_v3 total_steps=10000 seed=3
    python {script} env=mpe2/simple_tag_v3 env_kwargs.max_cycles=50     # arguments of the environment
    python {script} env=my_package.my_module:make_my_env               # an environment of your own
    python {script} preset=paper device=cuda                           # the paper's sizes
    python {script} -m seed=0,1,2                     # a run for each, a table and a picture over seeds
    python {script} -m seed=0,1,2 hydra/launcher=joblib     # at the same time, as many as there are cores for
    python {script} run_dir=FOLDER resume=true         # go on after Ctrl-C, with the same other settings
    python {script} --cfg job                          # all settings with their values

Environments, env=NAME
{environments}
Presets, preset=NAME
{presets}
Results are in run_dir, by default runs/ENVIRONMENT-seedSEED-TIME: summary.json (returns, settings), metrics.csv,
TensorBoard events, learning_curves.png, episodes.gif, imagination.png, policy.pt, and a checkpoint to go on from.
"""


def _help() -> str:
    """Return the template of the help, with the families of environments and the presets that there are."""
    environments = [*(f"{name}/TASK" if name != "mock" else name for name in families), "package.module:factory"]
    summaries = {name: (preset.__doc__ or "").strip().partition("\n")[0] for name, preset in presets.PRESETS.items()}
    return HELP.format(
        script=os.path.relpath(sys.argv[0]),
        environments="".join(f"    {name}\n" for name in environments),
        presets="".join(f"    {name:<10}{re.sub('^Return ', '', text)}\n" for name, text in summaries.items()),
    )


def command_line(arguments: Sequence[str]) -> list[str]:
    """Return a command line as Hydra needs it, once it has been checked; print what is wrong and exit otherwise.

    The configuration ``"train"`` is registered with Hydra, with presets, a help text, and a summary of every sweep.
    Where there is a GPU and no device is given, it is ``cuda``. The runs of a sweep (``-m``) are put into one folder:
    ``run_dir`` if it is given. Each has a folder there that is named after what differs between the runs, so that
    ``resume=true`` finds it again. With ``hydra/launcher=joblib``, as many runs go on at the same time as there are
    cores for, with ``num_threads`` each, unless ``hydra.launcher.n_jobs`` is given.

    Args:
        arguments: of the script, without its name.

    Raises:
        SystemExit: if there is no such setting, or its value is refused; the message names what is allowed.

    Examples:
        >>> command_line(["preset=tiny", "env_kwargs.episode_length=3"])
        ['preset=tiny', '++env_kwargs.episode_length=3']
        >>> command_line(["preset=tiny", "-m", "seed=0,1", "run_dir=runs/mine"])[-2:]
        ["hydra.sweep.dir='runs/mine'", "hydra.sweep.subdir='seed=${last_part:${seed}}'"]
        >>> command_line(["learner.gama=0.9"])
        Traceback (most recent call last):
        SystemExit: there is no entry 'learner.gama'; near ones are learner.gamma...
    """
    words = [presets.open_override(word) for word in arguments]
    given = {word.lstrip("+~").partition("=")[0] for word in words}
    if torch.cuda.is_available() and "device" not in given:
        words.append("device=cuda")
    overrides = [word for word in words if "=" in word and not word.lstrip("+~").startswith(("-", "hydra"))]
    try:
        swept, first = _first_of_sweep(overrides)
        cfg = presets.compose(first)
    except (TypeError, ValueError, import_optional("hydra.errors").HydraException) as error:
        raise SystemExit(str(error)) from None
    if given & set(MULTIRUN) and SWEEP_FOLDER not in given:
        if "run_dir" in swept:
            raise SystemExit("run_dir is the folder of the whole sweep: give one, or none")
        name = "" if "env" in swept else re.split("[/:]", cfg.env)[-1] + "-"
        folder = cfg.run_dir if "run_dir" in given else f"runs/{name}sweep-{datetime.now():%Y-%m-%d_%H-%M-%S}"
        values = {name: f"hydra.runtime.choices.{name}" if name == "preset" else name for name in swept}
        differs = ",".join(f"{name}=${{last_part:${{{value}}}}}" for name, value in values.items()) or "run"
        words += [f"{SWEEP_FOLDER}='{folder}'", f"hydra.sweep.subdir='{differs}'"]
    if JOBLIB in words and "hydra.launcher.n_jobs" not in given:
        cores = import_optional("joblib").cpu_count()
        words.append(f"hydra.launcher.n_jobs={max(1, cores // cfg.num_threads)}")
    callback = {"_target_": "matwm_rl.runs.sweep.make_callback"}
    presets.store(help={"template": _help()}, callbacks={"summarize_sweep": callback})
    return words


def _first_of_sweep(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the settings that differ between the runs of a sweep, and the overrides of its first run."""
    parser = import_optional("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    parsed = parser.parse_overrides(list(overrides))
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    first = [
        f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in parsed
    ]
    return swept, first


def to_config(composed: Any) -> presets.TrainConfig:
    """Turn what Hydra has composed into the settings of a run, see :func:`matwm_rl.presets.to_config`.

    In a sweep, ``run_dir`` is the folder that :func:`command_line` has chosen for this run.

    Args:
        composed: what ``hydra.main`` gives to its function.

    Examples:
        >>> from dataclasses import replace
        >>> from omegaconf import OmegaConf
        >>> to_config(OmegaConf.structured(replace(presets.tiny(), run_dir="runs/mine"))).run_dir
        'runs/mine'
    """
    cfg = presets.to_config(composed)
    hydra = import_optional("hydra.core.hydra_config").HydraConfig
    if hydra.initialized() and hydra.get().mode == import_optional("hydra.types").RunMode.MULTIRUN:
        folder = Path(hydra.get().runtime.output_dir)
        here = Path.cwd()
        return replace(cfg, run_dir=str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
    return cfg


def this_command() -> str:
    """Return the command line of this process without the folder of the run."""
    words = [word for word in sys.argv[1:] if not word.startswith(("run_dir=", "hydra.sweep."))]
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *words])


def resume_command(run_dir: Path) -> str:
    """Return the command line of this process, with what makes it go on in a folder."""
    words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.")]
    given = [word for word in words if word.partition("=")[0] not in ("run_dir", "resume")]
    folder = run_dir.parent if set(MULTIRUN) & set(words) else run_dir
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *given, f"run_dir={folder}", "resume=true"])
