"""Prediction intervals of a table: the numbers a gene that are kept, and the layers that are computed from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge import _keys
from histosge._statistics import PredictionIntervals, interval_around

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData


def find_table(data: AnnData | SpatialData, key: str) -> tuple[AnnData, str]:
    """Find the table, and what to call it in messages."""
    from anndata import AnnData

    if isinstance(data, AnnData):
        return data, "the AnnData"
    if not hasattr(data, "tables"):
        msg = f"data is a {type(data).__name__}: pass a SpatialData, or one of its tables (AnnData)."
        raise TypeError(msg)
    if key not in data.tables:
        msg = (
            f"key={key!r} is not among the tables of this SpatialData: {list(data.tables)}. "
            "Run `sge.tl.predict` first, or name another table."
        )
        raise KeyError(msg)
    return data.tables[key], f"table {key!r}"


def write_intervals(table: AnnData, intervals: PredictionIntervals) -> None:
    """Keep the numbers of all genes in the table, and what they are."""
    table.varm[_keys.INTERVALS] = intervals.numbers
    kept = {"columns": np.array(intervals.columns, object), "levels": intervals.levels}
    table.uns[_keys.UNS] = {**table.uns[_keys.UNS], "intervals": kept}


def intervals_of(table: AnnData, name: str) -> PredictionIntervals:
    """Read the numbers of all genes, in the order of the table."""
    made = table.uns.get(_keys.UNS, {})
    if _keys.INTERVALS in table.varm and "intervals" in made:
        numbers = np.asarray(table.varm[_keys.INTERVALS], np.float32)  # lazy ones are read
        return PredictionIntervals(numbers, np.asarray(made["intervals"]["levels"], float), int(made["n_spots"]))
    if "head" in made and "table" not in made:
        msg = (
            f"{name} has no prediction intervals: nothing was measured on this section, and those of other sections "
            "would be too narrow. To score a model on other sections: sge.tl.evaluate([...], split='sections')."
        )
    else:
        msg = (
            f"{name} holds no numbers of prediction intervals (varm[{_keys.INTERVALS!r}]): pass a table that "
            "`sge.tl.predict` wrote, with its varm and uns, or predict again."
        )
    raise ValueError(msg)


def columns_of(table: AnnData, genes: str | Sequence[str] | None, name: str) -> NDArray[np.int64]:
    """Columns of the genes, in the given order."""
    if genes is None:
        return np.arange(table.n_vars)
    wanted = pd.Index([genes] if isinstance(genes, str) else list(genes)).unique()
    missing = list(wanted.difference(table.var_names))
    if missing or not len(wanted):
        msg = f"genes {missing} are not in {name}: it has {list(table.var_names[:5])} … Predict them with genes=[...]."
        raise KeyError(msg)
    return np.asarray(table.var_names.get_indexer(wanted), np.int64)


def refuse_foreign_layers(layers: Iterable[str], uns: Mapping[str, Any], name: str) -> None:
    """Refuse to replace layers of the user."""
    there = set(layers)
    foreign = [
        layer for layer in _keys.INTERVAL_LAYERS if layer in there and "level" not in uns[_keys.UNS]["intervals"]
    ]
    if foreign:
        msg = (
            f"{name} has the layers {foreign} already, which `sge.tl.intervals` did not write: rename or remove them "
            "first."
        )
        raise ValueError(msg)


def interval_layers(
    values: Any, intervals: PredictionIntervals, *, level: float, genes: NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Layers ``sd``, ``lower`` and ``upper`` around ``X``, (n, g): float32 arrays, or dask arrays of a dask array.

    Parameters
    ----------
    values
        ``X`` of the table: an array, sparse or dense, in memory or lazy.
    intervals
        Those of its genes.
    level
        A level of the grid.
    genes
        (g,) which genes; the others are NaN. ``None`` takes all.
    """
    numbers = intervals.at(level)  # (5, g)
    if genes is not None:
        numbers[:, ~genes] = np.nan
    if not hasattr(values, "dask"):
        return dict(zip(_keys.INTERVAL_LAYERS, interval_around(predicted_values(values), numbers), strict=True))
    import dask.array as da

    of_columns = da.from_array(numbers, chunks=(-1, values.chunks[1]))
    stacked = da.map_blocks(
        _stacked, values, of_columns, dtype=np.float32, new_axis=0, chunks=((3,), *values.chunks),
        meta=np.empty((0, 0, 0), np.float32),
    )  # fmt: skip
    return dict(zip(_keys.INTERVAL_LAYERS, stacked, strict=True))


def _stacked(values: Any, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """One block of the three layers, (3, m, g)."""
    return np.stack(interval_around(predicted_values(values), numbers))


def predicted_values(values: Any) -> NDArray[np.float32]:
    """Rows of ``X`` as a dense array. Predictions are never negative: an ``X`` that is has been scaled or centred."""
    found = np.asarray(values.toarray() if hasattr(values, "toarray") else values, np.float32)
    if found.size and (lowest := found.min()) < 0:
        msg = (
            f"X holds {lowest:g}, but predicted expression is never negative: X was scaled or centred, and intervals "
            "around it would be wrong. Compute them around X as `sge.tl.predict` wrote it; keep scaled values in a "
            "layer, or scale a copy: sc.pp.scale(table, copy=True). To plot this X, leave 'width' out of panels=."
        )
        raise ValueError(msg)
    return found
