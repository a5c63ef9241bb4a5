"""Reading what instruments write: the same places, counts and scale come back; and what viewers are given."""

from __future__ import annotations

import pickle
import shutil

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import tifffile
from PIL import Image
from scipy import sparse
from spatialdata import get_pyramid_levels, read_zarr
from tests import spaceranger as sr

import histosge as sge
from histosge._readers import open_pixels
from histosge._section import lazy_image, read_section

FAST = {"encoder": "stain-texture", "head": "ridge", "genes": 20, "n_folds": 2}
LEIDEN = {"flavor": "igraph", "n_iterations": 2}


@pytest.fixture(scope="module")
def hd():
    return sge.datasets.synthetic(n_rows=6, n_cols=5, n_genes=20, mpp=2.0, bin_um=8)


@pytest.fixture(scope="module")
def visium(tmp_path_factory, _section_once):
    """A folder that is read only."""
    return sr.write_visium(tmp_path_factory.mktemp("visium") / "run", _section_once)


def measured(sdata):
    """Counts and places in pixels of the image by barcode, through the section that every function reads."""
    section = read_section(sdata)
    table = sdata.tables[section.table_key]
    frame = table.to_df()
    (key,) = [name for name in ("spot_id", "location_id") if name in table.obs]
    places = dict(zip(section.instances, section.xy_px, strict=True))
    return frame, np.array([places[i] for i in table.obs[key]]), section


def check_same(read, original, *, within_px):
    counts, xy_px, section = measured(read)
    table = next(iter(original.tables.values()))
    wanted = table.to_df()
    assert sorted(counts.index) == sorted(wanted.index)
    np.testing.assert_array_equal(counts.loc[wanted.index, wanted.columns], wanted)
    assert list(counts.columns) == list(wanted.columns)
    np.testing.assert_allclose(
        xy_px[counts.index.get_indexer(wanted.index)], table.obsm["spatial"], rtol=0, atol=within_px
    )
    there = read.tables[section.table_key]
    np.testing.assert_allclose(there[wanted.index].obsm["spatial"], table.obsm["spatial"], rtol=0, atol=within_px)
    np.testing.assert_array_equal(
        section.image.read(0, 0, section.image.width_px, section.image.height_px),
        np.moveaxis(sr.full_image(original), -1, 0),
    )
    assert section.mpp == pytest.approx(sr.mpp(original), rel=0.005)
    return section


VISIUM = {
    "1.x": ({"version": "1.3.1"}, 0.5),
    "2.x": ({"version": "2.1.0"}, 0.5),
    "3.x, CytAssist": ({"version": "3.1.3", "cytassist": True}, 1e-6),
    "4.x": ({"version": "4.0.1"}, 0.5),
    "downloaded": ({"version": "2.1.0", "prefix": "V1_Mouse"}, 0.5),
    "mtx": ({"version": "1.3.1", "mtx": True}, 0.5),
}


@pytest.mark.parametrize("layout", VISIUM)
def test_visium_is_read_as_it_was(tmp_path, sdata, layout):
    options, within_px = VISIUM[layout]
    written = sr.write_visium(tmp_path / "my run", sdata, **options)
    read = sge.io.read(written.source)
    section = check_same(read, sdata, within_px=within_px)
    name = options.get("prefix") or "my_run"
    assert (list(read.images), list(read.shapes), list(read.tables)) == ([f"{name}_full_image"], [name], ["table"])
    assert read.coordinate_systems == [name]
    assert section.technology == "visium"
    assert set(read.tables["table"].var["feature_types"]) == {"Gene Expression"}  # no protein
    if written.source.name == "outs":
        check_same(sge.io.read(written.source.parent), sdata, within_px=within_px)


@pytest.mark.parametrize(("version", "prefix"), [("3.1.3", ""), ("4.0.1", ""), ("4.0.1", "HD_Mouse")])
def test_visium_hd_is_read_as_it_was(tmp_path, hd, capsys, version, prefix):
    written = sr.write_visium_hd(tmp_path / "run", hd, version=version, prefix=prefix)
    read = sge.io.read(written.source)
    section = check_same(read, hd, within_px=2**-20)
    name = prefix or "run"
    assert (list(read.images), list(read.tables)) == (
        [f"{name}_full_image"],
        ["square_008um"],
    )  # no cells, no other bins
    assert list(read.shapes) == [f"{name}_square_008um"]
    assert section.technology == "visium-hd"
    assert capsys.readouterr().out == ""
    area = read.shapes[f"{name}_square_008um"].area
    np.testing.assert_allclose(area, (8 / 2.0) ** 2)


def test_visium_hd_other_bins(tmp_path, hd):
    written = sr.write_visium_hd(tmp_path / "run", hd)
    read = sge.io.read(written.source, bin_size=16, dataset_id="mine")
    frame, _, section = measured(read)
    assert section.spots_key == "mine_square_016um"
    assert section.mpp == pytest.approx(2.0, rel=0.005)
    assert frame.to_numpy().sum() == hd.tables["square_008um"].X.sum()
    with pytest.raises(ValueError, match=r"bin_size=4: .* holds bins of \[8, 16\] µm"):
        sge.io.read(written.source, bin_size=4)
    shutil.rmtree(written.source / "binned_outputs/square_008um")
    assert list(sge.io.read(written.source).tables) == ["square_016um"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_h5ad_beside_its_image(tmp_path, sdata, suffix):
    written = sr.write_h5ad(tmp_path, sdata, image=f"image.{suffix}")
    read = sge.io.read(written.source)
    if suffix != "jpg":
        check_same(read, sdata, within_px=2**-20)
    counts, _, section = measured(read)
    assert section.mpp == pytest.approx(2.0, rel=0.005)
    assert section.technology == "visium"
    assert (list(read.images), list(read.shapes), list(read.tables)) == (["counts_full_image"], ["counts"], ["table"])


def test_h5ad_of_bins(tmp_path, hd):
    section = check_same(sge.io.read(sr.write_h5ad(tmp_path, hd).source), hd, within_px=2**-20)
    assert (section.technology, section.spots_key) == ("visium-hd", "counts_square_008um")


@pytest.fixture
def squared(sdata):
    """The section with its spots called by place, as an ST array calls them."""
    table = sdata.tables["table"]
    table.obs_names = [f"{x}x{y}" for x, y in zip(table.obs["array_col"], table.obs["array_row"], strict=True)]
    return sdata


def test_st(tmp_path, squared, log):
    written = sr.write_st(tmp_path, squared, image="HE.png")
    check_same(sge.io.read(written.source), squared, within_px=2**-20)
    path = tmp_path / "spot_data-selection.tsv"
    spots = pd.read_csv(path, sep="\t")
    spots.assign(x=-1).to_csv(path, sep="\t", index=False)
    with pytest.raises(ValueError, match=r"no row of .* is a spot XxY of 'spot_data-selection.tsv'"):
        sge.io.read(written.source)
    spots.assign(new_x=spots["x"], new_y=spots["y"], x=-1)[1:].to_csv(path, sep="\t", index=False)
    assert sge.io.read(written.source).tables["table"].n_obs == 137
    assert "leaving out 1 of 138 rows of counts.tsv.gz that have no position" in log.text
    spots.assign(selected=[0, *[1] * 137]).to_csv(path, sep="\t", index=False)
    assert len(read_section(sge.io.read(written.source)).instances) == 137
    path.unlink()
    with pytest.raises(ValueError, match="needs one file of spots in its folder"):
        sge.io.read(written.source)


def test_zarr(tmp_path, sdata):
    sdata.write(tmp_path / "section.zarr")
    check_same(sge.io.read(tmp_path / "section.zarr"), sdata, within_px=2**-20)
    with pytest.raises(
        ValueError,
        match=r"image='a\.tif', but .* is a SpatialData .*, which holds its image and names\. Leave image= out",
    ):
        sge.io.read(tmp_path / "section.zarr", image="a.tif")


# -- six lines


def six_lines(folder, gene="GENE000"):
    sdata = sge.io.read(folder)
    sge.tl.predict(sdata, **FAST)
    adata = sdata.tables["histosge"]
    sc.pp.neighbors(adata)
    sc.tl.leiden(adata, **LEIDEN)
    return sdata, sge.pl.expression(sdata, gene, obs="leiden")


@pytest.mark.slow
@pytest.mark.parametrize("layout", VISIUM)
def test_from_visium_to_leiden(tmp_path, sdata, layout):
    result, axes = six_lines(sr.write_visium(tmp_path, sdata, **VISIUM[layout][0]).source)
    assert result.tables["histosge"].obs["leiden"].nunique() > 1
    assert axes.size == 4  # H&E, measured, predicted, domains


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.1.3", "4.0.1"])
def test_from_visium_hd_to_leiden(tmp_path, hd, version):
    written = sr.write_visium_hd(tmp_path, hd, version=version)
    shutil.rmtree(written.source / "binned_outputs/square_008um")  # fewer places
    result, _ = six_lines(written.source)
    assert result.tables["histosge"].obs["leiden"].nunique() > 1


@pytest.mark.slow
def test_from_h5ad_to_leiden(tmp_path, sdata):
    result, _ = six_lines(sr.write_h5ad(tmp_path, sdata).source)
    assert result.tables["histosge"].obs["leiden"].nunique() > 1


# -- the image


def test_image_named_and_found(tmp_path, sdata, log):
    written = sr.write_visium(tmp_path / "run", sdata)
    sge.io.read(written.source)
    assert f"image: {written.image}" in log.text
    other = written.image.rename(tmp_path / "slide.tif")
    read = sge.io.read(written.source, image=other, dataset_id="mine")
    check_same(read, sdata, within_px=0.5)
    assert list(read.images) == ["mine_full_image"]


def test_several_images_are_listed(tmp_path, sdata):
    written = sr.write_visium(tmp_path / "run", sdata)
    shutil.copy(written.image, written.source / "copy.tif")
    with pytest.raises(ValueError, match=r"there are several images for .*image= one of \[.*copy.tif.*tissue.tif"):
        sge.io.read(written.source)


def test_image_of_another_size(tmp_path, sdata, log):
    written = sr.write_visium(tmp_path / "run", sdata)
    small = sr.write_image(written.source / "cytassist.tif", sr.full_image(sdata)[::3, ::3])
    check_same(sge.io.read(written.source), sdata, within_px=0.5)  # not used
    told = "cytassist.tif has 284 x 258 px, but Space Ranger was given one of about 852 x 771 px"
    assert told not in log.text  # there is another
    away = written.image.rename(tmp_path / "away.tif")
    sge.io.read(written.source)
    assert told in log.text
    away.rename(written.image)
    with pytest.raises(ValueError, match=r"cytassist.tif' has 284 x 258 px, but Space Ranger was given"):
        sge.io.read(written.source, image=small)
    plain = sr.write_h5ad(tmp_path / "h5ad", sdata)
    with pytest.raises(ValueError, match=r"284 x 258 px, but the spots reach to x = \d+"):
        sge.io.read(plain.source, image=small)


def test_without_image(tmp_path, sdata, log):
    written = sr.write_visium(tmp_path / "run", sdata)
    written.image.unlink()
    read = sge.io.read(written.source)
    assert list(read.images) == ["run_hires_image"]
    assert "there is no full-resolution image for" in log.text
    section = read_section(read)
    assert section.mpp == pytest.approx(2.0 * 852 / sr.HIRES_PX, rel=0.005)  # places fit the thumbnail, too
    with pytest.raises(ValueError, match="far too coarse for a pathology encoder"):
        sge.tl.predict(read, encoder="h-optimus-0")
    (written.source / "spatial/tissue_hires_image.png").unlink()
    read = sge.io.read(written.source)
    assert (list(read.images), len(read.shapes["run"])) == ([], 138)
    with pytest.raises(ValueError, match="this SpatialData has no image"):
        sge.tl.predict(read, **FAST)


PIXELS = np.random.default_rng(0).integers(0, 256, (300, 2100, 3), dtype=np.uint8)
TIFFS = {
    "tiles": {"tile": (256, 256), "compression": "zlib"},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one strip": {"rowsperstrip": 300, "compression": "zlib"},
    "plain": {},
    "planes": {"planarconfig": "separate", "tile": (64, 64)},
    "LZW": {"compression": "lzw", "tile": (64, 64)},
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiffs_are_read_in_pieces(tmp_path, kind):
    path = tmp_path / "a.tif"
    pixels = np.moveaxis(PIXELS, -1, 0) if kind == "planes" else PIXELS
    tifffile.imwrite(path, pixels, photometric="rgb", **TIFFS[kind])
    lazy = open_pixels(path)
    assert (lazy.shape, lazy.dtype, lazy.chunksize[0]) == ((3, 300, 2100), np.uint8, 3)
    np.testing.assert_array_equal(lazy.compute(), np.moveaxis(PIXELS, -1, 0))
    again = pickle.loads(pickle.dumps(lazy))  # tasks of a cluster
    np.testing.assert_array_equal(again[:, 5:70, 1000:1100], np.moveaxis(PIXELS[5:70, 1000:1100], -1, 0))


def test_one_large_piece_is_read_once(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="rgb", compression="zlib", rowsperstrip=300)
    lazy = open_pixels(tmp_path / "a.tif", largest_piece=1000)
    (tmp_path / "a.tif").unlink()
    np.testing.assert_array_equal(lazy.compute(), np.moveaxis(PIXELS, -1, 0))


def test_other_pixels(tmp_path):
    rgba = np.dstack([PIXELS, np.full((300, 2100), 255, np.uint8)])
    deep = PIXELS.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "alpha.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb", bigtiff=True)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    few = Image.fromarray(PIXELS).convert("P")
    few.save(tmp_path / "few.png")
    files = dict.fromkeys(("alpha.tif", "deep.tif", "alpha.png"), PIXELS) | {"few.png": few.convert("RGB")}
    for name, wanted in files.items():
        lazy = open_pixels(tmp_path / name)
        assert lazy.dtype == np.uint8
        np.testing.assert_array_equal(lazy.compute(), np.moveaxis(np.asarray(wanted), -1, 0))


@pytest.mark.parametrize(
    ("name", "pixels", "options", "what"),
    [
        ("a.tif", PIXELS[..., 0], {}, r"has axes YX of \(300, 2100\)"),
        ("a.tif", np.moveaxis(PIXELS, -1, 0)[[0, 1, 2, 0, 1]], {"photometric": "minisblack"}, "has axes"),
        ("a.tif", PIXELS.astype(np.int32), {"photometric": "rgb"}, "3 channels of RGB, int32"),
        ("a.tif", np.dstack([PIXELS, PIXELS[..., :1]]), {"photometric": "separated"}, "4 channels of SEPARATED"),
        ("a.png", PIXELS[..., 0], None, "is of mode 'L'"),
    ],
)
def test_images_that_are_not_rgb(tmp_path, name, pixels, options, what):
    if options is None:
        Image.fromarray(pixels).save(tmp_path / name)
    else:
        tifffile.imwrite(tmp_path / name, pixels, **options)
    with pytest.raises(ValueError, match=f"{what}.*; an H&E image has red, green and blue"):
        open_pixels(tmp_path / name)


def test_pyramid_of_means(tmp_path):
    section = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=5, mpp=1.0)
    read = sge.io.read(sr.write_visium(tmp_path, section).source)
    levels = [level.shape for level in get_pyramid_levels(next(iter(read.images.values())))]
    assert levels == [(3, 1544, 1704), (3, 772, 852)]
    assert [factor for _, factor in read_section(read).image.coarser] == [2.0]


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_pyramid_of_odd_sizes(tmp_path, kind):
    y, x = np.indices((1501, 4099))
    pixels = np.stack([128 + 100 * np.sin(y / 9), 128 + 100 * np.sin(x / 11), (x + y) % 251], -1).astype(np.uint8)
    path = sr.write_image(tmp_path / f"slide.{kind}", pixels)
    (image,) = sge.io.read(path).images.values()
    assert len(image) == 4
    for i, level in enumerate(get_pyramid_levels(image)):
        step = 2**i
        high, wide = 1501 // step, 4099 // step
        assert level.shape == (3, high, wide)
        blocks = pixels[: high * step, : wide * step].reshape(high, step, wide, step, 3).mean((1, 3))
        np.testing.assert_allclose(np.moveaxis(level.values, 0, -1), blocks, atol=2)
    image = lazy_image(image, "slide")
    assert [factor for _, factor in image.coarser] == [2.0, 4.0, 8.0]


# -- what is not there


@pytest.mark.parametrize(
    "name", ["half.tif", "plain.tif", "text.tif", "empty.tif", "half.png", "empty.png", "half.jpg"]
)
def test_files_that_are_no_whole_image(tmp_path, sdata, log, name):
    path = tmp_path / name
    if name == "plain.tif":
        tifffile.imwrite(path, PIXELS, photometric="rgb")
    else:
        sr.write_image(path, PIXELS)
    whole = path.read_bytes()
    path.write_bytes({"text": b"text", "empty": b""}.get(path.stem, whole[: len(whole) // 2]))
    with pytest.raises(ValueError, match=rf"{name}' cannot be read as an image \(.*\)\. Is the file complete\?"):
        sge.io.read(path)
    written = sr.write_h5ad(tmp_path / "beside", sdata)
    path.rename(written.source.parent / name)
    if path.stem in ("text", "empty"):  # not even its size can be told
        assert len(sge.io.read(written.source).images) == 1
        assert f"not used: '{written.source.parent / name}' cannot be read as an image" in log.text


def test_other_files_that_are_not_whole(tmp_path, sdata):
    store = tmp_path / "half.zarr"
    store.mkdir()
    (store / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"half.zarr' cannot be read as a SpatialData .* Is it complete\?"):
        sge.io.read(store)
    written = sr.write_st(tmp_path / "st", sdata)
    (written.source.parent / "none.tsv").touch()
    (written.source.parent / "spots.tsv.sha256").write_text("x\ty\tpixel_x\tpixel_y\n")
    assert list(sge.io.read(written.source).tables) == ["table"]  # neither is taken for the spots
    table = sdata.tables["table"].copy()
    del table.uns["spatialdata_attrs"]
    table.obsm["spatial"] = np.zeros((table.n_obs, 2))
    table.write_h5ad(tmp_path / "one.h5ad")
    with pytest.raises(ValueError, match=r"most spots of .*one.h5ad' have the same position"):
        sge.io.read(tmp_path / "one.h5ad")


def test_what_cannot_be_read(tmp_path, sdata):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sge.io.read(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text("a")
    for source in (tmp_path / "empty", tmp_path / "empty/a.txt"):
        with pytest.raises(
            ValueError, match=r"is no section .* holds a.*txt.*\. Pass one of: an image alone, .*\.zarr"
        ):
            sge.io.read(source)
    written = sr.write_visium(tmp_path / "run", sdata)
    with pytest.raises(ValueError, match=r"bin_size=8, but source=.* is Visium, a folder of .* Leave bin_size= out\."):
        sge.io.read(written.source, bin_size=8)
    with pytest.raises(ValueError, match="dataset_id='a b' is not a valid name"):
        sge.io.read(written.source, dataset_id="a b")
    with pytest.raises(FileNotFoundError, match="image='no.tif' is not a file"):
        sge.io.read(written.source, image="no.tif")


def test_folders_that_lack_a_file(tmp_path, sdata, hd):
    written = sr.write_visium(tmp_path / "run", sdata)
    counts, factors = (
        written.source / "filtered_feature_bc_matrix.h5",
        written.source / "spatial/scalefactors_json.json",
    )
    shutil.copy(counts, written.source / "A_filtered_feature_bc_matrix.h5")
    with pytest.raises(ValueError, match="of which section"):
        sge.io.read(written.source)
    (written.source / "A_filtered_feature_bc_matrix.h5").unlink()
    factors.rename(tmp_path / "factors")
    with pytest.raises(FileNotFoundError, match="has no spatial/scalefactors_json.json"):
        sge.io.read(written.source)
    counts.unlink()
    (written.source / "raw_feature_bc_matrix.h5").unlink()
    with pytest.raises(FileNotFoundError, match="has no filtered_feature_bc_matrix.h5, or the folder"):
        sge.io.read(written.source)
    bins = sr.write_visium_hd(tmp_path / "hd", hd, prefix="A")
    with pytest.raises(ValueError, match="dataset_id='b', but the files of .* are named A_"):
        sge.io.read(bins.source, dataset_id="b")
    (bins.source / "A_feature_slice.h5").unlink()
    with pytest.raises(FileNotFoundError, match="has no feature_slice.h5"):
        sge.io.read(bins.source)


def test_files_of_two_runs(tmp_path, sdata):
    written = sr.write_visium(tmp_path / "run", sdata)
    path = written.source / "spatial/tissue_positions.csv"
    path.write_text(path.read_text().replace("SPOT-05", "TOPS-05"))
    with pytest.raises(ValueError, match=r"\d+ of 138 barcodes of .* have no position"):
        sge.io.read(written.source)


def test_h5ad_without_places(tmp_path, sdata):
    table = sdata.tables["table"].copy()
    del table.obsm["spatial"], table.uns["spatialdata_attrs"]
    table.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r'needs obsm\["spatial"\]'):
        sge.io.read(tmp_path / "a.h5ad")


# -- for viewers


@pytest.fixture
def predicted(sdata):
    sge.tl.predict(sdata, **FAST)
    return sdata


def for_cellxgene(table):
    """What its server checks (server/data_anndata/anndata_adaptor.py), in words of our own."""
    assert table.obs_names.is_unique and table.var_names.is_unique  # noqa: PT018
    assert table.obs.columns.is_unique and table.var.columns.is_unique  # noqa: PT018
    assert table.X.dtype == np.float32
    layouts = [value for key, value in table.obsm.items() if key.startswith("X_")]
    assert layouts
    for layout in layouts:
        assert type(layout) is np.ndarray
        assert layout.dtype.kind in "fiu"
        assert layout.shape[1] >= 2
        assert np.isfinite(layout).all()
    for frame in (table.obs, table.var):
        assert {dtype.kind for dtype in frame.dtypes} <= set("biufO")


def test_written_for_viewers(tmp_path, predicted, log):
    table = predicted.tables["histosge"]
    table.obs["group"] = table.obs["array_row"].astype("category")  # of numbers
    table.uns["odd"], table.uns["nothing"] = {"a": object()}, {"a": None}
    before = table.copy()
    sge.tl.intervals(table)
    sge.io.write_h5ad(predicted, tmp_path / "a.h5ad", layers=["sd"])
    assert "leaving out uns['odd', 'nothing']" in log.text
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    for_cellxgene(read)
    np.testing.assert_array_equal(read.X, table.X)
    np.testing.assert_array_equal(read.obsm["spatial"], table.obsm["spatial"])
    np.testing.assert_array_equal(read.obsm["X_spatial"], (table.obsm["spatial"] * [1, -1]).astype(np.float32))
    assert [name for name in read.layers if name is not None] == ["sd"]
    assert list(read.obs["group"].cat.categories) == [str(i) for i in before.obs["group"].cat.categories]
    assert read.obs["instance_id"].tolist() == table.obs["instance_id"].tolist()
    assert read.uns["histosge"]["encoder"]["name"] == "stain-texture"
    assert not {"odd", "nothing", "spatialdata_attrs"} & set(read.uns)
    assert table.obs["group"].cat.categories.dtype.kind == "i"  # the table given is as it was
    assert set(table.uns) == set(before.uns)
    assert list(table.obsm) == list(before.obsm)


def test_older_versions_of_anndata_can_read_it(tmp_path, sdata):
    sdata.tables["table"].obs["word"] = [f"word {i % 3}" for i in range(138)]
    sge.io.write_h5ad(sdata, tmp_path / "a.h5ad", key="table")
    kinds = {}
    with h5py.File(tmp_path / "a.h5ad") as file:
        file.visititems(lambda name, item: kinds.setdefault(item.attrs.get("encoding-type"), name))
    # those of anndata 0.8, of 2022; pandas 3 would have text as "nullable-string-array"
    old = {"array", "string-array", "categorical", "dataframe", "dict", "string", "numeric-scalar", "csr_matrix"}
    assert {kind: name for kind, name in kinds.items() if kind not in {None, *old}} == {}


def test_a_table_on_disk_is_written_without_loading_it(tmp_path, sdata, monkeypatch):
    lazy = sge.tl.predict(sdata, **FAST, store=tmp_path / "out.zarr", inplace=False)
    whole = read_zarr(tmp_path / "out.zarr").tables["histosge"]
    sge.tl.intervals(lazy)
    monkeypatch.setattr(type(lazy.X), "compute", lambda *_, **__: pytest.fail("loaded as a whole"))
    sge.io.write_h5ad(lazy, tmp_path / "a.h5ad", layers=["lower"])
    monkeypatch.undo()
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    for_cellxgene(read)
    np.testing.assert_array_equal(read.X, whole.X)
    sge.tl.intervals(whole)
    np.testing.assert_array_equal(read.layers["lower"], whole.layers["lower"])


def test_what_is_refused(tmp_path, predicted):
    path = tmp_path / "a.h5ad"
    with pytest.raises(KeyError, match=r"key='no' is not among the tables .*histosge"):
        sge.io.write_h5ad(predicted, path, key="no")
    with pytest.raises(KeyError, match=r"layers=\['no'\] are not among the layers of the table: \[\]"):
        sge.io.write_h5ad(predicted, path, layers=["no"])
    table = predicted.tables["histosge"].copy()
    table.obs_names = ["a"] * table.n_obs
    with pytest.raises(ValueError, match="names of obs are not unique"):
        sge.io.write_h5ad(table, path)
    with pytest.raises(ValueError, match=r'has no obsm\["spatial"\]'):
        sge.io.write_h5ad(ad.AnnData(np.ones((2, 2), np.float32)), path)
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        sge.io.write_h5ad(predicted, path)
    assert path.read_text() == "mine"
    sge.io.write_h5ad(predicted, path, overwrite=True)
    assert ad.read_h5ad(path).n_vars == 20


def test_measured_counts_are_written_sparse(tmp_path, sdata):
    sge.io.write_h5ad(sdata, tmp_path / "a.h5ad", key="table")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    assert sparse.issparse(read.X)
    assert (read.X != sdata.tables["table"].X).nnz == 0


def test_an_image_alone(sdata, tmp_path):
    pixels = np.moveaxis(np.asarray(sdata.images["he"]["scale0"].image.data), 0, -1)
    path = tmp_path / "slide 7.tif"
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb")
    section = sge.io.read(path)
    assert (list(section.images), list(section.shapes), list(section.tables)) == (["slide_7_full_image"], [], [])
    image = section.images["slide_7_full_image"]
    found = image["scale0"].image if hasattr(image, "keys") else image
    np.testing.assert_array_equal(np.moveaxis(np.asarray(found.data), 0, -1), pixels)
    model = sge.tl.fit(sdata, encoder="stain-texture", head="ridge", genes=5, n_folds=2)
    sge.tl.predict(section, model=model, mpp=2.0)
    assert section["histosge"].n_obs > 100
    with pytest.raises(
        ValueError, match=r"is an image alone, of which nothing was measured\. Leave image= and bin_size= out"
    ):
        sge.io.read(path, image=path, bin_size=8)
