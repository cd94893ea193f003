"""Sphinx's configuration. ``python docs/build.py`` builds the site and checks it.

What the site has and the repository does not is written before the pages are read, into ``docs/made`` (``made.py``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import made  # noqa: E402

import dcafy  # noqa: E402

project = "dcafy"
author = "The dcafy developers"
copyright = "The dcafy developers, Apache-2.0"
version = release = dcafy.__version__

extensions = ["sphinx.ext.autodoc", "myst_nb"]
exclude_patterns = ["made/parts", "*.py"]

myst_heading_anchors = 4  # a link to a heading that is not there is a warning, and a warning is an error
myst_enable_extensions = ["colon_fence", "deflist"]
myst_links_external_new_tab = False
nb_execution_mode = "off"  # python docs/make_notebook.py executes, and its outputs are committed

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
nitpicky = True
# What other packages document is no page of this site: only dcafy's own names have to be found.
nitpick_ignore_regex = [(r"py:.*", r"(?!dcafy).*"), (r"py:.*", r"dcafy\.(?!\w+$).*")]

html_theme = "furo"
html_title = f"dcafy {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["networks.js"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"footer_icons": [], "top_of_page_buttons": []}

made.write()


def setup(app: Any) -> None:
    app.connect("source-read", made.links)
    app.connect("autodoc-process-docstring", made.docstring)
