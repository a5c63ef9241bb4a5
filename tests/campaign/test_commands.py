"""Command lines with hostile values: each is refused in one line before the work starts, or starts the work."""

from __future__ import annotations

import random
import warnings

import click
import pytest
from click.testing import CliRunner

import histosge as sge
from histosge._embedding import Embedder
from histosge.cli import main

LONG = "a" * 300
NUMBERS = [
    "0", "-1", "-0.5", "0.3", "nan", "inf", "-inf", "1e400", "1e-300", "10000000000", "1" + "0" * 26, "-1" + "0" * 26, "",
    " ", "abc", "0x10", "1,5", "٣", "1;2", "--", "1e5", "2.5", "18446744073709551616",
]  # fmt: skip
WORDS = [
    "", " ", "a/b", "/", "..", "../x", ".", "-x", "--", "ü", "名", "a b", LONG, "a\nb", "a\tb", "%s", "{}", "$HOME",
    "<script>", "__a", "'", '"', "nul\\x", "0", "None", "a" * 255, "a,b", ",", ",,", "all",
]  # fmt: skip
OUTPUTS = [
    "{tmp}/no/such/x{end}", "{tmp}/file/x{end}", "{tmp}/x.exe", "{tmp}/x", "{tmp}/" + LONG + "{end}", "", ".", "..", "/",
    "{tmp}", "{tmp}/file", "/proc/x{end}", "{tmp}/-x{end}", "{tmp}/a b{end}", "{tmp}/ü{end}", "{tmp}/x.zarr",
    "{tmp}/{end}", "{tmp}/full", "{tmp}/full{end}", "{tmp}/x{end}/", "/dev/null",  "{tmp}/" + "d/" * 60 + "x{end}",
]  # fmt: skip
INPUTS = [
    "{tmp}/missing", "{tmp}/file", "{tmp}/full", "{tmp}/empty", "", ".", "/", LONG, "-x", "{tmp}/missing.zarr",
    "{tmp}/empty.h5ad", "{tmp}/empty.tif", "/dev/null", "{tmp}/text.json", "{tmp}/empty.zarr",
]  # fmt: skip
HOLLOW = ["{", "[]", "1", "null", '"a"', "", '{"a": NaN}', '{"n_neighbours": -1}', '{"' + LONG + '": 1}', "{}", "{1}"]
ENDS = {"predict": ".zarr", "evaluate": ".csv", "fit": "", "demo": "", "datasets synthetic": ".zarr"}
NOT_REFUSED = {"--help", "--version", "--verbose", "--quiet"}


class StartedError(Exception):
    """The work starts."""


def start(*_, **__):
    raise StartedError


def leaves(command=main, words=()):
    """All commands."""
    if not hasattr(command, "commands"):
        yield " ".join(words), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*words, name))


def hostile(param, name):
    """Values to try for a parameter."""
    if isinstance(param.type, click.Path):
        return INPUTS if param.type.exists else OUTPUTS
    if isinstance(param.type, click.types.FloatParamType | click.types.IntParamType):
        return NUMBERS
    return [*HOLLOW, *WORDS] if param.type.name == "json" else [*NUMBERS, *WORDS] if name == "genes" else WORDS


def cases():
    """Command, arguments before, option and value, all in one order."""
    found = []
    for words, command in leaves():
        for param in command.params:
            if isinstance(param, click.Option) and (param.is_flag or param.name in ("help", "version")):
                continue
            found += [(words, param, value) for value in hostile(param, param.name)]
    return found


CASES = cases()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Inputs, and what may be mistaken for them."""
    tmp = tmp_path_factory.mktemp("commands")
    sdata = sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=8, mpp=2.0)
    sdata.write(tmp / "in.zarr")
    sge.tl.predict(sdata, encoder="stain-texture", head="nearest", upsample=2, n_folds=2)
    sdata.write(tmp / "predicted.zarr")
    sge.tl.fit(sdata, encoder="stain-texture", head="nearest", table_key="table", n_folds=2).save(tmp / "model")
    (tmp / "file").write_text("text")
    (tmp / "text.json").write_text("{}")
    for name in ("empty.h5ad", "empty.tif"):
        (tmp / name).touch()
    for name in ("full", "full.zarr", "full.csv", "full.png", "full.html"):
        (tmp / name).mkdir()
        (tmp / name / "thesis.txt").write_text("precious")
    for name in ("empty", "empty.zarr"):
        (tmp / name).mkdir()
    return tmp


def line(words, param, value, tmp):
    """A command line that is right but for one value."""
    given = {"source": tmp / "in.zarr", "sources": tmp / "in.zarr", "target": tmp / f"out{ENDS.get(words, '')}",
             "path": tmp / "predicted.zarr", "name": "mouse_brain"}  # fmt: skip
    end = {"plot": ".png", "report": ".html"}.get(param.name, ENDS.get(words, ".zarr"))
    value = value.replace("{tmp}", str(tmp)).replace("{end}", end)
    positional = [
        (value if p is param else str(given[p.name]))
        for p in dict(leaves())[words].params
        if isinstance(p, click.Argument) and (p is param or (p.name in given and (p.required or p.name == "target")))
    ]
    options = [] if isinstance(param, click.Argument) else [f"{max(param.opts, key=len)}={value}"]
    known = {p.name for p in dict(leaves())[words].params}
    for name, usual in (("encoder", "stain-texture"), ("head", "nearest"), ("heads", "nearest")):
        if name in known and param.name not in (name, "model"):
            options.append(f"--{name}={usual}" if name != "head" or param.name != "head_options" else "--head=kriging")
    if param.name == "model":
        options = [f"--model={value}"]
    if param.name in ("resolution", "n_domains"):
        options.append("--domains")
    if words == "evaluate" and param.name not in ("split", "labels", "buffer_um", "block_um"):
        options.append("--split=random")
    if param.name in ("buffer_um", "block_um"):
        options += [f"--{other}=20" for other in ("buffer-um", "block-um") if f"--{other}" not in param.opts]
    if param.name == "on_invalid":
        options.append("--target-key=spots")
    if words == "datasets synthetic":
        options += [f"--{n}=5" for n in ("n-rows", "n-cols", "n-genes") if f"--{n}" not in param.opts] + ["--mpp=4"][
            : param.name != "mpp"
        ]
    return [*words.split(), *options, "--", *positional], value


@pytest.fixture
def _cut_short(monkeypatch):
    """The work is not done: what would start it raises."""
    for name in ("embed_spots", "embed_both", "embed", "embed_parts"):
        monkeypatch.setattr(Embedder, name, start)
    monkeypatch.setattr("histosge.datasets._published.fetch_files", start)
    monkeypatch.setattr("histosge.datasets._synthetic.hidden_fields", start)
    monkeypatch.setattr("histosge._section._interval_files._Job.fill", start)


def outcome(words, param, value, tmp):
    """What comes of a command line, and what it prints."""
    args, value = line(words, param, value, tmp)
    with warnings.catch_warnings(action="ignore"):
        done = CliRunner().invoke(main, args, standalone_mode=True)
    if isinstance(done.exception, StartedError):
        return "starts", args, ""
    if done.exit_code == 0 and done.exception is None:
        return "works", args, done.output
    if not isinstance(done.exception, SystemExit) or "Traceback" in done.output or done.exit_code not in (1, 2):
        return "raw error", args, repr(done.exception)
    names = [*param.opts, param.name, f"{param.name.removesuffix('_key')}", param.make_metavar(click.Context(main))]
    names += [" ".join(value.split())[:15], repr(value)[1:16]] if value.strip() else ["''", "=''"]
    names += value.split(",") if value.strip(", ") else []
    names += {"buffer_um": ["n_splits"], "block_um": ["n_splits"]}.get(param.name, [])  # what it makes too many
    said = done.stderr.strip().rpartition("\n")[2]
    if said == "histosge: " or "[Errno" in said:
        return "refused without a reason", args, said
    if not any(name.strip("-").lower().replace("-", "_") in said.lower().replace("-", "_") for name in names if name):
        return "refused without a name", args, said
    return "refused", args, said


@pytest.mark.usefixtures("_cut_short")
def test_hostile_values(place, tries, tally, monkeypatch):
    monkeypatch.chdir(place)
    chosen = random.Random(14).sample(CASES, min(tries(80, 500), len(CASES)))
    wrong = []
    for words, param, value in chosen:
        found, args, said = outcome(words, param, value, place)
        tally("command lines")[found] += 1
        if found not in ("refused", "starts", "works"):
            wrong.append(f"{found}: {args}\n    {said}")
    assert not wrong, "\n".join(wrong)
    assert (place / "full" / "thesis.txt").read_text() == "precious"
