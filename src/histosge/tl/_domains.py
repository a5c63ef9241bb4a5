"""Find spatial domains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from histosge import _keys
from histosge._section import feature_kinds, find_table, log_left_out
from histosge._settings import check_seed, logger
from histosge._statistics import N_ITERATIONS, SPATIAL_NEIGHBOURS, SPATIAL_WEIGHT, cut, domain_graph

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    Floats = NDArray[np.floating]

_METHOD = "histosge.tl.domains"
"""Marks an entry of ``uns`` that was written here and may be replaced."""


def domains(
    data: AnnData | SpatialData,
    *,
    key: str = "histosge",
    key_added: str = "domain",
    resolution: float = 1.0,
    n_domains: int | None = None,
    n_pcs: int = 30,
    n_neighbours: int = 15,
    spatial_weight: float = SPATIAL_WEIGHT,
    rng: int = 0,
    inplace: bool = True,
) -> pd.Series | None:
    """Find spatial domains: principal components, neighbours in expression and in space, one leiden clustering.

    With ``spatial_weight=0`` it is ``sc.pp.pca``, ``sc.pp.neighbors`` (with ``use_rep="X_pca"``) and ``sc.tl.leiden``
    on a copy. A seed gives one clustering: no label is read, and no result is chosen among several.

    Parameters
    ----------
    data
        Section with a table that :func:`histosge.tl.predict` wrote, or any table of log-normalised expression.
    key
        Table in ``data.tables``; not used for an ``AnnData``.
    key_added
        Column of ``obs`` written, and key of ``uns``.
    resolution
        Larger gives more domains. With ``n_domains`` the search starts here.
    n_domains
        Number of domains to find. Their resolution is searched for in at most 20 runs of leiden.
    n_pcs
        Principal components of the expression.
    n_neighbours
        Nearest neighbours in expression of each location, including itself, as in scanpy.
    spatial_weight
        Share of the edges between neighbours in space in all edge weight, 0 to 1. Larger gives smoother domains.
    rng
        Seed. The same seed gives the same domains on the same machine.
    inplace
        Whether to write into the table, or to return the column and write nothing.

    Returns
    -------
    ``None``, or with ``inplace=False`` the column. Written into the table:

    ``obs["{key_added}"]``
        (n,) categorical: ``"0"`` the largest domain, ``"1"`` the next, ...
    ``uns["{key_added}"]["params"]``
        Strings and numbers: all settings, and the resolution that was used.

    Raises
    ------
    KeyError
        Where there is no table ``key``, or no ``obsm["spatial"]`` with ``spatial_weight`` above 0.
    ValueError
        Where an argument is out of range, the values are raw counts, or this function did not write an existing
        ``key_added``. The table is then unchanged.

    Notes
    -----
    Genes are those of ``var["highly_variable"]`` where the table has it. The graph in space joins each location to its
    6 nearest ones, and to any others at the same distance. It is scaled to the total weight of the graph in expression
    before the two are added. A table with at most ``n_pcs`` genes is used without principal components.

    See Also
    --------
    predict : writes the table.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20, n_folds=2)
    >>> sge.tl.domains(sdata, n_domains=4)
    >>> list(sdata.tables["histosge"].obs["domain"].cat.categories)
    ['0', '1', '2', '3']
    """
    table, name = find_table(data, key)
    _check_arguments(
        n=table.n_obs,
        resolution=resolution,
        n_domains=n_domains,
        n_pcs=n_pcs,
        n_neighbours=n_neighbours,
        spatial_weight=spatial_weight,
        rng=rng,
    )
    if inplace:
        _check_free(table, key_added, name)
    expression = _expression(table, name)
    xy = _places(table, name) if spatial_weight > 0 else None
    graph = domain_graph(
        expression, xy, n_pcs=n_pcs, n_neighbours=n_neighbours, spatial_weight=spatial_weight, rng=int(rng)
    )
    label, used = cut(graph, resolution=float(resolution), n_domains=n_domains, rng=int(rng))
    n_found = int(label.max()) + 1
    column = pd.Series(
        pd.Categorical.from_codes(label, categories=pd.Index([str(i) for i in range(n_found)])),
        index=table.obs_names,
        name=key_added,
    )
    if not inplace:
        return column
    if key_added in table.obs:
        logger.warning("replacing obs[%r] of an earlier run", key_added)
    table.obs[key_added] = column
    table.uns[key_added] = {
        "params": {
            "method": _METHOD,
            "resolution": float(used),
            "random_state": int(rng),
            "n_iterations": N_ITERATIONS,
            "n_pcs": int(n_pcs),
            "n_neighbours": int(n_neighbours),
            "spatial_weight": float(spatial_weight),
            "spatial_neighbours": SPATIAL_NEIGHBOURS,
            "n_genes": int(expression.shape[1]),
            **({} if n_domains is None else {"n_domains": int(n_domains)}),
        }
    }
    logger.info(
        "added obs[%r] to %s: %d domains of %d locations (resolution %.4g)", key_added, name, n_found, table.n_obs, used
    )
    return None


def _check_arguments(
    *,
    n: int,
    resolution: float,
    n_domains: int | None,
    n_pcs: int,
    n_neighbours: int,
    spatial_weight: float,
    rng: Any,
) -> None:
    if not (np.isfinite(resolution) and resolution > 0):
        msg = f"resolution={resolution!r} must be a number above 0; 1 is usual, and larger gives more domains."
        raise ValueError(msg)
    if not 0 <= spatial_weight <= 1:
        msg = f"spatial_weight={spatial_weight!r} must lie between 0 (expression only) and 1 (space only)."
        raise ValueError(msg)
    if n_pcs < 1:
        msg = f"n_pcs={n_pcs!r} must be at least 1."
        raise ValueError(msg)
    if not 2 <= n_neighbours < n:
        msg = (
            f"n_neighbours={n_neighbours!r} must be at least 2 and fewer than the {n} rows of the table. "
            "Lower it, or pass a table with more locations."
        )
        raise ValueError(msg)
    if n_domains is not None and not 2 <= n_domains <= n:
        msg = f"n_domains={n_domains!r} must lie between 2 and the number of locations, {n}; None follows resolution=."
        raise ValueError(msg)
    check_seed(rng)  # leiden takes a seed and no generator


def _check_free(table: AnnData, key_added: str, name: str) -> None:
    """Raise where ``key_added`` would replace something of the user's."""
    _keys.check("key_added", key_added)
    written = table.uns.get(key_added)
    params = written.get("params") if isinstance(written, Mapping) else None
    ours = isinstance(params, Mapping) and params.get("method") == _METHOD
    # SpatialData ignores the case of names
    taken = [
        f"{where}[{found!r}]"
        for where, names in (("obs", table.obs.columns), ("uns", table.uns))
        for found in names
        if str(found).lower() == key_added.lower() and not (ours and found == key_added)
    ]
    if taken:
        msg = (
            f"key_added={key_added!r}: {name} holds {' and '.join(taken)} already, which `sge.tl.domains` did not "
            "write; choose another name, or remove it first."
        )
        raise ValueError(msg)


def _expression(table: AnnData, name: str) -> Floats | sparse.csr_matrix:
    """Return the values of the genes to use, dense or sparse float32; raise where they are no logarithms."""
    if table.X is None or table.n_vars == 0:
        msg = f"{name} has no expression in X: pass one that `sge.tl.predict` wrote, or log-normalised expression."
        raise ValueError(msg)
    values, kinds = table.X, feature_kinds(table.var)
    log_left_out(kinds.dropna(), level=logging.INFO)
    used = kinds.isna().to_numpy()
    if "highly_variable" in table.var:
        used = used & table.var["highly_variable"].isin([True]).to_numpy()  # arrays of pandas are read-only
        if not used.any():
            msg = f"var['highly_variable'] of {name} marks no gene. Mark some, or delete the column to use all genes."
            raise ValueError(msg)
    if not used.any():
        msg = (
            f"{name} holds no gene expression: its var says so of all features. Pass a table of genes, or delete that "
            "column of var."
        )
        raise ValueError(msg)
    if not used.all():
        values = values[:, np.flatnonzero(used)]
    values = values.compute() if hasattr(values, "compute") else values
    found: Floats | sparse.csr_matrix
    if sparse.issparse(values):
        found = sparse.csr_matrix(values, dtype=np.float32)
    else:
        found = np.asarray(values, dtype=np.float32)
    stored = found.data if sparse.issparse(found) else found
    n_bad = int((~np.isfinite(stored)).sum())
    if n_bad:
        msg = f"{name} holds {n_bad} values that are NaN or infinite: remove or replace them first."
        raise ValueError(msg)
    low, high = found.min(axis=0), found.max(axis=0)
    if not np.any((high - low).toarray() if sparse.issparse(low) else high - low):
        msg = f"no gene of {name} varies between locations: there are no domains to find."
        raise ValueError(msg)
    if np.all(stored == np.rint(stored)):
        msg = (
            f"the values of {name} are whole numbers, raw counts by the look of them: domains would follow the library "
            "size. Run `sc.pp.normalize_total(adata, target_sum=1e4)` and `sc.pp.log1p(adata)` first."
        )
        raise ValueError(msg)
    return found


def _places(table: AnnData, name: str) -> Floats:
    """Return the positions of the rows, (n, 2)."""
    if "spatial" not in table.obsm:
        msg = (
            f"{name} has no obsm['spatial'], only {list(table.obsm)}: write the locations (x, y) there, "
            "or pass spatial_weight=0 for expression alone."
        )
        raise KeyError(msg)
    xy = np.asarray(table.obsm["spatial"], dtype=float)
    if xy.ndim != 2 or xy.shape[1] < 2 or not np.isfinite(xy).all():
        msg = (
            f"obsm['spatial'] of {name} must hold a finite (x, y) for each row, not an array of shape {xy.shape} "
            f"with {int((~np.isfinite(xy)).sum())} values missing. Correct it, or pass spatial_weight=0."
        )
        raise ValueError(msg)
    regions = np.atleast_1d(table.uns.get("spatialdata_attrs", {}).get("region", []))
    if len(regions) > 1:
        msg = (
            f"{name} annotates several regions {list(map(str, regions))}, whose locations may overlap. "
            "Pass one section at a time, or spatial_weight=0."
        )
        raise ValueError(msg)
    return xy[:, :2]
