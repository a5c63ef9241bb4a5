"""What a prediction is worth, gene by gene: agreement of two (n, genes) arrays. Never torch, never SpatialData."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse, stats

from histosge._geometry import nearest_spots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

RIVALS = ("ridge", "nearest")
"""Simple heads that are scored beside every other, on the same folds."""
_SAME_PCC = 0.01
"""A part of a head that is less ahead than this is as good: so much changes from seed to seed."""
_BLOCK = 512
"""Genes at a time, where all at once need not fit in memory."""
_K1, _K2 = 0.01, 0.03
"""Constants of the structural similarity (Wang et al., 2004)."""


def correlation(predicted: Floats, measured: Floats) -> Floats:
    """Pearson correlation of each column; 0, not NaN, where a prediction or a measurement is constant."""
    p = np.asarray(predicted, np.float64) - np.mean(predicted, axis=0, dtype=np.float64)
    m = np.asarray(measured, np.float64) - np.mean(measured, axis=0, dtype=np.float64)
    size = np.sqrt((p**2).sum(0) * (m**2).sum(0))
    scale = np.sqrt((np.asarray(predicted, np.float64) ** 2).sum(0) * (np.asarray(measured, np.float64) ** 2).sum(0))
    constant = size <= 1e-12 * scale  # rounding of a constant column, or an empty one
    return np.where(constant, 0.0, (p * m).sum(0) / np.where(constant, 1.0, size))


def rank_correlation(predicted: Floats, measured: Floats) -> Floats:
    """Spearman correlation of each column, ties sharing their mean rank; 0 where either is constant."""
    return correlation(stats.rankdata(predicted, axis=0), stats.rankdata(measured, axis=0))


def gene_agreement(predicted: Floats, measured: Floats) -> Floats:
    """How well gene-gene correlations are kept: for each gene, the correlation of its rows of the two matrices.

    Over all other genes. A constant gene correlates with none: 0 in the rows of others, and its own score is 0.
    """
    p, m = _unit_columns(predicted), _unit_columns(measured)
    n_genes = p.shape[1]
    found = np.zeros(n_genes)
    for start in range(0, n_genes, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, n_genes))
        one, other = p.T @ p[:, rows], m.T @ m[:, rows]
        for block in (one, other):  # the mean of the others in place of a gene's 1 with itself does not count
            block[rows, rows - start] = 0
            block[rows, rows - start] = block.sum(0) / max(n_genes - 1, 1)
        found[rows] = correlation(one, other)
    return found


def _unit_columns(values: Floats) -> Floats:
    """Columns of mean 0 and length 1, float32; 0 where constant."""
    x = np.asarray(values, np.float64)
    centred = x - x.mean(0)
    length, scale = np.linalg.norm(centred, axis=0), np.linalg.norm(x, axis=0)
    constant = length <= 1e-9 * scale
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, length)).astype(np.float32)


def structural_similarity(predicted: Floats, measured: Floats, *, xy: Floats, n_neighbours: int = 6) -> Floats:
    """Structural similarity (Wang et al., 2004) of each gene, its windows a spot and its nearest neighbours.

    Mean over all spots. Both are taken as they are, in the measurement's unit: a prediction that varies less than what
    was measured pays for it, as it does for a wrong level. The dynamic range is that of the measured gene; 0 where
    this is constant.
    """
    mean = _mean_of_neighbours(xy, n_neighbours=n_neighbours, itself=True)
    found = np.zeros(predicted.shape[1])
    for start in range(0, len(found), _BLOCK):
        part = slice(start, start + _BLOCK)
        found[part] = _similarity_map(predicted[:, part], measured[:, part], mean=mean).mean(0)
    return found


def _similarity_map(predicted: Floats, measured: Floats, *, mean: sparse.csr_matrix) -> Floats:
    """Structural similarity in the window of every spot, (n, genes)."""
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    extent = np.ptp(m, axis=0)
    c1, c2 = (_K1 * extent) ** 2, (_K2 * extent) ** 2
    mean_p, mean_m = mean @ p, mean @ m
    variances = mean @ (p**2 + m**2) - mean_p**2 - mean_m**2
    covariance = mean @ (p * m) - mean_p * mean_m
    top = (2 * mean_p * mean_m + c1) * (2 * covariance + c2)
    return np.where(extent > 0, top / np.where(extent > 0, (mean_p**2 + mean_m**2 + c1) * (variances + c2), 1.0), 0.0)


def _mean_of_neighbours(xy: Floats, *, n_neighbours: int, itself: bool) -> sparse.csr_matrix:
    """Matrix that takes the mean over the nearest neighbours of each spot, with or without the spot itself."""
    n = len(xy)
    place = np.asarray(xy, np.float64)
    index, _, present = nearest_spots(place, place, k=n_neighbours, exclude=np.arange(n))
    if itself:
        index, present = np.column_stack([np.arange(n), index]), np.column_stack([np.ones(n, bool), present])
    weight = present / np.maximum(present.sum(1, keepdims=True), 1)
    rows = np.repeat(np.arange(n), index.shape[1])
    return sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(n, n))


def morans_i(expression: Floats | sparse.spmatrix, xy: Floats, *, n_neighbours: int = 6) -> Floats:
    """Moran's I (Moran, 1950) of every column on the graph of nearest neighbours, rows weighted alike; 0 if constant."""
    graph = _mean_of_neighbours(xy, n_neighbours=n_neighbours, itself=False).astype(np.float32)
    columns = sparse.csc_matrix(expression)
    found = np.zeros(columns.shape[1])
    for start in range(0, columns.shape[1], _BLOCK):
        part = np.asarray(columns[:, start : start + _BLOCK].todense(), dtype=np.float32)
        z = part - part.mean(axis=0, dtype=np.float64).astype(np.float32)
        power = (z.astype(np.float64) ** 2).sum(0)
        agree = (z * (graph @ z)).sum(0, dtype=np.float64)
        found[start : start + _BLOCK] = np.where(power > 1e-9, agree / np.where(power > 1e-9, power, 1), 0.0)
    return found


def thin(counts: sparse.spmatrix, *, rng: np.random.Generator) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split each count in two at random: of Poisson counts the halves are independent, and their sum is the input."""
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
    """Compressed rows without duplicates; raises if a value is no count at all."""
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
"""Where a gene's rates are looked for: standard deviations of their logarithm, dense near 0, out to 10."""
_AT_FIRST = (np.exp(-(_NODES**2) / 2) + 0.02 / (1 + _NODES**2)) * np.gradient(_NODES)
"""Weight of each node before it is fitted: normal, with tails heavy enough for a few odd spots."""
_N_FITS = 8
"""Times that the weights of these nodes are fitted: enough for the shape, too few to follow single counts."""
_CELLS = 160_000
"""Spots times genes at a time."""


def sized_counts(counts: sparse.spmatrix, total: Floats | None) -> tuple[sparse.csr_matrix, Floats]:
    """Raw counts and the library size (n,) of each spot, which none may be without."""
    rows = checked_counts(counts)
    size = np.asarray(rows.sum(1) if total is None else total, np.float64).ravel()
    if (size <= 0).any():
        msg = f"total: {(size <= 0).sum()} of {len(size)} spots have no counts. Leave them out first."
        raise ValueError(msg)
    return rows, size


def noise_ceiling(counts: sparse.spmatrix, *, total: Floats | None = None, target_sum: float = 1e4) -> Floats:
    """Correlation with the measured values that a model could at most reach if it knew the expression without noise.

    Counts of a gene are taken as Poisson around a rate, whose mean follows a power of the spot's library size and
    whose spread is found by moments, freed of counting noise just as by splitting the counts in all ways at once. What
    a count then tells of the rate behind it (log-normal at first, then of the shape that the counts ask for) gives the
    correlation of the rate with what was measured, both as log1p per ``target_sum``.

    No halves are correlated: log1p bends those of few counts in another way than the whole, and library size is in
    both. Stepped up to full depth (Spearman, 1910; Brown, 1910) they say up to 0.5 too much.

    It assumes that all noise is that of counting: corrected or smoothed counts get too high a ceiling, and no other
    technical noise is part of it. Leave spots of next to no counts out, as they alone can make up the spread of a gene.
    Take the mean over many genes: a single one is off by 0.01 (50 counts a spot) to 0.15 (0.2 counts, 200 spots), and
    one without any pattern gets 0.05 (2500 spots) to 0.1 (200 spots) instead of 0, as a spread cannot be negative.
    With 200 spots whose library sizes differ tenfold the mean can be too low, by up to 0.07.

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
    (genes,) from 0 to 1; 0 for a gene that was not seen, or varies no more than counting does.
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
    """Counts expected from library size alone (n, genes), and how rates vary: squared coefficient of variation (genes,).

    Quasi-likelihood for the mean and moments for the spread in turn (Breslow, 1984); spots count by what they know.
    """
    x = np.log(size / size.mean())[:, None]
    power, cv2 = np.zeros(k.shape[1]), np.zeros(k.shape[1])
    expected = size[:, None] * (k.sum(0) / size.sum())
    for last in (False,) * 5 + (True,):
        weight = 1 / (1 + cv2 * expected)
        known = weight * expected
        centred = x - (known * x).sum(0) / known.sum(0)
        information = np.maximum((known * centred**2).sum(0), 1e-6)
        if last:  # shrunk by its own noise (James and Stein, 1961), or every gene would follow library size a little
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


def not_beaten(head: str, pcc: dict[str, float]) -> list[str]:
    """Heads, best first, that are no worse than ``head`` by their correlations: a rival at once, a part of it clearly."""
    parts = {part.strip() for part in head.split("+")} - {*RIVALS, "mean"}
    lead = {name: value - pcc[head] - (_SAME_PCC if name in parts else 0) for name, value in pcc.items()}
    return sorted((n for n, ahead in lead.items() if n != head and ahead >= 0), key=lambda n: -pcc[n])
