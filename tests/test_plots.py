"""Pictures: which panels there are and what they show; never pixel by pixel."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import EllipseCollection
from PIL import Image
from spatialdata import SpatialData

import histosge as sge


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
    yield
    plt.close("all")


def discs(ax):
    (found,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
    return found


def test_panels(predicted):
    axes = sge.pl.expression(predicted, "GENE000")
    assert axes.shape == (1, 3)
    titles = [ax.get_title() for ax in axes[0]]
    assert titles[:2] == ["H&E", "GENE000, measured"]
    pcc = predicted["histosge"].var.loc["GENE000", "held_out_pcc"]
    assert titles[2] == f"GENE000, predicted (held-out PCC {pcc:.2f})"
    assert sge.pl.expression(predicted, ["GENE001", "GENE004"], obs="domain").shape == (2, 4)


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
    (bar,) = axes[0, 0].get_lines()
    assert np.ptp(bar.get_xdata()) == pytest.approx(250)  # 500 µm
    assert [t.get_text() for t in axes[0, 0].texts] == ["500 µm"]


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


def colour_bars(figure):
    return [ax.get_ylabel() for ax in figure.axes if ax.get_label() == "<colorbar>"]


def test_colour_bars(predicted):
    axes = sge.pl.expression(predicted, "GENE000")
    assert colour_bars(axes[0, 0].figure) == ["log1p expression"] * 2


def test_colour_bar_of_obs(predicted):
    axes = sge.pl.expression(predicted, "GENE000", obs="distance_to_spot_um")
    assert colour_bars(axes[0, 0].figure)[2] != "log1p expression"


def test_measured_is_what_was_predicted_from(predicted):
    table = predicted["table"]
    table.layers["counts"] = table.X.copy()
    table.X = np.random.default_rng(0).poisson(5, table.shape).astype(np.float32)
    run = {"encoder": "stain-texture", "head": "mean", "genes": 20, "n_folds": 2, "upsample": 2}
    sge.tl.predict(predicted, layer="counts", **run)
    by_default, by_name = (sge.pl.expression(predicted, "GENE003", **k) for k in ({}, {"layer": "counts"}))
    np.testing.assert_allclose(discs(by_default[0, 1]).get_array(), discs(by_name[0, 1]).get_array())


def test_no_panel_is_blank(predicted, tmp_path):
    axes = sge.pl.expression(predicted, ["GENE000", "GENE001"], obs="domain")
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


def test_bins_and_sparse_tables(predicted):
    from scipy import sparse

    run = {"encoder": "stain-texture", "head": "mean", "genes": 20, "n_folds": 2}
    sge.tl.predict(predicted, bin_um=50, key_added="bins", **run)
    table = predicted["bins"]
    dense = table[:, "GENE000"].X.ravel()
    table.X = sparse.csr_matrix(table.X)
    axes = sge.pl.expression(predicted, "GENE000", key="bins")
    np.testing.assert_allclose(discs(axes[0, 2]).get_widths(), 25.0)
    np.testing.assert_allclose(discs(axes[0, 2]).get_array(), dense)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            {"genes": "GENE99"},
            r"genes \['GENE99'\] were not predicted\. Predict them with genes=.* here are \['GENE000'",
        ),
        ({"genes": ["GENE001", "X"]}, r"genes \['X'\] were not predicted"),
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


def test_nothing_predicted(sdata):
    with pytest.raises(KeyError, match=r"key='histosge' is not a table .*there are \[\]"):
        sge.pl.expression(sdata, "GENE000")
