"""Counting noise: the random variation of counts, and the correlation that a perfect model reaches in spite of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]


def thin(counts: sparse.spmatrix, *, rng: np.random.Generator) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split each count in two at random. The halves of Poisson counts are independent, and their sum is the input."""
    whole = checked_counts(counts)
    if (whole.data != np.rint(whole.data)).any():
        odd = whole.data[whole.data != np.rint(whole.data)]
        msg = (
            f"counts hold {len(odd)} values that are not whole numbers (for example {odd[0]:.4g}), and only counts can "
            "be split. Pass raw counts: not normalised, log-transformed or corrected ones."
        )
        raise ValueError(msg)
    half, other = whole.copy(), whole.copy()
    half.data = rng.binomial(whole.data.astype(np.int64), 0.5).astype(whole.dtype)
    other.data = whole.data - half.data
    half.eliminate_zeros()
    other.eliminate_zeros()
    return half, other


def checked_counts(counts: sparse.spmatrix) -> sparse.csr_matrix:
    """Return compressed rows without duplicates; raise where a value is no count."""
    rows = sparse.csr_matrix(counts, copy=True)
    rows.sum_duplicates()
    bad = ~(np.isfinite(rows.data) & (rows.data >= 0))
    if bad.any():
        msg = (
            f"counts hold {bad.sum()} values that are negative, NaN or infinite (for example {rows.data[bad][0]:.4g}). "
            "Pass raw counts, not scaled ones."
        )
        raise ValueError(msg)
    return rows


_NODES = (3 * np.sinh(np.linspace(-1.9, 1.9, 41))).astype(np.float32)
"""Grid of a gene's rates: standard deviations of their logarithm, dense near 0, out to 10."""
_AT_FIRST = (np.exp(-(_NODES**2) / 2) + 0.02 / (1 + _NODES**2)) * np.gradient(_NODES)
"""Initial weight of each node: normal, with tails heavy enough for a few unusual spots."""
_N_FITS = 8
"""Number of fits of the weights of these nodes: enough for the shape, too few to fit single counts."""
_CELLS = 160_000
"""Spots times genes at a time."""


def sized_counts(counts: sparse.spmatrix, total: Floats | None) -> tuple[sparse.csr_matrix, Floats]:
    """Return raw counts and the library size (n,) of each spot; raise where spots have no counts."""
    rows = checked_counts(counts)
    size = np.asarray(rows.sum(1) if total is None else total, np.float64).ravel()
    if (size <= 0).any():
        msg = f"total: {(size <= 0).sum()} of {len(size)} spots have no counts. Leave them out first."
        raise ValueError(msg)
    return rows, size


def noise_ceiling(counts: sparse.spmatrix, *, total: Floats | None = None, target_sum: float = 1e4) -> Floats:
    """Highest correlation with the measured values, of a model that knows the expression without noise.

    Counts of a gene are Poisson around a rate. The mean rate follows a power of the spot's library size. The spread of
    the rates is found by moments, without counting noise, as if counts were split in all ways at once. The posterior of
    the rate given the count (log-normal at first, then of the shape that the counts suggest) gives the correlation of
    the rate with the measurement, both as log1p per ``target_sum``.

    Halves of the counts are not correlated with each other, because log1p bends small counts more and library size is
    in both halves. Stepped up to full depth (Spearman, 1910; Brown, 1910), such a correlation is up to 0.5 too high.

    All noise is assumed to be counting noise: corrected or smoothed counts get too high a ceiling, and other technical
    noise is not part of it. Leave out spots with nearly no counts: they alone can make up the spread of a gene.
    Use the mean over many genes: the error of a single gene is 0.01 (50 counts a spot) to 0.15 (0.2 counts, 200 spots),
    and a gene without a pattern gets 0.05 (2500 spots) to 0.1 (200 spots) instead of 0, since a spread is not negative.
    With 200 spots and library sizes that differ tenfold, the mean can be up to 0.07 too low.

    Parameters
    ----------
    counts
        (n, genes) raw counts.
    total
        (n,) counts of each spot over all genes, where ``counts`` has only some of them. Default: their sum.
    target_sum
        What the measured values were normalised to before log1p.

    Returns
    -------
    (genes,) from 0 to 1; 0 for a gene without counts, or one that varies no more than counting noise.
    """
    rows, size = sized_counts(counts, total)
    columns = rows.tocsc()
    found = np.zeros(columns.shape[1])
    seen = np.flatnonzero(np.asarray(columns.sum(0)).ravel() > 0)
    for genes in np.array_split(seen, max(1, len(seen) * len(size) // _CELLS)):
        k = np.asarray(columns[:, genes].todense(), np.float64)
        expected, cv2 = count_rates(k, size)
        log_rate, uncertainty = _posterior(k, expected, cv2, scale=target_sum / size)
        measured = np.log1p(k * (target_sum / size)[:, None])
        spread = np.sqrt((log_rate.var(0) + uncertainty) * measured.var(0))
        known = spread > 1e-9
        agree = ((log_rate - log_rate.mean(0)) * (measured - measured.mean(0))).mean(0)
        found[genes] = np.where(known, agree / np.where(known, spread, 1.0), 0.0)
    return np.clip(found, 0.0, 1.0)


def count_rates(k: Floats, size: Floats) -> tuple[Floats, Floats]:
    """Counts expected from library size alone (n, genes), and the squared coefficient of variation of rates (genes,).

    Quasi-likelihood for the mean and moments for the spread, in turn (Breslow, 1984); spots are weighted by precision.
    """
    x = np.log(size / size.mean())[:, None]
    power, cv2 = np.zeros(k.shape[1]), np.zeros(k.shape[1])
    expected = size[:, None] * (k.sum(0) / size.sum())
    for last in (False,) * 5 + (True,):
        weight = 1 / (1 + cv2 * expected)
        known = weight * expected
        centred = x - (known * x).sum(0) / known.sum(0)
        information = np.maximum((known * centred**2).sum(0), 1e-6)
        if last:  # shrunken by its noise (James and Stein, 1961), or every gene depends on library size a little
            power *= np.maximum(1 - 1 / (information * np.maximum(power**2, 1e-12)), 0)
        else:
            power = np.clip(power + (weight * (k - expected) * centred).sum(0) / information, -1.5, 1.5)
        expected = size[:, None] * np.exp(power * x)
        expected *= (weight * k).sum(0) / (weight * expected).sum(0)
        precision = (1 + cv2 * expected) ** -2
        excess = (precision * ((k - expected) ** 2 - k)).sum(0) / (precision * expected**2).sum(0)
        cv2 = np.maximum(excess, 0)
    return expected, cv2


def _posterior(k: Floats, expected: Floats, cv2: Floats, *, scale: Floats) -> tuple[Floats, Floats]:
    """Mean (n, genes) and mean variance (genes,) of log1p of the scaled rates, given the counts.

    Rates are log-normal at first; then the weights of the nodes are fitted to the counts (Laird, 1978).
    """
    spread = np.sqrt(np.log1p(cv2))
    node = (_NODES[:, None] * spread).astype(np.float32)
    factor = np.exp(np.minimum(node - spread**2 / 2, 20)).astype(np.float32)
    count, mean = k.astype(np.float32), expected.astype(np.float32)
    fit = node[:, None] * count - factor[:, None] * mean  # likelihood of every node, (nodes, n, genes)
    fit -= fit.max(0)
    np.exp(fit, out=fit)
    prior = np.repeat((_AT_FIRST / _AT_FIRST.sum())[:, None], len(cv2), 1).astype(np.float32)
    for _ in range(_N_FITS):
        evidence = 1 / np.maximum(np.einsum("jng,jg->ng", fit, prior), 1e-30)
        prior = prior * np.einsum("jng,ng->jg", fit, evidence)
        prior /= prior.sum(0)
    evidence = 1 / np.maximum(np.einsum("jng,jg->ng", fit, prior), 1e-30)
    first = np.einsum("jng,jg->ng", fit, prior * node) * evidence
    second = np.einsum("jng,jg->ng", fit, prior * node**2) * evidence
    sd = np.sqrt(np.maximum(second - first**2, 0) * 3)
    level = np.log(expected * scale[:, None]) - spread**2 / 2 + first
    # Gauss-Hermite with three nodes
    low, middle, high = (np.log1p(np.exp(level + side * sd)) for side in (-1, 0, 1))
    mean_log = (low + 4 * middle + high) / 6
    return mean_log, ((low - mean_log) ** 2 + 4 * (middle - mean_log) ** 2 + (high - mean_log) ** 2).mean(0) / 6
