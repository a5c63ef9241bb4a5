"""Sections of which nothing was measured: an image, a model of other sections, and a scale that somebody gives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from spatialdata import SpatialData, read_zarr
from spatialdata.transformations import get_transformation

import histosge as sge
from histosge._embedding import Embedder
from histosge._geometry import lay_over, tissue_mask
from histosge._heads import Spots
from histosge._model import UNMEASURED, stack_sections
from histosge._section import read_section
from histosge._statistics import correlation

CPU = torch.device("cpu")
FIT = {"encoder": "stain-texture", "genes": 10, "n_folds": 2}


@pytest.fixture(scope="module")
def other():
    """Another section of the same tissue: genes follow the same fields, which lie elsewhere."""
    return sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=20, mpp=1.6, rng=1, genes_rng=0)


@pytest.fixture(scope="module")
def measured(_section_once):
    return _section_once


@pytest.fixture(scope="module")
def model(measured):
    return sge.tl.fit(measured, head="in-context+kriging", **FIT)


@pytest.fixture
def image_alone(other):
    return SpatialData(images=dict(other.images))


def test_follows_the_truth_between_spots(model, image_alone, other):
    sge.tl.predict(image_alone, model=model, mpp=1.6)
    table = image_alone["histosge"]
    told = SpatialData(shapes=dict(image_alone.shapes), tables={"t": table})
    told.tables["t"].uns["synthetic"] = other["table"].uns["synthetic"]
    truth = sge.datasets.synthetic_truth(told, target_key="histosge_targets")[list(table.var_names)].to_numpy()
    # four genes follow fields that can be seen; one follows a field that cannot, of which neighbours alone could tell
    found = np.sort(correlation(table.X, truth))
    assert (found[-4:] > 0.5).all(), found
    assert np.median(found) > 0.3, found


def test_is_what_evaluate_measures_on_sections_left_out(model, image_alone, other, measured):
    """Places at the spots of the other section: as of the split by sections, where training spots are no neighbours."""
    image_alone.shapes["where"] = other.shapes["spots"]
    found = sge.tl.predict(image_alone, model=model, mpp=1.6, target_key="where", inplace=False)
    section = read_section(other, mpp=1.6, report=False)
    embeddings = []
    for one in (read_section(measured, report=False), section):
        embeddings.append(Embedder.open(one, "stain-texture", device=CPU, progress=False).embed_spots())
    spots = stack_sections([read_section(measured, report=False)], embeddings[:1], model.context_genes)
    context = model.condition(spots, section=UNMEASURED, device=CPU)
    wanted = model.predict_from(
        context,
        embedding=embeddings[1],
        xy_um=section.xy_um,
        spot_index=np.full(len(section.xy_px), -1),
    )
    rows = pd.Index(found.obs["instance_id"]).get_indexer(section.instances)
    # other blocks of the image: an embedding is the same to a thousandth of each feature's spread
    np.testing.assert_allclose(found.X[rows], wanted, atol=1e-3 * wanted.std(0).max())
    assert wanted.std(0).min() > 0.01


def test_saved_and_loaded(model, image_alone, tmp_path):
    model.save(tmp_path / "model")
    again = sge.Model.load(tmp_path / "model")
    assert again.fingerprint() == model.fingerprint()
    pd.testing.assert_frame_equal(again.training, model.training)
    first, second = (sge.tl.predict(image_alone, model=m, mpp=1.6, upsample=2, inplace=False).X for m in (model, again))
    np.testing.assert_array_equal(first, second)


def test_what_is_written(model, image_alone, tmp_path):
    sge.tl.predict(image_alone, model=model, mpp=1.6)
    table = image_alone["histosge"]
    assert table.obs["distance_to_spot_um"].isna().all()
    assert not table.obs[["is_spot", "in_spot"]].to_numpy().any()
    made = table.uns["histosge"]
    assert made["input"] == "the image alone"
    assert {"spots", "table"} & set(made) == set()
    assert made["technology"] == "not measured"
    # half the pitch that the model learnt from, at the scale that was given
    xy = table.obsm["spatial"]
    step = np.sort(np.linalg.norm(xy[:1] - xy[1:], axis=1))[0]
    assert step * 1.6 == pytest.approx(50, rel=1e-6)
    # the places lie where they lie in the image, in its coordinate systems
    shapes = image_alone.shapes["histosge_targets"]
    assert set(get_transformation(shapes, get_all=True)) == {"synthetic"}
    matrix = get_transformation(shapes, to_coordinate_system="synthetic").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(matrix, np.diag([1.6, 1.6, 1.0]))
    np.testing.assert_allclose(np.column_stack([shapes.geometry.x, shapes.geometry.y]), xy)
    image_alone.write(tmp_path / "section.zarr")
    np.testing.assert_array_equal(read_zarr(tmp_path / "section.zarr")["histosge"].X, table.X)


def test_bins_and_store(model, image_alone, tmp_path):
    sge.tl.predict(image_alone, model=model, mpp=1.6, bin_um=40, tissue="auto")
    table = image_alone["histosge"]
    area = image_alone.shapes["histosge_targets"].geometry.area.to_numpy()
    np.testing.assert_allclose(np.sqrt(area) * 1.6, 40)
    corner = table.obs[["array_col", "array_row"]].to_numpy()
    np.testing.assert_allclose(table.obsm["spatial"], (corner + 0.5) * 25)
    stored = sge.tl.predict(image_alone, model=model, mpp=1.6, bin_um=40, store=tmp_path / "out.zarr", inplace=False)
    rows = stored.obs["instance_id"].argsort()
    np.testing.assert_allclose(np.asarray(stored.X)[rows.to_numpy()], table.X, atol=1e-5)
    assert not stored.layers


def test_measured_sections_are_read_as_before(model, other, log):
    table = sge.tl.predict(other, model=model, upsample=2, inplace=False)
    assert table.obs["is_spot"].any()
    assert "image alone" not in log.text
    np.testing.assert_array_equal(table.varm["histosge_intervals"], model.intervals.numbers)
    assert "prediction intervals are those of the model, calibrated on the 138 spots that it learnt from" in log.text


def test_a_dense_model_predicts_an_image_alone(image_alone):
    """There are no spots to embed; this ended in an error of numpy."""
    other = sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=10, mpp=2.0, rng=1)
    dense = sge.tl.fit(other, encoder="stain-texture", genes=5, head="ridge", n_folds=2, dense=True, progress=False)
    table = sge.tl.predict(image_alone, model=dense, mpp=1.6, bin_um=25, inplace=False)
    assert np.isfinite(table.X).all()


def test_no_intervals_where_nothing_was_measured(model, image_alone, log, tmp_path):
    """Those of other sections would be too narrow, and nothing could tell."""
    sge.tl.predict(image_alone, model=model, mpp=1.6, upsample=2)
    table = image_alone["histosge"]
    assert not table.layers
    assert not table.varm
    assert "intervals" not in table.uns["histosge"]
    assert "held_out_pcc" in table.var  # which are said to be of the sections it learnt from
    with sge.settings.override(memory_gb=1.01 * 1.5e-9 * table.X.nbytes):  # memory is asked for X alone
        sge.tl.predict(image_alone, model=model, mpp=1.6, upsample=2, inplace=False)
    assert "no prediction intervals: nothing was measured on this section to calibrate them on" in log.text
    refusal = r"table 'histosge' has no prediction intervals: nothing was measured on this section.*split='sections'"
    with pytest.raises(ValueError, match=refusal):
        sge.tl.intervals(image_alone)
    with pytest.raises(ValueError, match=refusal):
        sge.pl.expression(image_alone, table.var_names[0], panels=["predicted", "width"])
    page = sge.pl.report(image_alone, tmp_path / "report.html").read_text()
    assert "no prediction intervals are given: those of other sections would be too narrow" in page
    assert "This table has none: nothing was measured on this section to calibrate them on" in page
    with pytest.raises(KeyError, match=r"layers=\['sd'\] are not among the layers of the table: \[\]"):
        sge.io.write_h5ad(image_alone, tmp_path / "out.h5ad", layers=["sd"])


def test_intervals_of_other_sections_are_measured_by_evaluate(measured, other):
    """The honest measurement stays: what they hold on a section left out."""
    scores = sge.tl.evaluate([measured, other], split="sections", heads=["ridge"], **FIT)
    assert scores["coverage"].between(0, 1).all()
    assert scores["coverage"].mean() < 0.9


def test_says_that_nothing_vouches_for_it(model, image_alone, log):
    sge.tl.predict(image_alone, model=model, mpp=1.6, upsample=2)
    assert "predicting from the image alone" in log.text


def test_errors(model, image_alone, sdata):
    before = list(image_alone.gen_elements())
    with pytest.raises(ValueError, match=r"Pass mpp="):
        sge.tl.predict(image_alone, model=model)
    with pytest.raises(ValueError, match=r"mpp=-1 is not a length"):
        sge.tl.predict(image_alone, model=model, mpp=-1)
    with pytest.raises(ValueError, match=r"tissue='spots' keeps targets within reach of a spot"):
        sge.tl.predict(image_alone, model=model, mpp=1.6, tissue="spots")
    with pytest.raises(ValueError, match=r"upsample=3: choose one of \(2, 4, 8, 16\)"):
        sge.tl.predict(image_alone, model=model, mpp=1.6, upsample=3)
    with pytest.raises(ValueError, match=r"conserve=True needs measured spots"):
        sge.tl.predict(image_alone, model=model, mpp=1.6, bin_um=8, conserve=True)
    with pytest.raises(ValueError, match=r"coordinate_system='global' does not hold .* one of \['synthetic'\]"):
        sge.tl.predict(image_alone, model=model, mpp=1.6, coordinate_system="global")
    with pytest.raises(ValueError, match=r"layer='counts', but no table of sdata annotates spots"):
        sge.tl.predict(image_alone, model=model, mpp=1.6, layer="counts")
    blind = sge.tl.fit(sdata, head="ridge+nearest", **FIT)
    with pytest.raises(ValueError, match=r"'nearest' knows positions only"):
        sge.tl.predict(image_alone, model=blind, mpp=1.6)
    # without a model there is nothing to predict with
    with pytest.raises(ValueError, match=r"no measured spots found: .* has no table.* model= and mpp="):
        sge.tl.predict(image_alone, encoder="stain-texture", mpp=1.6)
    assert list(image_alone.gen_elements()) == before


def test_losses_are_kept(model):
    table = model.training
    assert list(table.columns) == ["head", "fold", "epoch", "loss"]
    assert set(table["head"]) == {"in-context"}  # kriging is not trained in epochs
    assert sorted(table["fold"].unique()) == [0, 1]
    for _, one in table.groupby("fold"):
        np.testing.assert_array_equal(one["epoch"], np.arange(1, len(one) + 1))
        assert one["loss"].iloc[0] > one["loss"].min() > 0


def test_losses_of_heads_without_epochs(sdata):
    model = sge.tl.fit(sdata, head="ridge", **FIT)
    assert len(model.training) == 0
    table = sge.tl.predict(sdata, model=model, upsample=2, inplace=False)
    assert "training" not in table.uns["histosge"]


def test_losses_are_written(model, sdata):
    table = sge.tl.predict(sdata, model=model, upsample=2, inplace=False)
    told = pd.DataFrame(table.uns["histosge"]["training"])
    pd.testing.assert_frame_equal(told, model.training, check_dtype=False)


def test_spots_are_those_of_training(model, measured):
    section = read_section(measured, report=False)
    assert isinstance(model.spots, Spots)
    np.testing.assert_allclose(model.spots.xy_um.numpy(), section.xy_um, rtol=1e-6)
    np.testing.assert_array_equal(model.spots.expression.numpy(), section.dense(model.context_genes))


@pytest.mark.parametrize("hexagonal", [False, True])
def test_places_over_an_image(hexagonal):
    places = lay_over(1000, 700, step_px=20, hexagonal=hexagonal)
    xy = places.xy_px
    assert ((xy > 0) & (xy < [1000 + 20, 700])).all()
    gap = np.sqrt(((xy[:, None] - xy[None]) ** 2).sum(-1))
    np.fill_diagonal(gap, np.inf)
    np.testing.assert_allclose(gap.min(1), 20)
    inner = ((xy > 30) & (xy < [960, 660])).all(1)
    assert set((np.isclose(gap, 20).sum(1))[inner]) == {6 if hexagonal else 4}
    assert len(set(zip(places.array_row, places.array_col, strict=True))) == len(xy)
    assert (places.spot_index == -1).all()


def test_tissue_without_spots_is_what_otsu_says():
    image = np.full((60, 80, 3), 240, np.uint8)
    image[20:40, 30:60] = (160, 90, 150)
    mask, share = tissue_mask(image, np.empty((0, 2)), blur_cells=0.5)
    assert np.isnan(share)
    assert mask[22:38, 32:58].all()
    assert mask.sum() < 22 * 32
