"""How the documentation is built: ``make docs``."""

from __future__ import annotations

import shutil
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

HERE = Path(__file__).parent
logger = logging.getLogger(__name__)

project = "lirpa_fastwarmup"
author = "the authors of lirpa_fastwarmup"
project_copyright = author
version = release = version_of("lirpa_fastwarmup")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lirpa_fastwarmup {version}"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
copybutton_prompt_text = "$ "

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"
nb_execution_mode = "off"  # They are committed with their outputs, which a test keeps true.
nb_merge_streams = True
nb_render_markdown_format = "myst"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # Fields of dataclasses are documented by their class, and not a second time.


def _formula(self: Any, node: nodes.Element) -> None:
    formula = node.astext()
    try:
        self.body.append(tex2mathml(formula, as_block=isinstance(node, nodes.math_block)))
    except MathError as error:
        logger.warning("%s: %s", formula, error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Write formulas as MathML, which browsers show without a script from elsewhere."""
    app.add_html_math_renderer("mathml", inline_renderers=(_formula, None), block_renderers=(_formula, None))


# Notebooks live beside the scripts, where people look for them.
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in sorted((HERE.parent / "examples").glob("*.ipynb")):
    shutil.copy(notebook, HERE / "notebooks" / notebook.name)
