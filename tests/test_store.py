"""A store written part by part: the same as written at once, and none the worse for interruptions."""

from __future__ import annotations

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
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata
import zarr
from geopandas.testing import assert_geodataframe_equal
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData, read_zarr
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, get_transformation

from histosge._section import TableStore, _rows, _store, open_table

RECIPE = {
    "head": "in-context+kriging",
    "bin_um": 8.0,
    "scales": np.array([1.5, 2.0]),
    "encoder": {"name": "stain-texture"},
}
N_GENES = 7
SHAPES = "shapes/bins/shapes.parquet"


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


def cut(table, shapes, rows: slice):
    """Rows as a table of its own, as it is made of a part: all categories kept."""
    part = ad.AnnData(
        X=table.X[rows].copy(),
        obs=table.obs.iloc[rows].copy(),
        var=table.var.copy(),
        layers={key: values[rows].copy() for key, values in table.layers.items() if key is not None},
        obsm={key: (v.iloc[rows] if hasattr(v, "iloc") else v[rows]).copy() for key, v in table.obsm.items()},
        uns=dict(table.uns),
    )
    return part, shapes.iloc[rows]


def opened(path, n=100, part_rows=30, **changed):
    return TableStore.open(path, recipe=RECIPE | changed, n_rows=n, part_rows=part_rows)


def fill(store, table, shapes, *, parts=None, first=0):
    part, piece = cut(table, shapes, store.rows(first))
    store.begin(part, name="predicted", shapes=piece, shapes_key="bins")
    for p in range(store.n_parts) if parts is None else parts:
        part, piece = cut(table, shapes, store.rows(p))
        store.write(p, part, shapes=piece)
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
    assert _rows.geo(path / SHAPES) == _rows.geo(at_once / SHAPES)
    consolidated = zarr.open_group(path, mode="r").metadata.consolidated_metadata
    assert consolidated is not None
    assert "tables/predicted/obs/region/codes" in consolidated.flattened_metadata
    strange = [p for p in path.rglob("*") if p.is_file() and p.suffix in {".partial", ".tmp", ".done"}]
    assert strange == []


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
    ],
)
def test_parts_make_the_whole(tmp_path, monkeypatch, n, part_rows, ids, kind, order):
    monkeypatch.setattr(_store, "_CHUNK", (10, 4))
    monkeypatch.setattr(_store, "_CHUNK_VALUES", 40)
    table, shapes = whole(n, ids=ids, kind=kind)
    path = tmp_path / "out.zarr"
    store = fill(opened(path, n, part_rows), table, shapes, parts=order, first=order[0] if order else 0)
    assert not path.exists()
    assert store.done == set(range(store.n_parts))
    assert store.finish() == path
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]
    assert_same_stores(path, write_at_once(tmp_path / "whole.zarr", table, shapes))
    n_chunk = zarr.open_group(path, mode="r")["tables/predicted/X"].chunks[0]
    assert part_rows % n_chunk == 0 or store.n_parts == 1


@pytest.mark.parametrize("kind", ["polygons", "circles"])
def test_geoarrow(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(spatialdata.settings, "shapes_geometry_encoding", "geoarrow")
    table, shapes = whole(40, kind=kind)
    path = fill(opened(tmp_path / "out.zarr", n=40), table, shapes).finish()
    assert_same_stores(path, write_at_once(tmp_path / "whole.zarr", table, shapes))


def test_shapes_of_the_user_are_written_once(tmp_path):
    table, shapes = whole(ids="str")
    part, _ = cut(table, shapes, slice(0, 30))
    store = opened(tmp_path / "out.zarr", part_rows=60)
    store.begin(part, name="predicted", shapes_whole=shapes, shapes_key="bins")
    for p in range(store.n_parts):
        store.write(p, cut(table, shapes, store.rows(p))[0])
    assert_same_stores(store.finish(), write_at_once(tmp_path / "whole.zarr", table, shapes))


def test_table_without_expression(tmp_path, made):
    table, shapes = made
    bare = ad.AnnData(obs=table.obs, obsm={"spatial": table.obsm["spatial"]}, uns=dict(table.uns))
    store = opened(tmp_path / "out.zarr", part_rows=100)
    store.begin(bare, name="predicted", shapes=shapes, shapes_key="bins")
    store.write(0, bare, shapes=shapes)
    found = read_zarr(store.finish()).tables["predicted"]
    assert found.X is None
    np.testing.assert_array_equal(found.obsm["spatial"], table.obsm["spatial"])
    assert open_table(tmp_path / "out.zarr", "predicted").X is None


def test_chunks_of_a_large_table(tmp_path):
    table, shapes = whole(2, n_genes=1000)
    store = opened(tmp_path / "out.zarr", n=660_000, part_rows=32768)
    store.begin(table, name="predicted", shapes=shapes, shapes_key="bins")
    group = zarr.open_group(tmp_path / "out.zarr.partial" / "store.zarr" / "tables" / "predicted", mode="r")
    assert group["X"].chunks == group["layers/sd"].chunks == (8192, 128)
    assert group["X"].shape == (660_000, 1000)
    assert group["X"].shards is None
    assert group["obs/is_spot"].chunks == group["obs/region/codes"].chunks == (32768,)
    assert group["obsm/spatial"].chunks == (32768, 2)
    assert group["obs/region/categories"].shape == (1,)
    assert (store.n_parts, store.rows(20)) == (21, slice(655360, 660_000))


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_no_chunk_straddles_parts(part_rows, wanted):
    n = _rows.chunk_rows(part_rows, wanted=wanted, whole=False)
    assert part_rows % n == 0
    assert n == part_rows or part_rows > wanted


def stamps(path):
    return {str(p.relative_to(path)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in path.rglob("*") if p.is_file()}


def test_resume(tmp_path, log, made, at_once):
    table, shapes = made
    path = tmp_path / "out.zarr"
    store = fill(opened(path), table, shapes, parts=[2, 0])
    (store.folder / "model.json").write_text("fitted")
    del store
    before = stamps(tmp_path / "out.zarr.partial")
    store = opened(path)
    assert "resuming out.zarr: 2 of 4 parts are there" in log.text
    assert store.done == {0, 2}
    assert (store.folder / "model.json").read_text() == "fitted"
    fill(store, table, shapes, parts=[1, 3], first=1)
    after = stamps(tmp_path / "out.zarr.partial")
    assert {key: after[key] for key in before} == before
    assert_same_stores(store.finish(), at_once)
    shapes = pq.ParquetFile(path / SHAPES)
    assert [shapes.metadata.row_group(i).num_rows for i in range(shapes.num_row_groups)] == [30, 30, 30, 10]


def test_recipe_is_compared_by_what_it_says(tmp_path):
    opened(tmp_path / "out.zarr", folds=(1, 2), model=Path("a"), share=np.float32(0.5))
    same = opened(tmp_path / "out.zarr", folds=[1, 2], model="a", share=0.5, bin_um=8, scales=[1.5, 2])
    assert same.done == set()


def test_the_fit_outlives_a_run_that_was_killed_before_its_first_part(tmp_path):
    store = opened(tmp_path / "out.zarr")
    (store.folder / "model.json").write_text("fitted")
    assert (opened(tmp_path / "out.zarr").folder / "model.json").exists()


@pytest.mark.parametrize("killed_at", ["row_arrays", "_write_json"])
def test_killed_while_being_set_up(tmp_path, monkeypatch, killed_at):
    table, shapes = whole(30)
    store = opened(tmp_path / "out.zarr", n=30)
    with monkeypatch.context() as patch:
        patch.setattr(
            _store if killed_at == "_write_json" else _rows,
            killed_at,
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        if killed_at == "row_arrays":  # not in layout, which comes earlier
            patch.setattr(_rows, "layout", lambda *_: {})
        with pytest.raises(KeyboardInterrupt):
            fill(store, table, shapes)
    path = fill(opened(tmp_path / "out.zarr", n=30), table, shapes).finish()
    np.testing.assert_array_equal(read_zarr(path).tables["predicted"].X, table.X)


@pytest.mark.parametrize("left", [(), ("histosge-store.json.tmp",)])
def test_killed_at_the_very_beginning(tmp_path, left):
    partial = tmp_path / "out.zarr.partial"
    partial.mkdir()
    for name in left:
        (partial / name).write_text("{")
    assert opened(tmp_path / "out.zarr").done == set()
    assert opened(tmp_path / "out.zarr").folder.is_dir()


def test_killed_in_finish_and_the_result_removed(tmp_path):
    """Parts that are marked but whose arrays are gone are not taken for done."""
    store = fill(opened(tmp_path / "out.zarr", n=30), *whole(30))
    shutil.rmtree(tmp_path / "out.zarr.partial" / "store.zarr")
    assert store.done == {0}
    assert opened(tmp_path / "out.zarr", n=30).done == set()


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("tests_of_the_store", sys.argv[1])
tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
from pathlib import Path
calls = []
inner = tests.zarr.Array.__setitem__
def setitem(array, rows, values):
    calls.append(array.path)
    if calls.count("X") == 2 and array.path.startswith("layers"):  # the second part's
        torn = next(Path(sys.argv[2] + ".partial").rglob("c/0/0"))
        torn.with_suffix(".0123.partial").write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    inner(array, rows, values)
tests.zarr.Array.__setitem__ = setitem
table, shapes = tests.whole()
tests.fill(tests.opened(sys.argv[2]), table, shapes)
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_part(tmp_path, made, at_once):
    path = tmp_path / "out.zarr"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, __file__, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not path.exists()
    store = opened(path)
    assert store.done == {0}
    x = zarr.open_group(tmp_path / "out.zarr.partial" / "store.zarr", mode="r")["tables/predicted/X"]
    assert np.any(x[30:60])  # half a part is there
    table, shapes = made
    fill(store, table, shapes, parts=[1, 2, 3], first=1)
    assert_same_stores(store.finish(), at_once)


@pytest.mark.slow
def test_memory_stays_at_one_part(tmp_path):
    n_parts, part_rows = 5, 500
    table, shapes = whole(part_rows, n_genes=400)
    part_bytes = table.X.nbytes * 2
    store = opened(tmp_path / "out.zarr", n=n_parts * part_rows, part_rows=part_rows)
    store.begin(table, name="predicted", shapes=shapes, shapes_key="bins")
    tracemalloc.start()
    try:
        held = []
        for p in range(n_parts):
            store.write(p, table, shapes=shapes)
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
    path = fill(opened(tmp_path / "out.zarr"), table, shapes).finish()
    lazy = open_table(path, "predicted")
    for array in (lazy.X, lazy.layers["sd"]):
        assert isinstance(array, da.Array)
    disk = zarr.open_group(path, mode="r")["tables/predicted/X"]
    assert lazy.X.chunksize == (30, 7)
    assert disk.chunks == lazy.X.chunksize
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


def test_another_recipe_is_refused(tmp_path, made):
    table, shapes = made
    fill(opened(tmp_path / "out.zarr"), table, shapes, parts=[0])
    before = stamps(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"\(n_rows is 90, was 100; encoder\.name is \"uni\", was \"stain-texture\"; extra is 1, was absent\)",
    ) as error:
        opened(tmp_path / "out.zarr", n=90, encoder={"name": "uni"}, extra=1)
    assert "Finish that run with its own arguments, or remove the folder" in str(error.value)
    assert "out.zarr.partial" in str(error.value)
    assert "bin_um" not in str(error.value)
    with pytest.raises(ValueError, match=r"scales is \[0, 1, 2, .*\.\.\., was \[1\.5, 2\]"):
        opened(tmp_path / "out.zarr", scales=np.arange(100))
    assert stamps(tmp_path) == before


def test_recipe_of_unknown_things(tmp_path):
    with pytest.raises(TypeError, match=r"recipe: .* is a object; a recipe is made of numbers"):
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
    store = fill(opened(tmp_path / "out.zarr", n=30), *whole(30))
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
        FileExistsError, match=r"which exists and is not histosge's .*Move it away, or choose another store="
    ):
        opened(tmp_path / "out.zarr")
    assert stamps(tmp_path) == before


@pytest.mark.parametrize(("argument", "n", "part_rows"), [("n_rows", 0, 5), ("part_rows", 5, 0)])
def test_no_rows(tmp_path, argument, n, part_rows):
    with pytest.raises(ValueError, match=f"{argument}=0: a store needs at least one row"):
        opened(tmp_path / "out.zarr", n, part_rows)


@pytest.fixture(scope="module")
def begun(made, tmp_path_factory):
    return fill(opened(tmp_path_factory.mktemp("begun") / "out.zarr"), *made, parts=[0])


def changed(part, what):
    """A part that does not fit those before."""
    if what == "dtype":
        part.X = part.X.astype(np.float64)
    elif what == "layer":
        del part.layers["sd"]
    elif what == "order":
        part.obs = part.obs[part.obs.columns[::-1]]
    elif what == "categories":
        part.obs["layer"] = part.obs["layer"].cat.rename_categories({"deep": "white matter"})
    elif what == "unordered":
        part.obs["layer"] = part.obs["layer"].cat.as_unordered()
    elif what == "column":
        part.obs["n_tokens"] = part.obs["n_tokens"].fillna(0).astype(np.int32)
    elif what == "genes":
        part.var_names = [*part.var_names[:-1], "other"]
    elif what == "width":
        part.obsm["spatial"] = np.zeros((part.n_obs, 3))
    return part


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dtype", r"X is dense float64, not dense float32"),
        ("layer", r"layers/sd is absent, not dense float32"),
        ("order", r"obs is \[\"instance_id\", .*, not \[\"array_row\""),
        (
            "categories",
            r"obs/layer/codes is \[\"upper\", \"white matter\"\], ordered, not \[\"upper\", \"deep\"\], ordered",
        ),
        ("unordered", r"not ordered, not .* ordered"),
        ("column", r"obs/n_tokens is int32, not absent; obs/n_tokens/mask is absent, not bool"),
        ("genes", r"var is .*\"other\"\], not .*\"G6\"\]"),
        ("width", r"obsm/spatial is float64 3, not float64 2"),
    ],
)
def test_parts_that_differ(begun, made, what, message):
    table, shapes = made
    part, piece = cut(table, shapes, begun.rows(1))
    part = changed(part, what)
    with pytest.raises(ValueError, match=r"part 1 differs from the part that began the store: .*" + message):
        begun.write(1, part, shapes=piece)
    assert begun.done == opened(begun.path).done == {0}
    with pytest.raises(ValueError, match=r"this run's table differs .*" + message):
        begun.begin(part, name="predicted", shapes=piece, shapes_key="bins")


def test_misuse(tmp_path, made):
    table, shapes = made
    store = opened(tmp_path / "out.zarr")
    part, piece = cut(table, shapes, store.rows(0))
    with pytest.raises(RuntimeError, match=r"out\.zarr is not set up; call begin\(\)"):
        store.write(0, part, shapes=piece)
    for elements, word in (({}, "neither"), ({"shapes": piece, "shapes_whole": shapes}, "both")):
        with pytest.raises(ValueError, match=f"shapes=, shapes_whole=: pass one of them, not {word}"):
            store.begin(part, name="predicted", shapes_key="bins", **elements)
    store.begin(part, name="predicted", shapes=piece, shapes_key="bins")
    with pytest.raises(ValueError, match=r"begun otherwise: name='other' \(there: 'predicted'\)"):
        store.begin(part, name="other", shapes=piece, shapes_key="bins")
    with pytest.raises(ValueError, match=r"shapes='whole' \(there: 'in parts'\)"):
        store.begin(part, name="predicted", shapes_whole=shapes, shapes_key="bins")
    with pytest.raises(IndexError, match=r"part=4: this store has the parts 0 to 3"):
        store.write(4, part, shapes=piece)
    with pytest.raises(ValueError, match=r"part 3: its table has 30 rows, but the part has 10 \(90 to 99\)"):
        store.write(3, part, shapes=piece)
    with pytest.raises(ValueError, match=r"part 0: its shapes has 100 rows, but the part has 30"):
        store.write(0, part, shapes=shapes)
    with pytest.raises(ValueError, match=r"part 0: the shapes 'bins' of this store are written in parts: pass shapes="):
        store.write(0, part)
    with pytest.raises(ValueError, match=r"part 0: its shapes have the columns .*, but those that began the store"):
        store.write(0, part, shapes=piece.drop(columns="is_spot"))
    store.write(0, part, shapes=piece)
    with pytest.raises(ValueError, match="part=0 is written already"):
        store.write(0, part, shapes=piece)
    with pytest.raises(RuntimeError, match=r"out\.zarr: 3 of 4 parts are missing \(the first is 1\)"):
        store.finish()


def test_shapes_for_a_store_that_has_them_whole(tmp_path, made):
    table, shapes = made
    store = opened(tmp_path / "out.zarr")
    part, piece = cut(table, shapes, store.rows(0))
    store.begin(part, name="predicted", shapes_whole=shapes, shapes_key="bins")
    with pytest.raises(ValueError, match="were written whole: leave out shapes="):
        store.write(0, part, shapes=piece)


@pytest.mark.parametrize("what", ["sparse", "sparse obsm", "obsp", "raw", "empty"])
def test_tables_that_have_no_parts(tmp_path, what, made):
    from scipy.sparse import csr_matrix

    table, shapes = made
    part, piece = cut(table, shapes, slice(0, 30))
    if what == "sparse":
        part.X, told = csr_matrix(part.X), r"X \(csr_matrix\)"
    elif what == "sparse obsm":
        part.obsm["spatial"], told = csr_matrix(part.obsm["spatial"]), r"obsm/spatial is a csr_matrix"
    elif what == "obsp":
        part.obsp["distances"], told = np.eye(30), r"obsp=\['distances'\]"
    elif what == "raw":
        part.raw, told = part.copy(), "raw"
    else:
        (part, piece), told = cut(table, shapes, slice(0, 0)), "0 rows"
    with pytest.raises(ValueError, match=rf"table: {told}"):
        opened(tmp_path / "out.zarr").begin(part, name="predicted", shapes=piece, shapes_key="bins")


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, shapes = whole(30)
    assert fill(opened("new/out.zarr", n=30), table, shapes).finish() == Path("new/out.zarr")
    assert [p.name for p in Path("new").iterdir()] == ["out.zarr"]
