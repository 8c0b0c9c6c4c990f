"""What pyproject.toml cannot say: the package index shows README with links that lead somewhere there too."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def index_description(readme: str, repository: str | None) -> str:
    """Return README for the package index, which has none of the repository's files.

    Links and pictures get the repository's public address ahead of them. Without one, links become plain text, and
    paragraphs with pictures are left out. Code is not changed.

    Args:
        readme: the text in Markdown.
        repository: address such as ``https://github.com/OWNER/NAME``.
    """

    def replace(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if re.match(r"[a-z]+:", target):
            return link[0]
        if repository is None:
            return text
        return f"{picture}[{text}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{target})"

    parts = re.split(r"(^```.*?^```$)", readme, flags=re.DOTALL | re.MULTILINE)
    if repository is None:
        parts[::2] = [re.sub(r"^!\[.+?(\n\n|\Z)", "", part, flags=re.DOTALL | re.MULTILINE) for part in parts[::2]]
    parts[::2] = [re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", replace, part) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = index_description(
        (ROOT / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository")
    )
    setup(long_description=text, long_description_content_type="text/markdown")
