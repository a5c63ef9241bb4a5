"""Which genes a model predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from histosge._settings import logger
from histosge._statistics import morans_i

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Bools = NDArray[np.bool_]

MIN_SHARE = 0.1
"""Genes detected in a smaller share of the spots are not chosen: too little is known of them to predict them."""


def choose_genes(
    expression: sparse.spmatrix, xy: Floats, *, n_genes: int, groups: NDArray[np.int64] | None = None
) -> Bools:
    """Choose the genes with the strongest spatial autocorrelation among those detected in a tenth of the spots.

    A gene without a spatial pattern cannot be predicted from the image or from neighbours. On small sections nearly all
    genes of high dispersion have none (docs/benchmarks.md). ``groups`` (n_spots,) are the sections of the spots.
    """
    columns = sparse.csc_matrix(expression, copy=True)
    columns.eliminate_zeros()
    seen = np.diff(columns.indptr) / columns.shape[0]
    candidates = np.flatnonzero(seen >= MIN_SHARE)
    if len(candidates) < n_genes:  # a small panel: take the rest in order too
        candidates = np.flatnonzero(seen > 0)
    strength = morans_i(columns[:, candidates], xy, groups=groups)
    chosen = np.zeros(columns.shape[1], dtype=bool)
    chosen[candidates[np.argsort(-strength, kind="stable")[:n_genes]]] = True
    return chosen


def select_genes(
    genes: int | Sequence[str] | str,
    names: pd.Index,
    expression: sparse.csr_matrix,
    xy: NDArray[np.float64],
    *,
    groups: NDArray[np.int64],
    fold: NDArray[np.int64],
    measured: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return genes to predict; genes chosen on each fold's training spots (folds, genes); which vary most in space.

    ``measured`` (sections, genes) says which section measures which gene. Genes that are measured on the spots of one
    fold only are not chosen.
    """
    n_folds = int(fold.max()) + 1
    if isinstance(genes, (int, np.integer)):
        n = min(int(genes), len(names))
        final = choose_genes(expression, xy, n_genes=n, groups=groups)
        known = [fold != f for f in range(n_folds)]
        per_fold = np.stack([choose_genes(expression[k], xy[k], n_genes=n, groups=groups[k]) for k in known])
        return final, per_fold, final
    if isinstance(genes, str):
        final = np.asarray((expression > 0).sum(axis=0)).ravel() > 0
    else:
        final = np.asarray(names.isin([str(g) for g in genes]))
    of_others = [np.any(measured[np.unique(groups[fold != f])], axis=0) for f in range(n_folds)]
    learnt = np.all(np.stack(of_others), axis=0)
    if not learnt[final].all():
        logger.info(
            "leaving out %d genes that are measured on the spots of one fold only (%s, ...)",
            (final & ~learnt).sum(), names[final & ~learnt][0],
        )  # fmt: skip
    final &= learnt
    # what a section does not measure is no pattern of a gene
    everywhere = np.flatnonzero(measured.all(axis=0))
    variable = np.zeros(len(names), dtype=bool)
    if len(everywhere):
        n = min(1000, len(everywhere))
        variable[everywhere] = choose_genes(expression[:, everywhere], xy, n_genes=n, groups=groups)
    variable &= final
    # scanpy's PCA uses the highly variable genes: mark some where none is marked
    highly_variable = variable if variable.any() else final
    return final, np.tile(final, (n_folds, 1)), highly_variable
