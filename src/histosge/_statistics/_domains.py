"""Spatial domains: leiden on a graph of similar expression plus a graph of near neighbours. Labels are not used."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from histosge._geometry import nearest_spots
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Ints = NDArray[np.int64]

SPATIAL_NEIGHBOURS = 6
"""Nearest locations that are joined in space: those around a spot of a hexagonal array."""
SPATIAL_WEIGHT = 0.2
"""Default share of space in the graph."""

MAX_RUNS = 20
"""Largest number of runs of leiden in the search for a number of domains."""

N_ITERATIONS = 2


def find_domains(
    expression: Floats | sparse.spmatrix,
    xy: Floats | None,
    *,
    resolution: float,
    n_domains: int | None,
    n_pcs: int,
    n_neighbours: int,
    spatial_weight: float,
    rng: int,
) -> Ints:
    """Find domains (n,), 0 the largest, of locations by their (n, g) log-normalised expression and position."""
    graph = domain_graph(expression, xy, n_pcs=n_pcs, n_neighbours=n_neighbours, spatial_weight=spatial_weight, rng=rng)
    return cut(graph, resolution=resolution, n_domains=n_domains, rng=rng)[0]


def domain_graph(
    expression: Floats | sparse.spmatrix,
    xy: Floats | None,
    *,
    n_pcs: int,
    n_neighbours: int,
    spatial_weight: float,
    rng: int,
) -> sparse.csr_matrix:
    """Join locations of similar expression (scanpy's neighbours, McInnes et al., 2018), and adjacent ones: (n, n).

    ``spatial_weight`` is the share of the weight that is in space. The total weight is that of scanpy's graph: the
    refinement of leiden is random on an absolute scale (igraph's ``beta``), so another total gives other domains.
    """
    if xy is None or spatial_weight == 0:
        return _expression_graph(expression, n_pcs=n_pcs, n_neighbours=n_neighbours, rng=rng)
    in_space = spatial_graph(xy)
    if spatial_weight == 1:
        return in_space
    similar = _expression_graph(expression, n_pcs=n_pcs, n_neighbours=n_neighbours, rng=rng).astype(np.float64)
    in_space *= similar.sum() / in_space.sum()  # one factor for all rows: the graph stays symmetric
    return sparse.csr_matrix((1 - spatial_weight) * similar + spatial_weight * in_space)


def _expression_graph(
    expression: Floats | sparse.spmatrix, *, n_pcs: int, n_neighbours: int, rng: int
) -> sparse.csr_matrix:
    import scanpy as sc

    held = _holder(expression)
    n, n_genes = held.shape
    few = n_genes <= n_pcs  # all components of few genes are a rotation of the genes
    if not few:
        sc.pp.pca(held, n_comps=min(n_pcs, n - 1), random_state=rng)
    with warnings.catch_warnings():  # from identical locations scanpy makes a graph that scipy finds inefficient
        warnings.simplefilter("ignore", sparse.SparseEfficiencyWarning)
        sc.pp.neighbors(held, n_neighbors=n_neighbours, use_rep="X" if few else "X_pca", random_state=rng)
    return sparse.csr_matrix(held.obsp["connectivities"])


def spatial_graph(xy: Floats) -> sparse.csr_matrix:
    """Join every location to its nearest ones and to any at the same distance: on a square lattice eight, not six."""
    n = len(xy)
    position = np.asarray(xy, np.float64)
    index, distance, present = nearest_spots(position, position, k=2 * SPATIAL_NEIGHBOURS, exclude=np.arange(n))
    near = present & (distance <= 1.01 * distance[:, [SPATIAL_NEIGHBOURS - 1]])
    near[:, :SPATIAL_NEIGHBOURS] = present[:, :SPATIAL_NEIGHBOURS]
    row, column = np.nonzero(near)
    graph = sparse.csr_matrix((np.ones(len(row)), (row, index[row, column])), shape=(n, n))
    return graph.maximum(graph.T)


def cut(
    graph: sparse.csr_matrix,
    *,
    resolution: float,
    n_domains: int | None,
    rng: int,
    partition: Callable[..., Ints] | None = None,
) -> tuple[Ints, float]:
    """Cut a graph into domains; return (n,) domains, 0 the largest, and the resolution.

    With ``n_domains`` the resolution is halved or doubled until it lies between too few and too many domains, and
    then bisected on its logarithm. ``partition`` is called instead of :func:`leiden`, with the same arguments.
    """
    partition = leiden if partition is None else partition
    label = partition(graph, resolution=resolution, rng=rng)
    if n_domains is None:
        return label, resolution
    best, nearest = (label, resolution), int(label.max()) + 1
    low, high = 0.0, np.inf
    for _ in range(MAX_RUNS - 1):
        found = int(label.max()) + 1
        if found == n_domains:
            break
        low, high = (resolution, high) if found < n_domains else (low, resolution)
        if low > 0 and np.isfinite(high):
            resolution = float(np.sqrt(low * high))
        else:
            resolution *= 2 if low > 0 else 0.5
        label = partition(graph, resolution=resolution, rng=rng)
        if abs(int(label.max()) + 1 - n_domains) < abs(nearest - n_domains):
            best, nearest = (label, resolution), int(label.max()) + 1
    if nearest != n_domains:
        logger.warning(
            "n_domains=%d was not found in %d runs of leiden: the nearest number is %d domains (resolution %.4g)",
            n_domains, MAX_RUNS, nearest, best[1],
        )  # fmt: skip
    return best


def leiden(graph: sparse.csr_matrix, *, resolution: float, rng: int) -> Ints:
    """Run leiden (Traag et al., 2019) once; domains are numbered by size."""
    import scanpy as sc

    held = _holder(sparse.csr_matrix((graph.shape[0], 1), dtype=np.float32))
    sc.tl.leiden(
        held,
        resolution,
        adjacency=graph,
        flavor="igraph",
        n_iterations=N_ITERATIONS,
        directed=False,
        random_state=rng,
        key_added="domain",
    )
    _, label, size = np.unique(held.obs["domain"].to_numpy(), return_inverse=True, return_counts=True)
    rank = np.empty(len(size), np.int64)
    rank[np.argsort(-size, kind="stable")] = np.arange(len(size))
    return rank[label]


def _holder(values: Floats | sparse.spmatrix) -> AnnData:
    """Make an AnnData for scanpy, with dummy names of rows and columns."""
    import anndata as ad

    return ad.AnnData(values)


def agreement(domains: Ints, labels: NDArray[np.generic]) -> dict[str, float]:
    """Compare with labels: adjusted Rand index (Hubert and Arabie, 1985) and normalised mutual information.

    Rows without a label are left out by the caller.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "ari": float(adjusted_rand_score(labels, domains)),
        "nmi": float(normalized_mutual_info_score(labels, domains)),
    }
