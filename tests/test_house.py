"""Rules of the house that no linter knows: what import costs, how public functions look, what stays out of the repository."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import histosge as sge

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
NAMESPACES = ("pp", "tl", "pl", "io", "datasets")
HEAVY = {"anndata", "matplotlib", "pandas", "pydantic", "scanpy", "spatialdata", "squidpy", "timm", "torch"}
POSITIONAL = {"pp": 1, "tl": 1, "pl": 2, "io": 2, "datasets": 1, "": 1}  # a plot takes the data and the gene


def public() -> dict[str, object]:
    """Everything that users call, as they write it after ``sge.``."""
    found = {name: getattr(sge, name) for name in sge.__all__ if name not in {*NAMESPACES, "__version__"}}
    for namespace in NAMESPACES:
        module = importlib.import_module(f"histosge.{namespace}")
        found |= {f"{namespace}.{name}": getattr(module, name) for name in module.__all__}
    return found


PUBLIC = public()
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
METHODS = {
    f"{name}.{method}": inspect.unwrap(getattr(thing, method))
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing)
    for method, attribute in vars(thing).items()
    if not method.startswith("_") and (callable(attribute) or isinstance(attribute, classmethod | staticmethod))
}
functions = pytest.mark.parametrize("name", sorted(FUNCTIONS))
functions_and_methods = pytest.mark.parametrize("name", sorted(FUNCTIONS | METHODS))


def sections(doc: str) -> dict[str, str]:
    """Split a numpydoc docstring at its underlined headings; what comes before the first is ``""``."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(doc) + "\n", flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def documented(parameters: str) -> list[str]:
    """Names at the left margin of a *Parameters* section: ``a, b`` names two, ``**kwargs`` is ``kwargs``."""
    lines = [line for line in parameters.splitlines() if line and not line[0].isspace()]
    return [name.strip().lstrip("*\\") for line in lines for name in line.split(",")]


def own_parameters(function: object) -> list[inspect.Parameter]:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    return [p for p in signature.parameters.values() if p.name not in {"self", "cls"}]


def test_import_is_light():
    code = (
        "import json, sys; before = set(sys.modules); import histosge; "
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(json.loads(done.stdout)) == set()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_namespace_opens_from_the_package(namespace):
    assert getattr(sge, namespace) is importlib.import_module(f"histosge.{namespace}")
    assert namespace in sge.__all__
    assert namespace in dir(sge)


@functions_and_methods
def test_few_positional_arguments(name):
    parameters = own_parameters((FUNCTIONS | METHODS)[name])
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    positional = [p.name for p in parameters if p.kind not in by_keyword]
    namespace = name.rpartition(".")[0]
    allowed = POSITIONAL[namespace] if name in FUNCTIONS else 2  # numpy's and torch's habits hold for methods
    assert len(positional) <= allowed, f"{name}: only {allowed} may be positional, not {positional}"


@functions_and_methods
def test_annotated(name):
    function = (FUNCTIONS | METHODS)[name]
    bare = [p.name for p in own_parameters(function) if p.annotation is inspect.Parameter.empty]
    assert bare == [], f"{name}: no type for {bare}"
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@functions_and_methods
def test_docstring_has_a_summary(name):
    doc = (FUNCTIONS | METHODS)[name].__doc__
    assert doc, f"{name} has no docstring"
    assert len(inspect.cleandoc(doc).splitlines()[0]) > 10


@functions
def test_docstring_sections(name):
    found = sections(FUNCTIONS[name].__doc__ or "")
    wanted = {"Returns", "Examples"} | ({"Parameters"} if own_parameters(FUNCTIONS[name]) else set())
    assert wanted - found.keys() == set(), f"{name}: sections missing from the docstring"
    assert ">>> " in found["Examples"]


@functions_and_methods
def test_docstring_names_each_parameter(name):
    function = (FUNCTIONS | METHODS)[name]
    text = sections(function.__doc__ or "").get("Parameters", "")
    if name in METHODS and not text:
        return  # one line is enough for a method that explains itself
    typed = [line for line in text.splitlines() if re.match(r"[*\\\w][*\\\w, ]*\s*:(\s|$)", line)]
    assert typed == [], f"{name}: types belong in the signature"
    assert documented(text) == [p.name for p in own_parameters(function)]


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - set(FUNCTIONS)))
def test_classes_and_objects_are_documented(name):
    thing = PUBLIC[name]
    doc = (thing if inspect.isclass(thing) else type(thing)).__doc__
    assert doc
    assert not doc.startswith(f"{name}("), f"{name}: the docstring is the one that dataclass makes"


def test_api_page_lists_all_that_is_public():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\.\. autosummary::\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    listed = [name for table in tables for name in re.findall(r"^ {3}([\w.]+)$", table, flags=re.MULTILINE)]
    assert sorted(listed) == sorted(PUBLIC)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT / "src").as_posix())
def test_no_print_and_no_assert(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    prints = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert asserts == [], "raise an error with a message: assert vanishes under python -O"
    assert prints == [], "log with histosge's logger, or click.echo in cli/"


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert sge.__version__ == version
    cited = re.search(r"^version: *(\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert cited is not None
    assert cited[1].strip("\"'") == version
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] in {version, "Unreleased"}
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[:1] in ([], [version]), "the newest version of the changelog is not the one of the package"


def test_no_token_and_no_path_of_one_machine_in_the_repository():
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    forbidden = re.compile(r"hf_[A-Za-z0-9]{20,}|(?<![\w.~}-])/(?:work|root|home)/\w")
    found = []
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():  # not a link to a folder, nor deleted since
            text = path.read_bytes().decode("utf-8", errors="ignore")
            found += [f"{name}: {match.group()}" for match in forbidden.finditer(text)]
    assert found == []
