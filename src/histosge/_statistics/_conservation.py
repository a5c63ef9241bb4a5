"""Bins that agree with the measurement of their spot, without its counting noise.

Bins that average exactly to their spot copy its noise and are worse than bins without this step (docs/benchmarks.md).
So bins are scaled to the posterior mean of the spot. Its shrinkage is estimated gene by gene.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from histosge._geometry import nearest_spots
from histosge._statistics._counting_noise import count_rates, sized_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

_FEW = 20.0
"""Expected counts up to which the Poisson sum is used; above, the delta method is within 1 %."""
_TERMS = 60
"""Number of terms of the sum: at ``_FEW`` the rest is negligible."""
_CELLS = 2_000_000
"""Spots times genes at a time."""
_FLOOR = 0.02
"""Smallest share of the target in the bins: a prediction near zero is not scaled to the whole target."""
_TOLERANCE = 1e-6
_MOST_STEPS = 500


@dataclass(frozen=True)
class Shrunken:
    """Spots without their counting noise."""

    tau2: NDArray[np.float64]
    """(g,) variance of the expression around its prediction"""
    weight: NDArray[np.float64]
    """(n, g) share of the difference from the prediction that is kept, 0 to 1"""
    mean: NDArray[np.float64]
    """(n, g) posterior mean, log1p, never negative"""


def noise_variance(
    counts: sparse.spmatrix, *, total: Floats | None = None, target_sum: float = 1e4, cells_at_once: int = _CELLS
) -> NDArray[np.float64]:
    """Variance of log1p-normalised expression that comes from counting alone.

    A count of 0 does not mean a rate of 0, so counts are not used as rates. Rates are posterior means under a gamma
    prior around the expectation from library size. The spread of the prior is found by moments, as in
    :func:`noise_ceiling`.

    Parameters
    ----------
    counts
        (n, genes) raw counts.
    total
        (n,) counts of each spot over all genes, where ``counts`` has only some of them. Default: their sum.
    target_sum
        Total that the expression was normalised to before log1p.
    cells_at_once
        Spots times genes in memory at a time.

    Returns
    -------
    (n, genes); 0 for a gene without counts.
    """
    rows, size = sized_counts(counts, total)
    columns = rows.tocsc()
    found = np.zeros(columns.shape)
    seen = np.flatnonzero(np.asarray(columns.sum(0)).ravel() > 0)
    for genes in np.array_split(seen, max(1, len(seen) * len(size) // cells_at_once)):
        k = np.asarray(columns[:, genes].todense(), np.float64)
        expected, cv2 = count_rates(k, size)
        rate = expected * (1 + cv2 * k) / (1 + cv2 * expected)
        found[:, genes] = log_variance(rate, scale=(target_sum / size)[:, None])
    return found


def log_variance(rate: Floats, *, scale: Floats) -> Floats:
    """Variance of log1p(scale * k) of Poisson k, (n, g): the sum for few counts, the delta method for many."""
    few = np.minimum(rate, _FEW)
    chance, first, second = np.exp(-few), np.zeros_like(few), np.zeros_like(few)
    for k in range(1, _TERMS):
        chance = chance * few / k
        value = np.log1p(scale * k)
        first += chance * value
        second += chance * value**2
    slope = scale / (1 + scale * rate)
    # to second order: third and fourth central moments of a Poisson count are rate and 3 rate² + rate
    many = slope**2 * rate - slope**3 * rate + slope**4 * rate * (2.5 * rate + 11 / 12)
    return np.where(rate < _FEW, second - first**2, many)


def shrinkage(measured: Floats, predicted: Floats, *, noise: Floats) -> Shrunken:
    """Empirical-Bayes posterior of the spots, given a prediction and the noise of the measurement.

    The difference of measurement and prediction is normal with variance ``tau2 + noise``. ``tau2`` is a property of the
    gene, found by moments and never below 0. Where differences are no larger than counting noise, the prediction is
    kept.

    Parameters
    ----------
    measured
        (n, g) log1p expression.
    predicted
        (n, g) log1p expression, by a head that was not trained on the spot. The spot may be in the context of the head:
        the difference is then the part that the head did not use.
    noise
        (n, g) variance of ``measured``, from :func:`noise_variance`.
    """
    given = {"measured": measured, "predicted": predicted, "noise": noise}
    shapes = {name: np.shape(values) for name, values in given.items()}
    if len(set(shapes.values())) > 1 or np.ndim(measured) != 2:
        msg = f"measured, predicted and noise do not fit together: {shapes}. Pass (n, g) each, one row for each spot."
        raise ValueError(msg)
    for name, values in given.items():
        if not np.isfinite(values).all() or (name == "noise" and (noise < 0).any()):
            msg = f"{name} holds values that are not finite, or variances below 0. Leave these spots or genes out."
            raise ValueError(msg)
    residual = np.asarray(measured, np.float64) - predicted
    # subtract a common offset: log1p makes one where the depth of the spots differs from that of the prediction
    spread = ((residual - residual.mean(0)) ** 2).sum(0) / max(len(residual) - 1, 1)
    tau2 = np.maximum(spread - noise.mean(0), 0)
    whole = tau2 + noise
    weight = np.where(whole > 0, tau2 / np.where(whole > 0, whole, 1), 0.0)
    return Shrunken(tau2, weight, np.maximum(predicted + weight * residual, 0))


def fade(xy_um: Floats, spots_um: Floats, *, inner_um: float, outer_um: float) -> sparse.csr_matrix:
    """Weight (m, n) of the correction of the nearest spot in each bin.

    It is 1 within ``inner_um`` of the spot's centre (the radius plus half the diagonal of a bin, so that every covered
    bin is included) and falls as a cosine to 0 at ``outer_um`` (half the way to the next spot).
    """
    if not 0 < inner_um <= outer_um:
        msg = f"inner_um={inner_um:g}, outer_um={outer_um:g}: pass 0 < inner_um <= outer_um (usually half the pitch)."
        raise ValueError(msg)
    bins_um, spots = np.asarray(xy_um, np.float64), np.asarray(spots_um, np.float64)
    index, distance, present = nearest_spots(bins_um, spots, k=1)
    beyond = np.clip((distance[:, 0] - inner_um) / max(outer_um - inner_um, 1e-9), 0, 1)
    weight = np.where(present[:, 0], (1 + np.cos(np.pi * beyond)) / 2, 0.0)
    found = sparse.csr_matrix((weight, (np.arange(len(bins_um)), index[:, 0])), shape=(len(bins_um), len(spots)))
    found.eliminate_zeros()
    return found


def conserve(
    bins: Floats, *, coverage: sparse.spmatrix, target: Floats, window: sparse.spmatrix
) -> NDArray[np.float64]:
    """Scale bins so that the mean of the bins under a spot is its target.

    Every spot and gene has one factor. A bin is multiplied by 1 + window @ (factor - 1). Where no bin is under two
    spots, the factor is target / mean. Otherwise factors are scaled in turn until all spots agree.

    Parameters
    ----------
    bins
        (m, g) rates, never negative (expm1 of log1p expression).
    coverage
        (n, m) share of each bin in each spot's disc; rows sum to 1, or are empty for spots without bins.
    target
        (n, g) target rates of the spots.
    window
        (m, n) weight of spots on bins, from :func:`fade`; rows sum to at most 1.

    Returns
    -------
    (m, g) rates.
    """
    share, reach = sparse.csr_matrix(coverage, dtype=np.float64), sparse.csr_matrix(window, dtype=np.float64)
    before, wanted = np.asarray(bins, np.float64), np.asarray(target, np.float64)
    _check(before, share, wanted, reach)
    held = np.asarray(share.sum(1)).ravel() > 0
    mean = share @ before
    before = before + reach @ np.where(held[:, None], np.maximum(_FLOOR * wanted - mean, 0), 0.0)
    factor, untouched = np.ones_like(wanted), 1 - np.asarray(reach.sum(1))  # (n, g), (m, 1)
    after = before
    for _ in range(_MOST_STEPS):
        mean = share @ after
        off = held[:, None] & (np.abs(mean - wanted) > _TOLERANCE * wanted)
        if not off.any():
            return after
        factor = np.where(off & (mean > 0), factor * wanted / np.where(mean > 0, mean, 1), factor)
        after = before * (untouched + reach @ factor)
    worst = np.flatnonzero(off.any(1))
    msg = (
        f"{len(worst)} spots cannot reach their target (for example row {worst[0]}): they share their bins with other "
        "spots, or window gives them no bins. Use smaller bins, or a larger inner_um in fade()."
    )
    raise ValueError(msg)


@dataclass(frozen=True)
class Conservation:
    """Scales bins to the measurement of their spot without its counting noise."""

    share: sparse.csr_matrix
    """(n_spots, n_bins) share of each bin in each spot"""
    xy_um: NDArray[np.float64]
    """(n_bins, 2)"""
    spots_um: NDArray[np.float64]
    """(n_spots, 2)"""
    reach_um: tuple[float, float]
    """Distances from a spot's centre: bins are scaled fully up to the first, and not at all from the second on"""
    target: NDArray[np.float32]
    """(n_spots, genes) target rates of the spots"""
    weight: NDArray[np.float32]
    """(genes,) mean share of the difference between measurement and prediction that is kept"""

    def partners(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the other bins under the spots of ``rows``, since all bins of a spot are scaled together.

        Where spots overlap, these include the bins of their neighbours, and so on.
        """
        found = rows
        while len(more := np.setdiff1d(self.share[self._spots_of(found)].indices, found)):
            found = np.concatenate([found, more])
        return found[len(rows) :]

    def apply(self, rows: NDArray[np.int64], expression: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale the (n, genes) log1p expression of bins ``rows`` to the spots; all partners must be in ``rows``."""
        spots = self._spots_of(rows)
        window = self._window(rows)[:, spots]
        share = self.share[spots][:, rows]
        found = np.empty_like(expression)
        for start in range(0, expression.shape[1], 128):  # float64 inside: some genes at a time
            genes = slice(start, start + 128)
            rates = conserve(
                np.expm1(expression[:, genes]), coverage=share, target=self.target[spots, genes], window=window
            )
            found[:, genes] = np.log1p(rates)
        return found

    def _window(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        return fade(self.xy_um[rows], self.spots_um, inner_um=self.reach_um[0], outer_um=self.reach_um[1])

    def _spots_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.unique(self._window(rows).indices)


def _check(bins: Floats, share: sparse.csr_matrix, target: Floats, reach: sparse.csr_matrix) -> None:
    """Raise where bins cannot be scaled to spots."""
    (m, g), n = bins.shape, len(target)
    if target.shape != (n, g) or share.shape != (n, m) or reach.shape != (m, n):
        msg = (
            f"bins {bins.shape}, coverage {share.shape}, target {target.shape} and window {reach.shape} do not "
            "fit together. Pass (m, g), (n, m), (n, g) and (m, n)."
        )
        raise ValueError(msg)
    for name, values in (("bins", bins), ("target", target)):
        if not (np.isfinite(values) & (values >= 0)).all():
            msg = f"{name} holds values below 0, NaN or infinite. Pass rates: expm1 of log1p expression."
            raise ValueError(msg)
    whole = np.asarray(share.sum(1)).ravel()
    if ((np.abs(whole - 1) > 1e-6) & (whole != 0)).any() or (share.data < 0).any():
        sums = f"{whole.min():.3g} to {whole.max():.3g}"
        msg = f"coverage: rows must sum to 1 (or 0 for a spot without bins), but sums are {sums}."
        raise ValueError(msg)
    most = float(np.asarray(reach.sum(1)).max(initial=0))
    if (reach.data < 0).any() or most > 1 + 1e-9:
        msg = f"window: weights must be at least 0 and sum to at most 1 in a bin, but a sum is {most:.3g}."
        raise ValueError(msg)
