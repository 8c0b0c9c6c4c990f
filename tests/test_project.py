"""The project's own files agree with each other: README, .ci/run, pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


def readme_commands() -> list[str]:
    """Return README's lines that set up an environment: one runs the default example, one the tests."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("python3 -m venv ")]


def ci_test_command() -> str:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    (command,) = re.findall(r"^test_command='(.+)'$", script, flags=re.MULTILINE)
    return command


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert ci_test_command() in readme_commands()
    assert ci_test_command().endswith("-m pytest -n 2")


def test_the_commands_of_the_readme_stand_on_their_own() -> None:
    commands = readme_commands()
    assert len(commands) == 2, commands
    for command in commands:
        environment, install, run = command.split(" && ")
        python_bin = environment.removeprefix("python3 -m venv ") + "/bin/"
        assert install.startswith(f"{python_bin}pip install -c constraints.txt -e ")
        assert run.startswith(f"{python_bin}python ")
        (wanted,) = re.findall(r'-e "\.\[([a-z,]+)\]"$', install)
        assert set(wanted.split(",")) <= set(EXTRAS), command
        for script in re.findall(r"\S+\.py\b", run):
            assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("group", ["dependencies", *EXTRAS])
def test_every_dependency_is_pinned_within_its_range(group: str) -> None:
    listed = PROJECT["dependencies"] if group == "dependencies" else EXTRAS[group]
    for requirement in map(Requirement, listed):
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= set(EXTRAS), requirement
        else:
            version = pins()[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} in pyproject.toml, {version} pinned"


def test_only_one_distribution_provides_pygame() -> None:
    # pygame and pygame-ce overwrite each other's files; PettingZoo and mpe2 ask for pygame-ce.
    assert "pygame-ce" in pins()
    assert "pygame" not in pins()


def test_torch_is_pinned_without_a_local_version() -> None:
    # A pin such as 2.13.0+cpu could not be had from the package index, nor met by a CUDA build.
    assert re.fullmatch(r"[\d.]+", pins()["torch"])


def index_description(readme: str, repository: str | None) -> str:
    return str(runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["index_description"](readme, repository))


def test_the_description_on_the_package_index_links_to_what_is_there() -> None:
    code = "```md\n[code](d.md)\n```\n"
    readme = (
        f"Title\n\n![a dream](docs/a.png)\n*A dream*\n\nSee [`this`](docs/b.md#part), [that](https://c.org).\n\n{code}"
    )
    assert index_description(readme, "https://e.org/f/g") == (
        "Title\n\n![a dream](https://e.org/f/g/raw/HEAD/docs/a.png)\n*A dream*\n\n"
        f"See [`this`](https://e.org/f/g/blob/HEAD/docs/b.md#part), [that](https://c.org).\n\n{code}"
    )
    assert index_description(readme, None) == f"Title\n\nSee `this`, [that](https://c.org).\n\n{code}"


@pytest.mark.parametrize("repository", [None, "https://example.org/somebody/matwm_rl"])
def test_no_link_of_the_readme_is_relative_on_the_package_index(repository: str | None) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = index_description(readme, repository)
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", shown, flags=re.DOTALL))
    assert targets and all(target.startswith("https://") for target in targets)
    assert PROJECT["dynamic"] == ["readme"] and "readme" not in PROJECT
    assert re.findall(r"^```.*?^```$", shown, flags=re.DOTALL | re.MULTILINE) == re.findall(
        r"^```.*?^```$", readme, flags=re.DOTALL | re.MULTILINE
    ), "code is changed"
