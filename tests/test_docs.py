"""The pages: no dead link, tables that name what exists, plain words, one sentence a line."""

from __future__ import annotations

import inspect
import json
import os
import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest

import histosge as sge

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"])
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SOURCES = sorted((ROOT / "src" / "histosge").rglob("*.py"))


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


# language

AVOIDED = ("told", "lest", "whoever", "shall", "in vain")
PLAIN = [*PAGES, *NOTEBOOKS, ROOT / "src"]  # pages, and folders of Python files
ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "Fig.", "cf.", "vs.")


def words_to_avoid(path: Path) -> list[str]:
    """Each occurrence as ``file:line: word``; of a folder, those of its Python files."""
    if path.is_dir():
        return [found for file in sorted(path.rglob("*.py")) for found in words_to_avoid(file)]
    text = markdown(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return [
        f"{path.name}:{number}: {word}"
        for number, line in enumerate(text.splitlines(), 1)
        for word in re.findall(rf"\b(?:{'|'.join(AVOIDED)})\b", line, flags=re.IGNORECASE)
    ]


def lines_of_several_sentences(text: str) -> list[str]:
    """Lines outside tables, headings and code in which a second sentence begins."""
    text = re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#"))]
    found = []
    for line in lines:
        plain = re.sub(r"(`+)[^`].*?\1", "X", re.sub(r"^\s*(?:\d+\.|[-*])\s+", "", line))
        for abbreviation in ABBREVIATIONS:
            plain = plain.replace(f"{abbreviation} ", "")
        if re.search(r"[.!?][)\"]? +[*_(\[\"]*[A-Z]", plain):
            found.append(line)
    return found


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plain_words(path):
    assert words_to_avoid(path) == []


@pytest.mark.parametrize(
    "page", [path for path in PLAIN if path.is_file()], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_one_sentence_a_line(page):
    text = markdown(page) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
    assert lines_of_several_sentences(text) == []


def test_words_and_sentences_are_found(tmp_path):
    (tmp_path / "a.py").write_text("# Whoever is told\nshallow = 1  # in vain\n", encoding="utf-8")
    assert words_to_avoid(tmp_path) == ["a.py:1: Whoever", "a.py:1: told", "a.py:2: in vain"]
    one = ["1. One item.", "- **Bold.** One, e.g. Visium.", "A pitch of 0.5 µm.", "| A. B | table |", "See `a. B`."]
    two = ["One. Two.", "  Is it? `x` is.", "(One.) Two.", "One. **Two.**"]
    assert lines_of_several_sentences("\n".join([*one, "```", "A. B", "```", *two])) == two


# tables


def test_every_room_is_in_the_table_of_the_house():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rooms = {room.strip() for layer in layers for room in layer.split("|")}
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    house = text[text.index("## The house") :].split("\n\n| ")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)(?:\.py|/)?`", house))
    assert rooms - named == set(), "rooms that the table lacks"
    gone = {name for name in named - rooms if name.startswith("_")} - {path.stem for path in SOURCES}
    assert gone == set(), "rooms that are no more"


def test_encoders_that_pages_name_exist():
    known = set(sge.encoders().index)
    for page in (DOCS / "encoders.md", DOCS / "comparison.md", ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        named = {name for names in re.findall(r'encoder="([^":]+)"', text) for name in names.split("+")}
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
