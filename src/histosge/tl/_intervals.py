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

    :func:`histosge.tl.predict` writes ``X`` and some numbers a gene, which the intervals of all levels are computed from.
    This function writes them as layers, for those who need them; plots and the report compute what they draw.

    Parameters
    ----------
    data
        Section with a table that :func:`histosge.tl.predict` wrote, or the table itself. The table may be lazy.
    level
        Target coverage of the intervals: the share of measurements at spot scale that they hold. Whole per cents from 0.01 to
        0.99, 0.995 and 0.999; of another number the next higher level is used, and the log says so.
    genes
        Genes to compute the intervals of. ``None`` takes all.
    key
        Table in ``data.tables``; not used for an ``AnnData``.
    inplace
        Write into the table, or return a table of ``genes`` and write nothing.

    Returns
    -------
    ``None``, or with ``inplace=False`` a table of ``genes`` alone with these layers. Written into the table:

    ``layers["sd"]``
        (n, genes) float32: standard deviation of a measurement at spot scale around ``X``.
    ``layers["lower"]``, ``layers["upper"]``
        (n, genes) float32: ends of the interval, in units of ``X``.
    ``uns["histosge"]["intervals"]["level"]``
        The level of these layers.

    Layers have the shape of ``X``: of genes that are not asked for they are NaN. Of a lazy table (``X`` is a dask array) they
    are dask arrays, and nothing is computed before it is asked for.

    Raises
    ------
    KeyError
        Where there is no such table or gene.
    MemoryError
        Where the layers would not fit in memory.
    TypeError
        Where ``data`` is neither section nor table.
    ValueError
        Where ``level`` is no share or above the highest level that is kept, where the table has no numbers of prediction
        intervals, or where a layer of one of these names is there that this function did not write.

    Notes
    -----
    Prediction intervals are conformal: calibrated on measured spots in blocks that no head saw. Their level is met at the scale of
    a spot, for places that are like the held-out spots; for averages over several places they are too wide, and for
    bins smaller than a spot they say what a spot centred there would measure. Where nothing was measured there are none,
    since those of other sections would be too narrow. With few spots a high level cannot be met: the intervals then
    reach to the largest error seen, with a warning.

    They are computed around ``X`` as it is: scaled or otherwise changed values have no intervals.

    See Also
    --------
    predict : writes the table.
    evaluate : measures what the intervals hold.

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
    asked = None if genes is None or not inplace else np.isin(np.arange(table.n_vars), columns)
    for layer, values in interval_layers(table.X, kept, level=level, genes=asked).items():
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
    """Refuse layers that would not fit into memory; those of a lazy table take none."""
    n_bytes, available = len(_keys.INTERVAL_LAYERS) * table.n_obs * table.n_vars * 4, available_memory()
    if not hasattr(table.X, "dask") and n_bytes > available:
        msg = (
            f"the intervals of {name} take {n_bytes / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB of memory are free. Ask "
            "for some genes, with genes=[...] and inplace=False, or open the table lazily, with anndata.experimental.read_lazy."
        )
        raise MemoryError(msg)
