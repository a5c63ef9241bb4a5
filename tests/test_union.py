"""Genes that only some sections measure: ``genes="union"``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from spatialdata import SpatialData

import histosge as sge
from histosge._heads import Spots
from histosge._model import cross_fit, score
from histosge._model._completion import complete, measured_together
from histosge._model._genes import select_genes
from histosge._statistics import correlation

HOW = {"encoder": "stain-texture", "n_folds": 2, "progress": False}
N_GENES = 12


def make(rng, **how):
    return sge.datasets.synthetic(
        **{"n_rows": 12, "n_cols": 12, "n_genes": N_GENES, "mpp": 2.0, "genes_rng": 0, "rng": rng} | how
    )


def without(sdata, columns):
    """The section as if some genes had not been measured."""
    table = sdata.tables["table"][:, ~np.isin(np.arange(N_GENES), columns)].copy()
    return SpatialData(images=dict(sdata.images), shapes=dict(sdata.shapes), tables={"table": table})


@pytest.fixture(scope="module")
def whole():
    return [make(rng) for rng in range(3)]


@pytest.fixture(scope="module")
def sections(whole):
    """The first has all genes, the second lacks the first three, the third the last four."""
    return [whole[0], without(whole[1], [0, 1, 2]), without(whole[2], [8, 9, 10, 11])]


@pytest.fixture(scope="module")
def model(sections):
    return sge.tl.fit(sections, genes="union", **HOW)


def test_each_gene_is_learnt_where_it_is_measured(sections, model, log):
    names = list(sections[0].tables["table"].var_names)
    assert list(model.genes) == names
    assert model.scores["n_sections"].tolist() == [2] * 3 + [3] * 5 + [2] * 4
    with sge.settings.override(verbosity=2):
        sge.tl.fit(sections, genes="union", head="ridge", **HOW)
    assert "7 of 12 genes are measured by some of the sections only" in log.text
    assert list(sge.tl.fit(sections, genes="all", head="ridge", **HOW).genes) == names[3:8]


def test_what_is_filled_in_is_near_the_truth(whole, sections, model):
    """Where a gene was hidden, its prediction agrees with what was measured nearly as well as that of other genes."""
    table = sge.tl.predict(sections[1], model=model, target_key="spots", inplace=False)
    measured = whole[1].tables["table"]
    rows = measured.obs_names.get_indexer(table.obs["instance_id"])
    values = np.asarray(measured.X.todense(), float)[rows]
    values = np.log1p(values / values.sum(1, keepdims=True) * 1e4)
    found = correlation(np.asarray(table.X), values)
    assert found[:3].mean() > 0.7 * found[3:].mean() > 0.1
    assert table.var["measured"].tolist() == [False] * 3 + [True] * 9


def test_no_intervals_for_what_a_section_does_not_measure(sections, model):
    """They would be those of sections that do."""
    table = sge.tl.predict(sections[1], model=model, bin_um=50, inplace=False)
    assert np.isnan(table.varm["histosge_intervals"]).all(1).tolist() == [True] * 3 + [False] * 9
    layers = sge.tl.intervals(table, inplace=False).layers
    assert np.isnan(layers["lower"][:, :3]).all()
    assert np.isfinite(layers["lower"][:, 3:]).all()
    assert np.isfinite(
        sge.tl.predict(sections[0], model=model, bin_um=50, inplace=False).varm["histosge_intervals"]
    ).all()


def test_round_trip(sections, model, tmp_path):
    model.save(tmp_path / "model")
    again = sge.Model.load(tmp_path / "model")
    pd.testing.assert_frame_equal(again.scores, model.scores)
    assert again.fingerprint() == model.fingerprint()
    absent = again.spots.expression.isnan()  # what was not measured is kept as such
    assert torch.equal(absent, model.spots.expression.isnan())
    assert [int(absent[again.spots.section == i].all(0).sum()) for i in range(3)] == [0, 3, 4]
    assert int(absent.sum()) == sum(int((again.spots.section == i).sum()) * n for i, n in ((1, 3), (2, 4)))
    one, other = (sge.tl.predict(sections[2], model=m, bin_um=50, inplace=False).X for m in (model, again))
    np.testing.assert_array_equal(one, other)


def test_a_damaged_value_is_still_refused(model, tmp_path):
    """NaN is a gene that a whole section lacks; a single one is damage."""
    expression = model.spots.expression.clone()
    expression[0, 0] = np.nan
    broken = replace(model, spots=replace(model.spots, expression=expression))
    with pytest.raises(sge.ModelError, match=r"spots\.expression has 1 of \d+ numbers that are NaN or infinite"):
        broken.save(tmp_path / "model")


def test_a_store_holds_the_same(sections, model, tmp_path):
    stored = sge.tl.predict(sections[2], model=model, bin_um=50, store=tmp_path / "out.zarr", inplace=False)
    here = sge.tl.predict(sections[2], model=model, bin_um=50, inplace=False)
    np.testing.assert_allclose(np.asarray(stored[here.obs_names].X), here.X, atol=1e-4)
    assert stored.var["measured"].tolist() == here.var["measured"].tolist()


def test_the_same_genes_everywhere_are_all_genes(whole):
    union, everything = (sge.tl.fit(whole, genes=genes, head="ridge", **HOW) for genes in ("union", "all"))
    assert union.fingerprint() == everything.fingerprint()
    assert "n_sections" not in union.scores


def test_names_may_be_of_some_sections(sections):
    names = [str(name) for name in sections[0].tables["table"].var_names]
    model = sge.tl.fit(sections, genes=[names[0], names[5]], head="ridge", **HOW)
    assert model.scores["n_sections"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="genes: 1 of 2 names are not in the table"):
        sge.tl.fit(sections, genes=[names[0], "NOWHERE"], head="ridge", **HOW)


def test_disjoint_genes(whole):
    """Only the image is common to the sections."""
    apart = [without(whole[0], range(6)), without(whole[1], range(6, 12))]
    with pytest.raises(ValueError, match="no gene in common.*genes='union' learns each from the sections"):
        sge.tl.fit(apart, genes="all", **HOW)
    model = sge.tl.fit(apart, genes="union", **HOW)
    assert len(model.genes) == N_GENES
    assert set(model.scores["n_sections"]) == {1}
    assert (model.scores["held_out_pcc"] > 0).mean() > 0.8
    assert np.isfinite(sge.tl.predict(apart[0], model=model, bin_um=50, inplace=False).X).all()


def test_an_image_alone(whole, model):
    image = SpatialData(images=dict(whole[1].images))
    table = sge.tl.predict(image, model=model, bin_um=50, mpp=2.0, inplace=False)
    assert np.isfinite(table.X).all()
    assert "measured" not in table.var
    assert "n_sections" in table.var


def test_evaluate_scores_what_is_measured(sections):
    scores = sge.tl.evaluate(sections, heads="ridge", split="sections", genes="union", **HOW)
    names = list(sections[0].tables["table"].var_names)
    found = scores.groupby("section", sort=False)["gene"].agg(list).tolist()
    assert [sorted(genes) for genes in found] == [names, names[3:], names[:8]]
    assert np.isfinite(scores["pcc"]).all()
    assert np.isfinite(scores["mse_mean"]).all()
    within = sge.tl.evaluate(sections[1:], heads="ridge", split="random", n_splits=1, genes="union", **HOW)
    assert sorted(within.groupby("section")["gene"].nunique()) == [8, 9]


def test_conservation_needs_measurements(sections, model):
    with pytest.raises(
        ValueError, match=r"section 'spots' does not measure 3 of them \(for example .*\): leave conserve"
    ):
        sge.tl.predict(sections[1], model=model, bin_um=25, conserve=True, inplace=False)


def test_a_model_of_shared_genes_still_refuses(sections):
    model = sge.tl.fit(sections[0], genes="all", head="ridge", **HOW)
    with pytest.raises(ValueError, match="3 of the 12 genes of this model are not in the table of section 'spots'"):
        sge.tl.predict(sections[1], model=model, inplace=False)


def test_genes_of_one_fold_are_left_out(log):
    """Where folds hold whole sections, a gene of one section has none to be learnt from while that is held out."""
    names, xy = pd.Index(list("abc")), np.random.default_rng(0).uniform(size=(40, 2))
    of_section = np.arange(40) // 20
    measured = np.array([[True, True, False], [True, False, True]])
    how = {"groups": of_section, "measured": measured}
    counts = sparse.csr_matrix(np.random.default_rng(0).random((40, 3)) * measured[of_section])
    with sge.settings.override(verbosity=2):
        final, per_fold, _ = select_genes("union", names, counts, xy, fold=of_section, **how)
    assert names[final].tolist() == ["a"]
    assert (per_fold == final).all()
    assert "leaving out 2 genes that are measured on the spots of one fold only (b, ...)" in log.text
    final, _, variable = select_genes("union", names, counts, xy, fold=np.arange(40) % 2, **how)
    assert final.all()
    assert variable.tolist() == [True, False, False]  # what a section does not measure is no pattern


def test_no_genes_at_all(sections):
    only = str(sections[0].tables["table"].var_names[0])
    with pytest.raises(ValueError, match="none of them is measured and seen on the spots to learn from"):
        sge.tl.evaluate(sections, heads="ridge", split="random", n_splits=1, genes=[only], **HOW)


# ------------------------------------------------------------------------------------------------------- completion


def spots(n, n_genes, *, hidden, seed=0):
    """Two sections; genes are linear in two factors, and ``hidden`` ones are not measured on the second."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, 2))
    values = 20 + factors @ rng.normal(size=(2, n_genes))  # never negative
    section = np.arange(n) % 2
    values[np.ix_(section == 1, hidden)] = np.nan
    embedding, xy = rng.normal(size=(n, 4)), rng.uniform(0, 1000, (n, 2))
    as32 = [torch.as_tensor(v, dtype=torch.float32) for v in (embedding, values, xy)]
    return Spots(*as32, torch.as_tensor(section), 100.0)


def test_linear_genes_are_filled_in_exactly():
    known = spots(200, 10, hidden=[])
    some = spots(200, 10, hidden=[3, 7])
    filled = complete(some)
    there = ~some.expression.isnan()
    assert torch.equal(filled.expression[there], some.expression[there])
    np.testing.assert_allclose(filled.expression, known.expression, atol=0.02)


def test_complete_spots_stay_as_they_are():
    known = spots(20, 5, hidden=[])
    assert complete(known) is known


def test_what_nothing_measures_is_zero():
    some = spots(40, 5, hidden=[2])
    second = some.take(torch.nonzero(some.section == 1)[:, 0])
    assert (complete(second).expression[:, 2] == 0).all()


def test_others_fill_in():
    known = spots(200, 10, hidden=[])
    some = spots(200, 10, hidden=[3, 7])
    first, second = (torch.nonzero(some.section == i)[:, 0] for i in (0, 1))
    filled = complete(some.take(second), by=known.take(first))
    np.testing.assert_allclose(filled.expression, known.expression[second], atol=0.02)


def test_held_out_spots_fill_in_nothing():
    """Other values in a fold change no prediction of it, not even those that fill genes in."""
    some = spots(120, 6, hidden=[2, 3])
    fold = np.arange(120) // 40
    predicted = cross_fit(some, head="in-context", fold=fold, rng=np.random.default_rng(0), final=False).held_out
    inside = torch.as_tensor(fold == 1)
    changed = some.expression.clone()
    changed[inside] = changed[inside] + 3 * torch.rand(
        changed[inside].shape, generator=torch.Generator().manual_seed(0)
    )
    other = Spots(some.embedding, changed, some.xy_um, some.section, 100.0)
    again = cross_fit(other, head="in-context", fold=fold, rng=np.random.default_rng(0), final=False).held_out
    np.testing.assert_array_equal(again[fold == 1], predicted[fold == 1])
    assert (again[fold != 1] != predicted[fold != 1]).any()


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_groups_cover_each_measured_value_once(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rng.integers(1, 9), rng.integers(1, 9)))
    values[rng.random(values.shape) < rng.choice([0, 0.3, 0.9])] = np.nan
    seen = np.zeros(values.shape, int)
    for rows, columns in measured_together(values):
        block = values[rows][:, columns]
        assert np.isfinite(block).all()
        index = np.ix_(np.arange(len(values))[rows], np.arange(values.shape[1])[columns])
        seen[index] += 1
    np.testing.assert_array_equal(seen, np.isfinite(values))


def test_scores_are_those_of_the_spots_that_measure():
    rng = np.random.default_rng(0)
    predicted, measured = rng.normal(size=(2, 60, 5))
    fold = np.arange(60) % 3
    partly = measured.copy()
    partly[30:, 2] = np.nan
    found, alone = score(predicted, partly, fold=fold), score(predicted[:30, [2]], measured[:30, [2]], fold=fold[:30])
    others = score(predicted, measured, fold=fold)
    for name in ("pcc", "mse", "p_value"):  # of order 1, from 60 terms: a few hundred roundings of 2e-16
        values = getattr(found, name)
        np.testing.assert_allclose(values[2], getattr(alone, name)[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.delete(values, 2), np.delete(getattr(others, name), 2), rtol=0, atol=1e-12)
