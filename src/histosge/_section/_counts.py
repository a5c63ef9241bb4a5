"""Tables of ``SpatialData`` → log1p-normalised expression of the spots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from histosge._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

TARGET_SUM = 1e4
"""Counts of a spot are scaled to this sum before log1p, as in the paper."""


def named_layers(table: AnnData) -> list[str]:
    """Names of the layers; anndata 0.13 lists ``X`` among them, as ``None``."""
    return [name for name in table.layers if name is not None]


def match_rows(table: AnnData, element: GeoDataFrame, spots_key: str, table_key: str) -> tuple[Any, pd.Index, int]:
    """Which rows of the table belong to the spots, and which spots these are: matched by name, never by position."""
    from spatialdata.models import get_table_keys

    _, region_key, instance_key = get_table_keys(table)
    rows = np.flatnonzero((table.obs[region_key].astype(str) == spots_key).to_numpy())
    left_out = 0
    if "in_tissue" in table.obs:
        words = table.obs["in_tissue"].astype(str).str.lower().replace({"true": "1", "false": "0"})
        inside = pd.to_numeric(words, errors="coerce").fillna(1).to_numpy()[rows] > 0
        left_out = int((~inside).sum())
        if left_out:
            logger.info("leaving out %d spots with obs['in_tissue'] = 0", left_out)
        rows = rows[inside]
    instances = pd.Index(table.obs[instance_key].to_numpy()[rows])
    for what, names in ((f"the spots {spots_key!r}", element.index), (f"rows of table {table_key!r}", instances)):
        if not names.is_unique:
            twice = list(names[names.duplicated()][:3])
            msg = f"{what}: names are not unique, so that rows cannot be matched (for example {twice}). Rename or drop them."
            raise ValueError(msg)
    known = instances.isin(element.index)
    if not known.any():
        msg = (
            f"table {table_key!r} does not annotate the spots {spots_key!r}: none of its {len(instances)} "
            f"{instance_key!r} values (for example {list(instances[:2])}) is in the element's index "
            f"(for example {list(element.index[:2])}). Pass the table_key= that annotates these spots, or link them with "
            "`TableModel.parse`."
        )
        raise ValueError(msg)
    if not known.all():
        logger.warning("leaving out %d rows of table %r that have no spot", (~known).sum(), table_key)
    return rows[known], instances[known], left_out


def read_counts(table: AnnData, layer: str | None, rows: Any, table_key: str) -> sparse.csr_matrix:
    if layer is not None and layer not in table.layers:
        msg = f"layer={layer!r} is not among the layers of table {table_key!r}: {named_layers(table)} (None means X)."
        raise KeyError(msg)
    matrix = table.X if layer is None else table.layers[layer]
    if matrix is None or matrix.shape[1] == 0:
        msg = f"table {table_key!r} has no values in {'X' if layer is None else layer}. Name a layer: {named_layers(table)}."
        raise ValueError(msg)
    part = matrix[rows]
    part = part.compute() if hasattr(part, "compute") else part
    part = sparse.csr_matrix(part).astype(np.float64)
    bad = ~np.isfinite(part.data)
    if bad.any():
        spots = np.unique(np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))[bad])
        msg = (
            f"counts of table {table_key!r} hold {bad.sum()} values that are NaN or infinite, in {len(spots)} spots. "
            "Remove or replace them first, or name another layer=."
        )
        raise ValueError(msg)
    if (part.data < 0).any():
        msg = (
            f"counts of table {table_key!r} hold {(part.data < 0).sum()} negative values (least {part.data.min():.4g}). "
            f"Pass raw counts or log-normalised values, not scaled ones: layer= one of {named_layers(table)}."
        )
        raise ValueError(msg)
    return part


def log_normalise(counts: sparse.csr_matrix, table: AnnData) -> tuple[sparse.csr_matrix, bool]:
    """Scale every spot to ``TARGET_SUM`` and take log1p, unless that was done before."""
    values = counts.data
    whole = bool(np.all(values == np.rint(values)))
    logged = not whole and (values.max() < 20 or "log1p" in table.uns)
    if logged:
        logger.info("values are log-normalised already (not whole, largest %.3g): taken as they are", values.max())
        return counts.astype(np.float32), True
    if not whole:
        logger.info("values are not whole numbers (largest %.4g): treated as corrected counts", values.max())
    return per_target_sum(counts), False


def per_target_sum(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Scale every spot to ``TARGET_SUM`` and take log1p; a spot without counts stays 0."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sparse.diags(TARGET_SUM / np.where(total > 0, total, 1)) @ counts
    return sparse.csr_matrix(scaled.log1p()).astype(np.float32)
