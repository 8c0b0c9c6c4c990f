"""The directive ``public-names``: every name of the root package, its room's reference and its first sentence."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import matwm_rl


def rows() -> list[tuple[str, str]]:
    """Return the full name in the room that exports it, and the summary, of everything in ``matwm_rl.__all__``."""
    modules = [import_module(f"matwm_rl.{found.name}") for found in pkgutil.iter_modules(matwm_rl.__path__)]
    found = []
    for name in matwm_rl.__all__:
        value = getattr(matwm_rl, name)
        if inspect.ismodule(value):
            place = value.__name__
        else:
            place = next(f"{m.__name__}.{name}" for m in modules if name in getattr(m, "__all__", ()))
        found.append((place, (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")))
    return found


class PublicNames(SphinxDirective):
    """A table of two columns."""

    def run(self) -> list[nodes.Node]:
        """Return the parsed table."""
        lines = [".. list-table::", "   :widths: 30 70", ""]
        for place, summary in rows():
            lines += [f"   * - :py:obj:`~{place}`", f"     - {summary}"]
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=__file__), self.content_offset, node)
        return node.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
