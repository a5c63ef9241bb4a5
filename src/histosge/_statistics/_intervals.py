"""How far a measurement may lie from its prediction: error bars from cross-fitted errors. Never torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

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

FLOOR = 0.25
"""The variance is never below this share of the gene's mean squared error, wherever the fitted line leads."""

TINY = 1e-6
"""Standard deviation, log1p units, of a gene that all other folds predict without any error."""

PART = 512
"""Genes at a time: all at once in float64 need not fit in memory."""

PASS = 2**16
"""Values that bars are laid around at a time: a quarter of a megabyte, four times."""


@dataclass(frozen=True)
class PredictionIntervals:
    """Spread and reach of the errors of a prediction, gene by gene.

    The variance of a gene's errors is a line in its predicted value. Bars are that standard deviation times a quantile
    of the errors in such units (normalised scores: Lei et al., 2018), made by :func:`calibrate`.
    """

    intercept: NDArray[np.float32]
    """(g,) variance where nothing is predicted"""
    slope: NDArray[np.float32]
    """(g,) change of the variance with the predicted value; negative where the logarithm flattens a strong gene"""
    floor: NDArray[np.float32]
    """(g,) least variance"""
    quantile: NDArray[np.float32]
    """(g,) standard deviations that a bar reaches to either side"""
    largest: NDArray[np.float32]
    """(g,) largest error seen, which no bar reaches beyond"""
    level: float
    """Share of the measurements that lie within the bars"""

    def sd(self, predicted: Floats) -> NDArray[np.float32]:
        """Standard deviation (m, g) of a measurement at spot scale around ``predicted``, (m, g)."""
        value = np.asarray(predicted, np.float32)
        return _sd(value, self.intercept, self.slope, self.floor)

    def interval(self, predicted: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lower and upper end (m, g) of the bars around ``predicted``, (m, g); expression is never below 0."""
        return self.around(predicted)[1:]

    def around(self, predicted: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """:meth:`sd`, and both ends of :meth:`interval`, in one pass over a few rows at a time, which caches hold."""
        value = np.asarray(predicted, np.float32)
        sd, lower, upper = (np.empty(value.shape, np.float32) for _ in range(3))
        n = max(1, PASS // max(value.shape[-1], 1))
        centre = np.empty((n, value.shape[-1]), np.float32)
        for start in range(0, len(value), n):
            rows = slice(start, start + n)
            width, reach, end = sd[rows], lower[rows], upper[rows]
            middle = np.maximum(value[rows], 0, out=centre[: len(width)])
            np.multiply(middle, self.slope, out=width)
            width += self.intercept
            np.sqrt(np.maximum(width, self.floor, out=width), out=width)
            np.multiply(width, self.quantile, out=reach)
            np.minimum(reach, self.largest, out=reach)
            np.add(middle, reach, out=end)
            np.maximum(np.subtract(middle, reach, out=reach), 0, out=reach)
        return sd, lower, upper

    def to_arrays(self) -> dict[str, NDArray[np.floating]]:
        """Give all fields as arrays, for safetensors."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.floating]]) -> Self:
        """Restore from what :meth:`to_arrays` gave."""
        return cls(**{f.name: arrays[f.name] for f in fields(cls) if f.name != "level"}, level=float(arrays["level"]))


def calibrate(held_out: Floats, measured: Floats, *, fold: Ints, level: float = 0.9) -> PredictionIntervals:
    """Find error bars from cross-fitted predictions.

    The score of a spot is its absolute error in standard deviations, as fitted on the *other* folds; the bar reaches
    to the ``ceil((n + 1) * level)``-th smallest score of the gene. Scores have no sign on purpose: expression starts
    at 0 and is often 0, so a bar cut off at 0 loses nothing. At new places the standard deviation fitted on *all*
    folds is used: no new place had a part in it, just as no spot had a part in its own.

    Parameters
    ----------
    held_out
        (n, g) log1p expression, each spot predicted by a head that never saw it.
    measured
        (n, g) log1p expression.
    fold
        (n,) fold that each spot was held out with.
    level
        Share of the measurements that the bars shall hold, between 0 and 1.

    Notes
    -----
    New places must be like the held-out spots for the share to hold: folds and places exchangeable, measurements at
    spot scale. Random folds say nothing about the errors far from all spots. CV+ (Barber, Candes, Ramdas and
    Tibshirani, 2021) then holds at least about ``1 - 2 * (1 - level)`` in the worst case and about ``level`` in
    practice. It centres each error on the head of its own fold; these bars are centred on the mean of all heads, which
    takes a small fraction of the memory, has no such worst case, and holds about ``level`` as well for heads that
    a fifth of the spots does not upset.
    """
    _check(held_out, measured, fold=fold, level=level)
    n, n_genes = held_out.shape
    rank = _rank(n, level)
    if rank > n:
        logger.warning(
            "%d spots are too few for error bars at level %g, which needs %d: the bars reach to the largest error seen",
            n,
            level,
            _least_spots(level),
        )
    found = {f.name: np.empty(n_genes, np.float32) for f in fields(PredictionIntervals) if f.name != "level"}
    for start in range(0, n_genes, PART):
        part = slice(start, start + PART)
        predicted = np.maximum(np.asarray(held_out[:, part], np.float64), 0)
        error = np.abs(measured[:, part] - predicted)
        found["intercept"][part], found["slope"][part], found["floor"][part] = _fit(predicted, error)
        place = min(rank, n) - 1
        found["quantile"][part] = np.partition(_scores(predicted, error, fold), place, axis=0)[place]
        found["largest"][part] = error.max(0)
    return PredictionIntervals(**found, level=float(level))


def coverage(measured: Floats, lower: Floats, upper: Floats) -> Floats:
    """Share of the measurements within the bars, (g,); their ends belong to them."""
    return ((lower <= measured) & (measured <= upper)).mean(0)


def neighbour_average(values: Floats, *, xy: Floats, k: int) -> NDArray[np.float32]:
    """Average (n, g) held-out values over a spot and its ``k - 1`` nearest.

    Measurements and both ends of the bars averaged alike show what :func:`coverage` becomes at coarser scales. Bars
    hold their level at spot scale only, with exchangeable folds: averages of independent errors are smaller than the
    averaged bars say, so these over-cover; errors that neighbours share do not average out.
    """
    if k < 1:
        msg = f"k={k} spots cannot be averaged. Give k=1 for the spots as they are, or more."
        raise ValueError(msg)
    n = len(xy)
    place = np.asarray(xy, np.float64)
    index, _, present = nearest_spots(place, place, k=k - 1, exclude=np.arange(n))
    index = np.column_stack([np.arange(n), index])
    present = np.column_stack([np.ones(n, bool), present])
    weight = (present / present.sum(1, keepdims=True)).astype(np.float32)
    rows = np.repeat(np.arange(n), index.shape[1])
    graph = sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(n, n))
    return graph @ np.asarray(values, np.float32)


def _scores(predicted: Floats, error: Floats, fold: Ints) -> Floats:
    """Errors (n, g) in standard deviations as the other folds see them."""
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
    """Root of the line, or of the floor under it."""
    return np.sqrt(np.maximum(intercept + slope * np.maximum(predicted, 0), floor))


def _rank(n: int, level: float) -> int:
    """Which of ``n`` scores, smallest first, has at most ``1 - level`` of the future above it."""
    return math.ceil((n + 1) * level - 1e-9)  # 1e-9: a whole number that floats put a little too high


def _least_spots(level: float) -> int:
    """Fewest spots of which the largest error is enough for ``level``."""
    return math.ceil(level / (1 - level) - 1e-9)


def _check(held_out: Floats, measured: Floats, *, fold: Ints, level: float) -> None:
    """Refuse what no bars can be made of."""
    if not 0 < level < 1:
        msg = f"level={level} is not a share of the measurements. Give one between 0 and 1, such as 0.9."
        raise ValueError(msg)
    if held_out.ndim != 2 or held_out.shape != measured.shape or np.shape(fold) != held_out.shape[:1]:
        msg = (
            f"held_out {held_out.shape}, measured {measured.shape} and fold {np.shape(fold)} do not belong together. "
            f"Give (n, g), (n, g) and (n,): one row a spot in each."
        )
        raise ValueError(msg)
    if len(np.unique(fold)) < 2:
        msg = (
            f"fold holds {len(np.unique(fold))} fold(s), but the errors of one are measured by the spread in the "
            f"others. Give at least 2 folds."
        )
        raise ValueError(msg)
    for name, values in (("held_out", held_out), ("measured", measured)):
        if not np.isfinite(values).all():
            wrong = int((~np.isfinite(values)).sum())
            msg = f"{name} holds {wrong} value(s) that are no finite number. Leave these spots or genes out."
            raise ValueError(msg)
