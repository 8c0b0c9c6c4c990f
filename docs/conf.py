"""Sphinx configuration: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import inspect as sphinx_inspect

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import matwm_rl

project = "matwm_rl"
author = "matwm_rl contributors"
copyright = author
version = release = matwm_rl.__version__

extensions = [
    "mathml",  # docs/_ext
    "myst_parser",
    "public_names",  # docs/_ext
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
# A page of the reference whose room does not exist.
rooms = {path.stem for path in Path(matwm_rl.__file__).parent.iterdir()}
pages = (Path(__file__).parent / "api").glob("*.md")
exclude_patterns += [f"api/{page.name}" for page in pages if page.stem not in rooms | {"index"}]

# Pages are also read on the repository's site, so mathematics is written with dollars there and here.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# Names of `__all__`, in its order, under the room that exports them; shapes are in the text, types in the signature.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "default_keys"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes:" would otherwise describe a second time what autodoc describes
napoleon_use_rtype = False

# MathML, which browsers draw themselves: nothing is loaded from elsewhere, and no LaTeX is needed to build.
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"matwm_rl {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def constructor_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> Any:
    """Show the arguments of a class whose metaclass hides them behind ``*args, **kwargs``, as TorchRL's losses do."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    if getattr(obj, "_is_protocol", False):
        return "", returns
    arguments = sphinx_inspect.signature(obj.__init__, bound_method=True)
    return sphinx_inspect.stringify_signature(
        arguments, unqualified_typehints=True, show_return_annotation=False
    ), returns


def escape_letters(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep "num_agents: N." from being read as the item N of a list."""
    lines[:] = [re.sub(r"^(\s+[^:]+: )([A-Za-z]\.(\s|$))", r"\1\\\2", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Register what corrects the reference; before napoleon, whose priority is 500."""
    app.connect("autodoc-process-signature", constructor_signature)
    app.connect("autodoc-process-docstring", escape_letters, priority=400)
