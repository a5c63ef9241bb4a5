"""The pages: every error message with its remedy, no link into nothing, tables that name what there is."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

import pytest

import histosge as sge

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"])
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SOURCES = sorted((ROOT / "src" / "histosge").rglob("*.py"))


def extension(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


ext = extension("messages")


# error messages


def test_every_form_of_a_message_is_read():
    source = """
def _unfitted(name):
    return RuntimeError(f"head {name!r} is not fitted: call fit() first.")

def _answer(status):
    if status == 403:
        return "ask for access"
    return None

class A:
    def go(self, x, kind):
        if x < 0:
            msg = f"x={x!r} is {len(kind):,} too many"
            raise ValueError(msg)
        hint = f" Did you mean {self.near!r}?" if x else ""
        if kind == "a":
            msg = "first" + f" {', '.join(map(repr, x))}."
        else:
            msg = f"second {kind}.{hint}"
        raise click.BadParameter(msg) from None

def more(err):
    try:
        raise _Own
    except _Own:
        raise
    if err:
        raise _unfitted(err.name)
    said = _answer(err)
    raise KeyError(said) from err
"""
    found = [(m.error, m.text) for m in ext.read(source)]
    assert found == [
        ("ValueError", "x=‹x› is ‹number› too many"),
        ("BadParameter", "first ‹x›."),
        ("BadParameter", "second ‹kind›.[ Did you mean ‹near›?]"),
        ("RuntimeError", "head ‹name› is not fitted: call fit() first."),
        ("KeyError", "ask for access"),
    ]


@pytest.mark.parametrize(
    "bad", ["raise ValueError", 'raise ValueError("a", "b")', "raise ValueError(msg)", "raise errors[0]"]
)
def test_a_form_that_is_not_read_is_an_error(bad):
    with pytest.raises(ext.UnknownFormError, match=r"module, line 1: .* Write `msg = \.\.\.; raise ERROR\(msg\)`\."):
        ext.read(bad)


def test_every_raise_of_the_package_is_on_the_page():
    listed = {(m.module, m.error, m.text) for m in ext.messages()}
    page = (DOCS / "messages.md").read_text(encoding="utf-8")
    topics = re.findall(r"^```\{messages\}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    patterns = [line for topic in topics for line in topic.split()]
    raises = 0
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT / "src" / "histosge").with_suffix("").parts).removesuffix(".__init__")
        source = path.read_text(encoding="utf-8")
        read = ext.read(source, module)
        for node in ast.walk(ast.parse(source)):
            # what is raised again (`raise`, `raise err`) and what never leaves its module (`raise _Own`) says nothing new
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            if isinstance(node.exc, ast.Name) and not node.exc.id[0].isupper():
                continue
            raises += 1
            said = [m for m in read if m.line == node.lineno]
            assert said, f"{module}, line {node.lineno}: no message was read"
            assert all((m.module, m.error, m.text) in listed and m.text for m in said)
            shown = sum(fnmatchcase(module, pattern) for pattern in patterns)
            assert shown == 1, f"{module} is in {shown} topics of docs/messages.md, not in one"
    assert raises > 200


# verbs at the beginning of a clause, or a statement of what is allowed
VERBS = (
    "add|align|ask|call|change|check|choose|convert|copy|correct|delete|divide|download|draw|embed|evaluate|finish|fit|give|install|lay|leave|"
    "link|list|log|look|lower|make|mark|move|name|pass|point|predict|put|read|remove|rename|repair|replace|rescale|reset|run|say|see|"
    "set|take|train|try|turn|use|wait|write"
)
REMEDY = re.compile(
    rf"(?:^|[.:;,!?(\[\]›] |\b(?:or|and|then|first|lattice) |[(\[])(?:{VERBS})\b"
    r"|\b(?:must|needs?|needed|only|takes?|among|there are|a column of|the parts|Settings are|has at least|made of|is usual)\b"
    r"|\?$|other keys",
    flags=re.IGNORECASE,
)
# no remedy of their own. First what no user meets alone: it is caught, or becomes part of another message.
WITHOUT_REMEDY = {
    ("_geometry", "NotALattice"),
    ("_cache", "its checksum is wrong"),
    ("datasets._download", "the server"),
    ("datasets._download", "the connection broke off"),
    # the rooms' own, which no argument of a user reaches
    ("_section._store", "part ‹part›"),
    ("_section._rows", "‹of› differs from the part"),
    ("_encoders._pilm", "does not say with which colours"),
    ("_heads.in_context", "got no measured spots"),
    # to be mended
}


def test_every_message_names_a_remedy():
    lacking = [
        f"{m.module}:{m.line} {m.error}: {m.text}"
        for m in ext.messages()
        if not REMEDY.search(m.text)
        and not any(m.module == module and (m.error == part or part in m.text) for module, part in WITHOUT_REMEDY)
    ]
    assert lacking == []


def test_the_heuristic_can_say_no():
    assert not REMEDY.search("the sections have no gene in common, so that nothing can be learnt from them together.")
    assert not REMEDY.search("x=‹x› is an unfinished run of another setting.")
    assert REMEDY.search("k=‹k› spots cannot be averaged. Give k=1 for the spots as they are, or more.")


# links


def prose(text: str) -> str:
    """Markdown without its blocks and spans of code."""
    text = re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)[^`].*?\1", "", text)


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", prose(text))
    found += re.findall(r"^\[[^]]+\]:\s+(\S+)", prose(text), flags=re.MULTILINE)
    found += re.findall(r"<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(path: Path) -> set[str]:
    """Anchors of headings, as GitHub and MyST make them, down to the third level (``myst_heading_anchors``)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = markdown(path)
    for name in re.findall(r"```\{include\} (\S+)", text):
        text += (path.parent / name).read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,3} +(.+?) *#*$", text, flags=re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = sum(one == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", one) is not None for one in found)
        found.add(f"{slug}-{again}" if again else slug)
    return found


def markdown(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def dead(link: str, page: Path, text: str) -> str | None:
    where, _, anchor = unquote(link).partition("#")
    # notebooks link from tutorials/, as on GitHub: ../docs/NAME.md. Sphinx follows docs/tutorials to it.
    target = Path(os.path.normpath(page.parent / where)) if where else page
    if not target.exists():
        return f"{page.name}: {link} leads to nothing"
    if anchor and target.suffix in {".md", ".ipynb"} and anchor not in anchors(target):
        return f"{page.name}: {link} leads to no heading of {target.name}"
    return None


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = markdown(page) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
    found = [dead(link, page, text) for link in links(text)]
    assert [one for one in found if one] == []


def test_dead_links_are_found():
    page = DOCS / "results.md"
    text = "[a](nowhere.md), [b](design.md#no-such-heading), [c](#a-store), [d](design.md#choices), `[e](nowhere.md)`"
    assert links(text) == ["nowhere.md", "design.md#no-such-heading", "#a-store", "design.md#choices"]
    found = [dead(link, page, text) for link in links(text)]
    assert [one is not None for one in found] == [True, True, False, False]


def test_every_page_is_in_the_navigation():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", index, flags=re.MULTILINE | re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    pages = sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")
    assert sorted(line for line in listed if "<self>" not in line) == pages


# tables


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_every_room_is_in_the_table_of_the_house(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rooms = {room.strip() for layer in layers for room in layer.split("|")}
    text = (ROOT / page).read_text(encoding="utf-8")
    house = text[text.index("## The house") :].split("\n\n| ")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)(?:\.py|/)?`", house))
    assert rooms - named == set(), f"{page}: rooms that the table lacks"
    gone = {name for name in named - rooms if name.startswith("_")} - {path.stem for path in SOURCES}
    assert gone == set(), f"{page}: rooms that are no more"


def test_encoders_that_pages_name_exist():
    known = set(sge.encoders().index)
    for page in (DOCS / "encoders.md", DOCS / "comparison.md", ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r'encoder="([^":]+)"', text))
        if page.name == "encoders.md":
            rows = re.findall(r"^\| `([^|]*)` \| 0\.\d+ \| (yes|no) \| (yes|no) \|$", text, flags=re.MULTILINE)
            assert len(rows) == 20
            named |= {name for name, *_ in rows}
            listed = sge.encoders()[["gated", "commercial"]].replace({True: "yes", False: "no"})
            assert [tuple(listed.loc[name]) for name, *_ in rows] == [tuple(answers) for _, *answers in rows]
            open_to_all = [name for name, *answers in rows if answers == ["no", "yes"]]  # the best one first
            assert open_to_all[0] == inspect.signature(sge.tl.predict).parameters["encoder"].default
        assert named <= known, f"{page.name}: no such encoder"


def test_advice_on_encoders_is_true():
    table = sge.encoders()
    assert table.loc["h-optimus-0", ["gated", "commercial"]].tolist() == [True, True]
    assert table.loc["h-optimus-1", ["gated", "commercial"]].tolist() == [True, False]
    assert not table.loc[["midnight", "phikon", "lunit-dino-s16", "stain-texture"], "gated"].any()
    assert table.loc[["midnight", "phikon", "lunit-dino-s16"], "commercial"].tolist() == [True, False, False]
    assert table.loc[["lunit-dino-s16", "hibou-b"], "parameters"].tolist() == ["21.1M", "85.7M"]
    small = table.loc[["lunit-dino-s16", "gigapath-flash"], ["embed_dim", "token_um"]]
    assert small.drop_duplicates().to_numpy().tolist() == [[384, 8]]
    same = table.loc[["uni", "mstar", "phaet", "phikonv2"], ["embed_dim", "token_um", "parameters"]]
    assert same.drop_duplicates().to_numpy().tolist() == [[1024, 8, "303.4M"]]
