"""The shell: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime

import anndata as ad
import numpy as np
import pytest
import spatialdata as sd
from click.testing import CliRunner
from PIL import Image

import histosge as sge
from histosge._cache import open_cache
from histosge.cli import _size, main

FAST = ["--encoder", "stain-texture", "--head", "nearest", "--genes", "5", "--upsample", "2"]


@pytest.fixture(autouse=True)
def _quiet_again():
    yield
    sge.settings.verbosity = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "in.zarr"
    sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=8, mpp=2.0).write(path)
    return path


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def fails(*args, code=1):
    """End with a message and this code, not with a traceback."""
    done = run(*args)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code
    assert "Traceback" not in done.output
    return done.output


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_help():
    for command in ([], ["predict"], ["demo"], ["encoders"], ["cache"], ["cache", "list"], ["cache", "clear"]):
        done = run(*command, "--help")
        assert done.exit_code == 0
        assert "Usage:" in done.output
    assert "--pitch-um" in run("predict", "-h").output
    assert run("--version").output.strip() == f"histosge, version {sge.__version__}"


def test_options_are_those_of_python():
    """Same names and defaults as tl.predict."""
    import inspect

    python = inspect.signature(sge.tl.predict).parameters
    renamed = {"seed": "rng", "source": "sdata"}
    own = {"target", "weights", "overwrite", "no_cache"}
    for option in main.commands["predict"].params:
        if option.name in own:
            continue
        name = renamed.get(option.name, option.name)
        assert name in python, name
        default = python[name].default
        if default is not inspect.Parameter.empty and isinstance(option.default, str | int | float) and option.default:
            assert str(option.default) == str(default), name


def test_starts_as_a_program():
    done = subprocess.run(
        [sys.executable, "-c", "from histosge.cli import main; main()", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sge.__version__ in done.stdout


def test_encoders():
    done = run("encoders")
    assert done.exit_code == 0
    for word in ("stain-texture", "h-optimus-0", "licence", "gated"):
        assert word in done.output


def test_encoders_as_json():
    done = run("encoders", "--json")
    rows = json.loads(done.stdout)
    frame = sge.encoders()
    assert [r["encoder"] for r in rows] == list(frame.index)
    uni = next(r for r in rows if r["encoder"] == "uni")
    assert uni["mpp"] == 0.5
    assert uni["gated"] is True


def test_predict(source, tmp_path):
    before = files(source)
    done = run("predict", source, tmp_path / "out.zarr", *FAST)
    assert done.exit_code == 0, done.output
    assert files(source) == before
    back = sd.read_zarr(tmp_path / "out.zarr")
    assert set(back.images) == {"he"}
    assert set(back.shapes) == {"spots", "histosge_targets"}
    assert set(back.tables) == {"table", "histosge"}
    table = back.tables["histosge"]
    assert table.n_vars == 5
    assert table.uns["histosge"]["head"] == "nearest"
    sdata = sd.read_zarr(source)
    sge.tl.predict(sdata, encoder="stain-texture", head="nearest", genes=5, upsample=2)
    np.testing.assert_array_equal(table.X, sdata.tables["histosge"].X)
    assert "wrote" in done.stderr
    assert done.stdout == ""  # only results go there


def test_options_arrive(source, tmp_path):
    out = tmp_path / "out.zarr"
    options = ["--genes", "GENE003,GENE001", "--bin-um", "50", "--key-added", "fine", "--seed", "3", "--mpp", "2.0"]
    keys = ["--image-key", "he", "--spots-key", "spots", "--table-key", "table", "--coordinate-system", "synthetic"]
    done = run("-q", "predict", source, out, *FAST[:4], *options, *keys, "--device", "cpu", "--batch-size", "8")
    assert done.exit_code == 0, done.output
    assert "added" not in done.output
    table = sd.read_zarr(out).tables["fine"]
    assert list(table.var_names) == ["GENE001", "GENE003"]
    told = table.uns["histosge"]
    assert (told["seed"], told["mpp_source"]) == (3, "given")
    assert not table.obs["is_spot"].any()


def test_all_genes_at_the_spots(source, tmp_path):
    done = run("predict", source, tmp_path / "out.zarr", *FAST[:4], "--genes", "all", "--target-key", "spots")
    assert done.exit_code == 0, done.output
    assert sd.read_zarr(tmp_path / "out.zarr").tables["histosge"].n_vars == 8


@pytest.mark.parametrize(("level", "wanted"), [("0.5", 0.5), ("none", None), (None, 0.9)])
def test_level_arrives(source, tmp_path, level, wanted):
    options = [] if level is None else ["--level", level]
    done = run("predict", source, tmp_path / "out.zarr", *FAST, *options)
    assert done.exit_code == 0, done.output
    table = sd.read_zarr(tmp_path / "out.zarr").tables["histosge"]
    assert table.uns["histosge"].get("level") == wanted
    assert {name for name in table.layers if name} == (set() if wanted is None else {"sd", "lower", "upper"})
    if wanted is not None:
        assert (table.layers["lower"] <= table.X).all()
        assert (table.layers["upper"] >= table.X).all()


def test_level_that_is_no_number(source, tmp_path):
    told = fails("predict", source, tmp_path / "out.zarr", *FAST, "--level", "high", code=2)
    assert "'high' is neither a number between 0 and 1, such as 0.9, nor 'none'" in told
    assert not (tmp_path / "out.zarr").exists()


def test_several_heads_arrive(source, tmp_path):
    done = run("predict", source, tmp_path / "out.zarr", *FAST, "--head", "ridge+nearest")
    assert done.exit_code == 0, done.output
    told = sd.read_zarr(tmp_path / "out.zarr").tables["histosge"].uns["histosge"]
    assert told["head"] == "ridge+nearest"
    assert set(told["held_out"]) == {"ridge+nearest", "ridge", "nearest"}


def test_nothing_is_overwritten(source, tmp_path):
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "exists already: pass --overwrite" in fails("predict", source, out, *FAST)
    told = fails("predict", source, out, *FAST, "--overwrite")
    assert "does not look like results of histosge" in told
    assert (out / "precious.txt").read_text() == "mine"


def test_results_are_overwritten_if_told(source, tmp_path):
    out = shutil.copytree(source, tmp_path / "out.zarr")
    assert "exists already" in fails("predict", source, out, *FAST)
    assert "second" not in sd.read_zarr(out).tables
    assert run("predict", source, out, *FAST, "--overwrite", "--key-added", "second").exit_code == 0
    assert "second" in sd.read_zarr(out).tables


def test_a_failed_run_keeps_the_old_results(source, tmp_path):
    out = shutil.copytree(source, tmp_path / "out.zarr")
    before = files(out)
    fails("predict", source, out, "--encoder", "stain-texture", "--head", "typo", "--overwrite")
    assert out.exists()
    assert files(out) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_input_is_never_the_output(source, tmp_path, overwrite):
    before = files(source)
    link = tmp_path / "link.zarr"
    link.symlink_to(source)
    for out in (source, source.parent / "." / source.name, link):
        told = fails("predict", source, out, *FAST, *overwrite)
        assert "choose another name" in told
    assert files(source) == before


@pytest.mark.parametrize(
    "overwrite",
    [
        [],
        ["--overwrite"],
    ],
)
def test_output_is_never_around_the_input(tmp_path, overwrite):
    """A store that holds the input must not be replaced by the output."""
    outer = tmp_path / "outer.zarr"
    section = sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=8, mpp=2.0)
    section.write(outer)
    inner = outer / "inner.zarr"
    section.write(inner)
    fails("predict", inner, outer, "--encoder", "stain-texture", "--head", "typo", *overwrite)
    assert inner.exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--image-key", "HE"], "image_key='HE' is not among the images of this SpatialData: ['he']."),
        (["--spots-key", "x"], "spots_key='x' is not among the shapes"),
        (["--layer", "raw"], "layer='raw' is not among the layers"),
        (["--target-key", "x"], "target_key='x' is not among the shapes"),
        (["--head", "typo"], "head='typo' is unknown."),
        (["--encoder", "unii"], "far too coarse"),
        (["--encoder", "uni"], "fullres_image_file="),
        (["--genes", "NOPE"], "genes: 1 of 1 names are not in the table"),
        (["--upsample", "3"], "upsample=3: choose one of"),
        (["--upsample", "4", "--bin-um", "8"], "pass one of them"),
        (["--key-added", "a b"], "key_added='a b' is not a valid name"),
        (["--device", "gpu"], "device='gpu' is not a device torch knows"),
        (["--level", "1.5"], "level=1.5: choose a share between 0 and 1, such as 0.9"),
        (["--level", "nan"], "level=nan: choose a share between 0 and 1"),
        (["--batch-size", "0"], "batch_size=0: pass a whole number"),
    ],
)
def test_mistakes_are_told(source, tmp_path, options, match):
    out = tmp_path / "out.zarr"
    told = fails("predict", source, out, *FAST[:4], *options)
    last = told.strip().splitlines()[-1]
    assert last.startswith("histosge: ")
    assert match in last
    assert not out.exists()


def test_input_that_is_none(source, tmp_path):
    (tmp_path / "empty").mkdir()
    told = fails("predict", tmp_path / "empty", tmp_path / "out.zarr", *FAST)
    assert told.startswith("histosge: ")
    assert len(told) > 30
    assert "does not exist" in fails("predict", tmp_path / "nowhere", tmp_path / "out.zarr", *FAST, code=2)
    assert "weights" in fails("predict", source, tmp_path / "o", *FAST, "--weights", tmp_path / "no", code=2)


def test_weights(source, tmp_path):
    told = fails("predict", source, tmp_path / "o.zarr", "--encoder", "test_vit", "--weights", tmp_path)
    assert "is not a folder in the hub's layout" in told


def test_missing_library_is_told(source, tmp_path, monkeypatch):
    def predict(*_, **__):
        msg = "'hibou' requires transformers < 5.0"
        raise ImportError(msg)

    monkeypatch.setattr(sge.tl, "predict", predict)
    assert "transformers < 5.0" in fails("predict", source, tmp_path / "o.zarr", "--encoder", "hibou-b")


def test_error_of_the_system_is_told(source, tmp_path, monkeypatch):
    def predict(*_, **__):
        raise OSError(28, "No space left on device", "out.zarr")

    monkeypatch.setattr(sge.tl, "predict", predict)
    assert "No space left on device" in fails("predict", source, tmp_path / "o.zarr", *FAST)


# --------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def kept(cache_folder):
    """A cache with embeddings of two encoders."""
    cache = open_cache()
    uni = cache.shelf({"encoder": {"name": "uni", "mpp": 0.5}, "tile_um": 112.0, "dense": True})
    uni.put("a" * 16, np.zeros((120, 64), np.float16))
    uni.put("b" * 16, np.zeros((20, 64), np.float16))
    cache.shelf({"encoder": "mine"}).put("a" * 16, np.zeros((2, 3), np.float32))
    return cache


def test_cache_list(kept):
    uni, mine = (next(s for s in kept.shelves() if s.encoder == name) for name in ("uni", "mine"))
    os.utime(uni.folder / f"{'a' * 16}.npy", (2e9, 2e9))
    done = run("cache", "list")
    assert done.exit_code == 0, done.output
    head, first, second, total = done.stdout.splitlines()
    assert head.split() == ["encoder", "mpp", "tile_um", "dense", "blocks", "size", "last", "used"]
    assert len(head) == len(first) == len(second)
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
    assert told["n_bytes"] == sum(row["n_bytes"] for row in told["shelves"])
    uni = next(row for row in told["shelves"] if row["encoder"] == "uni")
    assert uni["recipe"] == {"encoder": {"name": "uni", "mpp": 0.5}, "tile_um": 112.0, "dense": True}
    assert uni["n_blocks"] == 2
    assert datetime.fromisoformat(uni["last_used"]).tzinfo is not None


def test_cache_that_is_empty(cache_folder):
    assert run("cache", "list").stdout == f"0 B of at most 20 GB in {cache_folder}\n"
    assert json.loads(run("cache", "list", "--json").stdout)["shelves"] == []
    assert run("cache", "clear").stdout == f"freed 0 B in {cache_folder}\n"  # and asks nothing
    assert not cache_folder.exists()


def test_cache_clear_asks(kept):
    done = CliRunner().invoke(main, ["cache", "clear"], input="n\n")
    assert done.exit_code == 1
    assert f"Remove the embeddings by all encoders, 18.3 kB, from {kept.root}?" in done.stderr
    assert done.stdout.strip() == ""
    assert "Aborted" in fails("cache", "clear")  # nobody there to answer
    assert len(kept.shelves()) == 2
    done = CliRunner().invoke(main, ["cache", "clear", "--encoder", "uni"], input="y\n")
    assert done.exit_code == 0
    assert "Remove the embeddings by 'uni', 18.2 kB" in done.stderr
    assert f"freed 18.2 kB in {kept.root}" in done.stdout
    assert [s.encoder for s in kept.shelves()] == ["mine"]


def test_cache_clear(kept):
    done = run("cache", "clear", "--yes")
    assert done.exit_code == 0
    assert done.stdout == f"freed 18.3 kB in {kept.root}\n"
    assert kept.shelves() == []


def test_cache_clear_of_an_unknown_encoder(kept):
    told = fails("cache", "clear", "--encoder", "unii", "--yes")
    assert told == f"histosge: encoder='unii': nothing is kept of it in {kept.root}; there are 'mine', 'uni'.\n"
    assert len(kept.shelves()) == 2


@pytest.mark.parametrize("command", [["list"], ["clear", "--yes"]])
def test_cache_of_somebody_else(cache_folder, command):
    cache_folder.mkdir()
    (cache_folder / "precious.txt").write_text("mine")
    told = fails("cache", *command)
    assert told.startswith(f"histosge: {cache_folder} would be the folder that embeddings are kept in, but")
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


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (2.5e10, "25 GB"),
        (3e13, "30 TB"),
    ],
)
def test_sizes(n_bytes, text):
    assert _size(n_bytes) == text


@pytest.fixture
def small_demo(monkeypatch):
    """The demo on a section a quarter as large, with the fast head."""
    synthetic, predict = sge.datasets.synthetic, sge.tl.predict
    monkeypatch.setattr(
        sge.datasets, "synthetic", lambda **k: synthetic(**{"n_rows": 8, "n_cols": 8, "n_genes": 20, "mpp": 2.0} | k)
    )
    monkeypatch.setattr(sge.tl, "predict", lambda s, **k: predict(s, **{"head": "ridge", "n_folds": 2} | k))


@pytest.mark.slow
def test_demo(small_demo, tmp_path):
    out = tmp_path / "demo"
    done = run("demo", "--out", out, "--seed", "1")
    assert done.exit_code == 0, done.output
    back = sd.read_zarr(out / "section.zarr")
    assert "leiden" in back.tables["histosge"].obs
    table = ad.read_h5ad(out / "predicted.h5ad")
    np.testing.assert_array_equal(table.X, back.tables["histosge"].X)
    assert table.uns["histosge"]["seed"] == 1
    picture = np.asarray(Image.open(out / "expression.png").convert("RGB"))
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
