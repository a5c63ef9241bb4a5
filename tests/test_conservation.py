"""Noise and spread against simulated counts of known rates; conservation for any bins, spots and targets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from histosge._statistics import conserve, fade, log_variance, noise_variance, shrinkage

properties = settings(deadline=None, max_examples=25)
PITCH, RADIUS = 100.0, 27.5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def simulate(n, *, g, depth, spread, rng):
    """Rates (n, g) that vary by ``spread`` on the log scale around a mean of each gene's own, and Poisson counts."""
    mean = np.exp(rng.normal(0, 1.5, g)) * np.exp(spread * rng.standard_normal((n, g)))
    size = rng.lognormal(np.log(depth), 0.35, n)
    rate = mean / mean.sum(1, keepdims=True) * size[:, None]
    return rate, rng.poisson(rate), size


def section(seed, *, n_side=4, bin_um=20.0, g=3):
    """Spots on a square array, square bins all over it, their shares in the discs (by centre), and rates."""
    rng = np.random.default_rng(seed)
    spots = PITCH * np.stack(np.meshgrid(*[np.arange(n_side)] * 2), -1).reshape(-1, 2) + rng.uniform(-5, 5, 2)
    side = np.arange(-PITCH, n_side * PITCH, bin_um)
    bins = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    distance = np.linalg.norm(spots[:, None] - bins, axis=2)
    share = (distance <= RADIUS).astype(float)
    share = sparse.csr_matrix(share / share.sum(1, keepdims=True))
    return bins, spots, share, distance, rng.lognormal(0, 1, (len(bins), g)), rng


# ------------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("rate", [0.05, 0.7, 6.0, 19.9, 20.1, 300.0])
def test_log_variance_is_that_of_poisson_counts(rate):
    k = np.arange(2000)
    chance, value = stats.poisson.pmf(k, rate), np.log1p(2.5 * k)
    exact = chance @ value**2 - (chance @ value) ** 2
    found = log_variance(np.array([[rate]]), scale=np.array([[2.5]]))
    assert found[0, 0] == pytest.approx(exact, rel=1e-9 if rate < 20 else 0.01)


@pytest.mark.parametrize(("depth", "spread"), [(2000, 0.0), (2000, 0.8), (15000, 0.3), (15000, 0.8)])
def test_noise_variance_is_found_from_the_counts(depth, spread, rng):
    rate, counts, size = simulate(400, g=200, depth=depth, spread=spread, rng=rng)
    found = noise_variance(sparse.csr_matrix(counts), total=size)
    true = log_variance(rate, scale=(1e4 / size)[:, None])
    assert found.mean() == pytest.approx(true.mean(), rel=0.1)
    assert np.median(np.abs(found.mean(0) / true.mean(0) - 1)) < 0.1
    repeats = np.log1p(rng.poisson(rate[:20], (400, 20, 200)) * (1e4 / size[:20])[:, None])
    assert repeats.var(0).mean() == pytest.approx(true[:20].mean(), rel=0.02)


def test_more_counts_have_less_noise_and_unseen_genes_none(rng):
    _, counts, _ = simulate(300, g=50, depth=2000, spread=0.3, rng=rng)
    counts[:, 7] = 0
    shallow = noise_variance(sparse.csr_matrix(counts))
    deep = noise_variance(sparse.csr_matrix(counts * 20))
    assert deep.mean() < 0.4 * shallow.mean()
    assert (shallow[:, 7] == 0).all()
    assert (np.delete(shallow, 7, axis=1) > 0).all()


def test_noise_variance_in_parts_is_the_same(rng):
    _, counts, size = simulate(60, g=30, depth=2000, spread=0.3, rng=rng)
    whole = noise_variance(sparse.csr_matrix(counts), total=size)
    parts = noise_variance(sparse.csr_matrix(counts), total=size, cells_at_once=200)
    np.testing.assert_allclose(parts, whole)


def test_noise_variance_needs_counts():
    with pytest.raises(ValueError, match="1 of 2 spots have no counts. Leave them out"):
        noise_variance(sparse.csr_matrix([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="Pass raw counts"):
        noise_variance(sparse.csr_matrix([[1.0, -2.0], [1.0, 0.0]]))


# -------------------------------------------------------------------------------------------------- shrinkage


def test_spread_and_weight_are_those_of_the_simulation(rng):
    n, tau2 = 4000, np.array([0.0, 0.1, 0.5])
    noise = rng.uniform(0.1, 0.4, (n, 3))
    predicted = 3 + rng.random((n, 3))
    truth = predicted + np.sqrt(tau2) * rng.standard_normal((n, 3))
    measured = truth + np.sqrt(noise) * rng.standard_normal((n, 3))
    found = shrinkage(measured, predicted, noise=noise)
    np.testing.assert_allclose(found.tau2, tau2, atol=0.03)
    np.testing.assert_allclose(found.weight, tau2 / (tau2 + noise), atol=0.1)
    error = ((found.mean - truth) ** 2).mean(0)
    np.testing.assert_allclose(error, (tau2 * noise / (tau2 + noise)).mean(0), rtol=0.1, atol=2e-3)
    for other in (measured, predicted):
        assert (error <= ((other - truth) ** 2).mean(0) + 2e-3).all()


def test_shrinkage_brings_poisson_counts_nearer_to_their_rates(rng):
    rate, counts, size = simulate(400, g=100, depth=4000, spread=0.4, rng=rng)
    truth, measured = (np.log1p(1e4 * v / size[:, None]) for v in (rate, counts))
    predicted = np.broadcast_to(measured.mean(0), measured.shape)
    found = shrinkage(measured, predicted, noise=noise_variance(sparse.csr_matrix(counts), total=size))
    assert found.tau2.mean() == pytest.approx(truth.var(0).mean(), rel=0.2)
    error = [((v - truth) ** 2).mean() for v in (found.mean, measured, predicted)]
    assert error[0] < 0.8 * min(error[1:])


def test_noise_alone_keeps_the_prediction_and_no_noise_the_measurement():
    measured, predicted = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [2.0], [2.0]])
    np.testing.assert_array_equal(shrinkage(measured, predicted, noise=np.full((3, 1), 9.0)).mean, predicted)
    np.testing.assert_array_equal(shrinkage(measured, predicted, noise=np.zeros((3, 1))).mean, measured)
    same = shrinkage(predicted, predicted, noise=np.zeros((3, 1)))  # nothing varies at all: no division by 0
    np.testing.assert_array_equal(same.mean, predicted)


def test_shrinkage_refuses_what_does_not_belong_together():
    one = np.ones((3, 2))
    with pytest.raises(ValueError, match="do not fit together"):
        shrinkage(one, one[:2], noise=one)
    with pytest.raises(ValueError, match="measured holds values that are not finite"):
        shrinkage(one * np.nan, one, noise=one)
    with pytest.raises(ValueError, match="noise holds values that are not finite, or variances below 0"):
        shrinkage(one, one, noise=-one)


# ----------------------------------------------------------------------------------------------- conservation


@given(seed=st.integers(0, 10_000), bin_um=st.floats(8, 25), scale=st.just(0.0) | st.floats(1e-6, 1e4))
@properties
def test_spots_get_their_target_and_far_bins_stay(seed, bin_um, scale):
    bins, spots, share, distance, rates, rng = section(seed, bin_um=bin_um)
    target = scale * rng.lognormal(0, 2, (len(spots), rates.shape[1])) * rng.integers(0, 2, (len(spots), 1))
    window = fade(bins, spots, inner_um=RADIUS + bin_um, outer_um=max(PITCH / 2, RADIUS + bin_um))
    found = conserve(rates, coverage=share, target=target, window=window)
    np.testing.assert_allclose(share @ found, target, rtol=1e-5)
    assert (found >= 0).all()
    assert np.isfinite(found).all()
    far = distance.min(0) > max(PITCH / 2, RADIUS + bin_um)
    assert far.any()
    np.testing.assert_array_equal(found[far], rates[far])


@given(seed=st.integers(0, 10_000))
@properties
def test_within_a_disc_all_bins_have_the_same_factor(seed):
    bins, spots, share, distance, rates, rng = section(seed)
    target = rng.lognormal(0, 1, (len(spots), rates.shape[1]))
    target = np.minimum(target, 40 * (share @ rates))  # bins of less than a fiftieth are lifted before they are scaled
    window = fade(bins, spots, inner_um=RADIUS, outer_um=PITCH / 2)
    found = conserve(rates, coverage=share, target=target, window=window)
    spot, inside = distance.argmin(0), distance.min(0) <= RADIUS
    np.testing.assert_allclose((found / rates)[inside], (target / (share @ rates))[spot[inside]], rtol=1e-5)
    between = (found / rates - 1)[~inside] / (target / (share @ rates) - 1)[spot[~inside]]
    assert (between > -1e-5).all()
    assert (between < 1 + 1e-5).all()


def test_what_agrees_already_is_not_touched():
    bins, spots, share, _, rates, _ = section(0)
    window = fade(bins, spots, inner_um=RADIUS, outer_um=PITCH / 2)
    np.testing.assert_array_equal(conserve(rates, coverage=share, target=share @ rates, window=window), rates)


def test_bins_of_two_spots_serve_both():
    share = sparse.csr_matrix([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]])
    window = sparse.csr_matrix([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    target = np.array([[2.0], [0.8]])
    found = conserve(np.ones((3, 1)), coverage=share, target=target, window=window)
    np.testing.assert_allclose(share @ found, target, rtol=1e-5)


def test_a_spot_where_nothing_was_predicted_is_filled():
    share, window = sparse.csr_matrix([[0.5, 0.5, 0.0]]), sparse.csr_matrix([[1.0], [1.0], [0.0]])
    found = conserve(np.zeros((3, 1)), coverage=share, target=np.array([[4.0]]), window=window)
    np.testing.assert_allclose(found[:, 0], [4.0, 4.0, 0.0], rtol=1e-5)


def test_a_spot_without_bins_asks_for_nothing():
    share, window = sparse.csr_matrix([[1.0], [0.0]]), sparse.csr_matrix([[1.0, 0.0]])
    found = conserve(np.ones((1, 1)), coverage=share, target=np.array([[3.0], [9.0]]), window=window)
    np.testing.assert_allclose(found, 3.0, rtol=1e-5)


def test_the_window_is_1_inside_and_0_half_way():
    places = np.array([[0.0, 0.0], [27.5, 0.0], [38.75, 0.0], [50.0, 0.0], [500.0, 0.0]])
    found = fade(places, np.array([[0.0, 0.0], [0.0, 100.0]]), inner_um=27.5, outer_um=50.0)
    np.testing.assert_allclose(found.toarray()[:, 0], [1, 1, 0.5, 0, 0], atol=1e-12)
    assert found.nnz == 3
    edge = fade(places, places[:1], inner_um=27.5, outer_um=27.5)  # spots that touch: no room to fade in
    np.testing.assert_array_equal(edge.toarray()[:, 0], [1, 1, 0, 0, 0])


def test_errors_of_conservation():
    one = np.ones((2, 1))
    share, window = sparse.csr_matrix([[0.5, 0.5]]), sparse.csr_matrix(one)
    with pytest.raises(ValueError, match="do not fit together"):
        conserve(one, coverage=share, target=one, window=window)
    with pytest.raises(ValueError, match="bins holds values below 0, NaN or infinite. Pass rates"):
        conserve(-one, coverage=share, target=one[:1], window=window)
    with pytest.raises(ValueError, match="target holds values below 0, NaN or infinite"):
        conserve(one, coverage=share, target=one[:1] * np.nan, window=window)
    with pytest.raises(ValueError, match="rows must sum to 1"):
        conserve(one, coverage=share * 2, target=one[:1], window=window)
    with pytest.raises(ValueError, match=r"at most 1 in a bin, but a sum is 2"):
        conserve(one, coverage=share, target=one[:1], window=window * 2)
    with pytest.raises(ValueError, match="1 spots cannot reach their target .for example row 0.*Use smaller bins"):
        conserve(one, coverage=share, target=one[:1] * 3, window=window * 0)
    with pytest.raises(ValueError, match="inner_um=60, outer_um=50: pass 0 < inner_um <= outer_um"):
        fade(one, one, inner_um=60, outer_um=50)
