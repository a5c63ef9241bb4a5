"""Arguments that several doors share: one rule each, before the work starts."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import spatialdata as sd
from click.testing import CliRunner

import histosge as sge
from histosge._atomic import naming, replacing
from histosge._section import write_interval_layers
from histosge.cli import main

FAST = {"encoder": "stain-texture", "head": "nearest"}
SEED = r"rng=.*: choose a whole number from 0 to 4294967295"


@pytest.fixture
def embeds(monkeypatch):
    """The embedding never starts."""
    from histosge._embedding import Embedder

    def start(*_, **__):
        pytest.fail("the embedding started")

    for name in ("embed_spots", "embed_both"):
        monkeypatch.setattr(Embedder, name, start)


@pytest.mark.usefixtures("embeds")
@pytest.mark.parametrize("rng", [-1, 2**32, 10**26, -(10**26), 0.5, "0", True, [1]])
def test_seeds(sdata, rng):
    for door, options in ((sge.tl.predict, FAST), (sge.tl.fit, FAST), (sge.tl.evaluate, {"encoder": "stain-texture"})):
        with pytest.raises(ValueError, match=SEED):
            door(sdata, rng=rng, **options)
    with pytest.raises(ValueError, match=SEED):
        sge.tl.domains(sdata.tables["table"], rng=rng)
    for name in ("rng", "genes_rng"):
        with pytest.raises(ValueError, match=f"{name}=.*: choose a whole number from 0 to 4294967295"):
            sge.datasets.synthetic(**{name: rng})


@pytest.mark.usefixtures("embeds")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_invalid": "skip"}, r"on_invalid='skip' is for the shapes of target_key=: pass that as well, or leave"),
        ({"on_invalid": "typo"}, r"on_invalid='typo' is for the shapes of target_key="),
        ({"batch_size": 65_537}, r"batch_size=65537: pass a whole number of tiles above 0, at most 65,536"),
        ({"key_added": "k" * 121}, r"key_added='k{20}\.\.\.' has 121 characters: choose a name of at most 120"),
        ({"store": "x.h5ad"}, r"store='x\.h5ad': the name must end in \.zarr"),
        ({"genes": -1}, r"genes=-1: pass a number above 0"),
        ({"mpp": float("nan")}, r"mpp=nan"),
    ],
)
def test_predict(sdata, options, said):
    with pytest.raises(ValueError, match=said):
        sge.tl.predict(sdata, **FAST | options)


@pytest.mark.parametrize("n", [0, 1001, 10**26, 1.5])
def test_numbers_of_trials(sdata, n):
    with pytest.raises(ValueError, match="n_repeats=.*: pass a whole number of at least 1 and at most 1000"):
        sge.tl.evaluate(sdata, encoder="stain-texture", n_repeats=n)


@pytest.mark.parametrize("name", ["n_rows", "n_cols", "n_genes"])
@pytest.mark.parametrize("number", [0, -1, 100_001, 2.5, float("nan")])
def test_sizes_of_synthetic_sections(name, number):
    with pytest.raises(ValueError, match=f"{name}=.*: choose a whole number from 1 to 100,000"):
        sge.datasets.synthetic(**{name: number})


def test_synthetic_sections_beyond_memory():
    for mpp in (0, 0.01, 51, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match=r"mpp=.*: choose a number of µm per pixel from 0\.05 to 50"):
            sge.datasets.synthetic(mpp=mpp)
    with pytest.raises(
        MemoryError, match=r"n_rows=100000, .* take about .* GiB of memory, and .* are free\. Choose fewer"
    ):
        sge.datasets.synthetic(n_rows=100_000, n_cols=100_000)


def test_damaged_tables(tmp_path):
    (tmp_path / "a.h5ad").write_text("text")
    with pytest.raises(ValueError, match=r"a\.h5ad' cannot be read as \.h5ad: .*Copy or download it again"):
        sge.io.read(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"a\.h5ad is neither a zarr store nor an HDF5 file: pass what"):
        write_interval_layers(tmp_path / "a.h5ad", key="histosge", level=0.9)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["predict", "{in}", "x.zarr", "--resolution", "nan", "--domains"], "'--resolution': nan is no number"),
        (
            ["predict", "{in}", "x.zarr", "--resolution", "1e26", "--domains"],
            "'--resolution': 1e+26 is not in the range",
        ),
        (["predict", "{in}", "x.zarr", "--on-invalid", "skip"], "--on-invalid: for the shapes of --target-key"),
        (
            ["predict", "{in}", "x.h5ad", "--layers", "typo"],
            "--layers typo: the only layer is conserved, with --conserve",
        ),
        (
            ["predict", "{in}", "x.h5ad", "--layers", "conserved"],
            "--layers conserved: the only layer is conserved, with",
        ),
        (["predict", "{in}", "{long}"], "'OUT': OUT='aaaaaaaaaaaaaaaaaaaa...' is too long a name"),
        (["fit", "{in}", ""], "'MODEL': MODEL='' is no name of a file: choose one that does not exist"),
        (
            ["evaluate", "{in}", "--plot", "x.zarr"],
            "'--plot': plot='x.zarr': the name must end in .png or .pdf or .svg",
        ),
        (["datasets", "synthetic", "x.h5ad"], "must end in .zarr"),
    ],
)
def test_command_lines(tmp_path, args, said):
    (tmp_path / "in.zarr").mkdir()
    filled = [arg.replace("{in}", str(tmp_path / "in.zarr")).replace("{long}", "a" * 300) for arg in args]
    done = CliRunner().invoke(main, filled)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_errors_of_the_disk_name_a_path(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    for context in (naming, replacing):
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a'"), context(tmp_path / "a"):
            raise OSError(*full.args)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: 'b'$"), naming(tmp_path / "a"):
        raise OSError(*full.args, "b")

    def write(*_, **__):
        raise full

    monkeypatch.setattr(sge.datasets, "synthetic", write)
    done = CliRunner().invoke(main, ["datasets", "synthetic", str(tmp_path / "x.zarr")])
    said = f"histosge: {tmp_path}/x.zarr: No space left on device. Correct that, or choose another place.\n"
    assert (done.exit_code, done.stderr) == (1, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", range(1, 7))
def test_intervals_are_never_of_two_levels(sdata, tmp_path, monkeypatch, step):
    """Stopped between any two steps, a store has whole layers of one level, or lacks some; the next run mends it."""
    sge.tl.predict(sdata, **FAST, upsample=2, n_folds=2)
    path = tmp_path / "p.zarr"
    sd.SpatialData(
        shapes={"histosge_targets": sdata.shapes["histosge_targets"]}, tables={"histosge": sdata.tables["histosge"]}
    ).write(path)
    want = {}
    for level in (0.5, 0.9):
        write_interval_layers(path, key="histosge", level=level)
        table = sd.read_zarr(path).tables["histosge"]
        want[level] = {name: table.layers[name].copy() for name in ("sd", "lower", "upper")}
    rename, seen = type(path).rename, []

    def stop(self, target):
        if self.name.removeprefix("old-") in want[0.9]:
            seen.append(self)
            if len(seen) == step:
                raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            write_interval_layers(path, key="histosge", level=0.5)
    table = sd.read_zarr(path).tables["histosge"]
    level = float(table.uns["histosge"]["intervals"]["level"])
    for name in table.layers:
        np.testing.assert_array_equal(table.layers[name], want[level][name])
    assert [p.name for p in tmp_path.iterdir()] == ["p.zarr"]
    write_interval_layers(path, key="histosge", level=0.5)
    assert set(sd.read_zarr(path).tables["histosge"].layers) == {"sd", "lower", "upper"}
