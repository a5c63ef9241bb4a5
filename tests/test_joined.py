"""Encoders joined with ``+``: how they are named, embedded side by side, and brought into balance by a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import rounding

import histosge as sge
from histosge._embedding import Embedder
from histosge._encoders import EncoderSpec
from histosge._heads import standardise, standardiser
from histosge._model import Measured, Plan, Projection, fit_model, predict_trial, trials
from histosge._section import read_section

CPU = torch.device("cpu")
JOINED = "stain-texture+rgb"


# ------------------------------------------------------------------------------------------------------- by name


def test_names_and_encoders_are_joined_in_their_order():
    one = sge.load_encoder("rgb")
    for encoder in (JOINED, ["stain-texture", "rgb"], ("stain-texture", one)):
        joined = sge.load_encoder(encoder)
        assert [part.spec.name for part in joined.encoders] == ["stain-texture", "rgb"]
        assert repr(joined) == "JoinedEncoder('stain-texture+rgb')"
        assert sge.load_encoder(joined).encoders == joined.encoders
    assert sge.load_encoder([one]) is one


@pytest.mark.parametrize(
    ("encoder", "match"),
    [
        ("rgb+rgb", "encoder names rgb twice"),
        ("rgb+RGB", "encoder names rgb twice"),
        ("rgb+", "encoder='' is unknown"),
        ("rgb+stain-textur", "encoder='stain-textur' is unknown. Did you mean 'stain-texture'"),
        ([], r"encoder=\[\] is an empty list: name at least one encoder"),
        (["rgb", 3], "encoder=3 is neither a name"),
    ],
)
def test_what_cannot_be_joined(encoder, match):
    with pytest.raises(ValueError, match=match):
        sge.load_encoder(encoder)


@pytest.mark.parametrize("what", [{"weights": "here"}, {"revision": "main"}, {"mpp": 0.5}])
def test_options_belong_to_one_encoder(what):
    with pytest.raises(ValueError, match=rf"{next(iter(what))}= is for one encoder, not for several\. Load each with"):
        sge.load_encoder(JOINED, **what)


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_an_encoder_has_the_method_that_its_spec_asks_for(whole_blocks):
    class Own:
        spec = EncoderSpec(name="own", mpp=1.0, tile_px=8, embed_dim=3, whole_blocks=whole_blocks)

    wanted = "embed_block" if whole_blocks else "embed"
    with pytest.raises(ValueError, match=rf"encoder 'own' has no method {wanted}\(\), which its spec needs with"):
        sge.load_encoder(Own())
    setattr(Own, wanted, lambda *_: None)
    one = Own()
    assert sge.load_encoder(one) is one


# ---------------------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("dense", [False, True])
def test_columns_are_those_of_each_encoder(sdata, dense):
    section = read_section(sdata, report=False)
    both, first, second = (
        Embedder.open(section, encoder, dense=dense, device="cpu") for encoder in (JOINED, "stain-texture", "rgb")
    )
    values = both.embed_spots()
    assert (both.config.name, both.config.dense, both.config.splits) == (JOINED, dense, (120,))
    np.testing.assert_array_equal(values[:, :120], first.embed_spots())
    np.testing.assert_array_equal(values[:, 120:], second.embed_spots())
    assert [part.tile_um for part in both.config.encoders] == [256.0, 55.0]
    assert both.config.token_um == (8.0 if dense else None)  # the widest: what is resolved


# ------------------------------------------------------------------------------------------------------- in balance


def unlike(n=400):
    """Two encoders, of 90 numbers in very different units and of 3."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((n, 12)) * np.geomspace(9, 0.5, 12) @ rng.standard_normal((12, 90))
    narrow = rng.standard_normal((n, 3)) @ rng.standard_normal((3, 3)) + 5
    return torch.as_tensor(np.hstack([wide * np.geomspace(1e-3, 1e3, 90), narrow * 1e-2]), dtype=torch.float32), (90,)


def components(embedding, n):
    """Principal components (n, q) of standardised columns, by another way."""
    scaled = standardise(embedding, *standardiser(embedding)).double()
    scaled = scaled - scaled.mean(0)
    left, size, _ = torch.linalg.svd(scaled, full_matrices=False)
    return (left * size)[:, :n]


def test_each_encoder_gets_the_same_total_variance():
    """All columns have variance 1, and distances between places are those of the components, up to one scale."""
    embedding, splits = unlike()
    projected = Projection.fit(embedding, splits)(embedding)
    assert projected.shape == (400, 128)
    tolerance = rounding.of_sum(400 * 90)
    np.testing.assert_allclose(projected.var(0), 1, rtol=tolerance)
    np.testing.assert_allclose(projected.mean(0), 0, atol=tolerance)
    for block, own in zip(projected.split(64, dim=1), embedding.tensor_split(splits, dim=1), strict=True):
        wanted = components(own, 64)
        wanted = wanted * (64 / wanted.var(0).sum()).sqrt()
        np.testing.assert_allclose(torch.pdist(block.double()), torch.pdist(wanted), rtol=1e-3, atol=1e-3)


def test_a_head_that_standardises_columns_keeps_the_balance():
    """On a part of the spots, as in a fold: total variances stay alike, and large components stay large."""
    embedding, splits = unlike()
    projected = Projection.fit(embedding, splits)(embedding)[:300]
    again = standardise(projected, *standardiser(projected))
    one, two = again.split(64, dim=1)
    assert float(one.var(0).sum() / two.var(0).sum()) == pytest.approx(1, abs=0.02)
    sizes = [torch.linalg.svdvals(values - values.mean(0)) for values in (projected[:, :64], one)]
    np.testing.assert_allclose(sizes[1][:12], sizes[0][:12], rtol=0.05)


def test_at_most_one_component_for_every_four_spots():
    embedding, splits = unlike(40)
    first, second = Projection.fit(embedding, splits)(embedding).split(64, dim=1)
    assert torch.linalg.matrix_rank(first - first.mean(0), rtol=1e-4) == 10
    assert torch.linalg.matrix_rank(second - second.mean(0), rtol=1e-4) == 3


def test_a_single_encoder_stays_as_it_is():
    embedding, _ = unlike(40)
    projection = Projection.fit(embedding, ())
    assert projection(embedding) is embedding
    assert projection.state() == {}


def test_a_constant_encoder_says_nothing():
    embedding, splits = unlike(40)
    embedding[:, 90:] = 0.7
    projected = Projection.fit(embedding, splits)(embedding)
    assert projected.isfinite().all()
    np.testing.assert_allclose(projected[:, 64:], 0, atol=1e-3)


def test_a_projection_is_what_was_saved():
    embedding, splits = unlike(80)
    projection = Projection.fit(embedding, splits)
    restored = Projection.from_state(projection.state())
    assert torch.equal(restored(embedding), projection(embedding))


# ---------------------------------------------------------------------------------------------------------- in a model


@pytest.fixture(scope="module")
def measured(_section_once):
    section = read_section(_section_once, report=False)
    embedder = Embedder.open(section, JOINED, device="cpu")
    return Measured("spots", section, embedder.embed_spots(), section.counts), embedder.config


def test_the_projection_is_fitted_on_training_spots_alone(measured):
    """Whatever is embedded where nothing is learnt: the model is the same."""
    one, config = measured
    plan = Plan("blocks", "held-out", 2, 1, 150.0)
    (trial, *_) = trials([one], plan, rng=np.random.default_rng(0))
    learn = {"head": "ridge", "genes": 8, "n_folds": 2, "baselines": (), "progress": False}
    model = fit_model(
        trial.sections, trial.embeddings, config=config, rng=np.random.default_rng(0), device=CPU, **learn
    )
    train = torch.as_tensor(np.concatenate(trial.embeddings))
    assert len(train) < len(one.embedding)
    wanted = Projection.fit(train, config.splits)
    assert all(torch.equal(tensor, wanted.state()[name]) for name, tensor in model.projection.state().items())
    assert torch.equal(model.spots.embedding, wanted(train))
    predicted, truth = predict_trial(model, trial, device=CPU)
    assert np.corrcoef(predicted.ravel(), truth.ravel())[0, 1] > 0.3


def test_a_joined_encoder_from_end_to_end(sdata, tmp_path):
    """Fit, save, load, predict bins and evaluate."""
    run = {"head": "kriging+ridge", "genes": 8, "n_folds": 2}
    model = sge.tl.fit(sdata, encoder=JOINED, dense=True, **run)
    model.save(tmp_path)
    loaded = sge.Model.load(tmp_path)
    assert (loaded.fingerprint(), loaded.config, repr(loaded)) == (model.fingerprint(), model.config, repr(model))
    one, two = (sge.tl.predict(sdata, model=m, bin_um=30, inplace=False) for m in (model, loaded))
    np.testing.assert_array_equal(one.X, two.X)
    assert one.X.std(0).min() > 0
    other = sge.tl.fit(sdata, encoder="stain-texture", dense=True, **run)
    assert other.fingerprint() != model.fingerprint()
    scores = sge.tl.evaluate(sdata, encoder=JOINED, heads=["ridge", "mean"], genes=8, n_splits=2, n_folds=2)
    pcc = scores.groupby("head")["pcc"].mean()
    assert pcc["ridge"] > 0.3 > pcc["mean"]
