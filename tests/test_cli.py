"""The shell: exit codes, messages, files."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime
from io import StringIO
from typing import Any

import anndata as ad
import h5py
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
from click.testing import CliRunner
from PIL import Image
from scipy import sparse
from tests.spaceranger import full_image, write_visium

import histosge as sge
from histosge._embedding import open_cache
from histosge._settings import logger
from histosge.cli import as_table, main

FAST = ["--encoder", "stain-texture", "--head", "nearest", "--genes", "5", "--upsample", "2"]
PREDICT = sge.tl.predict
COMMANDS = [
    [],
    ["demo"],
    ["predict"],
    ["intervals"],
    ["fit"],
    ["evaluate"],
    ["encoders"],
    ["datasets"],
    ["datasets", "list"],
    ["datasets", "fetch"],
    ["datasets", "synthetic"],
    ["cache"],
    ["cache", "list"],
    ["cache", "clear"],
    ["doctor"],
]


@pytest.fixture(autouse=True)
def _quiet_again():
    yield
    sge.settings.verbosity = 2


def small(**options):
    return sge.datasets.synthetic(**{"n_rows": 7, "n_cols": 7, "n_genes": 8, "mpp": 2.0} | options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "in.zarr"
    small().write(path)
    return path


@pytest.fixture(scope="module")
def predicted(source, tmp_path_factory):
    """The one real run of predict: what click returned, where it wrote, and what was in the input before."""
    out, before = tmp_path_factory.mktemp("cli") / "out.zarr", files(source)
    done = run("predict", source, out, *FAST, "--json", "--no-cache")
    assert done.exit_code == 0, done.output
    return done, out, before


@pytest.fixture(scope="module")
def back(predicted):
    return sd.read_zarr(predicted[1])


@pytest.fixture
def instead(monkeypatch):
    """Puts a quick function in the place of a door that takes long."""
    return lambda module, function: monkeypatch.setattr(module, function.__name__, function)


@dataclass
class Prediction:
    """What predict answers: the table of the real run, or an error. It keeps what it is asked."""

    shapes: Any
    table: ad.AnnData
    error: Exception | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def predict(self, sdata, **options):
        print("a library prints")  # noqa: T201
        logger.info("predict logs")
        self.asked.append(options)
        if self.error is not None:
            raise self.error
        sdata.shapes["histosge_targets"] = self.shapes
        sdata.tables[options["key_added"]] = self.table


@pytest.fixture
def prediction(back, instead):
    found = Prediction(back.shapes["histosge_targets"], back.tables["histosge"].copy())
    instead(sge.tl, found.predict)
    return found


@pytest.fixture
def asked(prediction):
    """Collects what predict is asked."""
    return prediction.asked


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def works(*args):
    done = run(*args)
    assert done.exit_code == 0, done.output
    return done


def fails(*args, code=1):
    """End with a message and this code, not with a traceback."""
    done = run(*args)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code
    assert "Traceback" not in done.output
    assert done.stdout == ""
    return done.stderr


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def chunks_of(array):
    """Files with the values of an array in a zarr store, in order."""
    found = sorted(path for path in array.rglob("[0-9]*") if path.is_file())
    assert found
    return found


def command_of(words):
    command = main
    for word in words:
        command = command.commands[word]
    return command


# ------------------------------------------------------------------------------------------------------ the frame


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help(words):
    done = works(*words, "--help")
    assert "Usage:" in done.stdout
    assert "Examples:\n" in done.stdout
    assert "histosge " + " ".join(words) in done.stdout.split("Examples:")[1]
    assert works(*words, "-h").stdout == done.stdout


def test_every_command_is_known_here():
    def walk(command, words):
        yield list(words)
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*words, name))

    assert sorted(walk(main, ())) == sorted(COMMANDS)


def test_help_tells_exit_codes():
    told = works("--help").stdout
    for line in ("0  done", "1  an error", "2  wrong usage"):
        assert line in told


def test_version():
    assert works("--version").output.strip() == f"histosge, version {sge.__version__}"


FUNCTIONS = {
    ("predict",): (lambda: sge.tl.predict, ["tests", "out.zarr"]),
    ("fit",): (lambda: sge.tl.fit, ["tests", "model"]),
    ("evaluate",): (lambda: sge.tl.evaluate, ["tests"]),
    ("datasets", "synthetic"): (lambda: sge.datasets.synthetic, ["out.zarr"]),
    ("datasets", "fetch"): (lambda: sge.datasets.fetch, ["name"]),
    ("encoders",): (lambda: sge.encoders, []),
}
ABSENT = {
    "sdata": "is the argument IN",
    "inplace": "a shell writes files, and no object",
}
OWN = {  # the function that an option belongs to, or a reason for it
    "source": "sdata",
    "sources": "sdata",
    "target": "where to write to",
    "more": "further sections, with --out",
    "images": "image of io.read, once for each section",
    "bin_size": lambda: sge.io.read,
    "dataset_id": lambda: sge.io.read,
    "layers": lambda: sge.io.write_h5ad,
    "weights": lambda: sge.load_encoder,
    "trust_remote_code": lambda: sge.load_encoder,
    "resolution": lambda: sge.tl.domains,
    "n_domains": lambda: sge.tl.domains,
    "domains": "runs tl.domains",
    "plot": "runs pl.expression or pl.evaluation",
    "report": "runs pl.report",
    "out": "where to write to",
    "no_cache": "settings.cache_gb = 0",
    "overwrite": "whether to replace files",
    "as_json_": "how to tell the result",
}
OTHERWISE = {
    ("predict", "store"): "a flag: OUT.zarr is the store",
    ("predict", "model"): "a folder instead of what Model.load makes of it",
}


@pytest.mark.parametrize("words", FUNCTIONS, ids=" ".join)
def test_options_are_those_of_python(words):
    """Same names, same defaults; each exception is listed above with its reason."""
    function, arguments = FUNCTIONS[words]
    python = inspect.signature(function()).parameters
    shell = command_of(words).make_context("x", list(arguments)).params
    assert {name for name in python if name not in shell} <= set(ABSENT)
    required = {"name"}
    for name, value in shell.items():
        if name in python and name not in required and (*words, name) not in OTHERWISE:
            assert value == python[name].default, name
        elif name not in python:
            assert name in OWN, f"--{name} is no argument of {function().__name__}"
            if callable(OWN[name]):
                assert value == inspect.signature(OWN[name]()).parameters[name].default, name
    flags = {flag for option in command_of(words).params for flag in option.opts if flag.startswith("--")}
    for name in set(shell) & set(python):
        assert {f"--{name.replace('_', '-')}", name} & (flags | {"name"}), name


def test_starts_as_a_program(tmp_path):
    """As the entry point does: what is told, what is logged and the exit code are apart."""
    from importlib.metadata import entry_points

    [entry] = entry_points(group="console_scripts", name="histosge")
    assert entry.load() is main
    code = "import sys; from histosge.cli import main; sys.argv[0] = 'histosge'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", tmp_path / "nowhere", "out.zarr"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: histosge predict [OPTIONS] IN OUT")


@pytest.mark.usefixtures("prediction")
def test_quiet_and_verbose(source, tmp_path):
    for i, words in enumerate((["-q", "predict"], ["predict", "-q"])):
        done = works(*words, source, tmp_path / f"{i}.h5ad", *FAST)
        assert (done.stdout, done.stderr) == ("", "a library prints\n")
    done = works("predict", source, tmp_path / "out.h5ad", *FAST)
    assert done.stdout == ""
    read, *rest = done.stderr.splitlines()
    assert read.startswith(f"read {source}: images ['he']")
    assert rest == ["a library prints", "predict logs", f"wrote {tmp_path / 'out.h5ad'}"]
    for words in (["-v", "predict"], ["predict", "-v"]):
        done = run(*words, source, tmp_path / "out.h5ad", *FAST)  # which is there
        assert done.exit_code == 1
        assert "Traceback (most recent call last)" in done.stderr
        assert "exists already" in done.stderr.splitlines()[-1]


def test_messages_are_one_line(source, tmp_path, prediction):
    prediction.error = RuntimeError("first\n  second\n")
    told = fails("-q", "predict", source, tmp_path / "o.zarr", *FAST)
    assert told == "a library prints\nhistosge: first second\n"
    prediction.error = IndexError()  # a fault of ours has a traceback to report
    assert isinstance(run("predict", source, tmp_path / "o.zarr", *FAST).exception, IndexError)


# ------------------------------------------------------------------------------------------------------- encoders


def test_encoders():
    done = works("encoders")
    for word in ("stain-texture", "midnight", "h-optimus-0", "licence", "gated"):
        assert word in done.stdout


def test_tables_are_aligned():
    rows = [("long name", 1, 0.5, True, None, float("nan")), ("b", 1000, 1234.5, False, "x", 2.0)]
    assert as_table(["name", "n", "share", "is", "text", "value"], rows).splitlines() == [
        "name          n  share   is  text  value",
        "long name     1    0.5  yes  -         -",
        "b          1000   1234   no  x         2",
    ]
    assert as_table(["a"], [(-0.0001,), (0.66,)], decimals=3).split() == ["a", "0.000", "0.660"]


def test_encoders_as_json():
    rows = json.loads(works("encoders", "--json").stdout)
    frame = sge.encoders()
    assert [r["encoder"] for r in rows] == list(frame.index)
    uni = next(r for r in rows if r["encoder"] == "uni")
    assert uni["mpp"] == 0.5
    assert uni["gated"] is True
    assert next(r for r in rows if r["encoder"] == "conch_v1.5")["token_um"] is None  # NaN is no JSON


# -------------------------------------------------------------------------------------------------------- predict


def test_predict(source, predicted, back):
    done, out, before = predicted
    assert files(source) == before
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.zarr"]  # nothing half-written beside it
    assert set(back.images) == {"he"}
    assert set(back.shapes) == {"spots", "histosge_targets"}
    assert set(back.tables) == {"table", "histosge"}
    table = back.tables["histosge"]
    sdata = sd.read_zarr(source)
    sge.tl.predict(sdata, encoder="stain-texture", head="nearest", genes=5, upsample=2)
    np.testing.assert_array_equal(table.X, sdata.tables["histosge"].X)
    np.testing.assert_array_equal(table.varm["histosge_intervals"], sdata["histosge"].varm["histosge_intervals"])
    assert "added" in done.stderr
    assert f"wrote {out}" in done.stderr


def test_predict_tells_json(source, predicted, back):
    done, out, _ = predicted
    told = json.loads(done.stdout)  # all of it
    table = back.tables["histosge"]
    made = table.uns["histosge"]
    assert (told["source"], told["out"], told["plot"], told["report"]) == (str(source), str(out), None, None)
    assert (told["n_places"], told["n_genes"]) == table.shape
    assert told["n_predictable"] == table.var["predictable"].sum()
    assert (told["table"], told["encoder"], told["head"], told["seed"]) == ("histosge", "stain-texture", "nearest", 0)
    assert told["mpp"] == pytest.approx(2.0, rel=0.01)
    assert told["held_out"]["nearest"]["pcc"] == made["held_out"]["nearest"]["pcc"]


ALL_OPTIONS = {  # each with another value than the default
    "--genes GENE003,GENE001": {"genes": ["GENE003", "GENE001"]},
    "--bin-um 50 --conserve --on-invalid skip": {"bin_um": 50.0, "conserve": True, "on_invalid": "skip"},
    "--upsample 2 --target-key cells --tissue spots": {"upsample": 2, "target_key": "cells", "tissue": "spots"},
    "--encoder uni+rgb --tile-um 100 --no-dense": {"encoder": "uni+rgb", "tile_um": 100.0, "dense": False},
    "--head nearest --n-folds 3": {"head": "nearest", "n_folds": 3},
    '--head-options {"n_neighbours":6}': {"head_options": {"n_neighbours": 6}},
    "--key-added fine --rng 3 --mpp 2.0": {"key_added": "fine", "rng": 3, "mpp": 2.0},
    "--max-spots 500 --merge-um 16": {"max_spots": 500, "merge_um": 16.0},
    "--layer raw": {"layer": "raw"},
    "--image-key he --spots-key spots": {"image_key": "he", "spots_key": "spots"},
    "--table-key table --coordinate-system x": {"table_key": "table", "coordinate_system": "x"},
    "--device cpu --batch-size 8 --no-progress": {"device": "cpu", "batch_size": 8, "progress": False},
}


def test_options_arrive(source, tmp_path, asked):
    python = inspect.signature(PREDICT).parameters
    given = {name: value for values in ALL_OPTIONS.values() for name, value in values.items()}
    works("predict", source, tmp_path / "out.h5ad", *(word for line in ALL_OPTIONS for word in line.split()))
    assert asked == [{name: p.default for name, p in python.items() if name not in {"sdata", "model"}} | given]
    assert set(python) - set(given) == {"sdata", "model", "store", "inplace"}
    assert all(value != python[name].default for name, value in given.items())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--genes", "all"], {"genes": "all"}),
        (["--genes", "12"], {"genes": 12}),
        (["--genes", "EPCAM, VIM,"], {"genes": ["EPCAM", "VIM"]}),
        (["--rng", "7"], {"rng": 7}),
        (["--dense", "--progress"], {"dense": True, "progress": True}),
    ],
)
def test_values_are_read(tmp_path, asked, source, options, wanted):
    works("predict", source, tmp_path / "out.h5ad", *options)
    assert {name: asked[0][name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--head-options", "[1]"], "'[1]' is no object in JSON, such as"),
        (["--head-options", "{k: 1}"], "is no object in JSON"),
        (["--plot", "map.gif"], "'--plot': plot='map.gif': the name must end in .png or .pdf or .svg."),
        (["--report", "page"], "'--report': report='page': the name must end in .html."),
        (["--n-domains", "4"], "--n-domains: for --domains. Pass that as well"),
        (["--resolution", "1.0"], "--resolution: for --domains."),
        (["--layers", "conserved"], "--layers: OUT.zarr holds all layers."),
        (["--domains", "--n-domains", "1"], "'--n-domains': 1 is not in the range x>=2"),
        (["--store", "--overwrite"], "--store continues where an earlier run stopped and replaces nothing"),
        (["--store", "--domains"], "need the whole table in memory: leave --store out"),
        (["--store", "--plot", "map.png"], "need the whole table in memory"),
        (
            ["--model", "tests", "--n-folds", "5", "--head", "ridge"],
            "--head, --n-folds: the model in tests has its own.",
        ),
        (["--image", "nowhere.tif"], "'nowhere.tif' does not exist"),
        (["--image", "README.md", "--image", "LICENSE"], "--image is given 2 times for 1 sections"),
        (["--weights", "nowhere"], "'nowhere' does not exist"),
        (["--typo"], "No such option"),
    ],
)
def test_wrong_usage(source, tmp_path, asked, options, match):
    told = fails("predict", source, tmp_path / "out.zarr", *options, code=2)
    assert match in " ".join(told.split())
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_of_names(source, tmp_path):
    assert "choose a name that ends in .zarr" in fails("predict", source, tmp_path / "out.csv", code=2)
    assert "--store writes a SpatialData store" in fails("predict", source, tmp_path / "out.h5ad", "--store", code=2)
    assert "does not exist" in fails("predict", tmp_path / "nowhere", tmp_path / "out.zarr", *FAST, code=2)


def test_table_alone(source, tmp_path, asked):
    done = works("predict", source, tmp_path / "out.h5ad", *FAST)
    assert ".part." not in done.stderr
    table = ad.read_h5ad(tmp_path / "out.h5ad")
    assert table.n_vars == 5
    assert table.varm["histosge_intervals"].shape == (5, 105)
    assert table.uns["histosge"]["head"] == "nearest"
    assert "exists already: pass --overwrite" in fails("predict", source, tmp_path / "out.h5ad", *FAST)
    works("predict", source, tmp_path / "out.h5ad", *FAST, "--overwrite")


# ------------------------------------------------------------------------------------------------------ intervals


@pytest.fixture
def few_rows():
    """Write a few rows at a time, as for tables that are larger than memory."""
    with sge.settings.override(part_rows=40):
        yield


@pytest.mark.filterwarnings("ignore:Did not")  # anndata 0.13, of a table inside a store
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("kind", ["section", "store", "alone", "h5ad"])
def test_intervals_on_disk(source, predicted, back, tmp_path, kind):
    """Equal to those of Python, a few rows at a time; nothing else is changed, and nothing is left behind."""
    path = tmp_path / ("t.h5ad" if kind == "h5ad" else "t.zarr")
    read = {"alone": ad.read_zarr, "h5ad": ad.read_h5ad}.get(kind, lambda path: sd.read_zarr(path).tables["histosge"])
    table = back.tables["histosge"].copy()
    if kind == "section":
        shutil.copytree(predicted[1], path)
    elif kind == "store":
        works("predict", source, path, *FAST, "--store")
    elif kind == "alone":
        table.write_zarr(path, chunks=(50, 2))
    else:
        sge.io.write_h5ad(table, path)
    before = read(path)
    told = json.loads(works("intervals", path, "--json").stdout)
    assert (told["out"], told["level"], told["n_genes"]) == (str(path), 0.9, 5)
    done = works("intervals", path, "--level", "0.8", "--genes", "GENE003, GENE001")
    assert f"wrote layers 'sd', 'lower', 'upper' to {path}: intervals at level 0.8 of 2 genes" in done.stderr
    after = read(path)
    wanted = before.copy()
    sge.tl.intervals(wanted, level=0.8, genes=["GENE001", "GENE003"])
    for layer in ("sd", "lower", "upper"):
        np.testing.assert_array_equal(after.layers[layer], wanted.layers[layer])
        assert after.layers[layer].dtype == np.float32
    np.testing.assert_array_equal(after.X, before.X)
    pd.testing.assert_frame_equal(after.obs, before.obs)
    assert after.uns["histosge"]["intervals"]["level"] == 0.8
    assert after.uns["histosge"]["head"] == "nearest"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    lazy = ad.experimental.read_lazy(path / "tables" / "histosge" if kind in ("section", "store") else path)
    np.testing.assert_array_equal(lazy.layers["upper"].compute(), wanted.layers["upper"])
    sge.tl.intervals(after, level=0.5)  # which knows them as its own


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("kind", ["zarr", "h5ad"])
def test_intervals_that_break_off_leave_the_table_as_it_was(back, tmp_path, kind):
    """The last rows of X cannot be read: the layers of all others were computed by then."""
    path = tmp_path / f"t.{kind}"
    table = back.tables["histosge"].copy()
    assert 100 < table.n_obs <= 150
    if kind == "zarr":
        table.write_zarr(path, chunks=(50, 5))
        chunks_of(path / "X")[-1].write_bytes(b"broken")
    else:
        table.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            attributes = dict(file["X"].attrs)
            del file["X"]
            file.create_dataset("X", data=table.X, chunks=(50, 5), compression="gzip").attrs.update(attributes)
            file["X"].id.write_direct_chunk((100, 0), b"broken")
    before = files(path) if kind == "zarr" else path.read_bytes()
    assert fails("intervals", path).startswith("histosge: ")
    assert (files(path) if kind == "zarr" else path.read_bytes()) == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_intervals_that_cannot_be(source, predicted, back, tmp_path):
    assert "key='typo' is not among the tables of" in fails("intervals", predicted[1], "--key", "typo")
    assert "holds no numbers of prediction intervals" in fails("intervals", predicted[1], "--key", "table")
    assert "genes ['TYPO'] are not in table 'histosge' of" in fails("intervals", predicted[1], "--genes", "TYPO")
    assert "level=2.0 is not a share of the measurements" in fails("intervals", predicted[1], "--level", "2")
    assert "does not exist" in fails("intervals", tmp_path / "nowhere.zarr", code=2)
    table = back.tables["histosge"].copy()
    table.layers["sd"] = table.X
    sge.io.write_h5ad(table, tmp_path / "mine.h5ad", layers=["sd"])
    assert "has the layers ['sd'] already, which" in fails("intervals", tmp_path / "mine.h5ad")
    table.X = sparse.csr_matrix(table.X)
    del table.layers["sd"]
    table.write_h5ad(tmp_path / "sparse.h5ad")
    assert "has no dense X, which intervals are computed around" in fails("intervals", tmp_path / "sparse.h5ad")
    centred = back.tables["histosge"].copy()
    centred.X = centred.X - centred.X.mean(0)
    centred.write_h5ad(tmp_path / "centred.h5ad")
    assert "X was scaled or centred" in fails("intervals", tmp_path / "centred.h5ad")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["centred.h5ad", "mine.h5ad", "sparse.h5ad"]


# ------------------------------------------------------------------------------------------------------ in one line


@pytest.mark.usefixtures("prediction")
def test_from_a_section_to_a_map_in_one_line(source, tmp_path, instead):
    def domains(sdata, *, key, **options):
        assert options == {"resolution": 0.5, "n_domains": 3, "rng": 4}
        sdata.tables[key].obs["domain"] = pd.Categorical.from_codes(np.arange(sdata.tables[key].n_obs) % 3, list("012"))

    instead(sge.tl, domains)
    out, plot, page = (tmp_path / name for name in ("out.zarr", "map.png", "report.html"))
    options = ["--domains", "--n-domains", "3", "--resolution", "0.5", "--rng", "4", "--plot", plot, "--report", page]
    done = works("predict", source, out, *FAST[:2], *options, "--json")
    told = json.loads(done.stdout)
    assert (told["n_domains"], told["plot"], told["report"]) == (3, str(plot), str(page))
    assert ".part." not in done.stderr
    column = sd.read_zarr(out).tables["histosge"].obs["domain"]
    assert list(column.cat.categories) == ["0", "1", "2"]
    picture = pixels(plot)
    assert picture.std() > 20
    assert picture.shape[1] > 1.5 * picture.shape[0]  # two genes, four panels
    text = page.read_text()
    assert text.endswith("</html>")
    assert 'id="domains"' in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.png", "out.zarr", "report.html"]


def test_a_picture_that_fails_costs_no_prediction(source, tmp_path, prediction):
    del prediction.table.uns["histosge"]["held_out"]
    out, page = tmp_path / "out.zarr", tmp_path / "report.html"
    told = fails("predict", source, out, *FAST, "--report", page).splitlines()
    assert told[-2] == f"wrote {out}"
    assert "held_out" in told[-1]
    assert list(tmp_path.iterdir()) == [out]
    assert "histosge" in sd.read_zarr(out).tables


def test_from_a_folder_of_space_ranger(tmp_path, asked):
    written = write_visium(tmp_path / "in", small())
    out = tmp_path / "out.zarr"
    works("predict", written.source, out, "--image", written.image, "--dataset-id", "mine", *FAST)
    back = sd.read_zarr(out)
    assert (set(back.images), set(back.shapes)) == ({"mine_full_image"}, {"mine", "histosge_targets"})
    pixels = np.moveaxis(np.asarray(back.images["mine_full_image"]), 0, -1)
    np.testing.assert_array_equal(pixels, full_image(small()))
    told = fails("predict", written.source, tmp_path / "2.zarr", "--bin-size", "8", *FAST)
    assert "bin_size=8, but" in told


@pytest.mark.usefixtures("prediction")
def test_named_genes_are_drawn(source, tmp_path, back):
    def wanted(genes):
        figure = sge.pl.expression(back, genes, key="histosge")[0, 0].figure
        figure.savefig(tmp_path / "wanted.png", dpi=110)
        plt.close(figure)
        return pixels(tmp_path / "wanted.png")

    table = back.tables["histosge"]
    some = list(table.var_names[:3])
    genes = ",".join([*some, "NOPE"])
    works("predict", source, tmp_path / "1.h5ad", "--genes", genes, "--plot", tmp_path / "1.png")
    np.testing.assert_array_equal(pixels(tmp_path / "1.png"), wanted(some))
    works("predict", source, tmp_path / "2.h5ad", "--plot", tmp_path / "2.png")
    best = table.var["held_out_pcc"].to_numpy().argsort()[::-1][:2]
    assert list(best) != [0, 1]
    np.testing.assert_array_equal(pixels(tmp_path / "2.png"), wanted(list(table.var_names[best])))


# ------------------------------------------------------------------------------------------ nothing of the user's


def test_nothing_is_overwritten(source, tmp_path, asked):
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "exists already: pass --overwrite" in fails("predict", source, out, *FAST)
    told = fails("predict", source, out, *FAST, "--overwrite")
    assert "does not look like results of histosge" in told
    assert (out / "precious.txt").read_text() == "mine"
    (tmp_path / "file.zarr").write_text("mine")
    assert "does not look like" in fails("predict", source, tmp_path / "file.zarr", *FAST, "--overwrite")
    (tmp_path / "map.png").write_text("mine")
    other = tmp_path / "other.zarr"
    assert "map.png exists already" in fails("predict", source, other, *FAST, "--plot", tmp_path / "map.png")
    assert not other.exists()
    assert asked == []  # and this is told before the work


@pytest.mark.usefixtures("prediction")
def test_results_are_overwritten_if_told(source, tmp_path):
    out = tmp_path / "out.zarr"
    out.mkdir()
    for name in ("zarr.json", "old"):
        (out / name).touch()
    assert "exists already" in fails("predict", source, out, *FAST)
    works("predict", source, out, *FAST, "--overwrite")
    assert not (out / "old").exists()
    assert "histosge" in sd.read_zarr(out).tables
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr"]


@pytest.mark.usefixtures("prediction")
def test_a_failed_run_keeps_the_old_results(source, tmp_path):
    """A part of the image of IN cannot be read, which nobody notices before OUT is half written."""
    out, broken = (shutil.copytree(source, tmp_path / name) for name in ("out.zarr", "in.zarr"))
    before = files(out)
    for chunk in chunks_of(broken / "images" / "he"):
        chunk.write_bytes(b"broken")
    options = ["--overwrite", "--plot", tmp_path / "map.png"]
    assert "predict logs" in fails("predict", broken, out, *FAST, *options)
    assert files(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zarr", "out.zarr"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_input_is_never_the_output(source, tmp_path, asked, overwrite):
    before = files(source)
    link = tmp_path / "link.zarr"
    link.symlink_to(source)
    for out in (source, source.parent / "." / source.name, link, source.parent):
        told = fails("predict", source, out, *FAST, *overwrite)
        assert "choose another name, the input is not overwritten" in told
    assert "choose another name" in fails("fit", source, source, *FAST[:2], *overwrite)
    assert files(source) == before


def test_a_folder_that_cannot_be_written_is_told_before_the_work(source, tmp_path, asked):
    (tmp_path / "file").write_text("")
    error = fails("predict", source, tmp_path / "file/out.zarr")
    assert re.search(r"file.out\.zarr cannot be written: (Not a directory|File exists)\. Choose another folder", error)
    assert not asked


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--image-key", "HE"], "image_key='HE' is not among the images of this SpatialData: ['he']."),
        (["--head", "typo"], "head='typo' is unknown."),
        (["--upsample", "4", "--bin-um", "8"], "pass one of them"),
        (["--device", "gpu"], "device='gpu' is not a device torch knows"),
        (["--encoder", "test_vit", "--weights", "tests"], "is not a folder in the hub's layout"),
        (["--model", "tests"], "tests holds no model: there is no histosge.safetensors"),
    ],
)
def test_mistakes_are_told(source, tmp_path, options, match):
    out = tmp_path / "out.zarr"
    told = fails("predict", source, out, *(FAST[:4] if "--model" not in options else []), *options)
    last = told.strip().splitlines()[-1]
    assert last.startswith("histosge: ")
    assert match in last
    assert list(tmp_path.iterdir()) == []


def test_input_that_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    told = fails("predict", tmp_path / "empty", tmp_path / "out.zarr", *FAST)
    assert told.startswith("histosge: ")
    assert len(told) > 30


@pytest.mark.parametrize("error", [ImportError, MemoryError, KeyError])
def test_errors_are_told(source, tmp_path, prediction, error):
    prediction.error = error("'hibou' requires transformers < 5.0")
    told = fails("-q", "predict", source, tmp_path / "o.zarr", "--encoder", "hibou-b")
    assert told == "a library prints\nhistosge: 'hibou' requires transformers < 5.0\n"


# ---------------------------------------------------------------------------------------------- many sections


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    """Folder of a model, of two sections, and what was told."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    done = works(
        "fit", source, source, folder, "--encoder", "stain-texture", "--head", "ridge", "--n-folds", "2", "--json"
    )
    return folder, done


def test_fit(model):
    folder, done = model
    told = json.loads(done.stdout)
    kept = sge.Model.load(folder)
    assert told["head"] == kept.head == "ridge"
    assert told["held_out"] == json.loads(json.dumps(kept.held_out))
    assert (told["n_genes"], told["encoder"]) == (8, "stain-texture")
    assert f"wrote {folder}" in done.stderr
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_model_is_used(source, model, tmp_path, asked):
    works("predict", source, tmp_path / "out.h5ad", "--model", model[0])
    assert asked[0]["model"].fingerprint() == sge.Model.load(model[0]).fingerprint()
    assert asked[0]["encoder"] == "stain-texture"


def test_model_and_store(source, model, tmp_path):
    """Really: no option but the model, and a store that is whole."""
    out = tmp_path / "out.zarr"
    told = json.loads(works("predict", source, out, "--model", model[0], "--upsample", "2", "--store", "--json").stdout)
    back = sd.read_zarr(out)
    assert (set(back.tables), set(back.images)) == ({"histosge"}, set())
    assert (told["n_places"], told["n_genes"]) == back.tables["histosge"].shape
    assert told["head"] == back.tables["histosge"].uns["histosge"]["head"] == "ridge"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr"]
    assert "exists already" in fails("predict", source, out, "--model", model[0], "--upsample", "2", "--store")


def test_fit_of_what_cannot_be(source, tmp_path, model):
    before = files(model[0])
    assert "exists already" in fails("fit", source, model[0], *FAST[:4])
    assert "head='typo' is unknown" in fails("fit", source, model[0], *FAST[:2], "--head", "typo", "--overwrite")
    assert files(model[0]) == before
    assert "Missing argument" in fails("fit", source, code=2)


# ------------------------------------------------------------------------------------------------------- evaluate


QUICK = [
    "--encoder",
    "stain-texture",
    "--heads",
    "ridge,mean",
    "--n-splits",
    "2",
    "--n-folds",
    "2",
    "--buffer-um",
    "50",
]


@pytest.fixture(scope="module")
def scored(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    out, plot = folder / "scores.csv", folder / "scores.png"
    done = works("evaluate", source, *QUICK, "-o", out, "--plot", plot, "--json")
    return done, out, plot


def test_evaluate(source, scored):
    done, out, plot = scored
    scores = pd.read_csv(out)
    wanted = sge.tl.evaluate(
        sd.read_zarr(source), encoder="stain-texture", heads=["ridge", "mean"], n_splits=2, n_folds=2, buffer_um=50
    )
    assert list(scores) == list(wanted)
    np.testing.assert_allclose(scores["pcc"], wanted["pcc"])
    told = json.loads(done.stdout)
    assert list(told["heads"]) == ["ridge", "mean"]  # best first
    for head, means in told["heads"].items():
        assert means["pcc"] == pytest.approx(wanted.loc[wanted["head"] == head, "pcc"].mean())
    assert (told["split"], told["n_genes"], told["n_rows"]) == ("blocks", 8, len(wanted))
    assert (told["sources"], told["out"], told["plot"]) == ([str(source)], str(out), str(plot))
    assert pixels(plot).std() > 10
    assert f"wrote {plot}" in done.stderr
    assert sorted(p.name for p in out.parent.iterdir()) == ["scores.csv", "scores.png"]


def test_means_are_printed(source, scored):
    done = works("evaluate", source, *QUICK)
    head, first, second = (line.split() for line in done.stdout.splitlines())
    assert head[:4] == ["head", "pcc", "spearman", "mse"]
    assert (first[0], second[:2]) == ("ridge", ["mean", "0.000"])
    assert float(first[1]) == pytest.approx(pd.read_csv(scored[1]).query("head == 'ridge'")["pcc"].mean(), abs=6e-4)
    assert done.stderr.startswith("read ")


def test_scores_on_standard_output(source, scored):
    done = works("evaluate", source, *QUICK, "-o", "-")
    pd.testing.assert_frame_equal(pd.read_csv(StringIO(done.stdout)), pd.read_csv(scored[1]))


def test_scores_of_several_sections_as_parquet(source, tmp_path):
    options = ["--split", "sections", "--buffer-um", "60", "--heads", "mean,ridge"]
    works("evaluate", source, source, *QUICK, *options, "-o", tmp_path / "scores.parquet")
    wanted = sge.tl.evaluate(
        [sd.read_zarr(source), sd.read_zarr(source)],
        encoder="stain-texture",
        heads=["mean", "ridge"],
        n_folds=2,
        split="sections",
        buffer_um=60,
    )
    found = pd.read_parquet(tmp_path / "scores.parquet")
    assert found["section"].nunique() == 2
    assert list(found["head"].unique()) == ["mean", "ridge"]
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False)


@pytest.mark.parametrize(
    ("options", "match", "code"),
    [
        (["-o", "scores.txt"], "out='scores.txt': the name must end in .csv or .parquet", 2),
        (["-o", "-", "--json"], "--out - and --json both write to standard output", 2),
        (["--split", "sections"], "split='sections' leaves one section out, and there is only one", 1),
        (["--split", "typo"], "split='typo' is unknown. Choose one of", 1),
        (["--head-options", '{"x": {}}'], "head_options name ['x'], which are not among the heads", 1),
    ],
)
def test_evaluate_tells_mistakes(source, options, match, code):
    assert match in " ".join(fails("evaluate", source, *QUICK, *options, code=code).split())


# ------------------------------------------------------------------------------------------------------- datasets


def test_datasets_list():
    names = list(sge.datasets.published().index)
    lines = works("datasets", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines[-len(names) :]] == names
    rows = json.loads(works("datasets", "list", "--json").stdout)
    assert [row["name"] for row in rows] == names
    assert all(isinstance(row["on_disk"], bool) for row in rows)


def test_datasets_fetch_of_what_is_not():
    assert "mouse_brian" in fails("datasets", "fetch", "mouse_brian")


def test_datasets_synthetic(tmp_path):
    out = tmp_path / "out.zarr"
    options = ["--n-rows", "7", "--n-cols", "7", "--n-genes", "8", "--mpp", "2", "--detail-um", "60", "--rng", "4"]
    done = works("datasets", "synthetic", out, *options)
    wanted = small(rng=4, detail_um=60.0)
    assert (sd.read_zarr(out).tables["table"].X != wanted.tables["table"].X).nnz == 0
    assert (done.stdout, done.stderr) == ("", f"wrote {out}\n")
    assert "detail_um=1.0 is out of range" in fails("datasets", "synthetic", tmp_path / "o.zarr", "--detail-um", "1")


# --------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def kept(cache_folder):
    """A cache with embeddings of two encoders."""
    cache = open_cache()
    uni = cache.group({"encoder": {"name": "uni", "mpp": 0.5}, "tile_um": 112.0, "dense": True})
    uni.put("a" * 16, np.zeros((120, 64), np.float16))
    uni.put("b" * 16, np.zeros((20, 64), np.float16))
    cache.group({"encoder": "mine"}).put("a" * 16, np.zeros((2, 3), np.float32))
    return cache


def test_cache_list(kept):
    uni, mine = (next(s for s in kept.groups() if s.encoder == name) for name in ("uni", "mine"))
    os.utime(uni.folder / f"{'a' * 16}.npy", (2e9, 2e9))
    done = run("cache", "list")
    assert done.exit_code == 0, done.output
    head, first, second, total = done.stdout.splitlines()
    assert head.split() == ["encoder", "mpp", "tile_um", "dense", "blocks", "size", "last", "used"]
    for column in ("mpp", "tile_um", "blocks"):  # numbers end where their name ends
        assert head.index(column) + len(column) == len(first[: head.index(column) + len(column)].rstrip())
    assert first.split()[:7] == ["uni", "0.5", "112", "yes", "2", "18.2", "kB"]
    assert first.split()[7] == f"{datetime.fromtimestamp(2e9):%Y-%m-%d}"
    assert second.split()[:7] == ["mine", "-", "-", "-", "1", str(mine.n_bytes), "B"]
    assert total == f"18.3 kB of at most 20 GB in {kept.root}"


def test_cache_list_as_json(kept):
    done = run("cache", "list", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["folder"] == str(kept.root)
    assert told["limit_bytes"] == 20_000_000_000
    assert told["n_bytes"] == sum(row["n_bytes"] for row in told["groups"])
    uni = next(row for row in told["groups"] if row["encoder"] == "uni")
    assert uni["config"] == {"encoder": {"name": "uni", "mpp": 0.5}, "tile_um": 112.0, "dense": True}
    assert uni["n_blocks"] == 2
    assert datetime.fromisoformat(uni["last_used"]).tzinfo is not None


def test_cache_that_is_empty(cache_folder):
    assert run("cache", "list").stdout == f"0 B of at most 20 GB in {cache_folder}\n"
    assert json.loads(run("cache", "list", "--json").stdout)["groups"] == []
    assert run("cache", "clear").stdout == f"freed 0 B in {cache_folder}\n"  # and asks nothing
    assert not cache_folder.exists()


def test_cache_clear_asks(kept):
    done = CliRunner().invoke(main, ["cache", "clear"], input="n\n")
    assert done.exit_code == 1
    assert f"Remove the embeddings by all encoders, 18.3 kB, from {kept.root}?" in done.stderr
    assert done.stdout.strip() == ""
    assert "Aborted" in fails("cache", "clear")  # nobody there to answer
    assert len(kept.groups()) == 2
    done = CliRunner().invoke(main, ["cache", "clear", "--encoder", "uni"], input="y\n")
    assert done.exit_code == 0
    assert "Remove the embeddings by 'uni', 18.2 kB" in done.stderr
    assert f"freed 18.2 kB in {kept.root}" in done.stdout
    assert [s.encoder for s in kept.groups()] == ["mine"]


def test_cache_clear(kept):
    done = run("cache", "clear", "--yes")
    assert done.exit_code == 0
    assert done.stdout == f"freed 18.3 kB in {kept.root}\n"
    assert kept.groups() == []


def test_cache_clear_of_an_unknown_encoder(kept):
    told = fails("cache", "clear", "--encoder", "unii", "--yes")
    assert told == f"histosge: encoder='unii': {kept.root} has no embeddings by it; there are 'mine', 'uni'.\n"
    assert len(kept.groups()) == 2


@pytest.mark.parametrize("command", [["list"], ["clear", "--yes"]])
def test_cache_of_somebody_else(cache_folder, command):
    cache_folder.mkdir()
    (cache_folder / "precious.txt").write_text("mine")
    told = fails("cache", *command)
    assert told.startswith(f"histosge: {cache_folder} is set as the folder for embeddings, but")
    assert (cache_folder / "precious.txt").read_text() == "mine"


def test_cache_that_is_a_file(cache_folder):
    cache_folder.write_text("")
    assert "Not a directory" in fails("cache", "list")


def test_cache_command_starts_without_torch(cache_folder):
    code = (
        "import sys; from histosge.cli import main; main(['cache', 'list'], standalone_mode=False); "
        "print(sorted({'torch', 'pandas', 'spatialdata', 'scanpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"0 B of at most 20 GB in {cache_folder}", "[]"]


@pytest.fixture
def small_demo(instead):
    """The demo on a section a quarter as large, with the fast head."""
    make, fit, join = sge.datasets.synthetic, sge.tl.predict, sc.pp.neighbors

    def synthetic(**options):
        return make(**{"n_rows": 8, "n_cols": 8, "n_genes": 20, "mpp": 2.0} | options)

    def predict(sdata, **options):
        return fit(sdata, **{"head": "ridge", "n_folds": 2} | options)

    def neighbors(table):  # the same neighbours with other weights, for which numba compiles nothing
        return join(table, method="gauss")

    instead(sge.datasets, synthetic)
    instead(sge.tl, predict)
    instead(sc.pp, neighbors)


def test_demo(small_demo, tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--seed", "1")
    assert done.exit_code == 0, done.output
    back = sd.read_zarr(out / "section.zarr")
    assert "leiden" in back.tables["histosge"].obs
    table = ad.read_h5ad(out / "predicted.h5ad")
    np.testing.assert_array_equal(table.X, back.tables["histosge"].X)
    assert table.uns["histosge"]["seed"] == 1
    picture = pixels(out / "expression.png")
    assert picture.shape[0] > 300
    assert picture.std() > 20
    for word in ("held-out spots", "nearest", "ridge", "known truth between the spots", "domains"):
        assert word in done.stdout
    # its own folder is replaced, a stranger's is not
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("mine")
    assert "does not look like results of histosge" in fails("demo", "--out", other)
    assert (other / "a.txt").exists()
