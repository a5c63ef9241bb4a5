"""The synthetic section: what it promises of its truth, and what it hides in the way of readers."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from spatialdata.models import ShapesModel, get_table_keys
from spatialdata.transformations import Identity, get_transformation

import histosge as sge
from histosge._evaluation import correlation

SMALL = {"n_rows": 8, "n_cols": 8, "n_genes": 10, "mpp": 2.0}


def pixels(sdata):
    return np.asarray(sd.get_pyramid_levels(sdata.images["he"], n=0))


def normalised(sdata):
    """Measured log1p expression, rows in the order of the shapes."""
    table = sdata.tables["table"]
    x = table.X.toarray()
    frame = pd.DataFrame(
        np.log1p(x / x.sum(1, keepdims=True) * 1e4), index=table.obs["spot_id"], columns=table.var_names
    )
    return frame.loc[sdata.shapes["spots"].index]


def test_same_seed_same_section():
    a, again, other = (sge.datasets.synthetic(**SMALL, rng=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(pixels(a), pixels(again))
    np.testing.assert_array_equal(a.tables["table"].X.toarray(), again.tables["table"].X.toarray())
    pd.testing.assert_frame_equal(a.tables["table"].obs, again.tables["table"].obs)
    assert (a.shapes["spots"].geometry == again.shapes["spots"].geometry).all()
    assert not np.array_equal(pixels(a), pixels(other))
    same_size = a.tables["table"].X.shape == other.tables["table"].X.shape
    assert not (same_size and np.array_equal(a.tables["table"].X.toarray(), other.tables["table"].X.toarray()))


def test_sizes_are_as_asked(sdata):
    table = sdata.tables["table"]
    assert set(sdata.images) == {"he"}
    assert set(sdata.shapes) == {"spots"}
    assert table.n_vars == 20
    assert 0.9 * 144 < table.n_obs <= 144
    assert pixels(sdata).dtype == np.uint8
    assert pixels(sdata).shape[0] == 3
    x = table.X
    assert x.dtype == np.float32
    assert np.array_equal(x.data, np.rint(x.data))
    assert 2000 < np.median(np.asarray(x.sum(1))) < 32000


def test_traps_are_in_place(sdata):
    """All that trips readers of real sections: a test that needs them would pass without."""
    table, frame = sdata.tables["table"], sdata.shapes["spots"]
    assert list(table.obs["spot_id"]) != list(frame.index)
    assert get_table_keys(table) == ("spots", "region", "spot_id")
    assert set(get_transformation(frame, get_all=True)) == {"synthetic"}
    matrix = get_transformation(frame, to_coordinate_system="synthetic").to_affine_matrix(("x", "y"), ("x", "y"))
    assert abs(matrix[0, 1]) > 0.1  # turned
    scale = np.sqrt(np.linalg.det(matrix[:2, :2]))
    assert frame["radius"].iloc[0] * scale == pytest.approx(32.5)  # not 27.5
    assert len(sd.get_pyramid_levels(sdata.images["he"], attr="shape", n=None)) == 2


def test_spots_lie_on_the_tissue(sdata):
    rgb = pixels(sdata).astype(float).mean(0)
    x, y = np.rint(sdata.tables["table"].obsm["spatial"]).astype(int).T
    at_spots = np.array([rgb[j - 10 : j + 10, i - 10 : i + 10].mean() for i, j in zip(x, y, strict=True)])
    corner = rgb[:40, :40].mean()
    assert corner > 235
    assert (at_spots < corner - 15).all()


def test_truth_is_what_was_measured(sdata):
    truth = sge.datasets.synthetic_truth(sdata)
    assert list(truth.index) == list(sdata.shapes["spots"].index)
    assert list(truth.columns) == list(sdata.tables["table"].var_names)
    measured = normalised(sdata)
    follows = correlation(measured.to_numpy(), truth.to_numpy())
    assert follows[:16].min() > 0.5
    assert follows[:16].mean() > 0.9
    # the level as well as the pattern
    assert np.abs(measured.mean() - truth.mean()).max() < 0.3
    # rows in another order have nothing to do with it
    assert correlation(measured.to_numpy()[::-1], truth.to_numpy())[:16].mean() < 0.5


def test_a_fifth_of_the_genes_follows_nothing(sdata):
    truth = sge.datasets.synthetic_truth(sdata)
    assert truth.std()[16:].max() < 0.35
    assert truth.std()[:16].median() > 0.45


def test_image_shows_the_truth(sdata):
    """The image causes the expression: colour alone explains some of it."""
    truth = sge.datasets.synthetic_truth(sdata)
    rgb = pixels(sdata).astype(float)
    places = pd.DataFrame(sdata.tables["table"].obsm["spatial"], index=sdata.tables["table"].obs["spot_id"]).loc[
        truth.index
    ]
    x, y = np.rint(places.to_numpy()).astype(int).T
    colour = np.stack([rgb[:, j - 20 : j + 20, i - 20 : i + 20].mean((1, 2)) for i, j in zip(x, y, strict=True)])
    explained = np.corrcoef(np.column_stack([colour, truth]).T)[:3, 3:]
    assert np.abs(explained).max(0).mean() > 0.4


def test_truth_anywhere(sdata):
    """Between the spots it lies between the spots, and two ways to name a place agree."""
    um = np.array([[500.0, 500.0], [800.0, 650.0], [801.0, 650.0]])
    points = gpd.GeoDataFrame({"radius": [5.0] * 3}, geometry=shapely.points(um))
    sdata.shapes["a"] = ShapesModel.parse(points, transformations={"synthetic": Identity()})
    squares = gpd.GeoDataFrame(geometry=[shapely.box(x - 4, y - 4, x + 4, y + 4) for x, y in um])
    sdata.shapes["b"] = ShapesModel.parse(squares, transformations={"synthetic": Identity()})
    a, b = (sge.datasets.synthetic_truth(sdata, target_key=k) for k in "ab")
    np.testing.assert_allclose(a, b, atol=1e-9)
    assert np.abs(a.iloc[1] - a.iloc[2]).max() < 0.05
    assert np.abs(a.iloc[0] - a.iloc[1]).max() > 0.1
    np.testing.assert_allclose(np.expm1(a).sum(axis=1), 1e4)


def test_truth_of_shapes_in_any_order(sdata):
    wanted = sge.datasets.synthetic_truth(sdata)
    sdata.shapes["other"] = sdata.shapes["spots"].iloc[::-1]
    found = sge.datasets.synthetic_truth(sdata, target_key="other")
    pd.testing.assert_frame_equal(found, wanted.iloc[::-1])


def test_truth_after_writing_and_reading(sdata, tmp_path):
    wanted = sge.datasets.synthetic_truth(sdata)
    sdata.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    pd.testing.assert_frame_equal(sge.datasets.synthetic_truth(back), wanted)
    sge.pp.targets(back)
    assert len(sge.datasets.synthetic_truth(back, target_key="histosge_targets")) == len(
        back.shapes["histosge_targets"]
    )


def test_no_truth(sdata):
    with pytest.raises(KeyError, match=r"target_key='cells' is not among the shapes .*\['spots'\]"):
        sge.datasets.synthetic_truth(sdata, target_key="cells")
    del sdata.tables["table"].uns["synthetic"]
    with pytest.raises(ValueError, match=r"has no known truth: it was not made by histosge\.datasets\.synthetic"):
        sge.datasets.synthetic_truth(sdata)
