"""Prediction intervals from cross-fitted errors: the range of a measurement around its prediction. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from scipy import sparse

from histosge._geometry import nearest_spots
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Ints = NDArray[np.integer]
    Bools = NDArray[np.bool_]

LEVEL = 0.9
"""Target coverage, unless the caller chooses another."""

LEVELS = (*(i / 100 for i in range(1, 100)), 0.995, 0.999)
"""Target coverages with stored quantiles of the scores."""

FLOOR = 0.25
"""Smallest variance, as a share of the gene's mean squared error: the fitted line may be lower."""

TINY = 1e-6
"""Standard deviation, in log1p units, of a gene without any error in the other folds."""

PART = 512
"""Genes at a time: all genes in float64 may not fit in memory."""

PASS = 2**16
"""Values whose intervals are computed at a time: four arrays of a quarter of a megabyte."""

_OF_A_GENE = ("intercept", "slope", "floor", "largest")
"""Columns that are the same at every level: the line of the variance, its smallest value, and the largest error."""


@dataclass(frozen=True)
class PredictionIntervals:
    """Prediction intervals, gene by gene, for any level of a grid.

    The variance of a gene's errors is a line in its predicted value. Half the width of an interval is that standard
    deviation times a quantile of the errors in these units (normalised scores: Lei et al., 2018), at most the largest
    error. Made by :func:`calibrate`.
    """

    numbers: NDArray[np.float32]
    """(g, 4 + n_levels) named by ``columns``: intercept and slope of the variance (the slope is negative where the
    logarithm flattens a strong gene), the smallest variance, the largest error, and a quantile of the scores for each
    level"""
    levels: NDArray[np.float64]
    """(n_levels,) target coverages, increasing"""
    n_spots: int
    """Number of spots with errors"""

    @property
    def columns(self) -> list[str]:
        """Names of the columns of ``numbers``."""
        return [*_OF_A_GENE, *(f"quantile_{level:g}" for level in self.levels)]

    def take(self, genes: Ints) -> Self:
        """Return the intervals of some genes, by number."""
        return replace(self, numbers=self.numbers[genes])

    def where(self, genes: Bools) -> Self:
        """Return NaN for all genes but some, (g,)."""
        return replace(self, numbers=np.where(genes[:, None], self.numbers, np.float32(np.nan)))

    def choose_level(self, level: float) -> float:
        """Return the level of the grid for ``level``; log where it differs or needs more spots."""
        number = isinstance(level, int | float | np.number) and not isinstance(level, bool)
        if not (number and 0 < level < 1):
            msg = f"level={level!r} is not a share of the measurements. Choose one between 0 and 1, such as 0.9."
            raise ValueError(msg)
        chosen = float(self.levels[self._column(level)])
        if abs(chosen - level) > 1e-6:
            logger.info("level %g: using %g, the next level of the grid", level, chosen)
        if _rank(self.n_spots, chosen) > self.n_spots:
            logger.warning(
                "%d spots are too few for prediction intervals at level %g, which needs %d: the intervals reach to the "
                "largest error",
                self.n_spots, chosen, _least_spots(chosen),
            )  # fmt: skip
        return chosen

    def at(self, level: float) -> NDArray[np.float32]:
        """Return the numbers of one level: intercept, slope, floor, largest error and quantile, (5, g)."""
        columns = [*range(len(_OF_A_GENE)), len(_OF_A_GENE) + self._column(level)]
        return np.ascontiguousarray(self.numbers[:, columns].T)

    def sd(self, predicted: Floats) -> NDArray[np.float32]:
        """Standard deviation (m, g) of a measurement at spot scale around ``predicted``, (m, g)."""
        intercept, slope, floor = self.numbers[:, :3].T
        return _sd(np.asarray(predicted, np.float32), intercept, slope, floor)

    def interval(self, predicted: Floats, *, level: float = LEVEL) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lower and upper end (m, g) of the intervals around ``predicted``, (m, g); expression is never below 0."""
        return interval_around(predicted, self.at(level))[1:]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return all fields as arrays, for safetensors."""
        return {"numbers": self.numbers, "levels": self.levels, "n_spots": np.asarray(self.n_spots)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Restore intervals from their :meth:`to_arrays`."""
        return cls(arrays["numbers"], arrays["levels"], int(arrays["n_spots"]))

    def _column(self, level: float) -> int:
        """Find the level in the grid: the same, or the next higher one."""
        found = int(np.searchsorted(self.levels, level - 1e-6))  # 1e-6: 0.9 in float32 is 0.9
        if found == len(self.levels):
            msg = f"level={level!r}: the highest level is {self.levels[-1]:g}. Choose that, or a lower one."
            raise ValueError(msg)
        return found


def interval_around(
    predicted: Floats, numbers: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Standard deviation, lower and upper end (m, g) around ``predicted``, (m, g), in one pass.

    Parameters
    ----------
    predicted
        (m, g) log1p expression.
    numbers
        (5, g) of :meth:`PredictionIntervals.at`. A gene whose numbers are NaN gets NaN.
    """
    intercept, slope, floor, largest, quantile = numbers
    value = np.asarray(predicted, np.float32)
    sd, lower, upper = (np.empty(value.shape, np.float32) for _ in range(3))
    n = max(1, PASS // max(value.shape[-1], 1))  # a few rows at a time, which fit in the cache
    centre = np.empty((n, value.shape[-1]), np.float32)
    for start in range(0, len(value), n):
        rows = slice(start, start + n)
        width, reach, end = sd[rows], lower[rows], upper[rows]
        middle = np.maximum(value[rows], 0, out=centre[: len(width)])
        np.multiply(middle, slope, out=width)
        width += intercept
        np.sqrt(np.maximum(width, floor, out=width), out=width)
        np.multiply(width, quantile, out=reach)
        np.minimum(reach, largest, out=reach)
        np.add(middle, reach, out=end)
        np.maximum(np.subtract(middle, reach, out=reach), 0, out=reach)
    return sd, lower, upper


def calibrate(held_out: Floats, measured: Floats, *, fold: Ints) -> PredictionIntervals:
    """Find prediction intervals from cross-fitted predictions, for every level of :data:`LEVELS`.

    The score of a spot is its absolute error in standard deviations, which are fitted on the *other* folds. The
    interval of a level reaches to the ``ceil((n + 1) * level)``-th smallest score of the gene. Scores have no sign,
    since expression is never below 0 and often 0: nothing is lost where an interval is cut off at 0. At new targets the
    standard deviation is fitted on *all* folds: it does not depend on a new target, as that of a spot does not depend
    on the spot.

    Parameters
    ----------
    held_out
        (n, g) log1p expression, each spot predicted by a head that was not trained on it.
    measured
        (n, g) log1p expression.
    fold
        (n,) fold of each spot.

    Notes
    -----
    The level is valid if new targets are like the held-out spots: folds and targets exchangeable, measurements at spot
    scale. Random folds do not measure the errors far from all spots. CV+ (Barber, Candes, Ramdas and Tibshirani, 2021)
    then covers at least about ``1 - 2 * (1 - level)`` in the worst case and about ``level`` in practice. It centres
    each error on the head of its own fold. These intervals are centred on the mean of all heads: this takes a small
    fraction of the memory, has no such guarantee, and also covers about ``level`` for heads that change little without
    a fifth of the spots.
    """
    _check(held_out, measured, fold=fold)
    n, n_genes = held_out.shape
    ranks = np.array([min(_rank(n, level), n) - 1 for level in LEVELS])
    numbers = np.empty((n_genes, len(_OF_A_GENE) + len(LEVELS)), np.float32)
    for start in range(0, n_genes, PART):
        part = slice(start, start + PART)
        predicted = np.maximum(np.asarray(held_out[:, part], np.float64), 0)
        error = np.abs(measured[:, part] - predicted)
        scores = np.sort(_scores(predicted, error, fold), axis=0)
        numbers[part] = np.vstack([*_fit(predicted, error), error.max(0), scores[ranks]]).T
    return PredictionIntervals(numbers, np.array(LEVELS), n)


def empirical_coverage(measured: Floats, lower: Floats, upper: Floats) -> Floats:
    """Share of the measurements within the intervals, (g,), including their ends."""
    return ((lower <= measured) & (measured <= upper)).mean(0)


def neighbour_average(values: Floats, *, xy: Floats, k: int) -> NDArray[np.float32]:
    """Average (n, g) held-out values over a spot and its ``k - 1`` nearest spots.

    Averages of the measurements and of both ends of the intervals give :func:`empirical_coverage` at coarser scales.
    Intervals have their level at spot scale only, with exchangeable folds. Averages of independent errors are smaller
    than the averaged intervals, which then over-cover; errors that neighbours share do not average out.
    """
    if k < 1:
        msg = f"k={k} spots cannot be averaged. Pass k=1 for single spots, or more."
        raise ValueError(msg)
    n = len(xy)
    position = np.asarray(xy, np.float64)
    index, _, present = nearest_spots(position, position, k=k - 1, exclude=np.arange(n))
    index = np.column_stack([np.arange(n), index])
    present = np.column_stack([np.ones(n, bool), present])
    weight = (present / present.sum(1, keepdims=True)).astype(np.float32)
    rows = np.repeat(np.arange(n), index.shape[1])
    graph = sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(n, n))
    return graph @ np.asarray(values, np.float32)


def _scores(predicted: Floats, error: Floats, fold: Ints) -> Floats:
    """Errors (n, g) in standard deviations, which are fitted on the other folds."""
    scores = np.empty_like(error)
    for one in np.unique(fold):
        inside = fold == one
        scale = _sd(predicted[inside], *_fit(predicted[~inside], error[~inside]))
        scores[inside] = error[inside] / np.maximum(scale, TINY)
    return scores


def _fit(predicted: Floats, error: Floats) -> tuple[Floats, Floats, Floats]:
    """Least-squares line of the squared error in the predicted value: intercept, slope and floor, each (g,)."""
    square = error**2
    mean, level = predicted.mean(0), square.mean(0)
    away = predicted - mean
    spread = (away**2).sum(0)
    constant = spread <= 1e-12 * (predicted**2).sum(0)  # rounding of a constant column, or an empty one
    slope = (away * square).sum(0) / np.where(constant, 1.0, spread)
    return level - slope * mean, slope, FLOOR * level


def _sd(predicted: Floats, intercept: Floats, slope: Floats, floor: Floats) -> Floats:
    """Square root of the line, at least of the floor."""
    return np.sqrt(np.maximum(intercept + slope * np.maximum(predicted, 0), floor))


def _rank(n: int, level: float) -> int:
    """Rank among ``n`` scores, smallest first, that a new score exceeds with a probability of at most ``1 - level``."""
    return math.ceil((n + 1) * level - 1e-9)  # 1e-9: rounding may put a whole number a little too high


def _least_spots(level: float) -> int:
    """Smallest number of spots for ``level``: the interval then reaches to the largest error."""
    return math.ceil(level / (1 - level) - 1e-9)


def _check(held_out: Floats, measured: Floats, *, fold: Ints) -> None:
    """Raise where intervals cannot be computed."""
    if held_out.ndim != 2 or held_out.shape != measured.shape or np.shape(fold) != held_out.shape[:1]:
        msg = (
            f"held_out {held_out.shape}, measured {measured.shape} and fold {np.shape(fold)} do not fit together. "
            f"Pass (n, g), (n, g) and (n,), with one row for each spot."
        )
        raise ValueError(msg)
    if len(np.unique(fold)) < 2:
        msg = (
            f"fold holds {len(np.unique(fold))} fold(s), but the errors of a fold are scaled by the spread in the "
            f"others. Pass at least 2 folds."
        )
        raise ValueError(msg)
    for name, values in (("held_out", held_out), ("measured", measured)):
        if not np.isfinite(values).all():
            wrong = int((~np.isfinite(values)).sum())
            msg = f"{name} holds {wrong} value(s) that are not finite. Leave these spots or genes out."
            raise ValueError(msg)
