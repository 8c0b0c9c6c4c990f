"""Check the built package: all files of the repository and no others, and a wheel that works outside of it.

    python .ci/check_package.py FOLDER    # of a wheel and a source distribution

The wheel is unpacked beside nothing else and imported from there; what it depends on is that of this environment.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the repository alone, and what the build adds.
LEFT_OUT = (".github/", ".gitignore", ".pre-commit-config.yaml")
BUILT = ("PKG-INFO", "setup.cfg", "matwm_rl.egg-info/")

SMOKE = """
import importlib, pkgutil, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
import matwm_rl as mw
assert mw.__file__.startswith(folder), mw.__file__
for found in pkgutil.walk_packages(mw.__path__, "matwm_rl."):
    importlib.import_module(found.name)
env = mw.make_env("mock", seed=0)
world_model = mw.WorldModel.from_env(env, mw.presets.tiny().world_model)
policy = mw.WorldModelPolicy(world_model, mw.make_actor(world_model), history_length=4)
print(env.append_transform(policy.make_tensordict_primer()).rollout(3, policy)["agents", "action"].shape)
"""


def tracked() -> set[str]:
    """Return the files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def compare(what: str, found: set[str], expected: set[str]) -> None:
    """End with the files that are missing, and those that nobody expected."""
    if found != expected:
        sys.exit(f"{what} lacks {sorted(expected - found)} and has besides {sorted(found - expected)}")


def main(folder: Path) -> None:
    """Check the one wheel and the one source distribution in a folder."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    files = tracked()
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if not name.startswith(BUILT)}
    compare(source.name, names, {name for name in files if not name.startswith(LEFT_OUT)})
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        compare(wheel.name, names, {name for name in files if name.startswith("matwm_rl/")})
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist()), "no licence"
    with tempfile.TemporaryDirectory() as target:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            target,
            str(wheel),
        ]
        subprocess.run(install, check=True)
        subprocess.run([sys.executable, "-I", "-c", SMOKE, target], cwd=target, check=True)
    print(f"{wheel.name} and {source.name} are whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
