"""Bins of few counts are merged before heads learn from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from spatialdata import SpatialData

import histosge as sge
from histosge._embedding import Embedder
from histosge._geometry import cut_bins
from histosge._section import merge_bins, merged_edge, read_section

QUICK = {"encoder": "stain-texture", "head": "ridge", "genes": 5, "n_folds": 2, "progress": False}


@pytest.fixture(scope="module")
def hd():
    """8 µm bins of about 215 counts."""
    return sge.datasets.synthetic(n_rows=5, n_cols=5, n_genes=12, mpp=2.0, bin_um=8, detail_um=40)


@pytest.fixture(scope="module")
def section(hd):
    return read_section(hd, report=False)


@pytest.mark.parametrize("merge_um", [16, 24.0, 40])
def test_counts_of_a_square_are_summed(section, merge_um):
    merged = merge_bins(section, merge_um)
    times = round(merge_um / 8)
    assert merged.merged == times
    assert merged.spot_um == merged.pitch_um == merge_um
    # every bin belongs to the square that it lies in: within half an edge of the middle
    reach_px = merge_um / 2 / section.mpp
    total = np.asarray(section.counts.sum(axis=1)).ravel()
    for i in range(0, len(merged.xy_px), 7):
        inside = np.abs(section.xy_px - merged.xy_px[i]).max(axis=1) < reach_px
        assert times**2 / 2 <= inside.sum() <= times**2
        assert merged.counts[i].sum() == total[inside].sum()
    assert len(np.unique(merged.lattice.index, axis=0)) == len(merged.xy_px)
    at = merged.lattice.origin + merged.lattice.index @ merged.lattice.basis
    assert np.abs(at - merged.xy_px).max() < 1e-3 * merged.lattice.pitch_px
    # footprints tile the plane: as large as the bins together
    assert np.allclose(merged.footprints.size_px, section.footprints.size_px[0] * times)
    expected = sparse.csr_matrix(merged.counts.multiply(1e4 / merged.counts.sum(axis=1))).log1p()
    assert abs(merged.expression - expected).max() < 1e-5


def test_a_square_with_less_than_half_of_its_bins_is_left_out(section):
    lattice = section.lattice.index
    first = (lattice - lattice.min(axis=0)) // 2
    _, square, size = np.unique(first, axis=0, return_inverse=True, return_counts=True)
    whole = int(np.flatnonzero(size == 4)[0])
    members = np.flatnonzero(square == whole)
    for n_missing, there in ((2, True), (3, False)):
        some = section.take(np.setdiff1d(np.arange(len(lattice)), members[:n_missing]))
        merged = merge_bins(some, 16)
        middle = section.xy_px[members].mean(axis=0)
        near = np.abs(merged.xy_px - middle).max(axis=1) < 1e-3
        assert near.any() == there  # in the middle of the square, although bins are missing


def test_labels_are_those_of_a_bin_inside(section):
    merged = merge_bins(section, 24)
    of_bin = dict(zip(section.rows, section.xy_px, strict=True))
    away = np.abs(np.array([of_bin[row] for row in merged.rows]) - merged.xy_px).max(axis=1)
    assert away.max() < 12 / section.mpp
    assert np.median(away) < 1e-3  # nearly always the one in the middle


def test_bins_are_merged_until_they_hold_enough_counts(section, sdata):
    assert merged_edge(section) == 16  # 4 x 215 counts
    few = section.counts.copy()
    few.data = np.ceil(few.data / 10)
    assert merged_edge(replace(section, counts=few)) == 32
    assert merged_edge(replace(section, counts=section.counts * 4)) == 8
    spots = read_section(sdata, report=False)
    assert merged_edge(spots) == spots.spot_um
    assert merge_bins(spots, None) is spots
    assert merge_bins(spots, 16) is spots  # spots with gaps stay
    assert merge_bins(section, 8) is section


@pytest.mark.parametrize("wrong", [12, 4, 0, -8, float("nan")])
def test_an_edge_that_is_no_multiple(section, wrong):
    with pytest.raises(ValueError, match=r"merge_um=.* is no whole multiple of the bins of .*, 8 µm: pass 8 to keep"):
        merge_bins(section, wrong)


def test_what_are_no_counts_is_not_merged(hd):
    table = hd.tables["square_008um"].copy()
    total = np.asarray(table.X.sum(axis=1)).ravel()
    table.X = sparse.csr_matrix(sparse.diags(1e4 / np.maximum(total, 1)) @ table.X).log1p()
    logged = SpatialData(images=dict(hd.images), shapes=dict(hd.shapes), tables={"square_008um": table})
    section = read_section(logged, report=False)
    assert merge_bins(section, None) is section
    with pytest.raises(ValueError, match="merge_um=16 adds up counts, and .* holds .*layer=, or leave merge_um= out"):
        merge_bins(section, 16)


def test_learning_from_merged_bins_is_nearer_to_the_truth(hd, log):
    target = "synthetic_square_008um"
    truth = sge.datasets.synthetic_truth(hd, target_key=target)
    found = {}
    with sge.settings.override(verbosity=2):
        for merge_um in (8, None):
            table = sge.tl.predict(
                hd, **QUICK | {"genes": "all"}, merge_um=merge_um, target_key=target, dense=True, inplace=False
            )
            expected = truth.loc[table.obs["instance_id"], table.var_names].to_numpy()
            found[merge_um] = np.mean((table.X - expected) ** 2)
    assert "merging 3" in log.text
    assert "2 x 2, to" in log.text
    assert table.uns["histosge"]["merged_um"] == 16
    assert table.uns["histosge"]["spot_um"] == 16
    assert not table.obs["is_spot"].any()
    assert table.obs["in_spot"].mean() > 0.95
    # log1p of 18 counts a gene is nearly unbiased; of 5 it is not
    assert found[None] < 0.8 * found[8]


def test_a_model_reads_bins_of_the_size_that_it_learnt_from(hd):
    model = sge.tl.fit(hd, **QUICK | {"head": "nearest", "genes": ["GENE001"]}, dense=True)
    assert model.info["merged_um"] == 16
    assert model.info["n_spots"] == len(model.spots) == model.info.get("n_measured", len(model.spots))
    coarse = sge.datasets.synthetic(n_rows=5, n_cols=5, n_genes=12, mpp=2.0, bin_um=16, detail_um=40)
    for other, key in ((hd, "synthetic_square_008um"), (coarse, "synthetic_square_016um")):
        table = sge.tl.predict(other, model=model, target_key=key, inplace=False)
        assert table.uns["histosge"]["merged_um"] == 16
    kept = sge.tl.fit(hd, **QUICK | {"head": "nearest", "genes": ["GENE001"]}, dense=True, merge_um=8)
    assert "merged_um" not in kept.info
    # bins that are not merged are hidden at their own place
    assert sge.tl.predict(hd, model=kept, target_key="synthetic_square_008um", inplace=False).obs["is_spot"].all()


def test_bins_of_all_sections_get_one_size(hd):
    coarse = sge.datasets.synthetic(n_rows=5, n_cols=5, n_genes=12, mpp=2.0, bin_um=16, detail_um=40)
    model = sge.tl.fit([hd, coarse], **QUICK)
    assert model.info["spot_um"] == 16


def test_evaluate_scores_merged_bins(hd):
    how = {name: QUICK[name] for name in ("encoder", "genes", "n_folds", "progress")}
    scores = sge.tl.evaluate(hd, **how, heads=["mean"], n_splits=2, buffer_um=0)
    n = len(merge_bins(read_section(hd, report=False), None).xy_px)
    assert (scores["n_train"] + scores["n_test"] == n).all()
    assert isinstance(scores, pd.DataFrame)


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 2])
@pytest.mark.parametrize("mirrored", [1, -1])
def test_bins_are_cut_along_their_edges(angle, mirrored):
    basis = 6.0 * np.array([[np.cos(angle), np.sin(angle)], [-mirrored * np.sin(angle), mirrored * np.cos(angle)]])
    centres = np.array([[0.0, 0.0], [50.0, 20.0]])
    xy, index, weight = cut_bins(centres, basis=basis, n_side=3)
    assert np.allclose(weight.sum(axis=1), 1)
    assert np.allclose(np.einsum("nk,nkd->nd", weight, xy[index]), centres)
    # in the axes of the bin, the pieces are at -1/3, 0 and 1/3 of its edge
    own = np.round((xy[index] - centres[:, None]) @ np.linalg.inv(basis) * 3)
    for each in own:
        assert sorted(map(tuple, each.astype(int))) == [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


def test_the_pieces_of_a_bin_have_the_mean_of_its_tokens(section):
    merged = merge_bins(section, 16)
    embedder = Embedder.open(merged, "stain-texture", dense=True, device="cpu", progress=False)
    rows = np.arange(0, len(merged.xy_px), 9)
    some = replace(embedder, section=merged.take(rows))
    parts, whole = some.embed_parts(), some.embed_spots()
    n = whole.shape[1] // 2
    assert parts.index.shape == (len(rows), 4)
    mean = np.einsum("nk,nkd->nd", parts.weight, parts.embedding[parts.index])
    # tokens are means over areas, to half precision at most; the rest is the surroundings of each centre
    assert np.abs(mean - whole)[:, :n].max() < 4e-3 * np.abs(whole[:, :n]).max()
