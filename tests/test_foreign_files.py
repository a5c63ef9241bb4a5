"""Folders and tables as people pass them on: the same section comes back, or an error that says what to do."""

from __future__ import annotations

import gzip
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from tests import spaceranger as sr
from tests.listed import read_as_listed

import histosge as sge
from histosge._image import LazyImage
from histosge._section import ORIENTATIONS, UPRIGHT, compare, likelier_orientation, read_section

FAST = {"encoder": "stain-texture", "head": "ridge", "genes": 10, "n_folds": 2}


@pytest.fixture(scope="module")
def tissue():
    """A section whose two sides differ."""
    return sge.datasets.synthetic(n_rows=10, n_cols=12, n_genes=20, mpp=4.0, rng=1)


@pytest.fixture(scope="module")
def pixels(tissue):
    return sr.full_image(tissue)


@pytest.fixture
def outs(tmp_path, tissue):
    return sr.write_visium(tmp_path / "run", tissue, version="2.1.0").source


def same(sdata, tissue, *, within_px=0.51):
    """Counts and places by barcode; Space Ranger's places are whole pixels."""
    section = read_section(sdata)
    table, wanted = sdata.tables[section.table_key], tissue.tables["table"]
    assert set(table.obs_names) == set(wanted.obs_names)
    np.testing.assert_array_equal(table[wanted.obs_names].to_df(), wanted.to_df())
    off = np.asarray(table[wanted.obs_names].obsm["spatial"]) - wanted.obsm["spatial"]
    assert np.abs(off).max() <= within_px
    assert section.mpp == pytest.approx(4.0, rel=0.005)


def unpack(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def pack(path, to=None):
    (to or path.with_name(f"{path.name}.gz")).write_bytes(gzip.compress(path.read_bytes()))


def warnings_in(log):
    return [r.getMessage() for r in log.records if r.levelname == "WARNING"]


# ---------------------------------------------------------------------------------------- Space Ranger's folders


def headerless(outs):
    path = outs / "spatial/tissue_positions.csv"
    path.write_text(path.read_text().partition("\n")[2])


def old_name_with_header(outs):
    (outs / "spatial/tissue_positions.csv").rename(outs / "spatial/tissue_positions_list.csv")


def packed_positions(outs):
    path = outs / "spatial/tissue_positions.csv"
    pack(path)
    path.unlink()


def named_positions(outs):
    (outs / "spatial/tissue_positions.csv").rename(outs / "spatial/S1_tissue_positions.csv")


def byte_order_mark(outs):
    path = outs / "spatial/tissue_positions.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    path.rename(path.with_name("S1_tissue_positions.csv"))


def both_positions(outs):
    frame = pd.read_csv(outs / "spatial/tissue_positions.csv")
    frame.to_csv(outs / "spatial/tissue_positions_list.csv", header=False, index=False)


def no_thumbnails(outs):
    for path in (outs / "spatial").glob("tissue_*res_image.png"):
        path.unlink()


@pytest.mark.parametrize(
    "change",
    [
        headerless,
        old_name_with_header,
        packed_positions,
        named_positions,
        byte_order_mark,
        both_positions,
        no_thumbnails,
    ],
)
def test_positions_and_thumbnails_in_other_forms(outs, tissue, change):
    change(outs)
    same(sge.io.read(outs), tissue)


@pytest.mark.parametrize("features", ["features.tsv", "genes.tsv"])
@pytest.mark.parametrize("packed", [False, True])
def test_matrix_folders(tmp_path, tissue, features, packed):
    outs = sr.write_visium(tmp_path / "run", tissue, version="1.3.1", mtx=True).source
    folder = outs / "filtered_feature_bc_matrix"
    table = pd.read_csv(folder / "features.tsv.gz", sep="\t", header=None)
    (folder / "features.tsv.gz").unlink()
    columns = table if features == "features.tsv" else table.iloc[:, :2]
    columns.to_csv(folder / features, sep="\t", header=False, index=False)
    if packed:
        pack(folder / features)
        (folder / features).unlink()
    else:
        unpack(folder / "matrix.mtx.gz")
        unpack(folder / "barcodes.tsv.gz")
    same(sge.io.read(outs), tissue)


def test_a_matrix_folder_without_barcodes(tmp_path, tissue):
    outs = sr.write_visium(tmp_path / "run", tissue, version="1.3.1", mtx=True).source
    unpack(outs / "filtered_feature_bc_matrix/matrix.mtx.gz")
    (outs / "filtered_feature_bc_matrix/barcodes.tsv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no barcodes\.tsv \(or barcodes\.tsv\.gz\): copy it there"):
        sge.io.read(outs)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_a_flat_folder_of_geo(outs, tissue, tmp_path, thumbnail):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (outs / "filtered_feature_bc_matrix.h5", *(outs / "spatial").iterdir()):
        if path.suffix == ".h5":
            shutil.copy(path, flat / f"GSM1_S1_{path.name}")
        elif thumbnail or path.suffix != ".png":
            pack(path, flat / f"GSM1_S1_{path.name}.gz")
    sdata = sge.io.read(flat, image=outs.parent / "tissue.tif")
    assert list(sdata.images) == ["GSM1_S1_full_image"]
    same(sdata, tissue)
    alone = sge.io.read(flat)
    assert list(alone.images) == (["GSM1_S1_hires_image"] if thumbnail else [])
    if thumbnail:
        assert np.asarray(alone.images["GSM1_S1_hires_image"]).max() > 100  # its file is gone with the copy


def test_two_samples_in_a_folder(outs, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for sample in ("A", "B"):
        shutil.copy(outs / "filtered_feature_bc_matrix.h5", flat / f"{sample}_filtered_feature_bc_matrix.h5")
        shutil.copy(outs / "spatial/tissue_positions.csv", flat / f"{sample}_tissue_positions.csv")
    with pytest.raises(ValueError, match="of which section"):
        sge.io.read(flat)


def test_only_the_raw_matrix(outs, tissue, log):
    """All barcodes are in it: those off the tissue are left out by the positions' own word."""
    path = outs / "spatial/tissue_positions.csv"
    positions = pd.read_csv(path)
    raw = ad.AnnData(tissue.tables["table"].X, obs=tissue.tables["table"].obs[[]], var=tissue.tables["table"].var[[]])
    off = raw[:3].copy()
    off.obs_names = positions.barcode[positions.in_tissue == 0][:3]
    both = ad.concat([raw, off])
    sr._write_h5(outs / "raw_feature_bc_matrix.h5", both, version="2.1.0")
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    sdata = sge.io.read(outs)
    same(sdata, tissue)
    assert len(sdata.shapes["run"]) == raw.n_obs
    said = f"only raw_feature_bc_matrix.h5: kept the {raw.n_obs} of {both.n_obs} barcodes"
    assert any(said in m for m in warnings_in(log))


@pytest.mark.parametrize("part", ["filtered_feature_bc_matrix.h5", "spatial"])
def test_a_part_of_the_folder_is_named(outs, tissue, part):
    same(sge.io.read(outs / part), tissue)


def test_a_part_of_an_hd_folder_is_named(tmp_path):
    hd = sge.datasets.synthetic(n_rows=3, n_cols=3, n_genes=10, bin_um=8, mpp=2.0)
    outs = sr.write_visium_hd(tmp_path / "run", hd).source
    assert list(sge.io.read(outs / "binned_outputs/square_016um").tables) == ["square_016um"]
    assert list(sge.io.read(outs / "binned_outputs").tables) == ["square_008um"]
    for bins in ("square_008um", "square_016um"):
        folder = outs / "binned_outputs" / bins
        (folder / "filtered_feature_bc_matrix.h5").rename(folder / "raw_feature_bc_matrix.h5")
    assert sge.io.read(outs).tables["square_008um"].shape == hd.tables["square_008um"].shape


# ---------------------------------------------------------------------------------------- tables


@pytest.fixture
def h5ad(tmp_path, tissue):
    """Write a table that was changed; the image lies beside."""

    def write(change=lambda a: None):
        written = sr.write_h5ad(tmp_path / "section", tissue)
        table = ad.read_h5ad(written.source)
        table = change(table) or table
        table.write_h5ad(written.source)
        return written.source

    return write


def test_columns_of_the_users_stay(h5ad):
    def own(table):
        table.obs["region"] = pd.Categorical(
            ["cortex", "medulla"] * (table.n_obs // 2) + ["cortex"] * (table.n_obs % 2)
        )
        table.obs["spot_id"] = [f"mine{i}" for i in range(table.n_obs)]
        table.obs["spot_id_1"] = 7
        table.uns["spatialdata_attrs"] = {"region": "old", "region_key": "region", "instance_key": "spot_id"}

    source = h5ad(own)
    before = ad.read_h5ad(source).obs
    sdata = sge.io.read(source)
    after = sdata.tables["table"].obs
    pd.testing.assert_frame_equal(after[before.columns], before, check_names=False)
    section = read_as_listed(sdata)
    np.testing.assert_allclose(section.xy_px, sdata.tables["table"].obsm["spatial"], atol=2**-20)


def test_a_third_coordinate_that_is_the_same_everywhere(h5ad, tissue):
    sdata = sge.io.read(
        h5ad(lambda t: t.obsm.update({"spatial": np.column_stack([t.obsm["spatial"], np.zeros(t.n_obs)])}))
    )
    np.testing.assert_allclose(
        read_section(sdata).xy_px[:, 0].sum(), tissue.tables["table"].obsm["spatial"][:, 0].sum()
    )

    def deep(table):
        table.obsm["spatial"] = np.column_stack([table.obsm["spatial"], np.arange(table.n_obs)])

    with pytest.raises(ValueError, match=r"needs obsm\[\"spatial\"\], \(n, 2\)"):
        sge.io.read(h5ad(deep))


@pytest.mark.parametrize(("n", "refused"), [(1, False), (5, False), (20, True)])
def test_spots_without_a_place(h5ad, tissue, log, n, refused):
    source = h5ad(lambda t: t.obsm["spatial"].__setitem__((slice(n), 1), np.nan))
    if refused:
        with pytest.raises(ValueError, match=r"20 of them NaN or infinite\. Write it there"):
            sge.io.read(source)
        return
    assert sge.io.read(source).tables["table"].n_obs == tissue.tables["table"].n_obs - n
    assert any(f"leaving out {n} of {tissue.tables['table'].n_obs} spots" in m for m in warnings_in(log))


def library(pixels, shrink, **more):
    factors = {"tissue_hires_scalef": 1 / shrink, "spot_diameter_fullres": 65 / 4, **more}
    return {"images": {"hires": pixels[::shrink, ::shrink].astype(np.float32) / 255}, "scalefactors": factors}


def two_sections(table, pixels, *, column, uns=True, values=("A", "B 2")):
    """The section twice, the second with all counts doubled."""
    other = table.copy()
    other.X = other.X * 2
    both = ad.concat([table, other], index_unique="-", keys=["0", "1"])
    if column:
        both.obs[column] = [values[0]] * table.n_obs + [values[1]] * table.n_obs
    if uns:
        both.uns["spatial"] = {value: library(pixels, 3) for value in values}
    return both


@pytest.mark.parametrize(
    ("column", "uns"), [("library_id", True), ("sample", True), ("library_id", False), ("mouse", False)]
)
def test_several_sections_in_one_table(h5ad, pixels, tissue, column, uns):
    source = h5ad(lambda t: two_sections(t, pixels, column=column, uns=uns))
    with pytest.raises(
        ValueError, match=rf"spots of 2 sections, \['A', 'B 2'\] \(obs\['{column}'\]\).*dataset_id= one of"
    ):
        sge.io.read(source)
    with pytest.raises(ValueError, match="dataset_id='C' is none of them"):
        sge.io.read(source, dataset_id="C")
    total = tissue.tables["table"].X.sum()
    for name, factor in (("A", 1), ("B_2", 2)):
        sdata = sge.io.read(source, dataset_id=name)
        assert list(sdata.shapes) == [name]
        assert sdata.tables["table"].X.sum() == factor * total
        assert len(read_section(sdata).xy_px) == tissue.tables["table"].n_obs


def test_several_sections_that_nothing_tells_apart(h5ad, pixels):
    with pytest.raises(ValueError, match=r'holds 2 sections, .*no column of obs states.*obs\["library_id"\]'):
        sge.io.read(h5ad(lambda t: two_sections(t, pixels, column="", uns=True)))
    with pytest.raises(
        ValueError,
        match="that another spot has.*of several sections. Read one of them: write the section of each spot to obs\\['library_id'\\]",
    ):
        sge.io.read(h5ad(lambda t: two_sections(t, pixels, column="", uns=False)))


def test_a_library_that_has_left_is_no_second_section(h5ad, pixels, tissue):
    """Subsets of a joined table keep all of ``uns``."""

    def one(table):
        table.obs["library_id"] = "A"
        table.uns["spatial"] = {
            "A": library(pixels, 3),
            "B": {"images": {}, "scalefactors": {"tissue_hires_scalef": 9.0}},
        }

    sdata = sge.io.read(h5ad(one))
    assert list(sdata.tables["table"].uns["spatial"]) == ["A"]
    assert read_section(sdata).mpp == pytest.approx(4.0)


# ---------------------------------------------------------------------------------------- alignment


def test_every_orientation_is_told_from_a_thumbnail(pixels):
    square = pixels[: min(pixels.shape[:2]), : min(pixels.shape[:2])]
    small = np.asarray(Image.fromarray(square).resize((100, 100)))
    for name, orient in ORIENTATIONS.items():
        image = LazyImage(np.moveaxis(orient(square), -1, 0))
        agreement = compare(image, small)
        assert agreement.orientation == name
        assert agreement.best > 0.95
        assert agreement.fits == (name == UPRIGHT)
        assert agreement.turned == (name != UPRIGHT)


def test_colour_and_brightness_do_not_count(pixels):
    small = np.asarray(Image.fromarray(pixels).resize((120, 100))).astype(float)
    image = LazyImage(np.moveaxis(pixels, -1, 0))
    for odd in (small / 255, small[..., ::-1] * 0.3 + 90, 255 * (small / 255) ** 2.2):
        assert compare(image, odd).fits
    assert compare(image, np.full((100, 120, 3), 7)) is None
    assert compare(image, small[:10, :10]) is None  # too small to compare


CHANGES = {
    "mirrored left to right": lambda a: a[:, ::-1],
    "upside down": lambda a: a[::-1],
    "turned by 180 degrees": lambda a: a[::-1, ::-1],
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", ["folder", "jpg thumbnails", "lowres only", "table"])
def test_an_image_that_is_mirrored_is_refused(tmp_path, tissue, pixels, h5ad, outs, how, kind):
    path = tmp_path / "other.tif"
    tifffile.imwrite(path, np.ascontiguousarray(CHANGES[how](pixels)), photometric="rgb", tile=(256, 256))
    source = h5ad(lambda t: t.uns.update(spatial={"S": library(pixels, 3)})) if kind == "table" else outs
    spatial = outs / "spatial"
    if kind == "jpg thumbnails":
        for png in spatial.glob("*.png"):
            Image.open(png).save(png.with_suffix(".jpg"), quality=90)
            png.unlink()
    if kind == "lowres only":
        (spatial / "tissue_hires_image.png").unlink()
    with pytest.raises(
        ValueError, match=f"is {how}.* against the one that the spots were aligned to.*turn this one back"
    ):
        sge.io.read(source, image=path)


@pytest.mark.parametrize(
    ("zoom", "said"), [(2, "exported at 2 times its size"), (0.5, "exported at 0.5 times its size")]
)
def test_an_image_of_another_size_is_refused(tmp_path, pixels, h5ad, zoom, said):
    path = tmp_path / "other.png"
    Image.fromarray(pixels).resize((int(pixels.shape[1] * zoom), int(pixels.shape[0] * zoom))).save(path)
    source = h5ad(lambda t: t.uns.update(spatial={"S": library(pixels, 3)}))
    with pytest.raises(ValueError, match=f"the shape of that one, {said}. Pass the image that"):
        sge.io.read(source, image=path)


def test_an_image_that_was_turned_is_refused(tmp_path, pixels, outs):
    path = tmp_path / "other.png"
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(path)
    with pytest.raises(
        ValueError, match="the shape of that one, turned by 90 degrees or with rows and columns swapped"
    ):
        sge.io.read(outs, image=path)


def test_an_image_of_another_section_is_said(tmp_path, pixels, outs, log):
    other = sr.full_image(sge.datasets.synthetic(n_rows=10, n_cols=12, n_genes=2, mpp=4.0, rng=9))
    path = tmp_path / "other.tif"
    Image.fromarray(other).resize(pixels.shape[1::-1]).save(path)
    sge.io.read(outs, image=path)
    assert any("looks unlike the thumbnail" in m and "of this section?" in m for m in warnings_in(log))


@pytest.mark.parametrize("tag", [3, 6])
@pytest.mark.parametrize("follows", [True, False])
def test_the_thumbnail_decides_whether_a_tag_of_orientation_counts(tmp_path, tissue, pixels, log, tag, follows):
    """Programs differ: spots were aligned to the image as it is shown, or as it is stored."""
    back = {3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a)}[tag]
    written = sr.write_visium(tmp_path / "run", tissue)
    stored = np.ascontiguousarray(back(pixels) if follows else pixels)
    tifffile.imwrite(written.image, stored, photometric="rgb", tile=(256, 256), extratags=[(274, "H", 1, tag, True)])
    (element,) = sge.io.read(written.source).images.values()
    np.testing.assert_array_equal(np.moveaxis(np.asarray(element.data), 0, -1), pixels)
    assert warnings_in(log) == []


def test_images_that_differ_in_a_spatialdata(tmp_path, tissue, pixels, outs):
    """As spatialdata_io.visium reads them: the hires image lies beside, and the full one is mirrored."""
    import spatialdata_io
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity

    sdata = spatialdata_io.visium(outs, dataset_id="run", counts_file="filtered_feature_bc_matrix.h5")
    for image, fits in ((pixels, True), (pixels[:, ::-1], False)):
        sdata.images["run_full_image"] = Image2DModel.parse(
            np.moveaxis(image, -1, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={"run": Identity()},
        )
        if fits:
            assert read_section(sdata, image_key="run_full_image").mpp == pytest.approx(4.0, rel=0.005)
        else:
            with pytest.raises(ValueError, match="'run_full_image' is mirrored left to right against"):
                read_section(sdata, image_key="run_full_image")
        del sdata.images["run_full_image"]


@pytest.mark.parametrize("name", list(ORIENTATIONS)[:4])
def test_expression_and_tissue_tell_the_orientation(tissue, pixels, name):
    """Without any thumbnail: what was measured follows the colours under the spots, in one orientation only."""
    section = read_section(tissue, report=False)
    turned = np.ascontiguousarray(ORIENTATIONS[name](pixels))
    found = likelier_orientation(turned, section.xy_px, section.expression, spot_cells=14.0)
    assert found == (None if name == UPRIGHT else name)


def test_expression_that_follows_nothing_tells_nothing(tissue, pixels):
    section = read_section(tissue, report=False)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(section.xy_px))
        assert likelier_orientation(pixels, section.xy_px, section.expression[order], spot_cells=14.0) is None


def test_predict_and_fit_warn_of_a_mirrored_image(tmp_path, h5ad, pixels, log):
    source = h5ad()
    Image.fromarray(np.ascontiguousarray(pixels[:, ::-1])).save(source.with_name("image.png"))
    sdata = sge.io.read(source)
    log.clear()
    sge.pp.targets(sdata)
    sge.tl.fit(sdata, **FAST)
    said = [m for m in warnings_in(log) if "fit it better mirrored left to right" in m]
    assert len(said) == 2


def test_the_right_image_gets_no_word(h5ad, pixels, log):
    sge.pp.targets(sge.io.read(h5ad(lambda t: t.uns.update(spatial={"S": library(pixels, 3)}))))
    assert warnings_in(log) == []
