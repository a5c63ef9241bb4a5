"""Scores of genes against scipy and sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from histosge._metrics import correlation, morans_i

properties = settings(deadline=None, max_examples=25)


def grid(n=10):
    """Jittered, so that no two neighbours are equally far."""
    xy = np.stack(np.meshgrid(np.arange(float(n)), np.arange(float(n))), -1).reshape(-1, 2)
    return 100 * (xy + np.random.default_rng(0).random(xy.shape) * 0.2)


# -------------------------------------------------------------------------------------------------- correlation


@properties
@given(st.integers(3, 60), st.floats(1e-3, 1e3), st.floats(-100, 100), st.sampled_from([np.float32, np.float64]))
def test_correlation_against_scipy(n, scale, shift, dtype):
    rng = np.random.default_rng(n)
    measured = rng.standard_normal((n, 5))
    predicted = 0.5 * measured + rng.standard_normal((n, 5))
    predicted, measured = (scale * predicted + shift).astype(dtype), measured.astype(dtype)
    expected = [stats.pearsonr(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)]
    assert correlation(predicted, measured) == pytest.approx(expected, abs=2e-3 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1e6, -2.7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_scores_zero(value, dtype):
    """In the reference it scores NaN and is dropped from the mean."""
    varying = np.random.default_rng(0).random((41, 2)).astype(dtype)
    constant = np.full((41, 2), value, dtype)
    for p, m in ((constant, varying), (varying, constant), (constant, constant)):
        assert correlation(p, m).tolist() == [0.0, 0.0]


def test_correlation_of_one_spot_is_zero():
    assert correlation(np.ones((1, 3)), np.ones((1, 3))).tolist() == [0, 0, 0]


def test_correlation_of_small_wobbles_is_seen():
    """A gene that varies by a millionth still varies."""
    rng = np.random.default_rng(0)
    signal = rng.random((50, 1))
    assert correlation(1 + 1e-6 * signal, signal) == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------------------------------------------- Moran's I


def moran_by_hand(values, xy, k):
    n = len(xy)
    z = values - values.mean()
    total, weights = 0.0, 0.0
    for i in range(n):
        far = np.hypot(*(xy - xy[i]).T)
        far[i] = np.inf
        for j in np.argsort(far)[:k]:
            total += z[i] * z[j] / k
            weights += 1 / k
    return n / weights * total / (z**2).sum()


@pytest.mark.parametrize("k", [4, 6])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_morans_i_against_the_formula(k, form):
    xy, rng = grid(), np.random.default_rng(1)
    values = np.column_stack([rng.random(100), np.sin(xy[:, 0] / 200), rng.poisson(0.3, 100)]).astype(np.float32)
    found = morans_i(form(values), xy, n_neighbours=k)
    assert found == pytest.approx([moran_by_hand(v.astype(float), xy, k) for v in values.T], abs=1e-5)


def test_morans_i_of_known_patterns():
    side = np.arange(12)
    xy = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2).astype(float)
    checkers, halves = xy.sum(1) % 2, (xy[:, 0] < 6).astype(float)
    found = morans_i(np.column_stack([checkers, halves, np.full(144, 2.3)]).astype(np.float32), xy, n_neighbours=4)
    assert found[0] < -0.8
    assert found[1] > 0.85
    assert found[2] == 0  # not NaN


def test_morans_i_of_many_genes():
    """More than one part's worth of columns, each in its place."""
    xy, rng = grid(), np.random.default_rng(0)
    values = rng.random((100, 1100)).astype(np.float32)
    found = morans_i(values, xy)
    for gene in (0, 511, 512, 1023, 1024, 1099):
        assert found[gene] == pytest.approx(moran_by_hand(values[:, gene].astype(float), xy, 6), abs=1e-5)
