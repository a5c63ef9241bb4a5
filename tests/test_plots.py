"""Pictures: which panels there are and what they show; never pixel by pixel."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
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
        ({"rival": "nearest"}, "ridge", "nearest"),
        ({"head": "ridge", "rival": "mean"}, "ridge", "mean"),
    ):
        ax = sge.pl.evaluation(scores, **choice)[1]
        share = (pcc[one] > pcc[other]).mean()
        assert ax.get_title() == f"{one} is ahead\nfor {share:.0%} of genes"
        assert (ax.get_xlabel(), ax.get_ylabel()) == (f"PCC of {other}", f"PCC of {one}")
        drawn = np.asarray(ax.collections[0].get_offsets())
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(pcc[[other, one]].to_numpy(), axis=0))
        assert ax.get_xlim() == ax.get_ylim()
        plt.close("all")


def test_error_bars_by_width_and_scale(scores):
    ax = sge.pl.evaluation(scores, level=0.9)[2]
    assert [line.get_linestyle() for line in ax.get_lines()].count("--") == 1
    mean = scores.groupby(["head", "gene"]).mean(numeric_only=True).groupby("head").mean()
    drawn = {tuple(np.round(c.get_offsets().data.ravel(), 6)) for c in ax.collections}
    names = ["coverage", "coverage_2", "coverage_4", "coverage_8"]
    wanted = {tuple(np.round([v for n in names for v in (row["width"], row[n])], 6)) for _, row in mean.iterrows()}
    assert drawn == wanted
    sizes = ax.collections[0].get_sizes()
    assert (np.diff(sizes) > 0).all()
    assert [line.get_linestyle() for line in sge.pl.evaluation(scores)[2].get_lines()].count("--") == 0


def test_smoothness_of_every_head(scores):
    ax = sge.pl.evaluation(scores)[3]
    mean = scores.groupby(["head", "gene"]).mean(numeric_only=True).groupby("head").mean()
    drawn = [tuple(c.get_offsets()[0]) for c in ax.collections if len(c.get_offsets()) == 1]
    assert len(drawn) == 3
    for row in mean.itertuples():
        assert any(np.allclose(d, (row.morans_i_measured, row.morans_i)) for d in drawn)


def test_no_panel_for_scores_that_are_missing(scores):
    bars = [c for c in scores if c.startswith(("coverage", "width"))]
    none = sge.pl.evaluation(scores.drop(columns=bars))
    assert len(none) == 3
    assert not [t for t in titles(none) if "error bars" in t]
    scores[bars] = np.nan
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
    axes = sge.pl.evaluation(many, level=0.9)
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
        ({"rival": "kriging"}, ValueError, r"rival='kriging' is not in scores\. Choose one of \['nearest'"),
        ({"head": "mean", "rival": "mean"}, ValueError, r"head and rival are both 'mean'\. Choose two of \['nearest'"),
    ],
)
def test_scores_refused(scores, wrong, error, match):
    with pytest.raises(error, match=match):
        sge.pl.evaluation(**{"scores": scores} | wrong)
    assert plt.get_fignums() == []


def test_no_scores_refused(scores):
    with pytest.raises(ValueError, match=r"scores has no rows: nothing was scored, or nothing is left of it\."):
        sge.pl.evaluation(scores[:0])


@pytest.mark.parametrize(("column", "other"), [("split", "random"), ("protocol", "published")])
def test_scores_that_do_not_compare_are_refused(scores, column, other):
    mixed = pd.concat([scores, scores.assign(**{column: other})])
    first = scores[column].iloc[0]
    match = (
        rf"scores holds {column} \['{first}', '{other}'\], which do not compare\. Draw .* scores\[scores\['{column}'\]"
    )
    with pytest.raises(ValueError, match=match):
        sge.pl.evaluation(mixed)
