"""Mathematics as MathML, by docutils' own converter.

Sphinx's MathJax would be loaded from elsewhere whenever a page is read, and its image renderer needs LaTeX to build.
Browsers draw MathML themselves.
"""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

ElementTree.register_namespace("", "http://www.w3.org/1998/Math/MathML")
_NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
_HAT = "ˆ"


def _numeric(entity: re.Match[str]) -> str:
    """Return HTML's entities by number: XML does not know their names."""
    return "".join(f"&#{ord(character)};" for character in html.unescape(entity[0]))


def convert(text: str, *, as_block: bool) -> str:
    """Return MathML for LaTeX; docutils raises a ``MathError`` for what it does not know."""
    markup = latex2mathml.tex2mathml(text.strip(), as_block=as_block)
    tree = ElementTree.fromstring(re.sub(r"&\w+;", _numeric, markup))
    for node in tree.iter(f"{_NAMESPACE}munderover"):
        base, sub, accent = node
        if accent.text == _HAT:
            # docutils puts the index of a letter with a hat below the letter, as if it were the limit of a sum.
            node.tag = f"{_NAMESPACE}msub"
            node[:] = [ElementTree.Element(f"{_NAMESPACE}mover"), sub]
            node[0].extend([base, accent])
    return ElementTree.tostring(tree, encoding="unicode")


def _visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext(), as_block=False))
    raise nodes.SkipNode


def _visit_math_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math-block"))
    translator.body.append(convert(node.astext(), as_block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
