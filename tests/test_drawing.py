"""More spots than ``max_spots``: which are learnt from, and what stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import histosge as sge
from histosge._heads import Spots, _space
from histosge._heads._training import Schedule
from histosge._statistics import draw_evenly, shares_of

QUICK = {"encoder": "stain-texture", "head": "ridge", "genes": 5, "n_folds": 2, "progress": False}


@pytest.fixture(scope="module")
def bins():
    return sge.datasets.synthetic(n_rows=4, n_cols=4, n_genes=12, mpp=2.0, bin_um=16)


def grid(n):
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) * 8.0


@pytest.mark.parametrize("n", [300, 2500, 9000])
def test_drawn_spots_are_spread_over_the_section_and_keep_their_neighbours(n):
    xy = grid(100)
    rows = draw_evenly(xy, n, pitch_um=8.0, rng=np.random.default_rng(0))
    assert len(np.unique(rows)) == len(rows) == n
    assert (np.diff(rows) > 0).all()
    # each sixteenth of the section has its share: the blocks of a grid over it are cut by its borders at worst
    part = np.bincount((xy[rows] // 200).astype(int) @ [4, 1], minlength=16)
    assert part.min() > 0.4 * n / 16
    # a scattered draw has a neighbour at the pitch with a chance of n / 10,000 on each side
    near, _ = cKDTree(xy[rows]).query(xy[rows], k=5)
    assert np.mean(near[:, 1:] <= 8.0) > max(0.6, n / len(xy))


def test_all_spots_are_drawn_where_there_are_no_more():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert draw_evenly(grid(5), 25, pitch_um=8.0, rng=rng).tolist() == list(range(25))
    assert rng.bit_generator.state == before


@pytest.mark.parametrize(
    "turn", [lambda xy: xy[:, ::-1], lambda xy: -xy, lambda xy: xy + 10_000.0], ids=["mirrored", "turned", "moved"]
)
def test_the_same_tissue_is_drawn_however_a_section_lies(turn):
    xy = grid(40)
    xy = xy[xy[:, 1] < 40 * np.sqrt(xy[:, 0])]  # no symmetry
    drawn = [draw_evenly(each, 400, pitch_um=8.0, rng=np.random.default_rng(0)) for each in (xy, turn(xy))]
    assert np.array_equal(*drawn)


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [([5, 7], 12, [5, 7]), ([100, 100], 60, [30, 30]), ([10, 100, 40], 90, [10, 40, 40]), ([9, 9, 9], 10, [3, 3, 4])],
)
def test_sections_share_the_drawn_spots_evenly(sizes, most, expected):
    assert sorted(shares_of(sizes, most=most).tolist()) == sorted(expected)
    assert (shares_of(sizes, most=most) <= sizes).all()


def test_fit_learns_from_drawn_spots_and_says_so(bins, log):
    n = len(bins.shapes["synthetic_square_016um"])
    with sge.settings.override(verbosity=2):
        model = sge.tl.fit(bins, **QUICK, max_spots=120)
    assert len(model.spots) == model.info["n_spots"] == 120
    assert model.info["n_measured"] == n
    assert f"learning from 120 of {n} spots (max_spots)" in log.text
    everything = sge.tl.fit(bins, **QUICK, max_spots=n)
    assert len(everything.spots) == n
    assert "n_measured" not in everything.info


def test_nothing_changes_without_a_draw(bins):
    n = len(bins.shapes["synthetic_square_016um"])
    assert sge.tl.fit(bins, **QUICK).fingerprint() == sge.tl.fit(bins, **QUICK, max_spots=n).fingerprint()


def test_a_model_of_drawn_spots_is_saved(bins, tmp_path):
    model = sge.tl.fit(bins, **QUICK, max_spots=100)
    model.save(tmp_path)
    assert sge.Model.load(tmp_path).fingerprint() == model.fingerprint()


def test_all_spots_stay_context_of_a_prediction(bins):
    """`nearest` learns nothing: with all spots as context, it does not matter which were drawn."""
    how = QUICK | {"head": "nearest", "genes": ["GENE001", "GENE002"], "bin_um": 8, "inplace": False}
    few, every = (sge.tl.predict(bins, **how, max_spots=n) for n in (60, 10_000))
    assert np.array_equal(few.X, every.X)
    assert few.uns["histosge"]["n_spots"] == 60
    assert few.uns["histosge"]["params"]["max_spots"] == 60


def test_evaluate_learns_and_scores_drawn_spots(bins):
    how = {name: QUICK[name] for name in ("encoder", "genes", "n_folds", "progress")}
    scores = sge.tl.evaluate(bins, **how, heads=["mean"], n_splits=2, buffer_um=0, max_spots=90)
    assert (scores["n_train"] + scores["n_test"] == 90).all()


@pytest.mark.parametrize("wrong", [49, 0, 1000.5, "all", None])
def test_too_few_spots_to_learn_from(bins, wrong):
    with pytest.raises(ValueError, match=r"max_spots=.*: pass a whole number of spots to learn from, at least 50"):
        sge.tl.fit(bins, **QUICK, max_spots=wrong)


def test_too_few_spots_of_each_section(sdata):
    with pytest.raises(ValueError, match="max_spots=50 is 8 spots in each of 6 sections.*pass max_spots=60 or more"):
        sge.tl.fit([sdata] * 6, **QUICK, max_spots=50)


def test_training_takes_no_longer_beyond_a_number_of_spots():
    schedule = Schedule(n_steps=300, batch_size=64, learning_rate=1e-3, weight_decay=0.0, patience=10)
    assert schedule.over(2400) == schedule.over(30) == schedule
    assert schedule.over(9600).n_steps == 600
    assert schedule.over(9600).batch_size == 128
    assert schedule.over(1_000_000) == schedule.over(20_000)
    assert schedule.over(20_000).n_steps > schedule.over(19_000).n_steps


def test_components_of_many_spots_are_those_of_each(monkeypatch):
    values = torch.as_tensor(np.random.default_rng(0).standard_normal((50, 8)), dtype=torch.float32)
    zeros = torch.zeros(50, dtype=torch.int64)
    space = _space.Space.fit(Spots(values, values, values[:, :2], zeros, 1.0), n_image=3, n_genes=4)
    whole = space.components(values)
    monkeypatch.setattr(_space, "_SPOTS_AT_ONCE", 16)
    # each value is a sum of 8 products: rounding differs by a few digits at most
    assert torch.allclose(space.components(values), whole, atol=1e-5)
    assert len(space.components(values[:0])) == 0
