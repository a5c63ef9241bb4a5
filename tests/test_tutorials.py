"""Tutorials as they are stored: executed, clean, and in step with the package. ``tutorials/run.py`` executes them."""

from __future__ import annotations

import ast
import base64
import copy
import importlib.util
import inspect
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import histosge as sge

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("tutorials_run", TUTORIALS / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def _tree(notebook):
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return ast.parse("\n".join(line for s in sources for line in s.splitlines() if line[:1] not in "%!" or not line))


def _dotted(node):
    """``sge.tl.predict`` as ``["tl", "predict"]``; ``None`` for what does not begin with ``sge``."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) and node.id == "sge" else None


def test_is_executed_and_clean(notebook, run):
    assert run.problems(notebook) == []
    assert run.clean(copy.deepcopy(notebook), folder=Path("/nowhere/tutorials"))["metadata"] == notebook["metadata"]
    assert run.machine_paths(notebook, folder=Path("/nowhere/tutorials")) == []
    assert len({c["id"] for c in notebook["cells"]}) == len(notebook["cells"])


def test_begins_with_its_title_and_shows_no_bars(notebook):
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")
    assert "sge.settings.progress = False" in json.dumps(notebook)
    assert "TODO" not in json.dumps([c["source"] for c in notebook["cells"]])


def test_is_small(notebook):
    assert len(json.dumps(notebook)) < 1_500_000


def test_uses_what_the_package_has(notebook):
    for node in ast.walk(_tree(notebook)):
        names = _dotted(node.func if isinstance(node, ast.Call) else node)
        if not names:
            continue
        found = sge
        for name in names:
            assert hasattr(found, name), f"sge.{'.'.join(names)}"
            found = getattr(found, name)
        if isinstance(node, ast.Call) and inspect.isroutine(found):
            known = inspect.signature(found).parameters
            unknown = [k.arg for k in node.keywords if k.arg is not None and k.arg not in known]
            assert not unknown or any(p.kind is p.VAR_KEYWORD for p in known.values()), (names, unknown)


def test_links_lead_to_tutorials_and_pages(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\(([^)#]+)[^)]*\)", "".join(cell["source"])):
                if not link.startswith(("http", "mailto")):
                    assert (TUTORIALS / link).exists(), link


def _cell(n, *outputs, tags=()):
    return {
        "cell_type": "code",
        "execution_count": n,
        "id": f"x{n}",
        "metadata": {"tags": list(tags)} if tags else {"trusted": True},
        "source": "f()",
        "outputs": list(outputs),
    }


def _stream(name, text):
    return {"output_type": "stream", "name": name, "text": text}


def test_runner_tells_warnings_errors_and_cells_that_did_not_run(run):
    warning = _stream("stderr", "WARNING: look\n")
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    address = {"output_type": "execute_result", "data": {"text/plain": "<object at 0x7f1234567890>"}, "metadata": {}}

    def said(*cells):
        return " | ".join(run.problems({"cells": list(cells)}))

    assert said(_cell(1, _stream("stdout", "fine"))) == ""
    assert "says on stderr: WARNING: look" in said(_cell(1, warning))
    assert said(_cell(1, warning, tags=["warns"])) == ""
    assert "does not warn" in said(_cell(1, tags=["warns"]))
    assert "raises ValueError: no" in said(_cell(1, error))
    assert "address in memory" in said(_cell(1, address))
    assert "not executed" in said(_cell(None))
    assert "not executed" in said(_cell(2))


def test_runner_misses_outputs_that_were_not_stored(run):
    executed = {"cells": [_cell(1, _stream("stdout", "a")), _cell(2)]}
    assert run.missing(executed, executed) == []
    assert "[1]" in run.missing({"cells": [_cell(1), _cell(2)]}, executed)[0]
    assert "[1, 2]" in run.missing({"cells": [_cell(None), _cell(None)]}, executed)[0]


def test_runner_leaves_out_what_differs_between_runs(run):
    picture = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(picture, "png")
    shown = {
        "output_type": "display_data",
        "data": {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": "<Figure>"},
        "metadata": {"needs_background": "light"},
    }
    cell = _cell(
        1,
        _stream("stdout", "    finished (12 s)\nadded 3 places, 15 s\n"),
        _stream("stdout", "wrote /tmp/run-1/tutorials/out.zarr, cache in /tmp/run-1/cache\n"),
        shown,
    )
    notebook = {"cells": [cell], "metadata": {"language_info": {"version": "3.11.7"}}}
    run.clean(notebook, folder=Path("/tmp/run-1/tutorials"))
    joined, drawn = cell["outputs"]
    assert joined["text"] == "    finished\nadded 3 places\nwrote out.zarr, cache in cache\n"
    assert notebook["metadata"] == run._METADATA
    assert (cell["id"], cell["metadata"], drawn["metadata"]) == ("c00", {}, {})
    again = Image.open(io.BytesIO(base64.b64decode(drawn["data"]["image/png"])))
    assert (again.size, again.mode, again.info) == ((256, 256), "P", {})
    assert run.machine_paths({"cells": [], "metadata": {"home": str(Path.home())}}, folder=Path("/nowhere")) != []
