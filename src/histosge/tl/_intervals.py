"""Compute prediction intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from histosge import _keys
from histosge._section import columns_of, find_table, interval_layers, intervals_of, refuse_foreign_layers
from histosge._settings import available_memory, logger
from histosge._statistics import LEVEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData


def intervals(
    data: AnnData | SpatialData,
    *,
    level: float = LEVEL,
    genes: str | Sequence[str] | None = None,
    key: str = "histosge",
    inplace: bool = True,
) -> AnnData | None:
    """Compute prediction intervals of a predicted table, at any level.

    :func:`histosge.tl.predict` writes ``X`` and some numbers for each gene, from which intervals of all levels are
    computed. This function writes the intervals as layers. Plots and the report do not need the layers.

    Parameters
    ----------
    data
        Section with a table that :func:`histosge.tl.predict` wrote, or the table itself. The table may be lazy.
    level
        Target coverage: the share of measurements at spot scale that lie in the intervals. Whole per cents from 0.01 to
        0.99, 0.995 and 0.999; for another number the next higher level is used and logged.
    genes
        Genes whose intervals are computed. ``None`` takes all.
    key
        Table in ``data.tables``; not used for an ``AnnData``.
    inplace
        Whether to write into the table, or to return a table of ``genes`` and write nothing.

    Returns
    -------
    ``None``, or with ``inplace=False`` a table of ``genes`` alone with these layers. Written into the table:

    ``layers["sd"]``
        (n, genes) float32: standard deviation of a measurement at spot scale around ``X``.
    ``layers["lower"]``, ``layers["upper"]``
        (n, genes) float32: ends of the interval, in units of ``X``.
    ``uns["histosge"]["intervals"]["level"]``
        The level of these layers.

    Layers have the shape of ``X`` and are NaN for other genes. For a lazy table (``X`` is a dask array) they are dask
    arrays that are computed when they are read.

    Raises
    ------
    KeyError
        Where there is no such table or gene.
    MemoryError
        Where the layers would not fit in memory.
    TypeError
        Where ``data`` is neither section nor table.
    ValueError
        Where ``level`` is no share or above the highest level, where the table has no numbers of prediction intervals,
        where ``X`` has negative values, or where this function did not write an existing layer of one of these names.

    Notes
    -----
    Prediction intervals are conformal: they are calibrated on measured spots in held-out blocks. They have their level
    at the scale of a spot, for targets that are like the held-out spots. For averages over several targets they are too
    wide. For bins smaller than a spot they describe the measurement of a spot centred at the bin. Where nothing was
    measured there are none, since those of other sections are too narrow. A high level is not reached with few spots:
    the intervals then have the width of the largest error, with a warning.

    They are computed around the present ``X``, which must be as it was predicted. A scaled or centred ``X`` is refused,
    since it has negative values; another change is not noticed.

    See Also
    --------
    predict : writes the table.
    evaluate : measures the coverage of the intervals.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20, n_folds=2)
    >>> sge.tl.intervals(sdata, level=0.8)
    >>> table = sdata.tables["histosge"]
    >>> bool((table.layers["lower"] <= table.X).all())
    True
    >>> sge.tl.intervals(table, level=0.95, genes="GENE001", inplace=False).shape[1]
    1
    """
    table, name = find_table(data, key)
    kept = intervals_of(table, name)
    level = kept.choose_level(level)
    columns = columns_of(table, genes, name)
    if inplace:
        refuse_foreign_layers(table.layers, table.uns, name)
    else:
        table, kept = table[:, columns].copy(), kept.take(columns)
    _check_memory(table, name)
    wanted = None if genes is None or not inplace else np.isin(np.arange(table.n_vars), columns)
    for layer, values in interval_layers(table.X, kept, level=level, genes=wanted).items():
        table.layers[layer] = values
    made = table.uns[_keys.UNS]
    table.uns[_keys.UNS] = {**made, "intervals": {**made["intervals"], "level": level}}
    if not inplace:
        return table
    logger.info(
        "added layers %s to %s: intervals at level %g of %d genes",
        ", ".join(map(repr, _keys.INTERVAL_LAYERS)), name, level, len(columns),
    )  # fmt: skip
    return None


def _check_memory(table: AnnData, name: str) -> None:
    """Raise where the layers would not fit into memory; those of a lazy table take none."""
    n_bytes, available = len(_keys.INTERVAL_LAYERS) * table.n_obs * table.n_vars * 4, available_memory()
    if not hasattr(table.X, "dask") and n_bytes > available:
        msg = (
            f"the intervals of {name} take {n_bytes / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB of memory are "
            "free. Compute them for some genes, with genes=[...] and inplace=False, or open the table lazily, with "
            "anndata.experimental.read_lazy."
        )
        raise MemoryError(msg)
