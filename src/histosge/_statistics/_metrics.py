"""Scores of a prediction, gene by gene: agreement of two (n, genes) arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse, stats

from histosge._geometry import nearest_spots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

BASELINES = ("ridge", "nearest")
"""Baselines that are always scored too, on the same folds."""
_SAME_PCC = 0.01
"""A smaller difference to a part of the head is ignored: scores differ as much between seeds."""
_BLOCK = 512
"""Genes at a time: all genes may not fit in memory."""
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
    """Agreement of gene-gene correlations: for each gene, the correlation of its rows of the two matrices.

    The row has all other genes. A constant gene correlates with none: it is 0 in the rows of others and scores 0.
    """
    p, m = _unit_columns(predicted), _unit_columns(measured)
    n_genes = p.shape[1]
    found = np.zeros(n_genes)
    for start in range(0, n_genes, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, n_genes))
        one, other = p.T @ p[:, rows], m.T @ m[:, rows]
        for block in (
            one,
            other,
        ):  # replace the correlation of 1 of a gene with itself by the mean of the others, which has no effect
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
    """Structural similarity (Wang et al., 2004) of each gene; a window is a spot and its nearest neighbours.

    Mean over all spots. Both are in the unit of the measurement: a prediction that varies less than the measurement, or
    has another mean, scores lower. The dynamic range is that of the measured gene; 0 where it is constant.
    """
    mean = neighbour_mean(xy, n_neighbours=n_neighbours, itself=True)
    found = np.zeros(predicted.shape[1])
    for start in range(0, len(found), _BLOCK):
        part = slice(start, start + _BLOCK)
        found[part] = similarity_map(predicted[:, part], measured[:, part], mean=mean).mean(0)
    return found


def similarity_map(predicted: Floats, measured: Floats, *, mean: sparse.csr_matrix) -> Floats:
    """Structural similarity in the window of every spot, (n, genes)."""
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    extent = np.ptp(m, axis=0)
    c1, c2 = (_K1 * extent) ** 2, (_K2 * extent) ** 2
    mean_p, mean_m = mean @ p, mean @ m
    variances = mean @ (p**2 + m**2) - mean_p**2 - mean_m**2
    covariance = mean @ (p * m) - mean_p * mean_m
    top = (2 * mean_p * mean_m + c1) * (2 * covariance + c2)
    return np.where(extent > 0, top / np.where(extent > 0, (mean_p**2 + mean_m**2 + c1) * (variances + c2), 1.0), 0.0)


def neighbour_mean(
    xy: Floats, *, n_neighbours: int, itself: bool, groups: NDArray[np.int64] | None = None
) -> sparse.csr_matrix:
    """Matrix that averages over the nearest neighbours of each spot, with or without the spot itself."""
    n = len(xy)
    position, of = np.asarray(xy, np.float64), {"groups": groups, "spot_groups": groups}
    index, _, present = nearest_spots(position, position, k=n_neighbours, exclude=np.arange(n), **of)
    if itself:
        index, present = np.column_stack([np.arange(n), index]), np.column_stack([np.ones(n, bool), present])
    weight = present / np.maximum(present.sum(1, keepdims=True), 1)
    rows = np.repeat(np.arange(n), index.shape[1])
    return sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(n, n))


def morans_i(
    expression: Floats | sparse.spmatrix,
    xy: Floats,
    *,
    n_neighbours: int = 6,
    groups: NDArray[np.int64] | None = None,
) -> Floats:
    """Moran's I (Moran, 1950) of every column on the graph of nearest neighbours, with equal weights; 0 if constant.

    Spots of different ``groups`` (n_spots,), such as sections, are not neighbours.
    """
    graph = neighbour_mean(xy, n_neighbours=n_neighbours, itself=False, groups=groups).astype(np.float32)
    columns = sparse.csc_matrix(expression)
    found = np.zeros(columns.shape[1])
    for start in range(0, columns.shape[1], _BLOCK):
        part = np.asarray(columns[:, start : start + _BLOCK].todense(), dtype=np.float32)
        z = part - part.mean(axis=0, dtype=np.float64).astype(np.float32)
        power = (z.astype(np.float64) ** 2).sum(0)
        agree = (z * (graph @ z)).sum(0, dtype=np.float64)
        found[start : start + _BLOCK] = np.where(power > 1e-9, agree / np.where(power > 1e-9, power, 1), 0.0)
    return found


def better_baselines(head: str, pcc: dict[str, float]) -> list[str]:
    """Heads, best first, with correlations at least as high as ``head``; parts of ``head`` must be clearly higher."""
    parts = {part.strip() for part in head.split("+")} - {*BASELINES, "mean"}
    lead = {name: value - pcc[head] - (_SAME_PCC if name in parts else 0) for name, value in pcc.items()}
    return sorted((n for n, ahead in lead.items() if n != head and ahead >= 0), key=lambda n: -pcc[n])
