"""Pictures: which panels there are and what they show; five of them pixel by pixel, within a tolerance."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata as ad
import dask.array as da
import geopandas as gpd
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
from matplotlib.collections import EllipseCollection
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text
from packaging.version import Version
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Affine, get_transformation
from tests.listed import read_as_listed

import histosge as sge
from histosge._geometry import Footprints
from histosge.pl import _places

IMAGES = Path(__file__).parent / "images"
TOLERANCE = 4.0
"""Root mean square difference of grey levels, of 255; another curve, colour or place is far beyond."""
ALL = ("image", "measured", "predicted", "width")


@pytest.fixture(scope="module")
def _predicted_once(_section_once):
    s = _section_once
    sdata = SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables={"table": s.tables["table"].copy()})
    sge.tl.predict(sdata, encoder="stain-texture", head="nearest", genes=20, n_folds=2, upsample=2)
    table = sdata.tables["histosge"]
    table.obs["domain"] = np.where(table.obsm["spatial"][:, 0] > 426, "right", "left")
    return sdata


@pytest.fixture
def predicted(_predicted_once):
    s = _predicted_once
    tables = {name: table.copy() for name, table in s.tables.items()}
    return SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables=tables)


@pytest.fixture(autouse=True)
def _close():
    assert mpl.get_backend().lower() == "agg"
    plt.close("all")
    with mpl.style.context("default"):  # scanpy and squidpy, in other tests, may have set another
        yield
    plt.close("all")


def discs(ax):
    (found,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
    return found


def as_expected(figure, name, folder):
    """Compare with ``tests/images``, without any text: fonts differ between versions, and with them the room of panels."""
    if Version(mpl.__version__) < Version("3.11"):
        pytest.skip("the pictures were drawn with matplotlib 3.11")
    figure.canvas.draw()
    for text in figure.findobj(Text):
        text.set_visible(False)
    actual, expected = folder / f"{name}.png", IMAGES / f"{name}.png"
    figure.savefig(actual, dpi=40)
    advice = f"Look at {folder}. If {actual.name} is right, copy it to {expected}."
    assert expected.exists(), f"there is no {expected}. {advice}"
    with Image.open(actual) as a, Image.open(expected) as e:
        assert a.size == e.size, f"{name}: {a.size} pixels instead of {e.size}. {advice}"
    shutil.copy(expected, folder / f"{name}-expected.png")
    found = compare_images(str(folder / f"{name}-expected.png"), str(actual), tol=TOLERANCE, in_decorator=True)
    assert found is None, f"{name} differs by {found['rms']:.1f} (at most {TOLERANCE}). {advice}"


@pytest.fixture
def many(monkeypatch):
    """Draw as if a hundred places were many."""
    monkeypatch.setattr(_places, "MANY", 100)


@pytest.fixture(scope="module")
def _bins_once(_section_once):
    run = {"encoder": "stain-texture", "head": "nearest", "genes": 20, "n_folds": 2, "inplace": False}
    section = SpatialData(
        images=dict(_section_once.images), shapes=dict(_section_once.shapes), tables=dict(_section_once.tables)
    )
    sge.pp.targets(section, bin_um=25, key_added="bins")
    return section.shapes["bins_targets"], sge.tl.predict(section, target_key="bins_targets", **run)


@pytest.fixture
def binned(predicted, _bins_once):
    """Bins of 25 µm with values that are known: waves that grow to the right, and to the bottom."""
    predicted.shapes["bins_targets"], predicted.tables["bins"] = _bins_once[0], _bins_once[1].copy()
    table = predicted["bins"]
    x, y = table.obsm["spatial"].T / 800
    table.X = np.column_stack([np.sin(9 * x) + 3 * x + i * y for i in range(20)]).astype(np.float32)
    # a variance that falls with the prediction, from 1 to its floor
    numbers = np.zeros((20, 105), np.float32) + np.array([1, -0.2, 0.04, 2, *np.full(101, 0.5)], np.float32)
    table.varm["histosge_intervals"] = numbers
    table.obs["domain"] = pd.Categorical(np.where(x + y > 1, "far", "near"), categories=["near", "far", "nowhere"])
    return predicted


def test_panels(predicted):
    axes = sge.pl.expression(predicted, "GENE000")
    assert axes.shape == (1, 3)
    titles = [ax.get_title() for ax in axes[0]]
    assert titles[:2] == ["H&E", "GENE000\nmeasured"]
    pcc = predicted["histosge"].var.loc["GENE000", "held_out_pcc"]
    assert titles[2] == f"GENE000\npredicted, held-out PCC {pcc:.2f}"
    assert sge.pl.expression(predicted, ["GENE001", "GENE004"], obs="domain").shape == (2, 4)


def test_panels_of_ones_own(predicted):
    axes = sge.pl.expression(predicted, ["GENE001", "GENE004"], panels=["width", "image"])
    assert [ax.get_title() for ax in axes[1]] == ["GENE004\nwidth of the prediction interval", "H&E"]
    assert colour_bars(axes[1, 0]) == ["width of the 90% interval"]
    one = sge.pl.expression(predicted, "GENE004", panels=["width"], level=0.995)
    assert colour_bars(one[0, 0]) == ["width of the 99.5% interval"]
    for level, drawn in ((0.9, axes[1, 0]), (0.995, one[0, 0])):
        table = sge.tl.intervals(predicted, level=level, genes="GENE004", inplace=False)
        wanted = (table.layers["upper"] - table.layers["lower"])[:, 0]
        np.testing.assert_allclose(discs(drawn).get_array(), wanted, rtol=1e-6)
    assert not set(predicted["histosge"].layers) - {None}  # nothing is written


def test_twenty_genes_stand_in_columns(predicted):
    """Each gene keeps its row of axes; no two panels lie upon each other, and the figure is no strip."""
    genes = list(predicted["histosge"].var_names)
    axes = sge.pl.expression(predicted, genes, panels=["predicted"])
    figure = axes[0, 0].figure
    assert axes.shape == (20, 1)
    assert [row[0].get_title().split("\n")[0] for row in axes] == genes
    figure.canvas.draw()
    boxes = [ax.get_tightbbox() for ax in axes.flat]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[i + 1 :])
    width, height = figure.get_size_inches()
    assert 0.4 < width / height < 2.5
    assert max(width, height) < 30
    assert min(ax.get_window_extent().width for ax in axes.flat) > 140


def test_values_are_those_of_the_tables(predicted):
    axes = sge.pl.expression(predicted, "GENE003")
    table = predicted["histosge"]
    np.testing.assert_allclose(discs(axes[0, 2]).get_array(), table[:, "GENE003"].X.ravel(), rtol=1e-6)
    np.testing.assert_allclose(discs(axes[0, 2]).get_offsets(), table.obsm["spatial"], atol=1e-6)
    measured = predicted["table"]
    x = measured.X.toarray()
    wanted = np.log1p(x[:, 3] / x.sum(1) * 1e4)
    np.testing.assert_allclose(discs(axes[0, 1]).get_array(), wanted, rtol=1e-5)
    np.testing.assert_allclose(discs(axes[0, 1]).get_offsets(), measured.obsm["spatial"], atol=1e-6)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "dask", "log-normalised", "nearly empty", "not in tissue"])
def test_measured_is_what_read_section_reads(predicted, kind):
    """Of any matrix, read in runs of rows, whatever spots are left out."""
    table = predicted["table"]
    if kind == "csc":
        table.X = sparse.csc_matrix(table.X)
    elif kind == "dense":
        table.X = table.X.toarray()
    elif kind == "log-normalised":
        table.X = sparse.csr_matrix(table.X).log1p()
    elif kind == "nearly empty":
        x = table.X.toarray()
        x[5], x[7] = 0, np.eye(1, 20, 3)
        table.X = sparse.csr_matrix(x)
    elif kind == "not in tissue":
        table.obs["in_tissue"] = (np.arange(table.n_obs) != 9).astype(int)
    section = read_as_listed(predicted, table_key="table", report=False)
    if kind == "dask":
        table.X = da.from_array(table.X.toarray(), chunks=(40, 7))
    with sge.settings.override(part_rows=50):
        ax = sge.pl.expression(predicted, "GENE003", panels="measured")[0, 0]
    np.testing.assert_allclose(discs(ax).get_array(), section.dense(["GENE003"])[:, 0], rtol=1e-5)
    np.testing.assert_allclose(discs(ax).get_offsets(), section.xy_px, atol=1e-6)


def test_image_lies_under_the_spots(predicted):
    """y points down in every panel, and all show the same part of the section."""
    axes = sge.pl.expression(predicted, "GENE000")
    (image,) = axes[0, 0].get_images()
    left, right, bottom, top = image.get_extent()
    assert (left, top) == (0, 0)
    assert (right, bottom) == (852, 772)
    places = predicted["table"].obsm["spatial"]
    for ax in axes[0]:
        (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
        assert y0 > y1
        assert x0 < places[:, 0].min() < places[:, 0].max() < x1
        assert y1 < places[:, 1].min() < places[:, 1].max() < y0
        assert ax.get_aspect() == 1


def test_spots_are_drawn_at_their_size(predicted):
    axes = sge.pl.expression(predicted, "GENE000")
    np.testing.assert_allclose(discs(axes[0, 1]).get_widths(), 27.5)  # 55 µm, whatever radius is stored
    np.testing.assert_allclose(discs(axes[0, 2]).get_widths(), 25.0)  # half a pitch


def test_scale_bar(predicted):
    axes = sge.pl.expression(predicted, "GENE000")
    (bar,) = axes[0, 0].artists
    assert bar.size_bar.get_children()[0].get_width() == pytest.approx(100)  # 200 µm
    assert bar.txt_label.get_text() == "200 µm"


def test_domains_have_a_colour_each(predicted):
    axes = sge.pl.expression(predicted, "GENE000", obs="domain")
    legend = axes[0, 3].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["left", "right"]
    colours = discs(axes[0, 3]).get_facecolor()
    right = predicted["histosge"].obs["domain"].to_numpy() == "right"
    assert len(np.unique(colours[right], axis=0)) == len(np.unique(colours[~right], axis=0)) == 1
    assert not np.array_equal(colours[right][0], colours[~right][0])


def test_numbers_of_obs_have_a_scale(predicted):
    axes = sge.pl.expression(predicted, "GENE000", obs="distance_to_spot_um")
    wanted = predicted["histosge"].obs["distance_to_spot_um"]
    np.testing.assert_allclose(discs(axes[0, 3]).get_array(), wanted)
    assert colour_bars(axes[0, 3]) == ["distance_to_spot_um"]


def colour_bars(ax):
    return [bar.get_ylabel() for bar in ax.child_axes]


def test_colour_bars_are_as_high_as_their_panel(predicted):
    axes = sge.pl.expression(predicted, "GENE000")
    assert [colour_bars(ax) for ax in axes[0]] == [[], ["log1p expression"], ["log1p expression"]]
    axes[0, 0].figure.canvas.draw()
    for ax in axes[0, 1:]:
        bar, panel = ax.child_axes[0].get_window_extent(), ax.get_window_extent()
        assert (bar.y0, bar.y1) == pytest.approx((panel.y0, panel.y1), abs=1)
        assert bar.width < 20


def test_limits_are_percentiles_and_rare_genes_are_seen(predicted):
    table = predicted["histosge"]
    values = np.zeros(table.n_obs, np.float32)
    values[3] = 2  # far fewer than one in a hundred
    table.X[:, 0], table.X[:, 1] = values, 5
    axes = sge.pl.expression(predicted, ["GENE000", "GENE001", "GENE002"])
    limits = [discs(ax).get_clim() for ax in axes[:, 2]]
    assert limits[:2] == [(0, 2), (5, 6)]
    assert limits[2] == pytest.approx(tuple(np.percentile(table.X[:, 2], [1, 99])))


def test_measured_is_what_was_predicted_from(predicted):
    table = predicted["table"]
    table.layers["counts"] = table.X.copy()
    table.X = np.random.default_rng(0).poisson(5, table.shape).astype(np.float32)
    run = {"encoder": "stain-texture", "head": "mean", "genes": 20, "n_folds": 2, "upsample": 2}
    sge.tl.predict(predicted, layer="counts", **run)
    by_default, by_name = (sge.pl.expression(predicted, "GENE003", **k) for k in ({}, {"layer": "counts"}))
    np.testing.assert_allclose(discs(by_default[0, 1]).get_array(), discs(by_name[0, 1]).get_array())


def test_gene_that_was_not_measured_is_no_map_of_zeros(predicted):
    del predicted.tables["table"].obsm["spatial"]
    some = predicted.tables["table"][:, 1:].copy()
    del predicted.tables["table"]
    predicted.tables["table"] = some
    axes = sge.pl.expression(predicted, ["GENE000", "GENE001"])
    assert [t.get_text() for t in axes[0, 1].texts] == ["not measured"]
    assert not axes[0, 1].collections
    assert len(discs(axes[1, 1]).get_array()) == some.n_obs


@pytest.mark.parametrize("upsample", [None, 2])
def test_gene_without_intervals_and_a_column_without_values(predicted, tmp_path, upsample):
    """Polygons and discs: a panel with nothing to draw says so. It ended in an IndexError."""
    how = {"bin_um": 50} if upsample is None else {"upsample": upsample}
    sge.tl.predict(predicted, encoder="stain-texture", head="mean", genes=20, n_folds=2, **how)
    table = predicted["histosge"]
    table.varm["histosge_intervals"][0] = np.nan  # a gene that this section does not measure
    table.obs["empty"] = np.nan
    axes = sge.pl.expression(predicted, list(table.var_names[:2]), panels=["predicted", "width"], obs="empty")
    assert [t.get_text() for t in axes[0, 1].texts] == ["no interval: not measured"]
    assert not axes[1, 1].texts
    assert [t.get_text() for t in axes[0, 2].texts] == ["no values"]
    page = sge.pl.report(predicted, tmp_path / "page.html", genes=[table.var_names[0]]).read_text()
    assert "Traceback" not in page


def test_section_without_spots(predicted):
    """Predicted from the image alone: there is no measured panel, and asking for one is an error."""
    for name in ("spots", "table"):
        del predicted["histosge"].uns["histosge"][name]
    assert [ax.get_title().split("\n")[-1][:9] for ax in sge.pl.expression(predicted, "GENE000")[0]] == [
        "H&E",
        "predicted",
    ]
    assert sge.pl.domains(predicted).shape == (2,)
    plt.close("all")
    with pytest.raises(ValueError, match=r"panels=\['measured'\]: nothing was measured on this section\."):
        sge.pl.expression(predicted, "GENE000", panels=["measured"])


def test_no_panel_is_blank(predicted, tmp_path):
    axes = sge.pl.expression(predicted, ["GENE000", "GENE001"], obs="domain", panels=ALL)
    figure = axes[0, 0].figure
    figure.savefig(tmp_path / "p.png", dpi=60)
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(float)
    height = picture.shape[0]
    for ax in axes.ravel():
        box = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted()).extents * 60
        x0, y0, x1, y1 = np.rint(box).astype(int)
        panel = picture[height - y1 + 2 : height - y0 - 2, x0 + 2 : x1 - 2]
        assert panel.size > 10_000
        assert panel.std(axis=(0, 1)).min() > 5, ax.get_title()
        assert (panel.min(-1) < 200).mean() > 0.2, ax.get_title()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            {"genes": "GENE99"},
            r"genes \['GENE99'\] were not predicted\. Predict them with genes=.* here are \['GENE000'",
        ),
        ({"genes": ["GENE001", "X"]}, r"genes \['X'\] were not predicted"),
        ({"genes": []}, r"genes \[\] were not predicted"),
        ({"key": "table"}, r"key='table' is not a table that histosge\.tl\.predict wrote; there are \['histosge'\]"),
        ({"key": "no"}, r"key='no' is not a table"),
        ({"obs": "leiden"}, r"obs='leiden' is not a column of sdata\.tables\['histosge'\]\.obs: \['array_row'"),
        ({"layer": "raw"}, r"layer='raw' is not among the layers of table 'table'"),
    ],
)
def test_refused(predicted, wrong, match):
    with pytest.raises(KeyError, match=match):
        sge.pl.expression(predicted, **{"genes": "GENE000"} | wrong)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("panels", [["H&E"], [], ["image", "image"]])
def test_panels_refused(predicted, panels):
    with pytest.raises(ValueError, match=r"panels=\[.*\]: choose any of \('image', 'measured', 'predicted', 'width'\)"):
        sge.pl.expression(predicted, "GENE000", panels=panels)


def test_no_width_without_intervals(predicted):
    with pytest.raises(ValueError, match=r"level=1\.5 is not a share"):
        sge.pl.expression(predicted, "GENE000", panels=["width"], level=1.5)
    del predicted["histosge"].varm["histosge_intervals"]
    with pytest.raises(ValueError, match=r"table 'histosge' holds no numbers of prediction intervals"):
        sge.pl.expression(predicted, "GENE000", panels=["width"])


def test_elements_that_are_missing(predicted):
    """As in a store, which holds places and table only."""
    s = predicted
    no_image = SpatialData(shapes=dict(s.shapes), tables=dict(s.tables))
    with pytest.raises(KeyError, match=r"sdata\.images has no 'he', .* into that of the section"):
        sge.pl.expression(no_image, "GENE000")
    shapes = {name: e for name, e in s.shapes.items() if name == "spots"}
    with pytest.warns(UserWarning, match="histosge_targets"):
        no_places = SpatialData(images=dict(s.images), shapes=shapes, tables=dict(s.tables))
    with pytest.raises(KeyError, match=r"sdata\.shapes has no 'histosge_targets'"):
        sge.pl.domains(no_places)
    s.shapes["histosge_targets"] = s.shapes["histosge_targets"].iloc[2:]
    with pytest.raises(KeyError, match=r"2 of \d+ rows have no shape in sdata\.shapes\['histosge_targets'\]"):
        sge.pl.expression(s, "GENE000")
    assert plt.get_fignums() == []


def test_nothing_predicted(sdata):
    with pytest.raises(KeyError, match=r"key='histosge' is not a table .*there are \[\]"):
        sge.pl.expression(sdata, "GENE000")


# ------------------------------------------------------------------------------------- few places and many, of any shape


def polygon_map(ax):
    (found,) = ax.collections
    return found


def test_few_bins_are_squares(binned):
    table = binned["bins"]
    dense = table[:, "GENE001"].X.ravel()
    table.X = sparse.csr_matrix(table.X)
    drawn = polygon_map(sge.pl.expression(binned, "GENE001", key="bins")[0, 2])
    np.testing.assert_allclose(drawn.get_array(), dense, rtol=1e-6)
    boxes = np.array([path.get_extents().extents for path in drawn.get_paths()])
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], 12.5)
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, table.obsm["spatial"], atol=1e-6)


def test_many_bins_are_pixels_of_the_same_values(binned, many):
    """A lazy table, drawn as a raster, shows at the centre of every bin its value; nothing where there is no bin."""
    table = binned["bins"]
    wanted = table[:, "GENE002"].X.ravel()
    table.X = da.from_array(table.X, chunks=(200, 7))
    ax = sge.pl.expression(binned, "GENE002", key="bins")[0, 2]
    assert not ax.collections
    (image,) = ax.get_images()
    values = image.get_array()
    left, right, bottom, top = image.get_extent()
    assert bottom > top
    step = (right - left) / values.shape[1]
    column, row = np.floor((table.obsm["spatial"] - [left, top]) / step).astype(int).T
    np.testing.assert_allclose(values[row, column], wanted, rtol=1e-6)
    assert (~np.ma.getmaskarray(values)).sum() * step**2 == pytest.approx(len(wanted) * 12.5**2, rel=1e-6)
    assert image.get_clim() == pytest.approx(tuple(np.percentile(wanted, [1, 99])))


def test_many_domains_are_pixels_of_the_same_colours(binned, many):
    binned["bins"].uns["domain_colors"] = np.array(["#ff0000", "#0000ff", "#00ff00"])
    ax = sge.pl.domains(binned, key="bins")[1]
    (image,) = ax.get_images()
    pixels = image.get_array().reshape(-1, 4)
    assert set(map(tuple, np.unique(pixels, axis=0).tolist())) == {(0, 0, 0, 0), (255, 0, 0, 255), (0, 0, 255, 255)}
    share = (pixels[:, 0] == 255).sum() / (pixels[:, 3] == 255).sum()
    assert share == pytest.approx((binned["bins"].obs["domain"] == "near").mean(), abs=1e-6)


def hexagons():
    """Cells that touch each other without being squares."""
    y, x = np.mgrid[0:12, 0:10]
    xy = np.column_stack([(x + 0.5 * (y % 2)).ravel() * 17.3, y.ravel() * 15.0]) + 40
    corner = np.deg2rad(30 + 60 * np.arange(6))
    return shapely.polygons(xy[:, None] + 9.0 * np.column_stack([np.cos(corner), np.sin(corner)]))


def squares(angle):
    y, x = np.mgrid[0:10, 0:14]
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corner = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    return shapely.polygons(16 * (np.column_stack([x.ravel(), y.ravel()])[:, None] + corner) @ turn + 300)


@pytest.mark.parametrize(
    ("kind", "polygons"),
    [("square", squares(0.0)), ("square", squares(0.3)), ("square", squares(-2.0)), ("polygon", hexagons())],
)
def test_raster_shows_the_polygon_under_each_pixel(kind, polygons):
    """shapely says which it is, by another way; the outline itself may fall to either side."""
    keep = np.arange(len(polygons)) % 7 != 3
    places = _places.of_polygons(polygons[keep], np.eye(3))
    assert places.kind == kind
    np.testing.assert_allclose(places.extent, shapely.total_bounds(polygons[keep]))
    found = _places.raster(places)
    x0, y0, x1, y1 = places.extent
    some = np.random.default_rng(0).choice(found.size, 40_000, replace=False)
    y, x = np.stack(np.unravel_index(some, found.shape)) + 0.5
    x, y = x0 + (x1 - x0) * x / found.shape[1], y0 + (y1 - y0) * y / found.shape[0]
    pixel, under = shapely.STRtree(polygons[keep]).query(shapely.points(x, y), predicate="within")
    wanted = np.full(len(some), -1)
    wanted[pixel] = under
    differ = (wanted != found.ravel()[some]).mean()
    assert differ < (0.05 if kind == "polygon" else 1e-3)
    assert (found == -1).mean() > 0.05
    assert set(np.unique(found)) == {-1, *range(keep.sum())}
    assert _places.raster(places) is found  # of all panels


def test_raster_of_discs():
    xy = np.array([[50.0, 50.0], [80.0, 50.0], [50.0, 90.0]])
    places = Footprints.discs(xy, diameter_px=[20.0, 30.0, 10.0])
    np.testing.assert_allclose(places.extent, [40, 35, 95, 95])
    found = _places.raster(places)
    step = 55 / found.shape[1]
    for i, diameter in enumerate(places.size_px):
        rows, columns = np.nonzero(found == i)
        assert len(rows) * step**2 == pytest.approx(np.pi * diameter**2 / 4, rel=0.02)
        centre = np.array([columns.mean(), rows.mean()]) * step + step / 2 + places.extent[:2]
        np.testing.assert_allclose(centre, xy[i], atol=step)


@pytest.fixture(scope="module")
def _cells_once(_section_once):
    """Hexagonal cells as targets, turned against the image by their transformation."""
    s = _section_once
    section = SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables=dict(s.tables))
    system = next(iter(get_transformation(s.shapes["spots"], get_all=True)))
    c, d = np.cos(0.4), np.sin(0.4)
    turned = Affine([[c, -d, 300], [d, c, 200], [0, 0, 1]], ("x", "y"), ("x", "y"))
    frame = gpd.GeoDataFrame(geometry=hexagons(), index=[f"cell{i}" for i in range(120)])
    section.shapes["cells"] = ShapesModel.parse(frame, transformations={system: turned})
    run = {"encoder": "stain-texture", "head": "nearest", "genes": 20, "n_folds": 2, "dense": False}
    table = sge.tl.predict(section, target_key="cells", inplace=False, **run)
    table.X[:, 0] = np.arange(120)
    return section.shapes["cells"], table


@pytest.fixture
def cells(predicted, _cells_once):
    predicted.shapes["cells"], predicted.tables["in_cells"] = _cells_once[0], _cells_once[1].copy()
    return predicted


def test_cells_are_polygons(cells):
    drawn = polygon_map(sge.pl.expression(cells, "GENE000", key="in_cells")[0, 2])
    centres = np.array([path.vertices[:6].mean(0) for path in drawn.get_paths()])
    np.testing.assert_allclose(centres, cells["in_cells"].obsm["spatial"], atol=1e-3)
    np.testing.assert_allclose(drawn.get_array(), np.arange(120))
    assert {len(path.vertices) for path in drawn.get_paths()} == {7}


def test_cells_of_a_region_fill_the_panel(cells):
    """The rest of the section is not shown, measured spots neither."""
    axes = sge.pl.expression(cells, "GENE000", key="in_cells")
    places = cells["in_cells"].obsm["spatial"]
    for ax in axes[0]:
        assert np.ptp(ax.get_xlim()) < 1.3 * np.ptp(places[:, 0])
        assert ax.get_xlim()[0] < places[:, 0].min() < places[:, 0].max() < ax.get_xlim()[1]


def test_many_cells_are_a_raster_at_the_same_places(cells, many):
    (image,) = sge.pl.expression(cells, "GENE000", key="in_cells")[0, 2].get_images()
    values = image.get_array()
    left, right, _, top = image.get_extent()
    step = (right - left) / values.shape[1]
    column, row = np.floor((cells["in_cells"].obsm["spatial"] - [left, top]) / step).astype(int).T
    np.testing.assert_allclose(values[row, column], np.arange(120))


# ----------------------------------------------------------------------------------------------------- pixel by pixel


def test_picture_of_discs(predicted, tmp_path):
    axes = sge.pl.expression(predicted, "GENE000", obs="domain", panels=ALL[1:], panel_size=1.6)
    as_expected(axes[0, 0].figure, "expression_discs", tmp_path)


def test_picture_of_bins(binned, many, tmp_path):
    axes = sge.pl.expression(binned, "GENE001", key="bins", panels=["image", "predicted", "width"], panel_size=2.0)
    as_expected(axes[0, 0].figure, "expression_bins", tmp_path)


def test_picture_of_domains(cells, tmp_path):
    cells["in_cells"].obs["domain"] = np.where(np.arange(120) % 10 < 4, "one", "other")
    cells["table"].obs["domain"] = np.where(cells["table"].obsm["spatial"][:, 1] > 400, "one", "two")
    as_expected(sge.pl.domains(cells, key="in_cells", panel_size=2.0)[0].figure, "domains", tmp_path)


def test_picture_of_training(tmp_path):
    as_expected(sge.pl.training(trained())[0].figure, "training", tmp_path)


def test_picture_of_an_embedding(embedded, tmp_path):
    as_expected(sge.pl.embedding(embedded, panel_size=2.0)[0].figure, "embedding", tmp_path)


def test_another_picture_fails_and_says_where_to_look(tmp_path):
    losses = trained()
    losses.training["loss"] *= 1 + losses.training["epoch"] / 10
    figure = sge.pl.training(losses)[0].figure
    with pytest.raises(AssertionError, match=r"training differs by \d+\.\d \(at most 4\.0\)\. Look at .*copy it to"):
        as_expected(figure, "training", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"training.png", "training-expected.png", "training-failed-diff.png"}


# ------------------------------------------------------------------------------------------------------------ domains


def test_domains_beside_those_of_the_spots(predicted):
    assert [ax.get_title() for ax in sge.pl.domains(predicted)] == ["H&E", "domain, predicted: 2 domains"]
    predicted["table"].obs["domain"] = np.where(predicted["table"].obsm["spatial"][:, 1] > 400, "left", "below")
    axes = sge.pl.domains(predicted)
    assert [ax.get_title() for ax in axes[1:]] == ["domain, measured: 2 domains", "domain, predicted: 2 domains"]
    assert [[t.get_text() for t in ax.get_legend().get_texts()] for ax in axes[1:]] == [
        ["left", "below"],
        ["left", "right"],
    ]
    colours = [ax.get_legend().legend_handles[0].get_color() for ax in axes[1:]]
    assert colours[0] == colours[1]  # "left" is "left" in both
    drawn = discs(axes[1]).get_facecolor()
    is_left = (predicted["table"].obs["domain"] == "left").to_numpy()
    np.testing.assert_allclose(drawn[is_left], np.tile(mpl.colors.to_rgba(colours[0]), (is_left.sum(), 1)))


def test_colours_are_those_that_scanpy_stored(predicted):
    """By the place of the category among all, used or not; nothing is stored."""
    table = predicted["histosge"]
    table.obs["domain"] = pd.Categorical(table.obs["domain"], categories=["middle", "left", "right"])
    table.uns["domain_colors"] = ["#111111", "#ff0000", "#0000ff"]
    legend = sge.pl.domains(predicted)[1].get_legend()
    shown = {t.get_text(): h.get_color() for t, h in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert shown == {"left": "#ff0000", "right": "#0000ff"}
    del table.uns["domain_colors"]
    legend = sge.pl.domains(predicted)[1].get_legend()
    assert [h.get_color() for h in legend.legend_handles] == ["#ff7f0e", "#279e68"]  # scanpy's second and third
    assert "domain_colors" not in table.uns


def test_places_without_a_domain_are_grey(predicted):
    column = predicted["histosge"].obs["domain"].astype(object)
    column.iloc[:5] = None
    predicted["histosge"].obs["domain"] = pd.Categorical(column)
    ax = sge.pl.domains(predicted)[1]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["left", "right", "missing"]
    np.testing.assert_allclose(discs(ax).get_facecolor()[:5], [[0.83, 0.83, 0.83, 1]] * 5)


def test_thirty_domains_have_a_legend_beside_their_panel(predicted):
    """In the order of numbers, in columns, each with a colour of its own, none outside the figure."""
    table = predicted["histosge"]
    table.obs["domain"] = np.arange(table.n_obs) % 30
    table.obs["domain"] = table.obs["domain"].map(str)
    axes = sge.pl.domains(predicted, panel_size=3.0)
    legend = axes[1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [str(i) for i in range(30)]
    assert len({h.get_color() for h in legend.legend_handles}) == 30
    figure = axes[0].figure
    figure.canvas.draw()
    box, panel = legend.get_window_extent(), axes[1].get_window_extent()
    assert box.x0 >= panel.x1 - 2
    assert box.x1 <= figure.bbox.x1 + 2
    assert box.y0 >= 0


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"domain": "leiden"}, KeyError, r"domain='leiden' is not a column of .* Run sge\.tl\.domains\(sdata\) first"),
        ({"domain": "array_row"}, ValueError, r"domain='array_row' holds numbers, not domains\. Make it categorical"),
        ({"key": "no"}, KeyError, r"key='no' is not a table that histosge\.tl\.predict wrote"),
    ],
)
def test_domains_refused(predicted, wrong, error, match):
    with pytest.raises(error, match=match):
        sge.pl.domains(predicted, **wrong)
    assert plt.get_fignums() == []


# ---------------------------------------------------------------------------------------------------------- embedding


@pytest.fixture(scope="module")
def embeddings_once(_section_once):
    return sge.tl.embed(_section_once, encoder="stain-texture", inplace=False)


@pytest.fixture
def embedded(sdata, embeddings_once):
    """Embeddings of the spots with known components: x, y and their product, of less and less variance."""
    table = sdata.tables["spots_stain-texture"] = embeddings_once.copy()
    u, v = ((table.obsm["spatial"] - table.obsm["spatial"].mean(0)) / table.obsm["spatial"].std(0)).T
    parts = [u] * 60 + [v] * 40 + [u * v] * 19 + [np.full_like(u, 7.0)]
    table.obsm["X_stain-texture"] = np.column_stack(parts).astype(np.float32)
    return sdata


def test_embedding_in_three_colours(embedded):
    axes = sge.pl.embedding(embedded)
    assert axes.shape == (2,)
    assert axes[1].get_title() == (
        "stain-texture, tile around each location\nshare of variance: red 51%, green 34%, blue 16%"
    )
    colours = discs(axes[1]).get_facecolor()
    place = embedded["spots_stain-texture"].obsm["spatial"]
    assert abs(np.corrcoef(colours[:, 0], place[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(colours[:, 1], place[:, 1])[0, 1]) > 0.99
    assert colours[:, :3].min() == 0
    assert colours[:, :3].max() == 1
    inside = (colours[:, :3] > 0) & (colours[:, :3] < 1)
    assert (inside.mean(0) > 0.8).all()


def test_one_place_far_off_does_not_turn_all_others_grey(embedded):
    table = embedded["spots_stain-texture"]
    table.obsm["X_stain-texture"][17, :60] *= 100
    colours = discs(sge.pl.embedding(embedded)[1]).get_facecolor()
    assert colours[:, 0].std() > 0.2


def test_dense_embedding_of_many_bins(predicted):
    """More than components are found in, and more than are drawn one by one."""
    sge.pp.targets(predicted, bin_um=7, key_added="many")
    instances = predicted.shapes["many_targets"].index
    assert len(instances) > 20_000
    obs = pd.DataFrame(
        {"region": pd.Categorical(["many_targets"] * len(instances)), "instance_id": instances.to_numpy()}
    )
    table = ad.AnnData(obs=obs.set_axis(instances.astype(str)))
    table.obsm["X_stain-texture"] = np.random.default_rng(0).normal(size=(table.n_obs, 8)).astype(np.float32)
    table.uns["histosge"] = predicted["histosge"].uns["histosge"] | {"dense": True}
    keys = {"region": "many_targets", "region_key": "region", "instance_key": "instance_id"}
    predicted.tables["many"] = TableModel.parse(table, **keys)
    ax = sge.pl.embedding(predicted)[1]
    assert ax.get_title().startswith("stain-texture, area of each location\n")
    (image,) = ax.get_images()
    pixels = image.get_array().reshape(-1, 4)
    assert pixels[pixels[:, 3] == 255, :3].std(axis=0).min() > 20


def test_embedding_refused(sdata, embeddings_once):
    with pytest.raises(
        KeyError, match=r"there is no table that histosge\.tl\.embed wrote; there are \[\]\. Run sge\.tl\.embed"
    ):
        sge.pl.embedding(sdata)
    sdata.tables["spots_stain-texture"] = embeddings_once.copy()
    with pytest.raises(KeyError, match=r"key='table' is not a table .* there are \['spots_stain-texture'\]"):
        sge.pl.embedding(sdata, key="table")
    table = sdata["spots_stain-texture"]
    table.obsm["X_stain-texture"] = table.obsm["X_stain-texture"][:, :2]
    with pytest.raises(ValueError, match=r"holds \d+ embeddings of 2 numbers: too few for three components"):
        sge.pl.embedding(sdata)
    sdata.tables["more"] = table.copy()
    with pytest.raises(ValueError, match=r"several tables of embeddings.*key= one of \['"):
        sge.pl.embedding(sdata)
    assert plt.get_fignums() == []


# ----------------------------------------------------------------------------------------------------------- training


class Trained:
    """What of a model is drawn."""

    def __init__(self, training, head="in-context+kriging"):
        self.training, self.head = training, head


def trained():
    """Two heads, two folds; fold 1 of the first does best at epoch 4 and stops at epoch 6."""
    rows = [(h, f, e, 0.2 + (e - (4 if f else 9)) ** 2 / (30 + 20 * i)) for i, h in enumerate(("in-context", "published"))
            for f in (0, 1) for e in range(1, 7 if f else 12)]  # fmt: skip
    return Trained(pd.DataFrame(rows, columns=["head", "fold", "epoch", "loss"]))


def test_training_by_head_and_fold():
    axes = sge.pl.training(trained())
    assert axes.shape == (2,)
    assert [ax.get_title() for ax in axes] == [
        f"{h}: weights of epochs 4 to 9 kept (dots)" for h in ("in-context", "published")
    ]
    curves = [line for line in axes[0].get_lines() if len(line.get_xdata()) > 1]
    dots = [line for line in axes[0].get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[-1] for line in curves] == [11, 6]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(9, 0.2), (4, 0.2)]
    np.testing.assert_allclose(curves[1].get_ydata(), 0.2 + (np.arange(1, 7) - 4) ** 2 / 30)
    assert [t.get_text() for t in axes[0].figure.legends[0].get_texts()] == ["fold 0", "fold 1"]
    assert (
        len({line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color()) for line in curves})
        == 2
    )


def test_training_from_a_table(predicted):
    """As ``uns`` keeps it: arrays, which come back from disk as such."""
    losses = trained().training
    predicted["histosge"].uns["histosge"]["training"] = {name: column.to_numpy() for name, column in losses.items()}
    axes = sge.pl.training(predicted)
    assert [len(ax.get_lines()) for ax in axes] == [4, 4]


def test_training_refused(predicted):
    solved = r"head 'nearest' was not trained in steps, but solved directly: there are no curves to draw\."
    with pytest.raises(ValueError, match=solved):
        sge.pl.training(predicted)
    with pytest.raises(ValueError, match=solved):
        sge.pl.training(Trained(trained().training.iloc[:0], "nearest"))
    with pytest.raises(TypeError, match=r"data is a DataFrame: pass a Model of sge\.tl\.fit, or a SpatialData"):
        sge.pl.training(trained().training)
    with pytest.raises(KeyError, match=r"key='no' is not a table"):
        sge.pl.training(predicted, key="no")
    assert plt.get_fignums() == []


# -------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def _scores_once(_section_once):
    return sge.tl.evaluate(
        _section_once,
        encoder="stain-texture",
        heads=["nearest", "ridge", "mean"],
        genes=20,
        n_splits=2,
        n_folds=2,
        buffer_um=150,
        progress=False,
    )


@pytest.fixture
def scores(_scores_once):
    return _scores_once.copy()


def titles(axes):
    return [ax.get_title() for ax in axes]


def rows(ax):
    """Labels of the rows of the first panel, from the top."""
    return [t.get_text() for t in ax.get_yticklabels()][::-1]


def test_heads_are_ordered_by_their_mean_below_the_ceiling(scores):
    axes = sge.pl.evaluation(scores)
    assert axes.shape == (4,)
    mean = scores.groupby(["head", "gene"])["pcc"].mean().groupby("head").mean()
    ceiling = scores.groupby("gene")["ceiling"].mean().mean()
    order = mean.sort_values(ascending=False)
    assert list(order.index) == ["ridge", "nearest", "mean"]
    assert rows(axes[0]) == [
        f"noise ceiling\n{ceiling:.3f}",
        *(f"{h}\n{m:.3f}, {m / ceiling:.0%}" for h, m in order.items()),
    ]
    assert axes[0].get_xlabel() == "held-out PCC of a gene"


def test_boxes_hold_the_mean_of_a_gene_over_splits(scores):
    """Median of the box of ridge, by hand."""
    axes = sge.pl.evaluation(scores.drop(columns="ceiling"))
    wanted = scores[scores["head"] == "ridge"].groupby("gene")["pcc"].mean()
    medians = [
        line.get_xdata() for line in axes[0].get_lines() if line.get_color() == "black" and len(line.get_xdata()) == 2
    ]
    assert any(np.allclose(x, wanted.median()) for x in medians)
    assert [text.split("\n")[0] for text in rows(axes[0])] == ["ridge", "nearest", "mean"]
    assert titles(axes)[0] == "mean ◇"


def test_the_first_head_meets_the_best_of_the_others(scores):
    pcc = scores.groupby(["gene", "head"])["pcc"].mean().unstack()
    for choice, one, other in (
        ({}, "nearest", "ridge"),
        ({"head": "mean"}, "mean", "ridge"),
        ({"baseline": "nearest"}, "ridge", "nearest"),
        ({"head": "ridge", "baseline": "mean"}, "ridge", "mean"),
    ):
        ax = sge.pl.evaluation(scores, **choice)[1]
        share = (pcc[one] > pcc[other]).mean()
        assert ax.get_title() == f"{one} is ahead\nfor {share:.0%} of genes"
        assert (ax.get_xlabel(), ax.get_ylabel()) == (f"PCC of {other}", f"PCC of {one}")
        drawn = np.asarray(ax.collections[0].get_offsets())
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(pcc[[other, one]].to_numpy(), axis=0))
        assert ax.get_xlim() == ax.get_ylim()
        plt.close("all")


def test_intervals_by_width_and_scale(scores):
    ax = sge.pl.evaluation(scores)[2]
    (line,) = (line for line in ax.get_lines() if line.get_linestyle() == "--")
    assert list(line.get_ydata()) == [0.9, 0.9]
    mean = scores.groupby(["head", "gene"]).mean(numeric_only=True).groupby("head").mean()
    drawn = {tuple(np.round(c.get_offsets().data.ravel(), 6)) for c in ax.collections}
    names = ["coverage", "coverage_2", "coverage_4", "coverage_8"]
    wanted = {tuple(np.round([v for n in names for v in (row["width"], row[n])], 6)) for _, row in mean.iterrows()}
    assert drawn == wanted
    sizes = ax.collections[0].get_sizes()
    assert (np.diff(sizes) > 0).all()


def test_smoothness_of_every_head(scores):
    ax = sge.pl.evaluation(scores)[3]
    mean = scores.groupby(["head", "gene"]).mean(numeric_only=True).groupby("head").mean()
    drawn = [tuple(c.get_offsets()[0]) for c in ax.collections if len(c.get_offsets()) == 1]
    assert len(drawn) == 3
    for row in mean.itertuples():
        assert any(np.allclose(d, (row.morans_i_measured, row.morans_i)) for d in drawn)


def test_no_panel_for_scores_that_are_missing(scores):
    intervals = [c for c in scores if c.startswith(("coverage", "width"))]
    none = sge.pl.evaluation(scores.drop(columns=intervals))
    assert len(none) == 3
    assert not [t for t in titles(none) if "intervals" in t]
    scores[intervals] = np.nan
    scores["ceiling"] = np.nan
    assert len(sge.pl.evaluation(scores)) == 3
    assert len(rows(sge.pl.evaluation(scores)[0])) == 3
    alone = sge.pl.evaluation(scores[scores["head"] == "ridge"])
    assert [t.split("\n")[0] for t in titles(alone)] == ["mean ◇", "above the line:"]
    least = scores[["split", "protocol", "head", "gene", "pcc"]]
    assert len(sge.pl.evaluation(least[least["head"] == "ridge"])) == 1


def test_title_says_what_was_scored(scores):
    figure = sge.pl.evaluation(scores)[0].figure
    assert figure.get_suptitle() == "held-out spots, split 'blocks': 20 genes, 1 section, 2 splits"


def test_published_protocol_is_labelled(scores):
    scores["protocol"] = "published"
    axes = sge.pl.evaluation(scores)
    assert "SCORED ON TRAINING SPOTS AS WELL, not held out" in axes[0].figure.get_suptitle()
    assert axes[0].figure._suptitle.get_color() == "tab:red"
    assert axes[0].get_xlabel() == "PCC of a gene"


def test_six_heads_fit_without_overlap(scores):
    """At ten by four inches, long names too: no text lies on another, none outside the figure."""
    names = ["in-context+kriging", "kriging", "published", "ridge", "coordinates", "nearest"]
    one = scores[scores["head"] == "ridge"]
    many = pd.concat([one.assign(head=n, pcc=one["pcc"] - 0.05 * i) for i, n in enumerate(names)], ignore_index=True)
    axes = sge.pl.evaluation(many)
    figure = axes[0].figure
    assert tuple(figure.get_size_inches()) == (10, 4)
    figure.canvas.draw()
    panels = [figure._suptitle.get_window_extent(), *(ax.get_tightbbox() for ax in axes)]
    labels = [t.get_window_extent() for t in axes[0].get_yticklabels()]
    assert len(labels) == 7
    for boxes in (panels, labels):
        for i, box in enumerate(boxes):
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= 1000
            assert box.y1 <= 400
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    assert min(ax.get_window_extent().width for ax in axes) > 130


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"scores": {"pcc": [1]}}, TypeError, r"scores is a dict: pass the DataFrame that histosge\.tl\.evaluate"),
        (
            {"scores": pd.DataFrame({"gene": ["a"], "pcc": [1.0]})},
            ValueError,
            r"scores lacks the columns \['split', 'protocol', 'head'\]: pass the DataFrame that histosge\.tl\.evaluate",
        ),
        (
            {"head": "rigde"},
            ValueError,
            r"head='rigde' is not in scores\. Choose one of \['nearest', 'ridge', 'mean'\]",
        ),
        ({"baseline": "kriging"}, ValueError, r"baseline='kriging' is not in scores\. Choose one of \['nearest'"),
        (
            {"head": "mean", "baseline": "mean"},
            ValueError,
            r"head and baseline are both 'mean'\. Choose two of \['nearest'",
        ),
    ],
)
def test_scores_refused(scores, wrong, error, match):
    with pytest.raises(error, match=match):
        sge.pl.evaluation(**{"scores": scores} | wrong)
    assert plt.get_fignums() == []


def test_no_scores_refused(scores):
    with pytest.raises(ValueError, match=r"scores has no rows: nothing was scored, or all rows were filtered out\."):
        sge.pl.evaluation(scores[:0])


@pytest.mark.parametrize(("column", "other"), [("split", "random"), ("protocol", "published")])
def test_scores_that_do_not_compare_are_refused(scores, column, other):
    mixed = pd.concat([scores, scores.assign(**{column: other})])
    first = scores[column].iloc[0]
    match = rf"scores holds {column} \['{first}', '{other}'\], which are not comparable\. Draw .* scores\[scores\['{column}'\]"
    with pytest.raises(ValueError, match=match):
        sge.pl.evaluation(mixed)
