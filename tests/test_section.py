"""Reading a section: what is found, whatever the shape it comes in, and what is refused, leaving it as it was."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import anndata as ad
import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import xarray as xr
from scipy import sparse
from spatialdata import SpatialData, get_pyramid_levels
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation, get_transformation
from tests.listed import as_listed

import histosge as sge
from histosge._section import column, read_section

# ------------------------------------------------------------------------------------------------ builders


def warnings_in(log):
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]


def snapshot(sdata):
    """Every element by name and identity, and the content of every table."""
    elements = {f"{kind}/{name}": id(element) for kind, name, element in sdata.gen_elements()}
    tables = {}
    for name, t in sdata.tables.items():
        x = sparse.csr_matrix(t.X) if t.X is not None else sparse.csr_matrix((0, 0))
        keys = [sorted(map(str, getattr(t, part))) for part in ("uns", "obsm", "layers")]
        values = (x.data.tobytes(), x.indices.tobytes(), list(t.obs_names), list(t.var_names), keys)
        tables[name] = (values, t.obs.to_json(), {k: str(v) for k, v in t.uns.items()})
    return elements, tables


@contextmanager
def refused(sdata, match, error=ValueError):
    before = snapshot(sdata)
    with pytest.raises(error, match=match) as told:
        yield told
    assert snapshot(sdata) == before


def predict_refuses(sdata, match, error=ValueError, **kwargs):
    """Refused by the door that users call, and nothing is changed."""
    with refused(sdata, match, error) as told:
        sge.tl.predict(sdata, encoder="stain-texture", head="mean", genes=5, n_folds=2, **kwargs)
    return str(told.value)


def pixels(sdata, key="he"):
    """Finest scale of an image: (3, h, w) uint8."""
    element = sdata.images[key]
    return np.asarray(get_pyramid_levels(element, n=0) if hasattr(element, "children") else element)


def add_image(sdata, array, *, key="he", names=("r", "g", "b"), like="he", **kwargs):
    """Put an image where ``like`` lies."""
    where = get_transformation(sdata.images[like], get_all=True)
    names = list(names) if names is not None else None
    image = Image2DModel.parse(array, dims=("c", "y", "x"), c_coords=names, transformations=where, **kwargs)
    if key in sdata.images:
        del sdata.images[key]
    sdata.images[key] = image


def own_places(sdata):
    """Centres of the spots in their own coordinates, by name."""
    frame = sdata.shapes["spots"]
    return pd.DataFrame({"x": frame.geometry.x, "y": frame.geometry.y}, index=frame.index)


def add_spots(sdata, xy, *, transformations, names=None, radius=65.0, key="spots"):
    names = sdata.shapes["spots"].index if names is None else names
    circles = gpd.GeoDataFrame({"radius": radius}, geometry=shapely.points(xy), index=names)
    if key in sdata.shapes:
        del sdata.shapes[key]
    sdata.shapes[key] = ShapesModel.parse(circles, transformations=transformations)


def replace_table(sdata, table, key="table"):
    del sdata.tables[key]
    sdata.tables[key] = table


def affine(matrix, shift=(0, 0)):
    full = np.eye(3)
    full[:2, :2], full[:2, 2] = matrix, shift
    return full


def as_transformation(matrix):
    return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))


def turn(degrees):
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def square_section(*, n=12, pitch_px=16.0, kind="bins", key="bins", image_px=260, jitter=0.0, drawn=None):
    """Make n x n places on a square lattice: touching bins (polygons), or circles that leave gaps."""
    random = np.random.default_rng(0)
    col, row = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n)))
    xy = (np.column_stack([col, row]) + 1.0) * pitch_px + 10 + random.uniform(-jitter, jitter, (n * n, 2)) * pitch_px
    names = np.array([f"b{i}" for i in range(len(xy))])
    if kind == "bins":
        half = pitch_px / 2 if drawn is None else drawn / 2
        frame = gpd.GeoDataFrame(geometry=[shapely.box(x - half, y - half, x + half, y + half) for x, y in xy])
        frame.index = names
    else:
        radius = pitch_px / 4 if drawn is None else drawn / 2
        frame = gpd.GeoDataFrame({"radius": radius}, geometry=shapely.points(xy), index=names)
    adata = ad.AnnData(
        sparse.csr_matrix(random.poisson(3.0, (len(xy), 6)).astype(np.float32) + 1),
        obs=pd.DataFrame({"region": pd.Categorical([key] * len(xy)), "name": names}, index=names),
    )
    image = random.integers(0, 255, (3, image_px, image_px), dtype=np.uint8)
    return SpatialData(
        images={"he": Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        shapes={key: ShapesModel.parse(frame)},
        tables={"counts": TableModel.parse(adata, region=key, region_key="region", instance_key="name")},
    ), xy


# --------------------------------------------------------------------------------------------- known truth


def test_known_truth(sdata):
    """The drawn radius is 32.5 µm and rows are shuffled: neither scale nor places may come from them."""
    section = as_listed(read_section(sdata))
    table = sdata.tables["table"]
    assert section.mpp == pytest.approx(2.0, rel=1e-6)
    assert (section.pitch_um, section.spot_um, section.technology) == (100.0, 55.0, "visium")
    assert "from the pitch" in section.mpp_source
    assert (section.image_key, section.spots_key, section.table_key) == ("he", "spots", "table")
    assert section.coordinate_system == "synthetic"
    assert list(section.instances) == list(table.obs["spot_id"])
    np.testing.assert_allclose(section.xy_px, table.obsm["spatial"], atol=1e-6)
    np.testing.assert_allclose(section.xy_um, table.obsm["spatial"] * 2, rtol=1e-6)
    assert list(section.genes) == list(table.var_names)
    x = table.X.toarray().astype(float)
    wanted = np.log1p(x / x.sum(1, keepdims=True) * 1e4)
    assert section.expression.dtype == np.float32
    np.testing.assert_allclose(section.expression.toarray(), wanted, rtol=1e-5)
    assert not section.log_normalised
    assert section.n_left_out == 0


def test_dense_takes_genes_by_name(sdata):
    section = read_section(sdata)
    wanted = ["GENE013", "GENE002"]
    np.testing.assert_array_equal(section.dense(wanted), section.expression.toarray()[:, [13, 2]])


@pytest.mark.parametrize("mpp", [1.0, 3.0])
def test_scale_is_exact(mpp):
    small = sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=5, mpp=mpp)
    assert read_section(small).mpp == pytest.approx(mpp, rel=1e-6)


def same(a, b, *, atol=1e-6):
    """Sections agree spot by spot, whatever the order of their rows."""
    assert sorted(a.instances) == sorted(b.instances)
    order = b.instances.get_indexer(a.instances)
    np.testing.assert_allclose(b.xy_px[order], a.xy_px, atol=atol)
    np.testing.assert_allclose(b.expression.toarray()[order], a.expression.toarray(), rtol=1e-5, atol=1e-6)
    assert b.mpp == pytest.approx(a.mpp, rel=1e-6)
    assert (a.technology, a.spot_um, list(a.genes)) == (b.technology, b.spot_um, list(b.genes))


# ------------------------------------------------------------------------------------------------- image


def test_single_scale_and_pyramid_are_the_same(sdata):
    wanted = read_section(sdata)
    assert hasattr(sdata.images["he"], "children")  # multi-scale
    add_image(sdata, pixels(sdata))
    assert not hasattr(sdata.images["he"], "children")
    found = read_section(sdata)
    same(wanted, found)
    assert (found.image.height_px, found.image.width_px) == (wanted.image.height_px, wanted.image.width_px)
    np.testing.assert_array_equal(found.image.read(100, 50, 300, 90), wanted.image.read(100, 50, 300, 90))


def test_image_is_lazy_and_of_the_finest_scale(sdata):
    image = read_section(sdata).image
    assert hasattr(image.data, "dask")
    assert image.data.shape == pixels(sdata).shape
    assert image.data.dtype == np.uint8


def by_means(array, factor):
    _, h, w = array.shape
    whole = array[:, : h // factor * factor, : w // factor * factor]
    return whole.reshape(3, h // factor, factor, w // factor, factor).mean((2, 4)).round().astype(np.uint8)


def pyramid(levels, *, names=("r", "g", "b")):
    arrays = [xr.DataArray(da.from_array(a), dims=("c", "y", "x"), coords={"c": list(names)}) for a in levels]
    return xr.DataTree.from_dict({f"scale{i}": xr.Dataset({"image": a}) for i, a in enumerate(arrays)})


def test_coarser_levels_come_along_where_they_show_the_same(sdata):
    """Levels by means are taken; those by leaving pixels out are not, nor those of another place or of odd factors."""
    from histosge._section import lazy_image

    rng = np.random.default_rng(0)
    fine = rng.integers(0, 255, (3, 203, 301), dtype=np.uint8)
    cases = {
        "means": ([by_means(fine, 2), by_means(fine, 4)], [2.0, 4.0]),
        "left out": ([fine[:, ::2, ::2], by_means(fine, 4)], [4.0]),
        "moved": ([np.roll(by_means(fine, 2), 3, axis=2)], []),
        "odd": ([by_means(fine, 2)[:, :90]], []),
    }
    for levels, factors in cases.values():
        image = lazy_image(pyramid([fine, *levels]), "he")
        assert [factor for _, factor in image.coarser] == factors
        assert (image.read(0, 0, 301, 203) == fine).all()
    swapped = pyramid([fine, by_means(fine, 2)], names=("b", "g", "r"))
    level, factor = lazy_image(swapped, "he").level(2.0)
    assert factor == 2
    assert (level.read(0, 0, 150, 101) == by_means(fine, 2)[::-1]).all()  # in the order red, green, blue


def read_all(sdata, **kwargs):
    image = read_section(sdata, **kwargs).image
    return np.moveaxis(image.read(0, 0, image.width_px, image.height_px), 0, -1).astype(int)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(np.uint16) * 257,
        lambda a: a.astype(np.uint16),
        lambda a: a.astype(np.float32) / 255,
        lambda a: a.astype(np.float64) / 255,
        lambda a: a.astype(np.float32),
    ],
    ids=["uint16", "uint16 of 255", "float32 of 1", "float64 of 1", "float32 of 255"],
)
def test_other_types_are_converted(sdata, convert):
    wanted = read_all(sdata)
    add_image(sdata, convert(pixels(sdata)))
    assert np.abs(read_all(sdata) - wanted).max() <= 1


def test_transparency_shows_the_white_slide(sdata):
    rgb = pixels(sdata)
    alpha = np.full((1, *rgb.shape[1:]), 255, np.uint8)
    alpha[0, :100], alpha[0, 100:200] = 0, 128
    wanted = np.moveaxis(rgb, 0, -1).astype(int)
    add_image(sdata, np.concatenate([rgb, alpha]), names=("r", "g", "b", "a"))
    found = read_all(sdata)
    np.testing.assert_array_equal(found[200:], wanted[200:])
    assert (found[:100] == 255).all()
    half = wanted[100:200] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(found[100:200] - half).max() <= 1


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("b", "g", "r"), [2, 1, 0]),
        (("Red", "Green", "Blue"), [0, 1, 2]),
        (None, [0, 1, 2]),
        (("g", "b", "r"), [1, 2, 0]),
        (("a", "r", "g", "b"), [3, 0, 1, 2]),
    ],
)
def test_channels_go_by_name(sdata, names, order):
    """Channel i of the file holds colour ``order[i]``."""
    rgb = pixels(sdata)
    wanted = np.moveaxis(rgb, 0, -1)
    rgba = np.concatenate([rgb, np.full((1, *rgb.shape[1:]), 255, np.uint8)])
    add_image(sdata, rgba[order], names=names)
    np.testing.assert_array_equal(read_all(sdata), wanted)


def test_no_image(sdata):
    del sdata.images["he"]
    predict_refuses(sdata, r"has no image\. .*sge\.io\.read\(path, image=")


def test_several_images(sdata):
    add_image(sdata, pixels(sdata), key="if")
    predict_refuses(sdata, r"has 2 images; say which one is the H&E image: image_key= one of \['he', 'if'\]")
    assert read_section(sdata, image_key="he").image_key == "he"


def test_thumbnails_of_space_ranger_give_way(sdata):
    rgb = pixels(sdata)
    for name in ("S1_hires_image", "S1_lowres_image", "S1_full_image"):
        add_image(sdata, rgb, key=name)
    del sdata.images["he"]
    assert read_section(sdata).image_key == "S1_full_image"
    del sdata.images["S1_full_image"]
    predict_refuses(sdata, r"2 images; .* one of \['S1_hires_image', 'S1_lowres_image'\]")
    del sdata.images["S1_lowres_image"]
    assert read_section(sdata).image_key == "S1_hires_image"


def test_wrong_image_key(sdata):
    predict_refuses(
        sdata, r"image_key='HE' is not among the images of this SpatialData: \['he'\]", KeyError, image_key="HE"
    )


@pytest.mark.parametrize(
    ("make", "names", "match"),
    [
        (lambda a: a[:1], None, r"image 'he' has 1 channels .*3 \(RGB\) or 4 \(RGBA\)"),
        (lambda a: a[:2], None, "image 'he' has 2 channels"),
        (lambda a: np.concatenate([a, a]), None, "image 'he' has 6 channels"),
        (
            lambda a: np.concatenate([a, a[:1]]),
            ("DAPI", "CD3", "CD8", "PanCK"),
            r"channels \['dapi', 'cd3', 'cd8', 'panck'\], which are not red, green and blue.*image_key=.*rename",
        ),
        (lambda a: a, ("DAPI", "FITC", "TRITC"), "which are not red, green and blue: it does not look like H&E"),
        (lambda a: a, ("r", "g", "red"), "which are not red, green and blue"),
        (
            lambda a: a.astype(np.int16),
            ("r", "g", "b"),
            "dtype int16; pass an RGB image of dtype uint8, uint16 or float",
        ),
        (lambda a: a.astype(np.uint32), ("r", "g", "b"), "dtype uint32; pass an RGB image"),
        (
            lambda a: a.astype(np.float32) * 100,
            ("r", "g", "b"),
            "values from .* to .*; a float image goes from 0 to 1 or",
        ),
        (lambda a: a / 255.0 - 0.5, ("r", "g", "b"), r"values from -0\.\d+ to 0\.\d+; a float image"),
        (lambda a: np.where(a > 200, np.nan, a / 255), ("r", "g", "b"), "a float image goes from 0 to 1"),
    ],
    ids=[
        "grey",
        "two",
        "six",
        "four stains",
        "three stains",
        "twice red",
        "int16",
        "uint32",
        "large",
        "negative",
        "nan",
    ],
)
def test_not_an_image_of_colours(sdata, make, names, match):
    add_image(sdata, make(pixels(sdata)), names=names)
    predict_refuses(sdata, match)


@pytest.mark.parametrize("names", [("r", "g", "a"), ("g", "b", "a")])
def test_a_colour_is_missing(sdata, names):
    add_image(sdata, pixels(sdata), names=names)
    predict_refuses(sdata, "which are not red, green and blue")


# --------------------------------------------------------------------------- coordinates and transformations


@pytest.mark.parametrize("name", ["global", "my section 1", "S1_downscaled", "µm"])
def test_any_name_of_the_coordinate_system(sdata, name):
    wanted = read_section(sdata)
    spots, image = (get_transformation(e, get_all=True) for e in (sdata.shapes["spots"], sdata.images["he"]))
    add_spots(sdata, own_places(sdata), transformations={name: spots["synthetic"]})
    rgb = pixels(sdata)
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(rgb, dims=("c", "y", "x"), transformations={name: image["synthetic"]})
    found = read_section(sdata)
    assert found.coordinate_system == name
    same(wanted, found)


SIMILARITIES = {
    "turned": affine(3 * turn(37), (100, -50)),
    "mirrored": affine(0.25 * np.diag([1, -1]), (0, 900)),
    "turned and mirrored": affine(7 * turn(-110) @ np.diag([-1, 1]), (1e4, 2e4)),
}


@pytest.mark.parametrize("image_way", SIMILARITIES)
@pytest.mark.parametrize("spots_way", SIMILARITIES)
def test_any_similarity(sdata, image_way, spots_way):
    """Image and spots in coordinates of their own, which meet in a system that is turned against both."""
    wanted = read_section(sdata)
    to_lab, from_px = SIMILARITIES[image_way], SIMILARITIES[spots_way]
    order = wanted.instances.get_indexer(sdata.shapes["spots"].index)
    own = wanted.xy_px[order] @ from_px[:2, :2].T + from_px[:2, 2]
    scale = np.sqrt(abs(np.linalg.det(from_px[:2, :2])))
    rgb = pixels(sdata)
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(
        rgb, dims=("c", "y", "x"), transformations={"lab": as_transformation(to_lab)}
    )
    to_lab_from_own = as_transformation(to_lab @ np.linalg.inv(from_px))
    add_spots(sdata, own, transformations={"lab": to_lab_from_own}, radius=16.25 * scale)
    same(wanted, read_section(sdata), atol=1e-5)


def test_sequence_of_transformations(sdata):
    wanted = read_section(sdata)
    order = wanted.instances.get_indexer(sdata.shapes["spots"].index)
    own = (wanted.xy_px[order] - [30, -20]) / 4
    steps = [Scale([4.0, 4.0], axes=("x", "y")), Translation([30.0, -20.0], axes=("x", "y"))]
    rgb = pixels(sdata)
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(rgb, dims=("c", "y", "x"), transformations={"px": Identity()})
    add_spots(sdata, own, transformations={"px": Sequence(steps)}, radius=4.0)
    same(wanted, read_section(sdata))


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (np.diag([1.0, 1.2]), r"from 'spots' to the image 'he' stretches or shears .*scales, turns and shifts"),
        ([[1.0, 0.3], [0.0, 1.0]], "stretches or shears"),
        (np.diag([1.0, 1.02]), "stretches or shears"),
    ],
)
def test_stretched_transformation(sdata, matrix, match):
    where = get_transformation(sdata.shapes["spots"], to_coordinate_system="synthetic")
    back = where.to_affine_matrix(("x", "y"), ("x", "y"))
    add_spots(sdata, own_places(sdata), transformations={"synthetic": as_transformation(affine(matrix) @ back)})
    predict_refuses(sdata, match)


def test_no_common_coordinate_system(sdata):
    add_spots(sdata, own_places(sdata), transformations={"elsewhere": Identity()})
    match = (
        r"image 'he' \(\['synthetic'\]\) and shapes 'spots' \(\['elsewhere'\]\) share no coordinate system.*set_transf"
    )
    predict_refuses(sdata, match)


def test_wrong_coordinate_system(sdata):
    match = r"coordinate_system='global' does not hold both the image 'he' .* and the shapes 'spots' .*Choose one of \['synt"
    predict_refuses(sdata, match, coordinate_system="global")


def test_coordinate_system_chosen(sdata):
    there = get_transformation(sdata.shapes["spots"], to_coordinate_system="synthetic")
    add_spots(sdata, own_places(sdata), transformations={"a": Identity(), "synthetic": there})
    assert read_section(sdata).coordinate_system == "synthetic"  # the only one that holds both
    assert read_section(sdata, coordinate_system="synthetic").mpp == pytest.approx(2.0)


def test_spots_outside_the_image(sdata):
    there = get_transformation(sdata.shapes["spots"], to_coordinate_system="synthetic")
    moved = Sequence([there, Translation([0.0, 900.0], axes=("x", "y"))])
    add_spots(sdata, own_places(sdata), transformations={"synthetic": moved})
    match = r"\d+ of 138 spots of 'spots' lie outside the image 'he': they span x .* the image is 852 x 772 px.*image_key= and"
    predict_refuses(sdata, match)


def test_image_of_another_scale(sdata):
    """A hires image in place of the full one: spots lie far outside."""
    rgb = pixels(sdata)[:, ::4, ::4]
    add_image(sdata, rgb)
    predict_refuses(sdata, "lie outside the image 'he'")


# ----------------------------------------------------------------------------------------------- rows


def test_order_of_rows_does_not_matter(sdata):
    wanted = read_section(sdata)
    order = np.random.default_rng(3).permutation(138)
    replace_table(sdata, sdata.tables["table"][order].copy())
    found = read_section(sdata)
    np.testing.assert_array_equal(found.rows, np.argsort(order)[wanted.rows])
    # every digit is the same
    assert list(found.instances) == list(wanted.instances)
    np.testing.assert_array_equal(found.xy_px, wanted.xy_px)
    assert (found.expression != wanted.expression).nnz == 0


def test_order_of_shapes_does_not_matter(sdata):
    wanted = read_section(sdata)
    frame = sdata.shapes["spots"]
    order = np.random.default_rng(4).permutation(138)
    where = get_transformation(frame, get_all=True)
    add_spots(sdata, own_places(sdata).iloc[order], transformations=where, names=frame.index[order])
    same(wanted, read_section(sdata))


def test_whole_numbers_as_names(sdata):
    wanted = read_section(sdata)
    frame = sdata.shapes["spots"]
    number = pd.Series(np.random.default_rng(5).permutation(138) + 1000, index=frame.index)
    where = get_transformation(frame, get_all=True)
    add_spots(sdata, own_places(sdata), transformations=where, names=number.to_numpy())
    adata = sdata.tables["table"].copy()
    adata.obs["number"] = number[adata.obs["spot_id"].to_numpy()].to_numpy()
    del adata.uns["spatialdata_attrs"]
    replace_table(sdata, TableModel.parse(adata, region="spots", region_key="region", instance_key="number"))
    found = read_section(sdata)
    np.testing.assert_allclose(found.xy_px, wanted.xy_px)
    assert list(as_listed(found).instances) == list(adata.obs["number"])


@pytest.mark.parametrize("call", ["predict", "evaluate"])
def test_counts_are_read_once(sdata, log, call):
    """Each warning about them then comes once."""
    table = sdata.tables["table"].copy()
    counts = sparse.csr_matrix(table.X).astype(np.float32).tolil()
    counts[3] = 0
    counts, read = counts.tocsr(), []
    table.X = da.from_array(counts.toarray(), chunks=-1).map_blocks(
        lambda block: read.append(len(block)) or block, dtype=np.float32, meta=np.empty((0, 0), np.float32)
    )
    table.obs["domain"] = np.where(np.arange(table.n_obs) % 2, "a", "b")
    table.var["feature_types"] = ["Antibody Capture"] + ["Gene Expression"] * 19
    replace_table(sdata, table)
    ask = {"encoder": "stain-texture", "genes": 5, "n_folds": 2}
    if call == "predict":
        sge.tl.predict(sdata, head="ridge", bin_um=27, conserve=True, inplace=False, **ask)
    else:
        sge.tl.evaluate(sdata, heads=["ridge"], labels="domain", **ask)
    assert read == [138]
    about = [r.getMessage() for r in log.records if r.getMessage().startswith("leaving out")]
    assert sorted(about) == [
        "leaving out 1 features that are no gene expression: 1 Antibody Capture",
        "leaving out 1 of 138 spots that have no counts, or less than 2 % of the median",
    ]


def test_spots_without_rows(sdata, log):
    """Spots off the tissue have a circle and no row."""
    wanted = as_listed(read_section(sdata))
    replace_table(sdata, sdata.tables["table"][20:].copy())
    found = as_listed(read_section(sdata))
    assert len(found.instances) == 118
    np.testing.assert_allclose(found.xy_px, wanted.xy_px[20:])
    np.testing.assert_allclose(found.expression.toarray(), wanted.expression.toarray()[20:], rtol=1e-6)
    assert found.mpp == pytest.approx(2.0)
    assert warnings_in(log) == []


def test_rows_without_spots(sdata, log):
    wanted = as_listed(read_section(sdata))
    frame = sdata.shapes["spots"]
    gone = list(sdata.tables["table"].obs["spot_id"][:7])
    kept = [n for n in frame.index if n not in gone]
    where = get_transformation(frame, get_all=True)
    add_spots(sdata, own_places(sdata).loc[kept], transformations=where, names=kept)
    found = as_listed(read_section(sdata))
    np.testing.assert_allclose(found.xy_px, wanted.xy_px[7:])
    np.testing.assert_allclose(found.expression.toarray(), wanted.expression.toarray()[7:], rtol=1e-6)
    assert warnings_in(log) == ["leaving out 7 rows of table 'table' that have no spot"]


def test_rows_of_another_element(sdata):
    """One table may annotate two elements, of which only one is a section's spots."""
    wanted = read_section(sdata)
    table = sdata.tables["table"].copy()
    more = table[:9].copy()
    more.obs["region"] = pd.Categorical(["cells"] * 9)
    both = ad.concat([more, table], index_unique="-")
    both.obs["region"] = pd.Categorical(both.obs["region"].astype(str))
    replace_table(sdata, TableModel.parse(both, region=["cells", "spots"], region_key="region", instance_key="spot_id"))
    same(wanted, read_section(sdata))


@pytest.mark.parametrize("values", [[0, 1], [False, True], ["0", "1"], [0.0, 1.0]])
@pytest.mark.parametrize("categorical", [False, True])
def test_in_tissue(sdata, values, categorical, log):
    wanted = as_listed(read_section(sdata))
    table = sdata.tables["table"]
    column = np.array([values[0]] * 5 + [values[1]] * 133)
    table.obs["in_tissue"] = pd.Categorical(column) if categorical else column
    found = as_listed(read_section(sdata))
    assert list(found.instances) == list(wanted.instances[5:])
    assert found.n_left_out == 5
    assert "leaving out 5 spots with obs['in_tissue'] = 0" in log.text


def test_in_tissue_in_words(sdata):
    sdata.tables["table"].obs["in_tissue"] = ["False"] * 5 + ["True"] * 133
    assert len(read_section(sdata).instances) == 133


def test_instances_that_do_not_match(sdata):
    table = sdata.tables["table"]
    table.obs["spot_id"] = [f"{n}-1" for n in table.obs["spot_id"]]
    match = r"'table' does not annotate the spots 'spots': none of its 138 'spot_id' values .*SPOT-.*-1'.* index .*'SPOT-\d\d-\d\d'"
    predict_refuses(sdata, match)


@pytest.mark.parametrize("which", ["rows", "shapes"])
def test_a_spot_twice(sdata, which):
    if which == "rows":
        table = sdata.tables["table"]
        table.obs["spot_id"] = [*table.obs["spot_id"][2:4], *table.obs["spot_id"][2:]]
    else:
        frame = sdata.shapes["spots"]
        names, where = [*frame.index, *frame.index[:2]], get_transformation(frame, get_all=True)
        add_spots(sdata, own_places(sdata).to_numpy()[[*range(138), 0, 1]], transformations=where, names=names)
    predict_refuses(sdata, "(twice|doubles|more than once|not unique)")


# ------------------------------------------------------------------------------------- spots and table


def test_no_table(sdata):
    del sdata.tables["table"]
    predict_refuses(sdata, r"no measured spots found: this SpatialData has no table\. Read the section with its counts")


def test_table_that_annotates_nothing(sdata):
    del sdata.tables["table"].uns["spatialdata_attrs"]
    predict_refuses(sdata, r"no measured spots found: tables \['table'\] annotate \{'table': \[\]\}.*TableModel\.parse")


def test_table_that_annotates_something_else(sdata):
    add_spots(sdata, own_places(sdata), transformations={"synthetic": Identity()}, key="cells")
    told = predict_refuses(sdata, "no measured spots found", spots_key="cells")
    assert "the shapes 'cells'" in told
    assert "'table': ['spots']" in told


def test_several_spots(sdata):
    frame = sdata.shapes["spots"]
    where = get_transformation(frame, get_all=True)
    add_spots(sdata, own_places(sdata), transformations=where, key="spots_2")
    other = sdata.tables["table"].copy()
    other.obs["region"] = pd.Categorical(["spots_2"] * 138)
    del other.uns["spatialdata_attrs"]
    sdata.tables["second"] = TableModel.parse(other, region="spots_2", region_key="region", instance_key="spot_id")
    match = (
        r"several spots or tables.* spots_key= one of \['spots', 'spots_2'\], table_key= one of \['second', 'table'\]"
    )
    predict_refuses(sdata, match)
    for spots, table in (("spots", "table"), ("spots_2", "second")):
        assert read_section(sdata, spots_key=spots).table_key == table
        assert read_section(sdata, table_key=table).spots_key == spots


def test_several_tables(sdata):
    sdata.tables["other"] = sdata.tables["table"].copy()
    predict_refuses(sdata, r"several spots or tables.*table_key= one of \['other', 'table'\]")
    assert read_section(sdata, table_key="other").table_key == "other"


def test_own_tables_are_no_candidates(sdata):
    sge.tl.embed(sdata, encoder="stain-texture")
    assert len(sdata.tables) == 2
    assert read_section(sdata).table_key == "table"


def test_wrong_keys(sdata):
    predict_refuses(sdata, r"spots_key='spot' is not among the shapes .*\['spots'\]", KeyError, spots_key="spot")
    predict_refuses(sdata, r"table_key='x' is not among the tables .*\['table'\]", KeyError, table_key="x")
    predict_refuses(
        sdata, r"layer='raw' is not among the layers of table 'table': .*None means X", KeyError, layer="raw"
    )


def test_only_layers_are_listed(sdata):
    sdata.tables["table"].layers["counts"] = sdata.tables["table"].X.copy()
    predict_refuses(sdata, r"layers of table 'table': \['counts'\]", KeyError, layer="raw")
    sdata.tables["table"].X = sparse.csr_matrix((138, 20))
    predict_refuses(sdata, r"Name the layer that does: layer=\['counts'\]")


def test_double_gene_names(sdata):
    table = sdata.tables["table"]
    table.var_names = ["A", "A", *table.var_names[2:]]
    predict_refuses(sdata, r"var_names of table 'table' are not unique \(for example \['A'\]\).*var_names_make_unique")


# --------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "dense", "integers", "dask"])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_forms_of_counts(sdata, form, layer):
    import dask.array as da

    wanted = read_section(sdata)
    table = sdata.tables["table"]
    counts = table.X.toarray()
    make = {
        "csr": sparse.csr_matrix,
        "csc": sparse.csc_matrix,
        "coo": sparse.csr_array,
        "dense": np.asarray,
        "integers": lambda x: x.astype(np.int32),
        "dask": lambda x: da.from_array(x, chunks=(50, 7)),
    }[form]
    if layer is None:
        table.X = make(counts)
    else:
        table.layers["counts"] = make(counts)
        table.X = np.random.default_rng(0).normal(size=counts.shape)  # scaled values: not to be read
    same(wanted, read_section(sdata, layer=layer))


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_log_normalised_already(sdata, marked, dense, log):
    import scanpy as sc

    wanted = read_section(sdata)
    table = sdata.tables["table"]
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    if dense:
        table.X = table.X.toarray()
    if not marked:
        del table.uns["log1p"]
    found = read_section(sdata)
    assert found.log_normalised
    assert "log-normalised already" in log.text
    np.testing.assert_allclose(found.expression.toarray(), wanted.expression.toarray(), rtol=1e-4)


def test_counts_of_a_table_once_logged_are_counts(sdata):
    """uns["log1p"] says something of X, not of a layer."""
    wanted = read_section(sdata)
    table = sdata.tables["table"]
    table.layers["counts"] = table.X.copy()
    table.uns["log1p"] = {}
    found = read_section(sdata, layer="counts")
    assert not found.log_normalised
    same(wanted, found)


def test_corrected_counts_are_normalised(sdata):
    """Fractions of counts, as ambient correction leaves them, are no logarithms."""
    wanted = read_section(sdata)
    table = sdata.tables["table"]
    table.X = table.X * 0.9
    assert table.X.max() > 100
    found = read_section(sdata)
    assert not found.log_normalised
    np.testing.assert_allclose(found.expression.toarray(), wanted.expression.toarray(), rtol=1e-5)


def test_spots_without_counts_are_left_out(sdata, log):
    wanted = as_listed(read_section(sdata))
    table = sdata.tables["table"]
    counts = table.X.toarray()
    counts[[3, 50, 51]] = 0
    table.X = sparse.csr_matrix(counts)
    found = as_listed(read_section(sdata))
    kept = np.setdiff1d(np.arange(138), [3, 50, 51])
    assert list(found.instances) == list(wanted.instances[kept])
    np.testing.assert_allclose(found.xy_px, wanted.xy_px[kept])
    np.testing.assert_allclose(found.expression.toarray(), wanted.expression.toarray()[kept], rtol=1e-6)
    assert found.n_left_out == 3
    assert warnings_in(log) == ["leaving out 3 of 138 spots that have no counts, or less than 2 % of the median"]
    assert np.isfinite(found.expression.data).all()


def test_nearly_empty_spots_are_left_out(sdata, log):
    """Scaled to 10,000, one count of such a spot would be the largest value of its gene."""
    wanted = as_listed(read_section(sdata))
    table = sdata.tables["table"]
    counts = table.X.toarray()
    median = np.median(counts.sum(1))
    for row, total in ((3, 1), (50, np.floor(0.019 * median)), (51, np.ceil(0.021 * median))):
        counts[row] = 0
        counts[row, 4] = total
    table.X = sparse.csr_matrix(counts)
    found = as_listed(read_section(sdata))
    kept = np.setdiff1d(np.arange(138), [3, 50])
    assert list(found.instances) == list(wanted.instances[kept])
    assert found.n_left_out == 2
    assert warnings_in(log) == ["leaving out 2 of 138 spots that have no counts, or less than 2 % of the median"]
    table.obs["in_tissue"] = [int(i != 7) for i in range(138)]
    assert read_section(sdata).n_left_out == 3  # and those off the tissue


def test_nearly_empty_is_told_by_the_spots_that_have_counts(sdata):
    """Many empty spots do not make the others look full, nor nearly empty."""
    table = sdata.tables["table"]
    counts = table.X.toarray()
    far = np.argsort(np.hypot(*(table.obsm["spatial"] - table.obsm["spatial"].mean(0)).T))[50:]
    counts[far] = 0
    table.X = sparse.csr_matrix(counts)
    assert len(read_section(sdata).instances) == 50


def test_nearly_empty_spots_are_not_learnt_from(sdata, log):
    table = sdata.tables["table"]
    counts = table.X.toarray()
    counts[[3, 50]] = 0
    counts[50, 4] = 1
    table.X = sparse.csr_matrix(counts)
    run = {"encoder": "stain-texture", "head": "nearest", "genes": 20, "n_folds": 2, "upsample": 2, "inplace": False}
    predicted = sge.tl.predict(sdata, **run)
    assert any("leaving out 2 of 138 spots" in told for told in warnings_in(log))
    assert predicted.obs["is_spot"].sum() == 136
    assert predicted.uns["histosge"]["n_spots"] == 136


# ----------------------------------------------------------------------------- some spots, their counts and labels


def test_some_of_the_spots(sdata):
    section = read_section(sdata)
    rows = np.random.default_rng(0).permutation(138)[:60]
    some = section.take(rows)
    assert list(some.instances) == list(section.instances[rows])
    np.testing.assert_array_equal(some.xy_px, section.xy_px[rows])
    np.testing.assert_array_equal(some.xy_um, section.xy_um[rows])
    np.testing.assert_array_equal(some.expression.toarray(), section.expression.toarray()[rows])
    np.testing.assert_array_equal(some.lattice.index, section.lattice.index[rows])
    for name in ("image", "genes", "mpp", "pitch_um", "spot_um", "technology", "n_left_out"):
        assert getattr(some, name) is getattr(section, name), name
    assert some.lattice.pitch_px == section.lattice.pitch_px
    assert len(section.instances) == len(section.lattice.index) == 138  # the section itself stays whole


def test_some_spots_of_no_lattice():
    sdata, _ = square_section(kind="circles", jitter=0.4)
    section = read_section(sdata, mpp=1.0)
    assert section.lattice is None
    assert section.take(np.arange(40)).lattice is None
    assert len(section.take(np.arange(40)).xy_px) == 40


@pytest.mark.parametrize("layer", [None, "raw"])
def test_counts_of_the_section(sdata, layer):
    """By name: the table's rows are in another order than the section's spots, and some are no spots of it."""
    table = sdata.tables["table"]
    counts = table.X.toarray() * (1 if layer is None else 2)
    counts[9] = 0  # left out
    if layer is None:
        table.X = sparse.csr_matrix(counts)
    else:
        table.layers[layer] = sparse.csr_matrix(counts)
    by_name = pd.DataFrame(counts, index=table.obs["spot_id"])
    order = np.random.default_rng(4).permutation(138)
    replace_table(sdata, table[order].copy())
    section = read_section(sdata, layer=layer)
    assert section.counts.shape == (137, 20)
    for found in (section, section.take(np.array([70, 3, 12]))):
        np.testing.assert_array_equal(found.counts.toarray(), by_name.loc[found.instances].to_numpy())
        named = sdata.tables["table"].obs["spot_id"].to_numpy()[found.rows]
        np.testing.assert_array_equal(named, found.instances)


def test_no_counts_where_there_are_no_whole_numbers(sdata):
    table = sdata.tables["table"]
    raw = table.X.copy()
    assert read_section(sdata).counts is not None
    table.layers["raw"] = raw
    table.X = raw * 1.5
    assert read_section(sdata).counts is None
    table.X = raw.log1p()
    assert read_section(sdata).counts is None
    np.testing.assert_array_equal(as_listed(read_section(sdata, layer="raw")).counts.toarray(), raw.toarray())
    with pytest.raises(KeyError, match="layer='rwa' is not among the layers of table 'table'"):
        read_section(sdata, layer="rwa")


@pytest.mark.parametrize("kind", ["text", "category", "number"])
def test_column_of_the_section(sdata, kind):
    table = sdata.tables["table"]
    names = table.obs["spot_id"].astype(str).to_numpy()
    label = np.array([f"L{int(n.split('-')[1]) // 4}" for n in names])
    values = {"text": label, "category": pd.Categorical(label), "number": np.arange(138.0)}[kind]
    table.obs["label"] = values
    replace_table(sdata, table[np.random.default_rng(4).permutation(138)].copy())
    section = read_section(sdata)
    found = column(sdata, section, "label")
    by_name = pd.Series(np.asarray(values), index=names)
    assert list(found) == list(by_name.loc[section.instances])
    some = section.take(np.array([5, 100, 2]))
    assert list(column(sdata, some, "label")) == list(by_name.loc[some.instances])


def test_column_that_is_not_there(sdata):
    section = read_section(sdata)
    with pytest.raises(KeyError, match=r"labels='lable' is not a column of sdata\.tables\['table'\]\.obs: \['region'"):
        column(sdata, section, "lable")


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (
            np.nan,
            r"counts of table 'table' hold 2 values that are NaN or infinite, in 2 spots\. Remove or replace .*layer=",
        ),
        (np.inf, "hold 2 values that are NaN or infinite, in 2 spots"),
        (-4.0, r"hold 2 negative values \(least -4\).*raw counts or log-normalised values, not scaled ones: layer="),
    ],
)
def test_impossible_counts(sdata, value, match, dense):
    table = sdata.tables["table"]
    counts = table.X.toarray()
    counts[5, 3] = counts[9, 0] = value
    table.X = counts if dense else sparse.csr_matrix(counts)
    predict_refuses(sdata, match)


def test_impossible_counts_off_the_tissue_do_no_harm(sdata):
    table = sdata.tables["table"]
    counts = table.X.toarray()
    counts[5, 3] = np.nan
    table.X = counts
    table.obs["in_tissue"] = [int(i != 5) for i in range(138)]
    assert len(read_section(sdata).instances) == 137


def test_no_counts_at_all(sdata):
    table = sdata.tables["table"]
    table.layers["raw"] = table.X.copy()
    table.X = sparse.csr_matrix(table.shape)
    predict_refuses(sdata, r"'table' holds no counts at all\. Name the layer that does: layer=.*'raw'")
    assert len(read_section(sdata, layer="raw").instances) == 138


def test_no_matrix(sdata):
    table = sdata.tables["table"]
    table.layers["raw"] = table.X.copy()
    table.X = None
    predict_refuses(sdata, r"'table' has no values in X\. Name a layer: .*'raw'")


def test_too_few_spots(sdata):
    replace_table(sdata, sdata.tables["table"][:29].copy())
    predict_refuses(sdata, r"29 measured spots are too few to learn from; at least 30 are needed.*'table' annotates")


def test_thirty_spots_will_do(sdata):
    middle = sdata.tables["table"].obsm["spatial"] - [426, 386]
    near = np.argsort(np.hypot(*middle.T))[:30]
    replace_table(sdata, sdata.tables["table"][near].copy())
    section = read_section(sdata)
    assert len(section.instances) == 30
    assert section.mpp == pytest.approx(2.0, rel=1e-6)


# -------------------------------------------------------------------------------------------- physical scale


def test_touching_bins_say_their_size_by_name():
    sdata, xy = square_section(key="S1_square_008um")
    section = read_section(sdata)
    assert section.mpp == pytest.approx(0.5)
    assert (section.technology, section.pitch_um, section.spot_um) == ("visium-hd", 8.0, 8.0)
    np.testing.assert_allclose(section.xy_px, xy)


def test_touching_bins_without_a_name():
    sdata, _ = square_section()
    predict_refuses(sdata, r"scale of 'bins' cannot be known.* they touch each other on a square lattice.*Pass mpp=")
    predict_refuses(sdata, r"Pass mpp=: the pitch of the spots in µm divided by 16 px\.")
    section = read_section(sdata, mpp=16 / 16)
    assert (section.mpp, section.mpp_source) == (1.0, "given")
    assert (section.pitch_um, section.spot_um) == (pytest.approx(16.0), pytest.approx(16.0))


def test_legacy_st():
    sdata, _ = square_section(kind="circles")
    table = sdata.tables["counts"]
    table.obs_names = [f"{2 + i % 12}.02x{3 + i // 12}.98" for i in range(144)]
    section = read_section(sdata)
    assert (section.technology, section.pitch_um, section.spot_um) == ("st", 200.0, 100.0)
    assert section.mpp == pytest.approx(12.5)


def test_irregular_spots():
    sdata, _ = square_section(kind="circles", jitter=1.5, image_px=300)
    predict_refuses(sdata, r"physical scale of 'bins' cannot be known from its spots: .*Pass mpp=, the µm per pixel")
    section = read_section(sdata, mpp=0.5)
    assert (section.technology, section.lattice, section.mpp) == ("irregular", None, 0.5)
    assert section.spot_um == pytest.approx(4.0)  # drawn: 8 px


def test_places_around_irregular_spots():
    """mpp= is enough: a lattice of its own, as dense as asked for, near every spot and nowhere else."""
    sdata, xy = square_section(kind="circles", jitter=1.5, image_px=300)
    sge.pp.targets(sdata, mpp=0.5, tissue="spots")
    places = sdata.shapes["histosge_targets"]
    at = np.column_stack([places.geometry.x, places.geometry.y])
    near = np.sort(np.linalg.norm(xy[:, None] - xy[None], axis=-1), axis=1)[:, 1]
    pitch, off = np.median(near), np.linalg.norm(at[:, None] - xy[None], axis=-1)
    assert off.min(axis=1).max() <= pitch
    assert off.min(axis=0).max() <= pitch / 2 / np.sqrt(3) * 1.001  # half a step is the farthest from such a lattice
    step = np.sort(np.linalg.norm(at[:, None] - at[None], axis=-1), axis=1)[:, 1]
    np.testing.assert_allclose(step, pitch / 2, rtol=1e-6)
    assert not places["is_spot"].any()


def test_mpp_given(sdata, log):
    section = read_section(sdata, mpp=2.0)
    assert (section.mpp, section.mpp_source) == (2.0, "given")
    assert warnings_in(log) == []


def test_unusual_pitch_is_told(sdata, log):
    section = read_section(sdata, mpp=1.0)
    assert section.pitch_um == pytest.approx(50.0)
    assert section.technology != "visium"
    assert section.spot_um == pytest.approx(32.5)  # as it is drawn
    assert warnings_in(log) == ["mpp=1 makes the pitch of these visium spots 50.0 µm, where 100 µm is usual"]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e6])
def test_impossible_scale(sdata, value):
    predict_refuses(sdata, rf"mpp={value!r} is not a length in µm.*None to take it from the spots", mpp=value)


# --------------------------------------------------------------------------------------------- on disk


def test_read_from_disk_is_the_same(sdata, tmp_path):
    import spatialdata as sd

    wanted = read_section(sdata)
    sdata.write(tmp_path / "s.zarr")
    found = read_section(sd.read_zarr(tmp_path / "s.zarr"))
    same(wanted, found)
    np.testing.assert_array_equal(found.image.read(200, 200, 260, 250), wanted.image.read(200, 200, 260, 250))


# ------------------------------------------------------------------------------------- the tests themselves


def test_a_change_would_be_seen(sdata):
    """``refused`` fails where something was changed before the error."""

    def change(what):
        with refused(sdata, "later"):
            what()
            msg = "later"
            raise ValueError(msg)

    changes = [
        lambda: sdata.shapes.__setitem__("new", sdata.shapes["spots"]),
        lambda: sdata.tables["table"].obs.insert(0, "new", 1),
        lambda: sdata.tables["table"].uns.update(new=1),
        lambda: setattr(sdata.tables["table"], "X", sdata.tables["table"].X * 2),
    ]
    for what in changes:
        with pytest.raises(AssertionError):
            change(what)
