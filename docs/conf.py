"""Configuration of Sphinx; see https://www.sphinx-doc.org/en/master/usage/configuration.html."""

import os
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import metadata
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import NumpyDocstring

info = metadata("histosge")
project = info["Name"]
author = info["Author"] or "the histosge developers"
copyright = f"{datetime.now(tz=UTC):%Y}, {author}"
version = release = info["Version"]
source_page = dict(url.split(", ", 1) for url in info.get_all("Project-URL", [])).get("Source")

sys.path.insert(0, str(Path(__file__).parent))
extensions = [
    "_ext.directives",
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
exclude_patterns = ["_build", "_ext", "registry", "**.ipynb_checkpoints"]
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
    "spatialdata_io": "https://spatialdata.scverse.org/projects/io/en/stable",
    "torch": "https://docs.pytorch.org/docs/stable",
    "xarray": "https://docs.xarray.dev/en/stable",
}
intersphinx_mapping = {k: (v, None) for k, v in other_projects.items()} if "READTHEDOCS" in os.environ else {}
nitpick_ignore_regex = [
    # other projects: a link where there is an inventory, plain text where there is none
    (r"py:.*", r"(anndata|collections|dask|geopandas|matplotlib|networkx|numpy|pandas|pathlib|scipy)(\..*)?"),
    (r"py:.*", r"(shapely|spatialdata|spatialdata_io|torch|types|typing|upath|xarray|np|os)(\..*)?"),
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
html_static_path = ["_static"]
html_css_files = ["histosge.css"]
html_theme_options = {
    "path_to_docs": "docs",
    "use_repository_button": source_page is not None,
    "repository_url": source_page or "",
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # the side bar has a field to search in
}


def link_within_docs(app: Sphinx, relative_path: object, parent: str, content: list[str]) -> None:
    """Let links of README, CHANGELOG and CONTRIBUTING, written for the repository, lead to pages of the documentation."""
    # no pages there: a link to the repository, or the bare words while it has no address
    elsewhere = (
        "LICENSE|CITATION|CODE_OF_CONDUCT|Makefile|pyproject|(?:docs/registry|src|tests|benchmarks|recipe|[.]github)/"
    )
    to_source = rf"[\1]({source_page}/blob/main/\2)" if source_page else r"\1"
    text = re.sub(rf"(?<!!)\[([^]]*)\]\(((?:{elsewhere})[^)]*)\)", to_source, content[0])
    text = re.sub(r"(!\[[^]]*\]\()(?!docs/|https?:)", r"\1../", text)
    text = re.sub(r"\]\(docs/", "](", text)
    content[0] = re.sub(r"\]\((CHANGELOG|CONTRIBUTING)\.md", lambda match: f"]({match[1].lower()}.md", text)


def returns_as_written(self: NumpyDocstring, section: str) -> list[str]:
    """Take *Returns* as text: napoleon looks for ``name : type`` there, and ours lists the fields that are written."""
    lines = self._dedent(self._consume_to_next_section())
    if lines[:1] == [":"]:  # sphinx_autodoc_typehints puts it there, against the same search
        lines = lines[1:]
    return self._format_block(":returns: ", lines) if lines else []


def attributes_as_written(self: NumpyDocstring) -> list[str]:
    """Take the text under an attribute as text: napoleon looks for ``type: text`` there, and ours have no types."""
    return self._format_field("", "", self._dedent(self._consume_to_end()))


def know_notebooks_by_their_place(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Let notebooks link to each other: Sphinx follows ``docs/tutorials``, a link, and then knows no page of that path."""
    for docname in env.project.docnames:
        path = Path(env.doc2path(docname))
        env.project._path_to_docname.setdefault(path.resolve(), docname)


def setup(app: Sphinx) -> None:
    """Connect them."""
    NumpyDocstring._parse_returns_section = returns_as_written
    NumpyDocstring._parse_attribute_docstring = attributes_as_written
    app.connect("env-before-read-docs", know_notebooks_by_their_place)
    app.connect("include-read", link_within_docs)
