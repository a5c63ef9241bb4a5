"""Execute the tutorials: ``python tutorials/run.py [NAME …] [--write]``.

Each notebook runs in a copy of this folder and a fresh kernel, offline, with a cache of its own. It fails where a cell
raises, or says anything on stderr: warnings, those of histosge too, are for cells tagged "warns", and these must warn. It fails as
well where the notebook was stored without its outputs. ``--write`` stores the new outputs, without what differs from
machine to machine and from run to run: paths, durations, versions.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from time import time
from typing import Any

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 300
WARNS = "warns"
"""Tag of a cell that shows a warning."""
_PREPARE = """
def prepare():
    import logging, sys, warnings
    from histosge._settings import logger

    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where no browser draws bars
    warnings.filterwarnings("ignore", message="zarr v3 autosharding")  # about a default to come

    class ByLevel(logging.Handler):
        def emit(self, record):
            print(self.format(record), file=sys.stdout if record.levelno < logging.WARNING else sys.stderr)

    handler = ByLevel()
    handler.setFormatter(logger.handlers[0].formatter)
    logger.handlers[:] = [handler]

prepare()
del prepare
"""
"""What was done goes to stdout, so that all that is on stderr is a warning or worse."""
_DURATION = re.compile(r" \(\d+ s\)|, \d+ s(?=\n|$)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}")
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells that can be executed; an empty one cannot."""
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]


def _texts(output: dict[str, Any]) -> dict[str, str]:
    """What an output says, by the kind of it, without its pictures."""
    said = {"text": output.get("text", "")} | output.get("data", {})
    return {k: v if isinstance(v, str) else "".join(v) for k, v in said.items() if not k.startswith("image/")}


def problems(notebook: dict[str, Any]) -> list[str]:
    """What is wrong with an executed notebook."""
    found = []
    for i, cell in enumerate(code_cells(notebook), 1):
        if cell.get("execution_count") != i:
            found.append(f"code cell {i} is not executed, or not in its turn")
        said = "".join(
            _texts(o)["text"] for o in cell["outputs"] if o["output_type"] == "stream" and o["name"] == "stderr"
        )
        told_to = WARNS in cell["metadata"].get("tags", [])
        if bool(said) != told_to:
            what = f"is tagged {WARNS!r} and does not warn" if told_to else f"says on stderr: {said.strip()}"
            found.append(f"code cell {i} {what}")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"code cell {i} raises {output['ename']}: {output['evalue']}")
            if _ADDRESS.search("".join(_texts(output).values())):
                found.append(f"code cell {i} prints an address in memory, another one each time")
    return found


def missing(stored: dict[str, Any], executed: dict[str, Any]) -> list[str]:
    """Outputs that a notebook was stored without."""
    pairs = zip(code_cells(stored), code_cells(executed), strict=True)
    lacking = [
        i
        for i, (old, new) in enumerate(pairs, 1)
        if old.get("execution_count") is None or len(new["outputs"]) > 0 == len(old["outputs"])
    ]
    return [f"stored without the outputs of code cells {lacking}: run with --write"] if lacking else []


def clean(notebook: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """Leave out what differs between machines and runs; ``folder``, in one of its own, is where the notebook ran."""
    notebook["metadata"] = json.loads(json.dumps(_METADATA))
    for i, cell in enumerate(notebook["cells"]):
        cell["id"] = f"c{i:02d}"
        tags = cell["metadata"].get("tags", [])
        cell["metadata"] = {"tags": tags} if tags else {}
        if cell["cell_type"] == "code":
            cell["outputs"] = _joined(cell["outputs"])
            for output in cell["outputs"]:
                if "metadata" in output:
                    output["metadata"] = {}
                if "text" in output:
                    output["text"] = _plain(output["text"], folder)
                for kind, value in output.get("data", {}).items():
                    output["data"][kind] = small_png(value) if kind == "image/png" else _plain(value, folder)
    return notebook


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pieces of a stream that follow one another are one: where they are cut is a matter of time."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" and output["name"] == last.get("name"):
            last["text"] = "".join(last["text"]) + "".join(output["text"])
        else:
            joined.append(output)
    return joined


def _plain(text: Any, folder: Path) -> Any:
    if not isinstance(text, str):
        return text
    for path in (folder, folder.resolve(), folder.parent, folder.parent.resolve()):
        text = text.replace(f"{path}/", "").replace(str(path), ".")
    return _DURATION.sub("", text)


def small_png(encoded: str) -> str:
    """Draw a picture with 256 colours, a third of the size, and forget who made it."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    out = io.BytesIO()
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode() + "\n"


def machine_paths(notebook: dict[str, Any], *, folder: Path) -> list[str]:
    """Paths of this machine that a notebook still holds."""
    pictures = re.compile(r'"image/png": "[^"]*"')
    text = pictures.sub("", json.dumps(notebook))
    places = {str(folder), str(Path.home()), str(HERE.parent), sys.prefix} - {"/"}
    return [f"its outputs name {place}" for place in sorted(places) if place in text]


def execute(path: Path, *, folder: Path) -> dict[str, Any]:
    """Run a notebook, with ``folder`` as its working directory."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", record_timing=False, allow_errors=False,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=40"],
    )  # fmt: skip
    client.on_notebook_start = lambda **_: client.kc.execute(_PREPARE, silent=True, store_history=False)
    client.execute(env=_environment(folder.parent))
    return notebook


def _environment(own: Path) -> dict[str, str]:
    """What a kernel finds: caches below the folder ``own``, no network, and this interpreter's commands first."""
    return os.environ | {
        "HISTOSGE_CACHE": str(own / "cache"),
        "HF_HOME": str(own / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _run(path: Path, *, write: bool) -> list[str]:
    """Execute one notebook; give what is wrong with it."""
    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    stored = json.loads(path.read_text())
    with tempfile.TemporaryDirectory(prefix="tutorial-") as name:
        folder = Path(name) / "tutorials"
        shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        try:
            executed = execute(folder / path.name, folder=folder)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as err:
            return [_COLOUR.sub("", str(err))]
        wrong = problems(executed)
        executed = clean(executed, folder=folder)
        wrong += machine_paths(executed, folder=folder)
    if write and not wrong:
        nbformat.write(executed, path)
        return []
    return wrong if write else wrong + missing(stored, executed)


def main() -> None:
    """Execute what was asked for and tell how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, without .ipynb; all by default")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    asked = parser.parse_args()
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this interpreter's kernel, whatever else the user has installed
    there = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    names = [Path(name).stem for name in asked.names] or list(there)
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        parser.error(f"no such tutorial: {', '.join(unknown)}; there are {', '.join(there)}")
    seconds, failed = {}, {}
    for name in names:
        start = time()
        wrong = _run(there[name], write=asked.write)
        seconds[name] = time() - start
        print(
            f"{name:<20} {seconds[name]:6.1f} s  {'FAILED' if wrong else 'written' if asked.write else 'ok'}",
            flush=True,
        )
        if wrong:
            failed[name] = wrong
            print("\n".join(f"    {line}" for text in wrong for line in text.splitlines()), flush=True)
    print(f"{'all':<20} {sum(seconds.values()):6.1f} s  {len(names) - len(failed)} of {len(names)} ok")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
