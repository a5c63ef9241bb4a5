"""Configuration of Sphinx; see https://www.sphinx-doc.org/en/master/usage/configuration.html."""

import os
import re
from datetime import UTC, datetime
from importlib.metadata import metadata

from sphinx.application import Sphinx
from sphinx.ext.napoleon import NumpyDocstring

info = metadata("histosge")
project = info["Name"]
author = info["Author"] or "the histosge developers"
copyright = f"{datetime.now(tz=UTC):%Y}, {author}"
version = release = info["Version"]
source_page = dict(url.split(", ", 1) for url in info.get_all("Project-URL", [])).get("Source")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "literal"

# API pages: numpydoc sections, types from the signature only
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # sphinx_autodoc_typehints writes them
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_include_init_with_doc = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_use_param = True
always_use_bars_union = True
typehints_defaults = "braces"
typehints_use_rtype = True

# Markdown and notebooks
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_url_schemes = ("http", "https", "mailto")
nb_execution_mode = "off"
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Links. Those to other projects need their inventories, which only the published build fetches: the build itself, and
# with it the check that no link of our own is broken, must work offline.
nitpicky = True
other_projects = {
    "python": "https://docs.python.org/3",
    "anndata": "https://anndata.readthedocs.io/en/stable",
    "geopandas": "https://geopandas.org/en/stable",
    "matplotlib": "https://matplotlib.org/stable",
    "numpy": "https://numpy.org/doc/stable",
    "pandas": "https://pandas.pydata.org/docs",
    "scanpy": "https://scanpy.readthedocs.io/en/stable",
    "scipy": "https://docs.scipy.org/doc/scipy",
    "spatialdata": "https://spatialdata.scverse.org/en/stable",
    "torch": "https://docs.pytorch.org/docs/stable",
    "xarray": "https://docs.xarray.dev/en/stable",
}
intersphinx_mapping = {k: (v, None) for k, v in other_projects.items()} if "READTHEDOCS" in os.environ else {}
nitpick_ignore_regex = [
    # other projects: a link where there is an inventory, plain text where there is none
    (r"py:.*", r"(anndata|collections|dask|geopandas|matplotlib|networkx|numpy|pandas|pathlib|scipy)(\..*)?"),
    (r"py:.*", r"(shapely|spatialdata|torch|types|typing|xarray|np|os)(\..*)?"),
    (
        r"py:.*",
        r"(None|Any|Path|bool|bytes|complex|dict|float|frozenset|int|list|object|set|str|tuple|type|ellipsis|Ellipsis)",
    ),
    (r"py:exc", r"[A-Z]\w*(Error|Warning)"),
    # rooms: a public signature may name one of their types, which has no page
    (r"py:.*", r"(histosge\.)?_.*"),
]

# Pages
html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {
    "path_to_docs": "docs",
    "use_repository_button": source_page is not None,
    "repository_url": source_page or "",
    "show_navbar_depth": 1,
}


def link_within_docs(app: Sphinx, relative_path: object, parent: str, content: list[str]) -> None:
    """Let links of README, CHANGELOG and CONTRIBUTING, written for the repository, lead to pages of the documentation."""
    text = re.sub(r"(!\[[^]]*\]\()(?!docs/|https?:)", r"\1../", content[0])
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((CHANGELOG|CONTRIBUTING)\.md", lambda match: f"]({match[1].lower()}.md", text)
    # no pages there: a link to the repository, or the bare words while it has no address
    elsewhere = "LICENSE|CITATION|CODE_OF_CONDUCT|Makefile|src|tests|benchmarks|tutorials"
    to_source = rf"[\1]({source_page}/blob/main/\2)" if source_page else r"\1"
    content[0] = re.sub(rf"(?<!!)\[([^]]*)\]\(((?:{elsewhere})\b[^)]*)\)", to_source, text)


def returns_as_written(self: NumpyDocstring, section: str) -> list[str]:
    """Take *Returns* as text: napoleon looks for ``name : type`` there, and ours lists the fields that are written."""
    lines = self._dedent(self._consume_to_next_section())
    if lines[:1] == [":"]:  # sphinx_autodoc_typehints puts it there, against the same search
        lines = lines[1:]
    return self._format_block(":returns: ", lines) if lines else []


def setup(app: Sphinx) -> None:
    """Connect the two."""
    NumpyDocstring._parse_returns_section = returns_as_written
    app.connect("include-read", link_within_docs)
