"""What a prediction is worth, gene by gene: agreement of two (n, genes) arrays. Never torch, never SpatialData."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from histosge._geometry import nearest_spots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]


def correlation(predicted: Floats, measured: Floats) -> Floats:
    """Pearson correlation of each column; 0, not NaN, where a prediction or a measurement is constant."""
    p = np.asarray(predicted, np.float64) - np.mean(predicted, axis=0, dtype=np.float64)
    m = np.asarray(measured, np.float64) - np.mean(measured, axis=0, dtype=np.float64)
    size = np.sqrt((p**2).sum(0) * (m**2).sum(0))
    scale = np.sqrt((np.asarray(predicted, np.float64) ** 2).sum(0) * (np.asarray(measured, np.float64) ** 2).sum(0))
    constant = size <= 1e-12 * scale  # rounding of a constant column, or an empty one
    return np.where(constant, 0.0, (p * m).sum(0) / np.where(constant, 1.0, size))


def morans_i(expression: Floats | sparse.spmatrix, xy: Floats, *, n_neighbours: int = 6) -> Floats:
    """Moran's I (Moran, 1950) of every column on the graph of nearest neighbours, rows weighted alike; 0 if constant."""
    n = len(xy)
    place = np.asarray(xy, np.float64)
    index, _, present = nearest_spots(place, place, k=n_neighbours, exclude=np.arange(n))
    weight = present / np.maximum(present.sum(1, keepdims=True), 1)
    rows = np.repeat(np.arange(n), index.shape[1])
    graph = sparse.csr_matrix((weight.ravel().astype(np.float32), (rows, index.ravel())), shape=(n, n))
    columns = sparse.csc_matrix(expression)
    found = np.zeros(columns.shape[1])
    for start in range(0, columns.shape[1], 512):  # all genes at once need not fit in memory
        part = np.asarray(columns[:, start : start + 512].todense(), dtype=np.float32)
        z = part - part.mean(axis=0, dtype=np.float64).astype(np.float32)
        power = (z.astype(np.float64) ** 2).sum(0)
        agree = (z * (graph @ z)).sum(0, dtype=np.float64)
        found[start : start + 512] = np.where(power > 1e-9, agree / np.where(power > 1e-9, power, 1), 0.0)
    return found
