"""Places to predict at: where they lie, what they are called, what may be replaced."""

from __future__ import annotations

import logging

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy.spatial import cKDTree
from spatialdata import get_centroids
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Affine, Scale, get_transformation

import histosge as sge

NAME = "histosge_targets"
AXES = ("x", "y")


def warnings_in(log):
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]


def elements(sdata):
    return {name: id(element) for _, name, element in sdata.gen_elements()}


def places_um(sdata, key=NAME):
    """Centres in the system that image and spots share (µm), by SpatialData's own hand."""
    frame = get_centroids(sdata.shapes[key], coordinate_system="synthetic").compute()
    return frame.loc[sdata.shapes[key].index, ["x", "y"]].to_numpy()


def spots_um(sdata):
    return sdata.tables["table"].obsm["spatial"] * 2.0


@pytest.mark.parametrize(("upsample", "step_um"), [(2, 50), (4, 50), (8, 25), (16, 25)])
def test_lattice(sdata, upsample, step_um):
    before = elements(sdata)
    assert sge.pp.targets(sdata, upsample=upsample) is None
    frame = sdata.shapes[NAME]
    assert elements(sdata) == before | {NAME: id(frame)}  # nothing else
    xy = places_um(sdata)
    near, _ = cKDTree(xy).query(xy, k=2)
    assert near[:, 1].min() == pytest.approx(step_um, rel=1e-6)
    assert np.mean(near[:, 1] < step_um + 1e-6) > 0.99  # few at the rim stand alone
    # every spot has its place, and only those are marked
    at, which = cKDTree(xy).query(spots_um(sdata))
    assert at.max() < 1e-6
    assert sorted(which) == list(np.flatnonzero(frame["is_spot"]))
    assert 0.8 * upsample < len(xy) / 138 < 1.3 * upsample
    # none is farther than the corner of a spot's cell, or of a hole between spots
    reach = cKDTree(spots_um(sdata)).query(xy)[0]
    assert reach.max() <= 100 + 100 / np.sqrt(3)
    assert np.mean(reach <= 100 / np.sqrt(3) + 1e-6) > 0.95


def test_frame(sdata):
    sge.pp.targets(sdata)
    frame = sdata.shapes[NAME]
    assert set(frame.columns) == {"geometry", "radius", "array_row", "array_col", "is_spot"}
    assert frame["array_row"].dtype == frame["array_col"].dtype == np.int64
    assert frame["is_spot"].dtype == bool
    assert list(frame.index) == list(range(len(frame)))
    assert not frame[["array_row", "array_col"]].duplicated().any()
    assert (frame[["array_row", "array_col"]] >= 0).all(axis=None)
    assert (frame.geom_type == "Point").all()
    # circles of a step across, in the spots' own half µm
    np.testing.assert_allclose(frame["radius"] / 2, 25.0, rtol=1e-6)
    ShapesModel.validate(frame)


def test_rows_and_columns_are_a_grid(sdata):
    """Place = origin + row * step + column * step."""
    sge.pp.targets(sdata, upsample=8)
    frame = sdata.shapes[NAME]
    design = np.column_stack([np.ones(len(frame)), frame["array_row"], frame["array_col"]])
    fitted, *_ = np.linalg.lstsq(design, places_um(sdata), rcond=None)
    np.testing.assert_allclose(design @ fitted, places_um(sdata), atol=1e-6)
    assert abs(np.linalg.det(fitted[1:])) == pytest.approx(100**2 * np.sqrt(0.75) / 8, rel=1e-6)


def test_four_places_a_spot_by_default(sdata):
    four = sge.pp.targets(sdata, upsample=4, inplace=False)
    default = sge.pp.targets(sdata, inplace=False)
    assert NAME not in sdata.shapes
    pd.testing.assert_frame_equal(pd.DataFrame(default), pd.DataFrame(four))


@pytest.mark.parametrize("bin_um", [20, 33.3, 55])
def test_bins(sdata, bin_um):
    sge.pp.targets(sdata, bin_um=bin_um, tissue="spots")
    frame = sdata.shapes[NAME]
    assert set(frame.columns) == {"geometry", "array_row", "array_col", "is_spot"}
    assert not frame["is_spot"].any()
    matrix = get_transformation(frame, to_coordinate_system="synthetic").to_affine_matrix(AXES, AXES)
    corners = np.stack([np.asarray(g.exterior.coords)[:4] for g in frame.geometry])
    corners = corners @ matrix[:2, :2].T + matrix[:2, 2]
    edges = np.roll(corners, -1, axis=1) - corners
    np.testing.assert_allclose(np.hypot(edges[..., 0], edges[..., 1]), bin_um, rtol=1e-6)
    # along the image's axes, touching, none twice
    np.testing.assert_allclose(np.abs(edges).min(-1), 0, atol=1e-6)
    grid = corners.mean(1) / bin_um - frame[["array_col", "array_row"]].to_numpy()
    np.testing.assert_allclose(grid, np.broadcast_to(grid[0], grid.shape), atol=1e-6)
    assert not frame[["array_row", "array_col"]].duplicated().any()
    # every spot lies in a bin
    lattice = {tuple(v) for v in np.floor(corners.mean(1) / bin_um).astype(int)}
    assert {tuple(v) for v in np.floor(spots_um(sdata) / bin_um).astype(int)} <= lattice


def test_all_transformations_of_the_spots(sdata):
    """The spots lie in a second system, which the image knows nothing of."""
    frame = sdata.shapes["spots"]
    there = get_transformation(frame, get_all=True)
    more = {
        "atlas": Affine([[0, 3, 7], [-3, 0, 9], [0, 0, 1]], input_axes=AXES, output_axes=AXES),
        "tiny": Scale([0.1, 0.1], axes=AXES),
    }
    circles = gpd.GeoDataFrame({"radius": frame["radius"].to_numpy()}, geometry=list(frame.geometry), index=frame.index)
    del sdata.shapes["spots"]
    sdata.shapes["spots"] = ShapesModel.parse(circles, transformations=there | more)
    for what in ({"upsample": 4}, {"bin_um": 50}):
        sge.pp.targets(sdata, **what)
        found = get_transformation(sdata.shapes[NAME], get_all=True)
        assert set(found) == {"synthetic", "atlas", "tiny"}
        for name, transformation in (there | more).items():
            np.testing.assert_allclose(
                found[name].to_affine_matrix(AXES, AXES), transformation.to_affine_matrix(AXES, AXES)
            )


def test_transformations_are_the_targets_own():
    """Moving the targets later moves nothing else."""
    from spatialdata.transformations import set_transformation

    fresh = sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=5, mpp=2.0)
    sge.pp.targets(fresh)
    set_transformation(fresh.shapes[NAME], Scale([9.0, 9.0], axes=AXES), to_coordinate_system="moved")
    assert set(get_transformation(fresh.shapes["spots"], get_all=True)) == {"synthetic"}


def test_tissue(sdata):
    """Within reach of a spot, and dark enough, or only within reach."""
    dark, reach = (sge.pp.targets(sdata, upsample=16, tissue=t, inplace=False) for t in ("auto", "spots"))
    assert 0.8 * len(reach) < len(dark) < len(reach)
    assert {g.wkb for g in dark.geometry} <= {g.wkb for g in reach.geometry}
    assert dark["is_spot"].sum() == reach["is_spot"].sum() == 138


def test_places_off_the_image_are_left_out(sdata):
    """Crop the image at the outermost spots: what would lie beyond is not laid."""
    from spatialdata import SpatialData, get_pyramid_levels
    from spatialdata.models import Image2DModel

    element = sdata.images["he"]
    spots = sdata.tables["table"].obsm["spatial"]
    right, bottom = np.ceil(spots.max(0)).astype(int) + 2
    array = np.asarray(get_pyramid_levels(element, n=0))[:, :bottom, :right]
    where = get_transformation(element, get_all=True)
    image = Image2DModel.parse(array, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=where)
    cropped = SpatialData(images={"he": image}, shapes=dict(sdata.shapes), tables=dict(sdata.tables))
    for what in ({"upsample": 16, "tissue": "spots"}, {"upsample": 4}, {"bin_um": 20, "tissue": "spots"}):
        sge.pp.targets(cropped, key_added="k", **what)
        px = places_um(cropped, "k_targets") / 2
        assert (px >= 0).all()
        assert (px <= [right, bottom]).all()


@pytest.mark.parametrize("key", ["a b", "a/b", "", "__x", "é", "a:b", None, 3])
def test_impossible_key(sdata, key):
    before = elements(sdata)
    with pytest.raises(ValueError, match=r"key_added=.* is not a valid name for a SpatialData element\. Use letters"):
        sge.pp.targets(sdata, key_added=key)
    assert elements(sdata) == before


def test_key(sdata):
    sge.pp.targets(sdata, key_added="my-2.places")
    assert set(sdata.shapes) == {"spots", "my-2.places_targets"}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"upsample": 4, "bin_um": 8}, "upsample=4 and bin_um=8 are two ways to lay targets: pass one of them"),
        ({"upsample": 3}, r"upsample=3: choose one of \(2, 4, 8, 16\)"),
        ({"upsample": 0}, "upsample=0: choose one of"),
        ({"upsample": 1}, "upsample=1: choose one of"),
        ({"bin_um": 0}, r"bin_um=0: bins must be at least 1 µm wide and no wider than a measured spot \(55 µm\)"),
        ({"bin_um": -8}, "bin_um=-8: bins must be at least 1 µm wide"),
        ({"bin_um": 0.99}, "bin_um=0.99: bins must be at least 1 µm wide"),
        ({"bin_um": 55.1}, r"bin_um=55.1: .* no wider than a measured spot.* pass upsample="),
        ({"bin_um": float("nan")}, "bin_um=nan: bins must"),
        ({"tissue": "yes"}, r"tissue='yes': choose 'auto' .* or 'spots'"),
    ],
)
def test_impossible_arguments(sdata, wrong, match):
    before = elements(sdata)
    with pytest.raises(ValueError, match=match):
        sge.pp.targets(sdata, **wrong)
    assert elements(sdata) == before


def test_replacing_is_told(sdata, log):
    sge.pp.targets(sdata)
    assert warnings_in(log) == []
    sge.pp.targets(sdata, bin_um=50)
    assert warnings_in(log) == [f"replacing sdata.shapes['{NAME}'] of an earlier run"]
    assert (sdata.shapes[NAME].geom_type == "Polygon").all()


def test_tables_of_replaced_places_go_with_them(sdata, log):
    sge.pp.targets(sdata, upsample=2)
    sge.tl.embed(sdata, target_key=NAME, encoder="stain-texture")
    assert warnings_in(log) == []
    sge.pp.targets(sdata, upsample=4)
    assert set(sdata.tables) == {"table"}
    assert warnings_in(log)[1:] == [
        f"removing sdata.tables['{NAME}_stain-texture'], which describes the replaced shapes"
    ]


def test_same_places_keep_their_tables(sdata, log):
    """Laying the very same places again must not throw away what may be hours of embedding."""
    sge.pp.targets(sdata, upsample=2)
    sge.tl.embed(sdata, target_key=NAME, encoder="stain-texture")
    sge.pp.targets(sdata, upsample=2)
    assert set(sdata.tables) == {"table", f"{NAME}_stain-texture"}


def test_foreign_shapes_are_not_replaced(sdata):
    sdata.shapes[NAME] = sdata.shapes["spots"]
    before = elements(sdata)
    with pytest.raises(ValueError, match=rf"shapes '{NAME}' were not laid by histosge; choose another key_added="):
        sge.pp.targets(sdata)
    assert elements(sdata) == before


def test_shapes_that_others_annotate_are_not_replaced(sdata):
    """A user's own table on places of ours: replacing them would leave it without."""
    import anndata as ad

    sge.pp.targets(sdata)
    n = len(sdata.shapes[NAME])
    adata = ad.AnnData(np.ones((n, 2), np.float32))
    adata.obs["region"], adata.obs["id"] = pd.Categorical([NAME] * n), np.arange(n)
    sdata.tables["mine"] = TableModel.parse(adata, region=NAME, region_key="region", instance_key="id")
    before = elements(sdata)
    with pytest.raises(ValueError, match=rf"shapes '{NAME}' were not laid by histosge \(annotated by \['mine'\]\)"):
        sge.pp.targets(sdata, table_key="table")
    assert elements(sdata) == before


@pytest.mark.parametrize(
    "kind",
    ["images", "tables"],
)
def test_name_taken_by_another_kind(sdata, kind):
    holder = getattr(sdata, kind)
    holder[NAME] = sdata.images["he"] if kind == "images" else sdata.tables["table"].copy()
    before = elements(sdata)
    with pytest.raises(ValueError, match=r"is taken by another element|did not write"):
        sge.pp.targets(sdata, table_key="table", image_key="he")
    assert elements(sdata) == before


def test_bins_of_irregular_spots(sdata):
    """No lattice, and yet bins can be laid where mpp is given."""
    frame = sdata.shapes["spots"]
    random = np.random.default_rng(0)
    xy = np.column_stack([frame.geometry.x, frame.geometry.y]) + random.uniform(-90, 90, (len(frame), 2))
    circles = gpd.GeoDataFrame({"radius": 20.0}, geometry=shapely.points(xy), index=frame.index)
    where = get_transformation(frame, get_all=True)
    del sdata.shapes["spots"]
    sdata.shapes["spots"] = ShapesModel.parse(circles, transformations=where)
    sge.pp.targets(sdata, bin_um=20, mpp=2.0)
    assert len(sdata.shapes[NAME]) > 1000
