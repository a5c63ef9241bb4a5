"""Benchmarks still run: each of asv's at its smallest size, and the scripts' own arithmetic against what is known."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks are in the repository only")

MODULES = sorted(path.stem for path in (FOLDER / "suite").glob("*.py") if path.stem != "__init__")
SMALLER = {
    ("heads", "Fit"): {"n_spots": 100},
    ("heads", "Predict"): {
        "n_spots": 300,
        "n_genes": 30,
        "n_embedding": 32,
        "params": (["kriging", "in-context"], [100]),
    },
    ("store", "Write"): {"n_genes": 10, "params": ([500],), "part_rows": 300},
    ("tiles", "Tiles"): {"params": ([600], ["zarr"], [1.0])},
    ("embedding", "Embed"): {"params": ([6],)},
    ("store", "Predict"): {"params": ([50.0],), "rows": 7},
}


@pytest.fixture
def scripts(monkeypatch):
    """Load a module of the folder by its name, as a script there would import it."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def quiet():
    import histosge as sge

    with sge.settings.override(verbosity=sge.settings.verbosity, cache_gb=sge.settings.cache_gb):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_suite(scripts, quiet, name):
    module = scripts(f"suite.{name}")
    ran = []
    for thing in vars(module).values():
        if inspect.isfunction(thing) and thing.__name__.startswith("timeraw_"):
            assert importlib.util.find_spec(thing().removeprefix("import "))
            ran.append(thing.__name__)
        if not inspect.isclass(thing) or thing.__module__ != module.__name__:
            continue
        changed = type(thing.__name__, (thing,), SMALLER.get((name, thing.__name__), {}))
        heads = changed.params[0] if name == "heads" else changed.params[0][:1]
        for first in heads:
            values = (first, *(choices[0] for choices in changed.params[1:]))
            assert len(values) == len(changed.param_names)
            one = changed()
            one.setup(*values)
            for method in [m for m in dir(one) if m.startswith(("time_", "peakmem_", "track_"))]:
                value = getattr(one, method)(*values)
                assert value is None or value > 0
                ran.append(method)
            if hasattr(one, "teardown"):
                one.teardown(*values)
    assert ran


def test_asv_finds_the_suite():
    assert (FOLDER / json.loads((FOLDER / "asv.conf.json").read_text())["benchmark_dir"]).is_dir()


@pytest.mark.skipif("HISTOSGE_SLOW" in os.environ, reason="they are wanted")
def test_slow_parameters_are_left_out(scripts):
    coverage = scripts("suite.areas").Coverage()
    with pytest.raises(NotImplementedError, match="HISTOSGE_SLOW"):
        coverage.setup(1_000_000, "square")


def test_gpu_on_the_processor(scripts, quiet, capsys):
    found = scripts("gpu").main(["--device", "cpu", "--quick"])["tiny"]
    assert found["ours: tiles/s"] > 0
    assert found["ours: gap"] < 0.05  # the two ways see the same pixels
    assert "| ours |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_gpu_asks_for_one(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts("gpu").main([])
    assert "--device cpu --quick" in capsys.readouterr().err


def test_operations_are_those_of_a_transformer(scripts):
    gpu = scripts("gpu")
    module = gpu.SHAPES["tiny"].build()
    n, d, hidden = module.pos_embed.shape[1], module.embed_dim, module.blocks[0].mlp.fc1.out_features
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * hidden  # projections, attention, MLP
    patches = module.patch_embed.num_patches * d * 3 * module.patch_embed.patch_size[0] ** 2
    assert gpu.operations(gpu.SHAPES["tiny"], tile_px=160) == 2 * (len(module.blocks) * block + patches)


def test_busy_time_counts_overlaps_once(scripts):
    busy_s = scripts("gpu").busy_s
    assert busy_s([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == (4, 6)
    assert busy_s([]) == (0, 0)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_scripts_find_what_they_import(scripts, name):
    assert scripts(name).__doc__.strip()


def test_accuracy_of_a_mean_and_its_parts(scripts, quiet, tmp_path, capsys):
    """The tables of docs/benchmarks.md, on a section that is always there."""
    import histosge as sge

    section = sge.datasets.synthetic(n_rows=10, n_cols=10, n_genes=20, mpp=2.0)
    table = section["table"]
    kept = ad.AnnData(table.X, var=pd.DataFrame(index=table.var_names), obsm={"spatial": table.obsm["spatial"]})
    kept.uns["meta"] = {"spot_diameter_px": 27.5}
    kept.write_h5ad(tmp_path / "counts.h5ad")
    Image.fromarray(np.moveaxis(np.asarray(section["he"]["scale0"]["image"]), 0, -1)).save(tmp_path / "image.png")
    accuracy = scripts("accuracy")
    accuracy.RUNS["small"] = ([str(tmp_path)], "random", {"n_splits": 1}, ["default"])
    accuracy.run("small", seeds=range(2), heads=["ridge+nearest", "mean"])
    printed = capsys.readouterr().out
    rows = [line.split("|")[2].strip(" *") for line in printed.splitlines() if "±" in line]
    assert rows == ["ridge+nearest", "ridge", "nearest", "mean"], printed


def test_readers_side_by_side(scripts, quiet, monkeypatch, tmp_path, capsys):
    side_by_side, readers, slides = (scripts(name) for name in ("side_by_side", "readers", "slides"))
    pixels = np.random.default_rng(0).integers(150, 250, (3, 768, 768), np.uint8)
    # what is there is not built
    slides.section(pixels, slides.hexagonal_px(768), chunk_px=256).write(tmp_path / "section_768.zarr")
    zarr.create_array(tmp_path / "bare_768.zarr", data=pixels, chunks=(3, 256, 256), compressors=None, filters=None)
    monkeypatch.setattr(readers, "installed", lambda *names: False)
    side_by_side.main(["reader", "--edge", "768", "--repeats", "1", "--slow", "4", "--work", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "pixels of 4 tiles are those of the image: ours, slices" in printed
    assert "ours, SpatialData element (dask)" in printed
    with pytest.raises(RuntimeError, match="other pixels"):
        readers.check_same({"theirs": iter([np.zeros((1, 2, 2, 3))])}, n=1, truth=np.ones((1, 2, 2, 3), np.uint8))


def test_contenders_take_turns(scripts):
    timing, order = scripts("timing"), []
    made = [timing.Contender(name, lambda name=name: order.append(name) or 7) for name in "abc"]
    measured = timing.interleave(made, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the first three warm up
    assert [len(one.seconds) for one in measured.values()] == [3, 3, 3]
    assert timing.Timed("a", "tiles", 10, [1.0, 2.0, 100.0]).rate == 5
