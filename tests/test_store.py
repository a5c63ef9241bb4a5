"""A store written part by part: the same as one written at once, and unharmed by interruptions."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import anndata as ad
import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import zarr
from geopandas.testing import assert_geodataframe_equal
from spatialdata import SpatialData, read_zarr
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, get_transformation

from histosge._section import TableStore, open_table

PARAMS = {
    "head": "in-context+kriging",
    "bin_um": 8.0,
    "scales": np.array([1.5, 2.0]),
    "encoder": {"name": "stain-texture"},
}
N_GENES = 7


def whole(n: int = 100, *, ids: str = "int", kind: str = "polygons", n_genes: int = N_GENES, seed: int = 0):
    """A table like those of ``predicted_table`` and its shapes, all rows."""
    rng = np.random.default_rng(seed)
    row, col = np.divmod(np.arange(n), 10)
    xy = np.stack([col, row], axis=1) * 4.0 + 2
    frame = gpd.GeoDataFrame(geometry=shapely.points(xy))
    if kind == "polygons":
        frame = gpd.GeoDataFrame(geometry=shapely.box(*(xy - 2).T, *(xy + 2).T))
    else:
        frame["radius"] = 2.0
    frame["array_row"], frame["array_col"], frame["is_spot"] = row, col, rng.random(n) < 0.3
    if ids == "str":
        frame.index = pd.Index([f"cell-{i}" for i in range(n)])
    shapes = ShapesModel.parse(frame, transformations={"global": Identity(), "um": Scale([2.0, 2.0], axes=("x", "y"))})
    obs = pd.DataFrame(index=pd.Index([f"bins-{i}" for i in shapes.index], dtype=str))
    obs["array_row"], obs["array_col"] = row, col
    obs["is_spot"] = frame["is_spot"].to_numpy()
    obs["distance_to_spot_um"] = rng.random(n).astype(np.float32)
    # the last category is in the last rows only
    obs["layer"] = pd.Categorical(np.where(np.arange(n) < n - 1, "upper", "deep"), ["upper", "deep"], ordered=True)
    obs["n_tokens"] = pd.array(np.where(row % 2, row, 0), dtype="Int32")
    obs["n_tokens"] = obs["n_tokens"].mask(obs["n_tokens"] == 0)
    expression = np.log1p(rng.gamma(1, size=(n, n_genes))).astype(np.float32)
    expression[expression < 0.2] = 0
    var = pd.DataFrame({"score": rng.random(n_genes)}, index=pd.Index([f"G{i}" for i in range(n_genes)], dtype=str))
    table = ad.AnnData(X=expression, obs=obs, var=var)
    table.layers["sd"] = rng.random((n, n_genes)).astype(np.float32)
    table.obsm["spatial"] = xy
    table.obsm["frame"] = pd.DataFrame({"a": rng.random(n)}, index=obs.index)
    table.uns["histosge"] = {"head": "kriging", "scores": np.arange(3.0), "nested": {"genes": ["a", "b"], "n": 3}}
    table.uns["log1p"] = {}
    table.obs["region"] = pd.Categorical(["bins"] * n)
    table.obs["instance_id"] = np.asarray(shapes.index)
    return TableModel.parse(table, region="bins", region_key="region", instance_key="instance_id"), shapes


def head_of(table):
    """All but the matrices, as a store begins with it."""
    return ad.AnnData(obs=table.obs, var=table.var, obsm=dict(table.obsm), uns=dict(table.uns))


def matrices(table, rows=slice(None)):
    return {"X": table.X[rows], "sd": table.layers["sd"][rows]}


def opened(path, n=100, part_rows=30, **changed):
    return TableStore.open(path, name="predicted", params=PARAMS | changed, n_rows=n, part_rows=part_rows)


def run_folder(path):
    """Where an unfinished run works."""
    [found] = (p for p in path.with_name(f"{path.name}.partial").glob("run-*") if p.is_dir())
    return found


def begun(store, table, shapes):
    store.begin(head_of(table), shapes={"bins": shapes}, matrices=["X", "sd"])
    return store


def fill(store, table, *, parts=None):
    for p in range(store.n_parts) if parts is None else parts:
        store.write(p, matrices(table, store.rows(p)))
    return store


def nodes(path):
    """Shape, type and attributes of all that is in a zarr, by path."""
    found = {}
    for file in sorted(path.rglob("zarr.json")):
        meta = json.loads(file.read_text())
        found[str(file.parent.relative_to(path))] = {
            k: meta.get(k) for k in ("shape", "data_type", "attributes", "fill_value")
        }
    return found


def same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    else:
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)


def assert_same_tables(a, b):
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)
    assert a.layers.keys() == b.layers.keys()
    assert a.obsm.keys() == b.obsm.keys()
    for x, y in [(a.X, b.X), *((a.layers[key], b.layers[key]) for key in a.layers)]:
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    np.testing.assert_array_equal(a.obsm["spatial"], b.obsm["spatial"])
    pd.testing.assert_frame_equal(a.obsm["frame"], b.obsm["frame"])
    same(dict(a.uns), dict(b.uns))


def assert_same_stores(path, at_once):
    """By spatialdata's own reader, and node by node."""
    a, b = read_zarr(path), read_zarr(at_once)
    assert_same_tables(a.tables["predicted"], b.tables["predicted"])
    assert_geodataframe_equal(a.shapes["bins"], b.shapes["bins"])
    assert get_transformation(a.shapes["bins"], get_all=True) == get_transformation(b.shapes["bins"], get_all=True)
    assert nodes(path) == nodes(at_once)
    consolidated = zarr.open_group(path, mode="r").metadata.consolidated_metadata
    assert consolidated is not None
    assert {"tables/predicted/X", "tables/predicted/layers/sd"} < consolidated.flattened_metadata.keys()
    assert [p for p in path.rglob("*") if p.is_file() and p.suffix in {".partial", ".tmp", ".done"}] == []


def write_at_once(path, table, shapes):
    """What a store written in parts must be like."""
    SpatialData(shapes={"bins": shapes}, tables={"predicted": table}).write(path)
    return path


@pytest.fixture(scope="module")
def made():
    """Table and shapes of most tests; not to be changed."""
    return whole()


@pytest.fixture(scope="module")
def at_once(made, tmp_path_factory):
    return write_at_once(tmp_path_factory.mktemp("at_once") / "whole.zarr", *made)


@pytest.mark.parametrize(
    ("n", "part_rows", "ids", "kind", "order"),
    [
        (100, 30, "int", "polygons", None),
        (100, 33, "str", "circles", (3, 1, 0, 2)),  # one row in the last part, which comes first
        (100, 1000, "int", "circles", None),
        (3, 1, "str", "polygons", (2, 0, 1)),
        (20_000, 16_384, "int", "circles", (1, 0)),  # several chunks in a part
    ],
)
def test_parts_make_the_whole(tmp_path, n, part_rows, ids, kind, order):
    table, shapes = whole(n, ids=ids, kind=kind)
    path = tmp_path / "out.zarr"
    store = fill(begun(opened(path, n, part_rows), table, shapes), table, parts=order)
    assert not path.exists()
    assert store.done == set(range(store.n_parts))
    assert store.finish() == path
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]
    assert_same_stores(path, write_at_once(tmp_path / "whole.zarr", table, shapes))


@pytest.mark.parametrize(
    ("n", "part_rows", "n_genes", "chunks"),
    [
        (33_000, 32_768, 300, (8192, 128)),
        (33_000, 10_000, 300, (10_000, 104)),  # of the divisors of a part, and as large
        (33_000, 16_000, 100, (8000, 100)),
        (33_000, 32_749, 3, (32_749, 3)),  # a prime number
        (5000, 32_768, 3, (5000, 3)),
    ],
)
def test_chunks(tmp_path, n, part_rows, n_genes, chunks):
    """About 4 MB, and none is of two parts."""
    obs = pd.DataFrame(index=[f"b{i}" for i in range(n)])
    store = opened(tmp_path / "out.zarr", n, part_rows)
    store.begin(
        ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])), shapes={}, matrices=["X"]
    )
    for part in range(store.n_parts):
        store.write(part, {"X": np.zeros((len(range(n)[store.rows(part)]), n_genes), np.float32)})
    x = zarr.open_group(store.finish(), mode="r")["tables/predicted/X"]
    assert (x.shape, x.chunks, x.shards) == ((n, n_genes), chunks, None)
    assert part_rows % chunks[0] == 0 or store.n_parts == 1


def stamps(path):
    return {str(p.relative_to(path)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in path.rglob("*") if p.is_file()}


def test_resume(tmp_path, log, made, at_once):
    table, shapes = made
    path = tmp_path / "out.zarr"
    store = fill(begun(opened(path), table, shapes), table, parts=[2, 0])
    (store.folder / "model.json").write_text("fitted")
    store.close()
    before = stamps(run_folder(path))
    store = opened(path)
    assert "resuming out.zarr: 2 of 4 parts are there" in log.text
    assert (store.begun, store.done, store.n_rows_left) == (True, {0, 2}, 40)
    assert (store.folder / "model.json").read_text() == "fitted"
    fill(store, table, parts=[1, 3])
    after = stamps(run_folder(path))
    assert {key: after[key] for key in before} == before
    assert_same_stores(store.finish(), at_once)


def test_params_are_compared_by_their_values(tmp_path):
    opened(tmp_path / "out.zarr", folds=(1, 2), model=Path("a"), share=np.float32(0.5)).close()
    same = opened(tmp_path / "out.zarr", folds=[1, 2], model="a", share=0.5, bin_um=8, scales=[1.5, 2])
    assert same.done == set()


def test_what_a_run_keeps_survives_a_kill_before_its_first_part(tmp_path):
    with opened(tmp_path / "out.zarr") as store:
        (store.folder / "model.json").write_text("fitted")
    assert (opened(tmp_path / "out.zarr").folder / "model.json").exists()


def test_interrupted_while_it_begins(tmp_path, made, at_once):
    table, shapes = made
    store = opened(tmp_path / "out.zarr")
    unfit = head_of(table)
    unfit.uns["unfit"] = object()
    with pytest.raises(Exception, match="unfit"):
        store.begin(unfit, shapes={"bins": shapes}, matrices=["X", "sd"])
    store.close()
    store = opened(tmp_path / "out.zarr")
    assert not store.begun
    assert_same_stores(fill(begun(store, table, shapes), table).finish(), at_once)


@pytest.mark.parametrize(
    "left", [(), ("run-0123456789ab/histosge-run.txt", "run-0123456789ab/histosge-store.json.tmp")]
)
def test_killed_at_the_very_beginning(tmp_path, left):
    partial = tmp_path / "out.zarr.partial"
    partial.mkdir()
    for name in left:
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text("{")
    with opened(tmp_path / "out.zarr") as store:
        assert store.done == set()
    assert opened(tmp_path / "out.zarr").folder.is_dir()


def test_killed_in_finish_and_the_result_removed(tmp_path):
    """Parts that are marked but whose arrays are gone do not count as done."""
    table, shapes = whole(30)
    store = fill(begun(opened(tmp_path / "out.zarr", n=30), table, shapes), table)
    shutil.rmtree(run_folder(store.path) / "store.zarr")
    store.close()
    assert store.done == {0}
    store = opened(tmp_path / "out.zarr", n=30)
    assert (store.begun, store.done) == (False, set())


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("tests_of_the_store", sys.argv[1])
tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
calls = []
inner = tests.zarr.Array.__setitem__
def setitem(array, rows, values):
    calls.append(array.path)
    if calls.count("X") == 2 and array.path.startswith("layers"):  # the second part's
        torn = next(tests.Path(sys.argv[2] + ".partial").rglob("c/0/0"))
        torn.with_suffix(".0123.partial").write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    inner(array, rows, values)
table, shapes = tests.whole()
store = tests.begun(tests.opened(sys.argv[2]), table, shapes)
tests.zarr.Array.__setitem__ = setitem
tests.fill(store, table)
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_part(tmp_path, made, at_once):
    path = tmp_path / "out.zarr"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, __file__, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not path.exists()
    store = opened(path)
    assert store.done == {0}
    x = zarr.open_group(run_folder(path) / "store.zarr", mode="r")["tables/predicted/X"]
    assert np.any(x[30:60])  # half a part is there
    assert_same_stores(fill(store, made[0], parts=[1, 2, 3]).finish(), at_once)


@pytest.mark.slow
def test_memory_stays_at_one_part(tmp_path):
    n_parts, part_rows, n_genes = 5, 500, 400
    table, shapes = whole(n_parts * part_rows, n_genes=n_genes)
    part_bytes = 2 * part_rows * n_genes * 4
    store = begun(opened(tmp_path / "out.zarr", n=n_parts * part_rows, part_rows=part_rows), table, shapes)
    tracemalloc.start()
    try:
        held = []
        for p in range(n_parts):
            store.write(p, matrices(table, store.rows(p)))
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        store.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held[-1] - held[2] < part_bytes / 10
    assert peak - held[0] < 2 * part_bytes


def test_open_table(tmp_path, made):
    table, shapes = made
    path = fill(begun(opened(tmp_path / "out.zarr"), table, shapes), table).finish()
    lazy = open_table(path, "predicted")
    for array in (lazy.X, lazy.layers["sd"]):
        assert isinstance(array, da.Array)
        assert array.chunksize == (30, 7)
    eager = read_zarr(path).tables["predicted"]
    assert_same_tables(lazy.to_memory(), eager)
    np.testing.assert_array_equal(lazy[:, "G3"].X.compute(), table.X[:, [3]])
    # it is a table like any other
    sdata = SpatialData(shapes={"bins": shapes}, tables={"predicted": lazy})
    sdata.write(tmp_path / "again.zarr")
    assert_same_tables(read_zarr(tmp_path / "again.zarr").tables["predicted"], eager)
    with pytest.raises(KeyError, match=r"name='other' is not among the tables of .*out\.zarr': \['predicted'\]"):
        open_table(path, "other")
    with pytest.raises(KeyError, match=r"not among the tables of .*nowhere\.zarr': \[\]"):
        open_table(tmp_path / "nowhere.zarr", "predicted")


@pytest.mark.filterwarnings("ignore:Did not read zarr as consolidated")  # the store is, and not its table alone
def test_anndata_reads_it_lazily(tmp_path, made):
    table, shapes = made
    path = fill(begun(opened(tmp_path / "out.zarr"), table, shapes), table).finish()
    lazy = ad.experimental.read_lazy(path / "tables" / "predicted")
    np.testing.assert_array_equal(lazy[40:50, "G3"].to_memory().X, table.X[40:50, [3]])
    np.testing.assert_array_equal(lazy.layers["sd"].compute(), table.layers["sd"])


def test_another_run_is_refused(tmp_path, made):
    table, shapes = made
    with opened(tmp_path / "out.zarr") as store:
        fill(begun(store, table, shapes), table, parts=[0])
    before = stamps(run_folder(store.path))
    with pytest.raises(
        ValueError,
        match=r"\(n_rows is 90, was 100; encoder\.name is \"uni\", was \"stain-texture\"; extra is 1, was absent\)",
    ) as error:
        opened(tmp_path / "out.zarr", n=90, encoder={"name": "uni"}, extra=1)
    assert "Finish that run with its own arguments, or remove the folder" in str(error.value)
    assert "out.zarr.partial" in str(error.value)
    assert "bin_um" not in str(error.value)
    with pytest.raises(ValueError, match=r"scales is \[0, 1, 2, .*\.\.\., was \[1\.5, 2\.0\]"):
        opened(tmp_path / "out.zarr", scales=np.arange(100))
    with pytest.raises(ValueError, match='table is "other", was "predicted"'):
        TableStore.open(tmp_path / "out.zarr", name="other", params=PARAMS, n_rows=100, part_rows=30)
    assert stamps(run_folder(store.path)) == before


def test_params_of_unknown_things(tmp_path):
    with pytest.raises(TypeError, match=r"params: .* is a object; params are numbers"):
        opened(tmp_path / "out.zarr", model=object())
    assert list(tmp_path.iterdir()) == []


def test_existing_path_is_refused(tmp_path):
    (tmp_path / "out.zarr").mkdir()
    with pytest.raises(
        FileExistsError, match=r"store='.*out\.zarr' exists already; choose another store=, or remove it"
    ):
        opened(tmp_path / "out.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_path_taken_meanwhile(tmp_path):
    table, shapes = whole(30)
    store = fill(begun(opened(tmp_path / "out.zarr", n=30), table, shapes), table)
    (tmp_path / "out.zarr").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        store.finish()
    (tmp_path / "out.zarr").rmdir()
    assert store.finish().is_dir()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_foreign_folder_is_refused(tmp_path, what):
    partial = tmp_path / "out.zarr.partial"
    if what == "folder":
        partial.mkdir()
    (partial / "thesis.txt" if what == "folder" else partial).write_text("precious")
    before = stamps(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"which exists and is not histosge's\. Move it away, or choose another store="
    ):
        opened(tmp_path / "out.zarr")
    assert stamps(tmp_path) == before


@pytest.mark.parametrize(("argument", "n", "part_rows"), [("n_rows", 0, 5), ("part_rows", 5, 0)])
def test_no_rows(tmp_path, argument, n, part_rows):
    with pytest.raises(ValueError, match=f"{argument}=0: a store needs at least one row"):
        opened(tmp_path / "out.zarr", n, part_rows)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (1, lambda m: m | {"X": m["X"].astype(float)}, r"'X': 'float64 \(30, 7\)'.* needs \{'X': 'float32 \(30, 7\)'"),
        (1, lambda m: {"X": m["X"]}, r"are \{'X': 'float32 \(30, 7\)'\}, .* 'sd': 'float32 \(30, 7\)'\}"),
        (1, lambda m: m | {"more": m["X"]}, r"'more': 'float32 \(30, 7\)'\}, but"),
        (1, lambda m: {key: values[:, 1:] for key, values in m.items()}, r"'X': 'float32 \(30, 6\)'"),
        (3, lambda m: m, r"'X': 'float32 \(30, 7\)'.* needs \{'X': 'float32 \(10, 7\)'"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, made, part, change, message):
    table, shapes = made
    store = begun(opened(tmp_path / "out.zarr"), table, shapes)
    with pytest.raises(ValueError, match=f"part {part}: the matrices .*{message}"):
        store.write(part, change(matrices(table, store.rows(0))))
    store.close()
    assert store.done == opened(store.path).done == set()


def test_a_part_is_written_once(tmp_path, made):
    table, shapes = made
    store = fill(begun(opened(tmp_path / "out.zarr"), table, shapes), table, parts=[1])
    for again in (lambda: store, lambda: opened(tmp_path / "out.zarr")):
        with again() as same, pytest.raises(ValueError, match=r"part=1 is on disk already; write only parts that are"):
            fill(same, table, parts=[1])


def test_incomplete(tmp_path, made):
    table, shapes = made
    store = opened(tmp_path / "out.zarr")
    with pytest.raises(ValueError, match=r"table: it has 50 rows, but the store has 100"):
        store.begin(head_of(table[:50]), shapes={"bins": shapes}, matrices=["X", "sd"])
    fill(begun(store, table, shapes), table, parts=[0])
    with pytest.raises(RuntimeError, match=r"out\.zarr: 3 of 4 parts are missing \(the first is 1\)"):
        store.finish()


def test_relative_path(tmp_path):
    table, shapes = whole(30)
    with contextlib.chdir(tmp_path):
        store = fill(begun(opened("new/out.zarr", n=30), table, shapes), table)
        assert store.finish() == Path("new/out.zarr")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.zarr"]
