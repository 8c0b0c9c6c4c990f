"""The documentation is true: its code runs, and its links lead somewhere."""

from __future__ import annotations

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import matwm_rl

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
ROOMS = sorted(found.name for found in pkgutil.iter_modules(matwm_rl.__path__) if found.ispkg)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    """Return the anchor that a heading has, on the site and on the repository's pages."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), flags=re.MULTILINE)


# -- pages -------------------------------------------------------------------------------------------------------------


def python_blocks(text: str) -> list[str]:
    """Return the blocks of code, but those marked as a fragment by a comment in the line before."""
    return re.findall(r"(?<!<!-- fragment -->\n)^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_fragments_are_told_from_code_that_runs() -> None:
    text = "```python\nx = 1\n```\n\n<!-- fragment -->\n```python\nx = ...\n```\n"
    assert python_blocks(text) == ["x = 1\n"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(read(page))], ids=name)
def test_code_of_a_page_runs(page: Path) -> None:
    """All blocks of a page together are one script."""
    exec(compile("\n".join(python_blocks(read(page))), str(page), "exec"), {})


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        path, _, part = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (page.parent / path) if path else page
        assert found.exists(), f"{name(page)} links to {target}"
        assert not part or part in map(anchor, headings(found)), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_nothing_unfinished_shows(page: Path) -> None:
    visible = re.sub(r"<!--.*?-->", "", read(page), flags=re.DOTALL)
    assert not re.findall(r"TODO|FIXME|PLACEHOLDER", visible)


def test_every_room_has_a_page_of_the_reference() -> None:
    assert {page.stem for page in (DOCS / "api").glob("*.md")} >= set(ROOMS)


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^```\{toctree\}\n(.*?)^```", read(DOCS / "index.md"), flags=re.DOTALL | re.MULTILINE)
    entries = {line for block in listed for line in block.split() if not line.startswith(":")}
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= entries


def test_the_algorithm_is_cited_by_headings_that_it_has() -> None:
    places = [ROOT / "matwm_rl", ROOT / "examples", ROOT / "benchmarks", ROOT / "tests"]
    for path in (path for place in places for path in place.rglob("*.py")):
        text = " ".join(read(path).split())
        for cited in re.findall(r"docs/algorithm\.md, ([A-Z][\w, ]*)", text):
            known = any(cited.startswith(heading) for heading in headings(DOCS / "algorithm.md"))
            assert known, f"{name(path)} cites docs/algorithm.md, {cited}"


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Deihim", "Alonso", "Apostolopoulou"]


def test_the_loop_in_the_readme_is_the_example() -> None:
    """The example itself runs in tests/examples."""
    (code,) = python_blocks(read(ROOT / "README.md"))
    assert code == (ROOT / "examples" / "custom_loop.py").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= 120
