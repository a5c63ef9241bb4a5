"""The synthetic section: what it promises of its truth, and what it hides in the way of readers."""

from __future__ import annotations

import hashlib

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from scipy.ndimage import gaussian_filter
from spatialdata.models import ShapesModel, get_table_keys
from spatialdata.transformations import Identity, get_transformation

import histosge as sge
from histosge._section import centroids, read_section
from histosge._statistics import correlation
from histosge.datasets import expected_rates, glands, hidden_fields, parts, sample

SMALL = {"n_rows": 8, "n_cols": 8, "n_genes": 10, "mpp": 2.0}
HD, HD_TABLE = "synthetic_square_008um", "square_008um"
AXES = ("x", "y")


@pytest.fixture(scope="module")
def hd():
    return sge.datasets.synthetic(n_rows=6, n_cols=5, n_genes=20, mpp=1.0, rng=2, detail_um=20, bin_um=8)


def places_um(sdata, key):
    """Centres in the image's µm."""
    matrix = get_transformation(sdata.shapes[key], to_coordinate_system="synthetic").to_affine_matrix(AXES, AXES)
    return centroids(sdata.shapes[key]) @ matrix[:2, :2].T + matrix[:2, 2]


def digest(values, dtype):
    return hashlib.sha256(np.ascontiguousarray(values, dtype=dtype).tobytes()).hexdigest()[:16]


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


@pytest.mark.parametrize(
    ("options", "image", "counts"),
    [
        ({}, -853806, "1dcb3442a9fef530"),
        ({"n_rows": 12, "n_cols": 12, "n_genes": 30, "rng": 3}, -433028, "c33240e919e900fd"),
    ],
)
def test_known_values(options, image, counts):
    """Results in the documentation rest on these very sections; whole numbers only, as floats vary by machine.

    A pixel is rounded from a float32, and another machine rounds some the other way: at most one in a hundred thousand.
    """
    sdata = sge.datasets.synthetic(**options)
    drawn = pixels(sdata).astype(np.int64)
    signs = np.random.default_rng(0).integers(0, 2, drawn.shape, dtype=np.int8)  # so that order counts
    assert np.where(signs, drawn, -drawn).sum() == pytest.approx(image, abs=1e-5 * drawn.size)
    assert digest(sdata.tables["table"].X.toarray(), "<i4") == counts


@pytest.mark.parametrize("bin_um", [None, 16])
def test_parts_change_nothing(monkeypatch, bin_um):
    whole = sge.datasets.synthetic(**SMALL, bin_um=bin_um)
    shapes, table = next(iter(whole.shapes)), next(iter(whole.tables))
    truth = sge.datasets.synthetic_truth(whole, target_key=shapes)
    monkeypatch.setattr("histosge.datasets._simulation._PART", 5000)  # some rows of the image, some spots or bins
    again = sge.datasets.synthetic(**SMALL, bin_um=bin_um)
    np.testing.assert_array_equal(pixels(again), pixels(whole))
    np.testing.assert_array_equal(again.tables[table].X.toarray(), whole.tables[table].X.toarray())
    pd.testing.assert_frame_equal(sge.datasets.synthetic_truth(again, target_key=shapes), truth, rtol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 7, 8])
def test_parts_cover_all_once(n):
    for values in (0, 1, 3, 100):
        taken = [i for part in parts(n, values, most=10) for i in range(n)[part]]
        assert taken == list(range(n))


@pytest.mark.parametrize("detail_um", [16.0, 20.0, 70.0])
def test_detail_is_as_fine_as_asked(detail_um):
    """Two places are correlated by exp(-(distance / (2 sigma)) ** 2): 1 / e at two sigmas."""
    lag = 2 * detail_um / 8
    found = []
    for seed in range(4):
        params = {"n_rows": 24, "n_cols": 24, "n_genes": 5, "seed": seed, "genes_seed": seed}
        usual, tissue = hidden_fields(params)
        fields, same_tissue = hidden_fields({**params, "detail_um": detail_um})
        for fine in (fields[1], fields[3]):
            assert fine.std() == pytest.approx(1)
            for axis in (0, 1):
                # between the two whole numbers of cells around the lag
                below, above = ((fine * np.roll(fine, int(k), axis)).mean() for k in (np.floor(lag), np.ceil(lag)))
                found.append(below + (above - below) * (lag % 1))
    assert np.mean(found) == pytest.approx(np.exp(-1), abs=0.04)
    np.testing.assert_array_equal(fields[[0, 2, 4]], usual[[0, 2, 4]])
    np.testing.assert_array_equal(same_tissue, tissue)
    assert np.array_equal(fields, usual) == (detail_um == 70)


def test_detail_reaches_expression_and_image():
    """Fields of 20 µm are in the expected counts, and in the picture: the lumen as holes, the size in the nuclei."""
    fine = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=40, rng=0, detail_um=20)
    usual = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=40, rng=0, mpp=4.0)
    um = np.random.default_rng(0).uniform(500, 1100, (500, 2))
    change = {}
    for name, sdata in (("fine", fine), ("usual", usual)):
        for key, shift in (("here", 0), ("there", 40)):
            frame = gpd.GeoDataFrame({"radius": [1.0] * len(um)}, geometry=shapely.points(um + [shift, 0]))
            sdata.shapes[key] = ShapesModel.parse(frame, transformations={"synthetic": Identity()})
        here, there = (sge.datasets.synthetic_truth(sdata, target_key=k).to_numpy() for k in ("here", "there"))
        change[name] = ((here - there) ** 2).mean() / here.var(0).mean()
    assert change["fine"] > 2 * change["usual"]

    fields, tissue = hidden_fields(fine.tables["table"].uns["synthetic"])
    density = -np.log10((pixels(fine).astype(float) + 1) / 246)  # (3, h, w)
    blue = np.tensordot(np.linalg.pinv(np.stack([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]).T)[0], density, 1)
    hole = density.max(0) < 0.1
    coarse_nuclei = (gaussian_filter(blue, 2) - gaussian_filter(blue, 5)) ** 2
    fine_nuclei = (blue - gaussian_filter(blue, 2)) ** 2
    inside = gaussian_filter(tissue.astype(float), 6) > 0.99
    row, col = (8 * i + 4 for i in np.nonzero(inside))
    opening, large, small = (gaussian_filter(a * 1.0, 15)[row, col] for a in (hole, coarse_nuclei, fine_nuclei))
    assert np.corrcoef(opening, fields[3][inside])[0, 1] > 0.4
    assert np.corrcoef(np.log(large / small), fields[1][inside])[0, 1] > 0.4


def test_sections_from_before_detail(sdata):
    wanted = sge.datasets.synthetic_truth(sdata)
    uns = sdata.tables["table"].uns
    assert uns["synthetic"]["detail_um"] == 70
    uns["synthetic"] = {k: v for k, v in uns["synthetic"].items() if k != "detail_um"}
    pd.testing.assert_frame_equal(sge.datasets.synthetic_truth(sdata), wanted)


def test_bins_are_read_as_visium_hd(hd):
    assert (set(hd.shapes), set(hd.tables)) == ({HD}, {HD_TABLE})
    section = read_section(hd)
    assert section.technology == "visium-hd"
    assert section.mpp == pytest.approx(1.0, rel=1e-3)
    assert section.pitch_um == section.spot_um == 8
    assert section.lattice.kind == "square"
    assert section.lattice.residual < 1e-6
    assert section.n_left_out == 0
    where = pd.Index(section.instances).get_indexer(hd.shapes[HD].index)
    np.testing.assert_allclose(section.xy_px[where], places_um(hd, HD), atol=1e-6)


def test_bins_touch_and_are_named_as_readers_name_them(hd):
    table, frame = hd.tables[HD_TABLE], hd.shapes[HD]
    assert get_table_keys(table) == (HD, "region", "location_id")
    assert list(table.obs.columns) == ["region", "location_id", "in_tissue", "array_row", "array_col"]
    assert table.obs_names.is_unique
    assert table.obs_names.str.fullmatch(r"s_008um_\d{5}_\d{5}-1").all()
    assert sorted(table.obs["location_id"]) == list(frame.index) == list(range(len(frame)))
    assert list(table.obs["location_id"]) != list(frame.index)
    assert (frame.geom_type == "Polygon").all()
    np.testing.assert_allclose(frame.area, 16.0**2)  # half-µm units
    assert shapely.union_all(frame.geometry.to_numpy(), grid_size=1e-6).area == pytest.approx(16.0**2 * len(frame))
    # the same place by the shapes, by the array and by the table
    um = pd.DataFrame(places_um(hd, HD), index=frame.index).loc[table.obs["location_id"]].to_numpy()
    np.testing.assert_allclose(um, 250 + 8 * (table.obs[["array_col", "array_row"]].to_numpy() + 0.5))
    np.testing.assert_allclose(table.obsm["spatial"], um)
    extent = np.array([500, 6 * 100 * np.sqrt(0.75)])
    assert ((um > 253.9) & (um < 246.1 + extent)).all()
    assert 0.8 < len(frame) * 64 / extent.prod() < 1
    corners = shapely.get_coordinates(frame.geometry.iloc[0])[:4]
    assert np.abs(np.diff(corners, axis=0)).min() > 1  # turned against their own axes


def test_bins_as_a_raster(hd):
    """What everybody's tools for bins make of it: a picture with each bin in its own pixel."""
    table = hd.tables[HD_TABLE].copy()
    table.X = table.X.tocsc()
    copy = sd.SpatialData(shapes=dict(hd.shapes), tables={HD_TABLE: table})
    raster = sd.rasterize_bins(copy, HD, HD_TABLE, "array_col", "array_row", value_key="GENE000")
    picture = np.asarray(raster)[0]
    row, col = table.obs["array_row"].to_numpy(), table.obs["array_col"].to_numpy()
    np.testing.assert_array_equal(
        picture[row - row.min(), col - col.min()], table[:, "GENE000"].X.toarray().ravel().astype(picture.dtype)
    )


def test_bins_hold_counts_by_their_area(hd):
    """As many in a µm² as spots: 8000 on a disc of 55 µm in the median; the mean of that lognormal is 6 % higher."""
    wanted = 8000 * np.exp(0.35**2 / 2) / (np.pi * 27.5**2)
    for sdata, bin_um in ((hd, 8), (sge.datasets.synthetic(**SMALL, bin_um=20), 20)):
        x = next(iter(sdata.tables.values())).X
        assert x.dtype == np.float32
        assert np.array_equal(x.data, np.rint(x.data))
        assert x.sum() / x.shape[0] / bin_um**2 == pytest.approx(wanted, rel=0.05)


def test_truth_at_bins(hd):
    """Blocks of bins, which hold enough counts to tell, follow the truth, and the fine fields too."""
    truth = sge.datasets.synthetic_truth(hd, target_key=HD)
    assert list(truth.index) == list(hd.shapes[HD].index)
    table = hd.tables[HD_TABLE]
    block = table.obs["array_row"].to_numpy() // 2 * 1000 + table.obs["array_col"].to_numpy() // 2
    counts = pd.DataFrame(table.X.toarray()).groupby(block).sum()
    wanted = np.expm1(truth.loc[table.obs["location_id"]].reset_index(drop=True)).groupby(block).mean()
    measured = np.log1p(counts.div(counts.sum(axis=1), axis=0) * 1e4)
    follows = correlation(measured.to_numpy(), np.log1p(wanted.to_numpy()))
    assert follows[:16].mean() > 0.75
    assert correlation(measured.to_numpy()[::-1], np.log1p(wanted.to_numpy()))[:16].mean() < 0.4


def test_bins_catch_the_mean_of_their_square():
    sdata = sge.datasets.synthetic(n_rows=14, n_cols=14, n_genes=30, mpp=4.0, detail_um=16, bin_um=50)
    centre = sge.datasets.synthetic_truth(sdata, target_key="synthetic_square_050um")
    um = places_um(sdata, "synthetic_square_050um")
    x, y = np.meshgrid(*[np.arange(-22.5, 25, 5)] * 2)
    within = (um[:, None] + np.column_stack([x.ravel(), y.ravel()])).reshape(-1, 2)
    frame = gpd.GeoDataFrame({"radius": [1.0] * len(within)}, geometry=shapely.points(within))
    sdata.shapes["within"] = ShapesModel.parse(frame, transformations={"synthetic": Identity()})
    mean = np.expm1(sge.datasets.synthetic_truth(sdata, target_key="within").to_numpy())
    mean = np.log1p(mean.reshape(len(um), 100, 30).mean(1))
    table = sdata.tables["square_050um"]
    rows = table.obs["location_id"].to_numpy()
    share = table.X.toarray() / table.X.sum(1).reshape(-1, 1)
    measured = np.log1p(1e4 * np.asarray(share))
    by_mean, by_centre = (correlation(measured, t[rows])[:24].mean() for t in (mean, centre.to_numpy()))
    assert by_mean > 0.9
    assert 1 - by_mean < 0.6 * (1 - by_centre)


def test_bins_and_spots_of_one_seed_share_their_truth(hd):
    spots = sge.datasets.synthetic(n_rows=6, n_cols=5, n_genes=20, mpp=2.0, rng=2, detail_um=20)
    spots.shapes[HD] = hd.shapes[HD]
    wanted, found = (sge.datasets.synthetic_truth(s, target_key=HD) for s in (hd, spots))
    pd.testing.assert_frame_equal(found, wanted)


def test_bins_after_writing_and_reading(hd, tmp_path):
    wanted = sge.datasets.synthetic_truth(hd, target_key=HD)
    sd.SpatialData(images=dict(hd.images), shapes=dict(hd.shapes), tables=dict(hd.tables)).write(tmp_path / "hd.zarr")
    back = sd.read_zarr(tmp_path / "hd.zarr")
    assert back.tables[HD_TABLE].uns["synthetic"]["detail_um"] == 20
    pd.testing.assert_frame_equal(sge.datasets.synthetic_truth(back, target_key=HD), wanted)
    assert read_section(back).technology == "visium-hd"


@pytest.mark.parametrize("detail_um", [15.9, 0, -20, 251, np.nan, np.inf])
def test_detail_out_of_range(detail_um):
    with pytest.raises(
        ValueError, match=r"detail_um=.* is out of range: .*16 to 250 µm\. .*raster of 8 µm.*detail_um=20"
    ):
        sge.datasets.synthetic(detail_um=detail_um)


@pytest.mark.parametrize("bin_um", [0, 1, -8, 2.5, 101, np.nan, np.inf])
def test_bins_out_of_range(bin_um):
    with pytest.raises(ValueError, match=r"bin_um=.* is not a whole number from 2 to 100 µm.*bin_um=8, or None"):
        sge.datasets.synthetic(bin_um=bin_um)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match=r"n_rows=1 and n_cols=1 leave no spot or bin on the tissue\. Pass larger"):
        sge.datasets.synthetic(n_rows=1, n_cols=1, bin_um=100)


def test_glands_are_sharp_and_bluer_and_change_genes():
    options = {"n_rows": 8, "n_cols": 8, "n_genes": 40, "mpp": 2.0, "rng": 3}
    plain, glandular = (sge.datasets.synthetic(**options, gland_um=gland_um) for gland_um in (None, 40))
    params = glandular.tables["table"].uns["synthetic"]
    assert params["gland_um"] == 40
    inside = glands(params)
    assert inside.min() == 0
    assert inside.max() == 1
    assert ((inside > 0) & (inside < 1)).mean() < 0.45  # mostly one or the other
    runs = np.diff(np.flatnonzero(np.diff((inside > 0.5).ravel().astype(int)))) * 4.0  # along rows of the 4 µm raster
    assert 30 < np.mean(runs) < 50
    # the image is darker in blue-absorbing stain there, and the same where there are none
    xy_um = np.argwhere(np.ones(inside.shape))[:, ::-1] * 4.0 + 2.0
    a, b = (
        pixels(s).astype(float)[:, (xy_um[:, 1] / 2).astype(int), (xy_um[:, 0] / 2).astype(int)]
        for s in (plain, glandular)
    )
    on_gland, off = inside.ravel() == 1, inside.ravel() == 0
    assert (b - a)[1, on_gland].mean() > 5  # green, which eosin absorbs
    assert np.abs((b - a)[:, off].mean(1)).max() < 2
    # half of the genes differ between glands and stroma, and a fifth does not
    rates = expected_rates(hidden_fields(params)[0], params, xy_um[:2000])
    without = expected_rates(hidden_fields(params)[0], {**params, "gland_um": 0.0}, xy_um[:2000])
    change = np.log(rates / without)
    changes = np.abs(change).max(0) > 0.1
    assert 15 <= changes.sum() <= 30
    assert not changes[32:].any()
    g = inside.ravel()[:2000]
    assert (np.abs([np.corrcoef(g, change[:, i])[0, 1] for i in np.flatnonzero(changes)]) > 0.99).all()


def test_glands_out_of_range():
    with pytest.raises(ValueError, match=r"gland_um=5 is out of range: glands can be 16 to 200 µm wide"):
        sge.datasets.synthetic(gland_um=5)


def test_sections_of_one_tissue_share_their_genes_but_not_their_places():
    """What a model learns of one holds for the other: the same regression of genes on hidden fields."""
    loading, truth = [], []
    for rng, genes_rng in ((1, 7), (2, 7), (2, None)):
        sdata = sge.datasets.synthetic(**SMALL, rng=rng, genes_rng=genes_rng)
        params = sdata.tables["table"].uns["synthetic"]
        assert params["genes_seed"] == (2 if genes_rng is None else 7)
        fields, _ = hidden_fields(params)
        at = np.random.default_rng(0).uniform(100, 500, (200, 2))
        log_rate = np.log(expected_rates(fields, params, at))
        x = np.column_stack([np.ones(len(at)), sample(fields, at)])
        loading.append(np.linalg.lstsq(x, log_rate, rcond=None)[0])
        truth.append(log_rate)
    np.testing.assert_allclose(loading[0], loading[1], atol=1e-8)
    assert np.abs(loading[1] - loading[2]).max() > 0.3
    assert np.abs(truth[0] - truth[1]).max() > 0.3


def test_sections_of_earlier_versions_have_one_seed():
    sdata = sge.datasets.synthetic(**SMALL)
    before = sge.datasets.synthetic_truth(sdata)
    del sdata.tables["table"].uns["synthetic"]["genes_seed"]
    np.testing.assert_array_equal(sge.datasets.synthetic_truth(sdata), before)
