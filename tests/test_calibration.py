"""Prediction intervals against MAPIE, conformal prediction by hand, and simulated errors of known spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.conformity_scores import ResidualNormalisedScore
from mapie.regression import SplitConformalRegressor
from safetensors.numpy import load, save
from scipy import optimize, stats
from sklearn.base import BaseEstimator, RegressorMixin
from tests import rounding

from histosge._statistics import (
    FLOOR,
    LEVELS,
    PredictionIntervals,
    calibrate,
    empirical_coverage,
    interval_around,
    neighbour_average,
)

properties = settings(deadline=None, max_examples=25)


def simulate(n, *, g, rng, intercept=0.4, slope=0.6):
    """Predictions far above 0, so that no measurement is cut off, and normal errors whose variance is a line in them."""
    predicted = 4 + 4 * rng.random((n, g))
    variance = intercept + slope * (predicted - 4)
    measured = predicted + np.sqrt(variance) * rng.standard_normal((n, g))
    return predicted.astype(np.float32), measured.astype(np.float32)


def folds(n, k=5):
    return np.arange(n) % k


def quantile(found, level):
    """Standard deviations that an interval reaches to either side, (g,)."""
    return found.at(level)[4]


def scores_by_hand(predicted, measured, fold):
    """Errors in standard deviations as a line through the squared errors of the other folds has them, one gene at a time."""
    predicted, error = np.maximum(predicted, 0).astype(float), np.abs(measured - np.maximum(predicted, 0)).astype(float)
    scores = np.empty_like(error)
    for gene in range(error.shape[1]):
        for one in np.unique(fold):
            inside, other = fold == one, fold != one
            slope, intercept = np.polyfit(predicted[other, gene], error[other, gene] ** 2, 1)
            least = FLOOR * (error[other, gene] ** 2).mean()
            variance = np.maximum(intercept + slope * predicted[inside, gene], least)
            scores[inside, gene] = error[inside, gene] / np.sqrt(variance)
    return scores


# --------------------------------------------------------------------------------------------------- the oracle


class Known(RegressorMixin, BaseEstimator):
    """Predicts what a column of its input says: MAPIE wants an estimator."""

    def __init__(self, column=0):
        self.column = column
        self.is_fitted = True  # the attribute that MAPIE looks for

    def fit(self, X, y=None):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def predict(self, X):
        return np.asarray(X)[:, self.column]


def mapie_half_width(predicted, scale, measured, *, level, at, at_scale):
    """Split conformal prediction with absolute errors, in units of ``scale`` if there is one."""
    score = ResidualNormalisedScore(residual_estimator=Known(1), prefit=True, sym=True) if scale is not None else None
    both = np.column_stack([predicted, np.ones_like(predicted) if scale is None else scale])
    regressor = SplitConformalRegressor(
        Known(0), confidence_level=level, prefit=True, conformity_score=score if score is not None else "absolute"
    )
    new = np.column_stack([at, np.ones_like(at) if at_scale is None else at_scale])
    centre, interval = regressor.conformalize(both, measured).predict_interval(new)
    return interval[:, 1, 0] - centre


levels = st.sampled_from([0.5, 0.6, 0.75, 0.8, 0.9, 0.95])


@properties
@given(st.integers(10, 60), levels, st.integers(0, 99))
def test_constant_predictions_get_the_intervals_of_mapie(m, level, seed):
    """A constant prediction has one standard deviation; all folds hold the same errors, so that they agree on it."""
    rng = np.random.default_rng(seed)
    error = rng.standard_normal(m)
    predicted, measured = np.full((2 * m, 1), 9.0), 9 + np.tile(error, 2)[:, None]
    fold = np.repeat([0, 1], m)
    found = calibrate(predicted, measured, fold=fold)
    lower, upper = found.interval(predicted[:3], level=level)
    want = mapie_half_width(predicted[:, 0], None, measured[:, 0], level=level, at=np.full(3, 9.0), at_scale=None)
    assert (upper - 9)[:, 0] == pytest.approx(want, rel=1e-5)
    assert (9 - lower)[:, 0] == pytest.approx(want, rel=1e-5)


@properties
@given(st.integers(15, 60), levels, st.integers(0, 99))
def test_normalised_intervals_are_those_of_mapie(m, level, seed):
    """The same spots in both folds, which then fit the same standard deviation as both together."""
    rng = np.random.default_rng(seed)
    predicted, measured = simulate(m, g=1, rng=rng)
    predicted, measured = np.tile(predicted, (2, 1)).astype(float), np.tile(measured, (2, 1)).astype(float)
    intervals = calibrate(predicted, measured, fold=np.repeat([0, 1], m))
    scale = intervals.sd(predicted)[:, 0].astype(float)
    at = np.linspace(4, 8, 7)
    at_scale = intervals.sd(at[:, None])[:, 0].astype(float)
    want = mapie_half_width(predicted[:, 0], scale, measured[:, 0], level=level, at=at, at_scale=at_scale)
    found = (intervals.interval(at[:, None], level=level)[1][:, 0] - at).astype(float)
    assert found == pytest.approx(np.minimum(want, np.abs(measured - predicted).max()), rel=1e-4)


@pytest.mark.parametrize(
    ("n", "level", "rank"), [(9, 0.9, 9), (10, 0.9, 10), (19, 0.95, 19), (99, 0.55, 55), (100, 0.9, 91), (30, 0.5, 16)]
)
def test_the_quantile_is_the_one_of_finite_samples(n, level, rank):
    """Errors 1, 2, ..., n around a constant: the interval reaches to the error of that rank in units of its fold."""
    error, fold = np.random.default_rng(n).permutation(n) + 1.0, folds(n, 3)
    predicted = np.full((n, 1), 9.0)
    found = calibrate(predicted, predicted + error[:, None], fold=fold)
    unit = np.array([np.sqrt((error[fold != one] ** 2).mean()) for one in fold])
    assert quantile(found, level) == pytest.approx(np.sort(error / unit)[rank - 1], rel=1e-5)


def test_all_levels_are_quantiles_of_scores_that_a_fold_has_no_part_in():
    """Of 99 spots the whole per cents are the scores themselves, smallest first: their unit comes from the other folds."""
    predicted, measured = simulate(99, g=4, rng=np.random.default_rng(0))
    found = calibrate(predicted, measured, fold=folds(99))
    wanted = np.sort(scores_by_hand(predicted, measured, folds(99)), axis=0)
    assert found.n_spots == 99
    for rank in range(1, 100):
        np.testing.assert_allclose(quantile(found, rank / 100), wanted[rank - 1], rtol=1e-5)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95, 0.995])
def test_sd_and_both_ends_by_the_formula(level):
    """The rank ``ceil((n + 1) * level)`` of the scores, the line of all errors, never beyond the largest of these."""
    predicted, measured = simulate(250, g=5, rng=np.random.default_rng(3))
    at = np.linspace(0, 9, 60, dtype=np.float32)[:, None] * np.ones(5, np.float32)
    sd, lower, upper = interval_around(at, calibrate(predicted, measured, fold=folds(250)).at(level))
    rank = min(math.ceil(251 * level - 1e-9), 250)
    reach = np.sort(scores_by_hand(predicted, measured, folds(250)), axis=0)[rank - 1]
    error = np.abs(measured - predicted).astype(float)
    lines = [np.polyfit(p, e**2, 1) for p, e in zip(predicted.T.astype(float), error.T, strict=True)]
    line = np.array([np.polyval(one, at[:, 0].astype(float)) for one in lines]).T
    wanted = np.sqrt(np.maximum(line, FLOOR * (error**2).mean(0)))
    half = np.minimum(wanted * reach, error.max(0))
    np.testing.assert_allclose(sd, wanted, rtol=2e-5)
    np.testing.assert_allclose(upper, at + half, rtol=2e-5)
    np.testing.assert_allclose(lower, np.maximum(at - half, 0), rtol=2e-5, atol=2e-4)


# ---------------------------------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_intervals_hold_their_level_on_errors_of_unequal_spread(level):
    rng = np.random.default_rng(0)
    n, m, g = 1500, 1500, 60
    intervals = calibrate(*simulate(n, g=g, rng=rng), fold=folds(n))
    predicted, measured = simulate(m, g=g, rng=rng)
    found = empirical_coverage(measured, *intervals.interval(predicted, level=level))
    one = math.sqrt(level * (1 - level) * (1 / n + 1 / m))
    assert abs(found.mean() - level) < 4 * one / math.sqrt(g)
    assert np.abs(found - level).max() < 4.5 * one


def test_intervals_hold_their_level_where_little_and_where_much_is_predicted():
    rng = np.random.default_rng(1)
    intervals = calibrate(*simulate(1500, g=60, rng=rng), fold=folds(1500))
    predicted, measured = simulate(3000, g=60, rng=rng)
    lower, upper = intervals.interval(predicted)
    inside = (lower <= measured) & (measured <= upper)
    for low in (4, 5, 6, 7):
        there = (low <= predicted) & (predicted < low + 1)
        assert inside[there].mean() == pytest.approx(0.9, abs=0.015)
    # intervals of equal width do not: they are too wide below and too narrow above
    equal = np.quantile(np.abs(measured - predicted), 0.9)
    assert (np.abs(measured - predicted) <= equal)[predicted < 5].mean() > 0.96
    assert (np.abs(measured - predicted) <= equal)[predicted > 7].mean() < 0.84


def test_counts_with_many_zeros_are_held_too():
    """log1p of Poisson counts: most are 0, and the lower end stands on it."""
    rng = np.random.default_rng(2)
    mean = rng.gamma(0.5, 1.0, (4000, 40))
    measured = np.log1p(rng.poisson(mean)).astype(np.float32)
    predicted = (np.log1p(mean) * 0.8).astype(np.float32)
    assert (measured == 0).mean() > 0.5
    intervals = calibrate(predicted[:2000], measured[:2000], fold=folds(2000))
    lower, upper = intervals.interval(predicted[2000:])
    found = empirical_coverage(measured[2000:], lower, upper)
    assert lower.min() == 0
    assert found.mean() == pytest.approx(0.9, abs=0.01)


def test_few_spots_still_hold_their_level():
    rng = np.random.default_rng(3)
    predicted, measured = simulate(30, g=2000, rng=rng)
    intervals = calibrate(predicted, measured, fold=folds(30))
    predicted, measured = simulate(200, g=2000, rng=rng)
    assert empirical_coverage(measured, *intervals.interval(predicted)).mean() == pytest.approx(0.9, abs=0.02)


# ------------------------------------------------------------------------------------------------------- spread


@pytest.mark.parametrize(("intercept", "slope"), [(0.2, 0.4), (1.8, -0.3), (0.5, 0.0)])
def test_the_known_spread_is_found(intercept, slope):
    """Also one that falls, as that of strong genes does after the logarithm."""
    rng = np.random.default_rng(0)
    intervals = calibrate(*simulate(4000, g=30, rng=rng, intercept=intercept, slope=slope), fold=folds(4000))
    assert intervals.at(0.9)[1].mean() == pytest.approx(slope, abs=0.02)
    at = np.broadcast_to(np.array([[4.5], [6.0], [7.5]], np.float32), (3, 30))
    want = np.sqrt(intercept + slope * (at - 4))
    assert intervals.sd(at).mean(1) == pytest.approx(want[:, 0], rel=0.03)
    assert np.abs(intervals.sd(at) / want - 1).max() < 0.2


def test_the_line_is_the_one_of_numpy():
    rng = np.random.default_rng(0)
    predicted, error = rng.random((50, 4)), rng.random((50, 4))
    intercept, slope, floor, largest = calibrate(predicted, predicted + error, fold=folds(50)).at(0.9)[:4]
    for gene in range(4):
        want = np.polyfit(predicted[:, gene], error[:, gene] ** 2, 1)
        assert [slope[gene], intercept[gene]] == pytest.approx(want, rel=1e-5)
        assert floor[gene] == pytest.approx(FLOOR * (error[:, gene] ** 2).mean(), rel=1e-5)
        assert largest[gene] == pytest.approx(error[:, gene].max(), rel=1e-5)


@pytest.mark.parametrize("value", [0.1, 2.3, 1e3 / 3])
def test_a_constant_prediction_has_no_slope(value):
    """Not even one made of rounding: the mean of a constant need not be that constant."""
    error = np.random.default_rng(0).random((41, 1))
    intercept, slope = calibrate(np.full((41, 1), value), value + error, fold=folds(41)).at(0.9)[:2]
    assert slope[0] == pytest.approx(0, abs=1e-9)
    assert intercept[0] == pytest.approx((error**2).mean(), rel=1e-5)


def test_the_variance_never_goes_below_its_floor():
    rng = np.random.default_rng(0)
    intervals = calibrate(*simulate(500, g=3, rng=rng, intercept=1.7, slope=-0.4), fold=folds(500))
    _, slope, floor = intervals.at(0.9)[:3]
    assert (slope < 0).all()
    assert intervals.sd(np.full((1, 3), 50.0))[0] == pytest.approx(np.sqrt(floor))


def test_intervals_are_narrower_than_equal_ones():
    """By as much as those who know the variance can make them."""
    rng = np.random.default_rng(0)
    predicted, measured = simulate(2000, g=40, rng=rng)
    intervals = calibrate(predicted, measured, fold=folds(2000))
    lower, upper = intervals.interval(predicted)
    equal = 2 * np.quantile(np.abs(measured - predicted), 0.9, axis=0)
    narrower = (upper - lower).mean(0) / equal
    sd = np.sqrt(np.linspace(0.4, 2.8, 2001))
    best = 2 * stats.norm.ppf(0.95) * sd.mean()
    best_equal = 2 * optimize.brentq(lambda h: (2 * stats.norm.cdf(h / sd) - 1).mean() - 0.9, 0.1, 9)
    assert best / best_equal < 0.98
    assert narrower.mean() == pytest.approx(best / best_equal, abs=0.006)


def test_no_interval_reaches_beyond_the_largest_error_seen():
    """A gene of one region, and folds that are regions: the others' errors say nothing of it."""
    rng = np.random.default_rng(0)
    fold = np.repeat(np.arange(5), 40)
    measured = 1e-3 * rng.random((200, 1))
    measured[:40] = 2 + rng.random((40, 1))
    predicted = np.full((200, 1), 0.01)
    predicted[::2] = 0.0
    intervals = calibrate(predicted, measured, fold=fold)
    assert quantile(intervals, 0.9)[0] > 100
    assert intervals.interval(predicted)[1].max() <= measured.max() + 0.01
    assert np.isfinite(intervals.interval(np.full((1, 1), 1e3))).all()


# -------------------------------------------------------------------------------------------------- no cheating


def test_genes_do_not_see_each_other():
    """Nor do the runs of genes that are calibrated at a time."""
    rng = np.random.default_rng(0)
    predicted, measured = simulate(60, g=1200, rng=rng)
    order = rng.permutation(1200)
    whole = calibrate(predicted, measured, fold=folds(60))
    other = calibrate(predicted[:, order], measured[:, order], fold=folds(60))
    assert len(np.unique(quantile(whole, 0.9))) > 1190
    # the same float64 sums over spots, perhaps in another order, stored as float32: they may round to its neighbour
    off = rounding.of_sum(60, dtype=np.float64) + np.finfo(np.float32).eps
    np.testing.assert_allclose(other.numbers, whole.take(order).numbers, rtol=off, atol=off)


def test_spots_may_come_in_any_order():
    rng = np.random.default_rng(0)
    predicted, measured = simulate(200, g=5, rng=rng)
    order, fold = rng.permutation(200), folds(200)
    one = calibrate(predicted, measured, fold=fold).to_arrays()
    other = calibrate(predicted[order], measured[order], fold=fold[order]).to_arrays()
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5)


# --------------------------------------------------------------------------------------------------- odd genes


@pytest.mark.parametrize("value", [0.0, 2.3])
def test_a_constant_gene_gets_intervals_of_no_width(value):
    rng = np.random.default_rng(0)
    predicted, measured = simulate(100, g=3, rng=rng)
    predicted[:, 1] = measured[:, 1] = value
    intervals = calibrate(predicted, measured, fold=folds(100))
    lower, upper = intervals.interval(predicted)
    assert (upper[:, 1] == lower[:, 1]).all()
    assert (intervals.sd(predicted)[:, 1] == 0).all()
    assert (upper[:, [0, 2]] > lower[:, [0, 2]]).all()
    assert all(np.isfinite(array).all() for array in intervals.to_arrays().values())
    assert empirical_coverage(measured, lower, upper)[1] == 1


def test_a_gene_seen_in_one_fold_only_gets_finite_intervals():
    measured = np.zeros((100, 1), np.float32)
    measured[:20] = 1
    intervals = calibrate(np.zeros_like(measured), measured, fold=np.repeat(np.arange(5), 20))
    assert np.isfinite(intervals.numbers).all()
    assert np.array(intervals.interval(np.zeros((2, 1)))).ravel() == pytest.approx([0, 0, 1, 1])


def test_intervals_are_never_below_zero_and_always_around_the_prediction():
    rng = np.random.default_rng(0)
    predicted, measured = rng.random((200, 8)) - 0.5, rng.random((200, 8))
    intervals = calibrate(predicted, measured, fold=folds(200))
    at = np.linspace(-3, 9, 40)[:, None] * np.ones(8)
    lower, upper = intervals.interval(at)
    assert lower.dtype == upper.dtype == intervals.sd(at).dtype == np.float32
    assert lower.shape == (40, 8)
    assert (lower >= 0).all()
    assert (lower <= np.maximum(at, 0) + 1e-6).all()
    assert (upper >= np.maximum(at, 0) - 1e-6).all()
    assert intervals.interval(at[:1])[1] == pytest.approx(
        intervals.interval(np.zeros((1, 8)))[1]
    )  # below 0 there is nothing


def test_predictions_below_zero_count_as_zero():
    rng = np.random.default_rng(0)
    predicted, measured = rng.random((200, 8)) - 0.5, rng.random((200, 8))
    below = calibrate(predicted, measured, fold=folds(200)).to_arrays()
    cut = calibrate(np.maximum(predicted, 0), measured, fold=folds(200)).to_arrays()
    assert all((below[name] == cut[name]).all() for name in cut)
    intervals = PredictionIntervals.from_arrays(cut)
    np.testing.assert_array_equal(intervals.sd(np.full((2, 8), -3.0)), intervals.sd(np.zeros((2, 8))))


# ------------------------------------------------------------------------------------------------------ the rest


def test_intervals_survive_being_saved():
    rng = np.random.default_rng(0)
    predicted, measured = simulate(60, g=5, rng=rng)
    intervals = calibrate(predicted, measured, fold=folds(60))
    again = PredictionIntervals.from_arrays(load(save(intervals.to_arrays())))
    assert (again.n_spots, again.columns) == (60, intervals.columns)
    for level in (0.8, 0.9):
        for one, other in zip(
            intervals.interval(predicted, level=level), again.interval(predicted, level=level), strict=True
        ):
            assert (one == other).all()


def test_too_few_spots_for_the_level_are_told_once(log):
    rng = np.random.default_rng(0)
    predicted, measured = simulate(30, g=1200, rng=rng)
    intervals = calibrate(predicted, measured, fold=folds(30))
    assert log.records == []  # 0.9 may be all that is asked for
    assert intervals.choose_level(0.99) == 0.99
    assert [r.getMessage() for r in log.records] == [
        "30 spots are too few for prediction intervals at level 0.99, which needs 99: the intervals reach to the largest "
        "error"
    ]
    scores = scores_by_hand(predicted[:, :50], measured[:, :50], folds(30))
    assert quantile(intervals, 0.99)[:50] == pytest.approx(scores.max(0), rel=1e-5)


@pytest.mark.parametrize(("level", "needed"), [(0.9, 9), (0.95, 19), (0.99, 99)])
def test_as_many_spots_are_asked_for_as_will_do(log, level, needed):
    for n in (needed - 1, needed):
        calibrate(*simulate(n, g=2, rng=np.random.default_rng(0)), fold=folds(n)).choose_level(level)
    assert [r.args for r in log.records] == [(needed - 1, level, needed)]


@pytest.mark.parametrize(("n", "level"), [(30, 0.9), (9, 0.9), (99, 0.99), (19, 0.95)])
def test_enough_spots_for_the_level_are_not_told(log, n, level):
    rng = np.random.default_rng(0)
    calibrate(*simulate(n, g=2, rng=rng), fold=folds(n)).choose_level(level)
    assert log.records == []


@pytest.mark.parametrize(
    ("level", "used"),
    [(0.9, 0.9), (np.float32(0.9), 0.9), (0.001, 0.01), (0.123, 0.13), (0.991, 0.995), (0.998, 0.999)],
)
def test_between_levels_the_next_higher_one_is_used(log, level, used):
    intervals = calibrate(*simulate(1200, g=2, rng=np.random.default_rng(0)), fold=folds(1200))
    assert intervals.choose_level(level) == used
    assert [r.getMessage() for r in log.records] == (
        [] if abs(level - used) < 1e-6 else [f"level {level:g}: using {used:g}, the next level of the grid"]
    )
    assert (intervals.at(level) == intervals.at(used)).all()
    assert used in LEVELS


def test_a_level_above_the_highest_that_is_kept_is_refused():
    intervals = calibrate(*simulate(50, g=2, rng=np.random.default_rng(0)), fold=folds(50))
    with pytest.raises(ValueError, match=r"level=0\.9999: the highest level is 0\.999\. Choose that"):
        intervals.choose_level(0.9999)


@pytest.mark.parametrize("level", [0, 1, -0.1, 90, float("nan"), "0.9", True, None])
def test_a_level_that_is_no_share_is_refused(level):
    intervals = calibrate(np.ones((10, 2)), np.ones((10, 2)), fold=folds(10))
    with pytest.raises(ValueError, match=rf"level={level!r} is not a share.*between 0 and 1, such as 0\.9"):
        intervals.choose_level(level)


@pytest.mark.parametrize(
    ("predicted", "measured", "n_folds"), [((10, 2), (10, 3), 10), ((10, 2), (10, 2), 9), ((10,), (10,), 10)]
)
def test_arrays_that_do_not_belong_together_are_refused(predicted, measured, n_folds):
    with pytest.raises(ValueError, match=r"held_out \(10.*measured \(10.*and fold .* Pass \(n, g\), \(n, g\) and"):
        calibrate(np.ones(predicted), np.ones(measured), fold=folds(n_folds))


def test_one_fold_is_refused():
    with pytest.raises(ValueError, match=r"fold holds 1 fold\(s\).*Pass at least 2"):
        calibrate(np.ones((10, 2)), np.ones((10, 2)), fold=np.zeros(10, int))


@pytest.mark.parametrize("name", ["held_out", "measured"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(name, value):
    given = {"held_out": np.ones((10, 2)), "measured": np.ones((10, 2))}
    given[name][3, 1] = value
    with pytest.raises(ValueError, match=rf"{name} holds 1 value\(s\) that are not finite.*Leave"):
        calibrate(given["held_out"], given["measured"], fold=folds(10))


def test_coverage_by_hand():
    measured = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    lower, upper = np.full((4, 2), 2.0), np.full((4, 2), 5.0)
    assert empirical_coverage(measured, lower, upper).tolist() == [0.5, 0.5]
    assert empirical_coverage(measured, measured, measured).tolist() == [1, 1]  # ends belong to the intervals


# ------------------------------------------------------------------------------------------- average of neighbours


@properties
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_average_of_neighbours_by_hand(n, k, seed):
    rng = np.random.default_rng(seed)
    xy, values = rng.random((n, 2)), rng.random((n, 3)).astype(np.float32)
    near = [np.hypot(*(xy - spot).T).argsort()[:k] for spot in xy]
    wanted = np.stack([values[i].mean(0) for i in near])
    assert neighbour_average(values, xy=xy, k=k) == pytest.approx(wanted, abs=rounding.of_sum(k))


def test_average_over_one_spot_changes_nothing():
    values = np.random.default_rng(0).random((20, 3)).astype(np.float32)
    assert (neighbour_average(values, xy=np.zeros((20, 2)), k=1) == values).all()


def test_averages_of_independent_errors_are_covered_more_often_and_shared_ones_are_not():
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(30.0), np.arange(30.0)), -1).reshape(-1, 2) + 0.1 * rng.random((900, 2))
    predicted, alone = np.full((900, 20), 9.0), rng.standard_normal((900, 20))
    shared = np.broadcast_to(rng.standard_normal((1, 3000)), (900, 3000))  # one error for the whole section
    intervals = calibrate(predicted, predicted + alone, fold=folds(900))

    def averaged(measured, k):
        lower, upper = intervals.interval(np.full_like(measured[:, :20], 9.0))
        wide = [np.tile(a, (1, measured.shape[1] // 20)) for a in (lower, upper)]
        return empirical_coverage(*[neighbour_average(a, xy=xy, k=k) for a in (measured, *wide)]).mean()

    independent = [averaged(predicted + alone, k) for k in (1, 2, 4)]
    assert independent[0] == pytest.approx(0.9, abs=0.005)
    assert independent[1] == pytest.approx(0.98, abs=0.01)  # 1.645 * sqrt(2) standard deviations
    assert independent[2] > 0.995
    assert averaged(9.0 + shared, 8) == pytest.approx(averaged(9.0 + shared, 1), abs=1e-3)


@pytest.mark.parametrize("k", [0, -2])
def test_an_average_over_nothing_is_refused(k):
    with pytest.raises(ValueError, match=rf"k={k} spots cannot be averaged\. Pass k=1"):
        neighbour_average(np.ones((5, 2)), xy=np.zeros((5, 2)), k=k)


@pytest.mark.parametrize("n_genes", [0, 1, 7, 70_000])
def test_intervals_in_one_pass_are_those_of_the_formula(n_genes):
    """Whatever the number of rows that are taken at a time: all, some, or one."""
    rng = np.random.default_rng(0)
    values = rng.random((5, n_genes), np.float32) * [[1], [1], [0.25], [1], [2]] - [[0], [0.5], [0], [0], [0]]
    numbers = np.float32(values)
    intercept, slope, floor, largest, reach = numbers
    predicted = rng.normal(0.5, 1, (9 if n_genes > 7 else 70_000, n_genes)).astype(np.float32)
    kept = predicted.copy()
    sd, lower, upper = interval_around(predicted, numbers)
    centre = np.maximum(predicted, 0)
    np.testing.assert_array_equal(predicted, kept)
    np.testing.assert_array_equal(sd, np.sqrt(np.maximum(intercept + slope * centre, floor)))
    reach = np.minimum(reach * sd, largest)
    np.testing.assert_array_equal(lower, np.maximum(centre - reach, 0))
    np.testing.assert_array_equal(upper, centre + reach)
