"""Shares of footprints (the disc of a spot, a square bin, a cell's outline) in the cells of a grid.

All areas are exact: closed forms for discs and squares, Green's theorem for polygons. Nothing is sampled.
Positions are (x, y) in pixels of one plane, where pixel ``i`` covers ``[i, i + 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from scipy import sparse

from histosge._geometry._footprints import Footprints, count_bad

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from histosge._geometry._lattice import Floats, Ints

_PAIRS = 2**18
"""Pairs of footprint and cell computed at a time: apart from the result, they need about 60 MB."""
EDGE = 1e-9
"""A footprint that crosses an edge by less than this share of a cell, and of itself, only touches it: rounding."""
_ROUNDING = 1e-12
"""A share below this is rounding of a difference of numbers near 1."""
_UNRESOLVED = 1e-6
"""Largest error of a sum of shares that may be rounding."""
_OFF_GRID = 0.01
"""Largest distance of a bin's centre from the position of its row and column, in bins."""


@dataclass(frozen=True)
class Grid:
    """Square cells in rows and columns.

    Cell (row, col) covers ``[x0 + col * cell_px, x0 + (col + 1) * cell_px)`` and the same in y.
    """

    x0: float
    y0: float
    cell_px: float
    n_rows: int
    n_cols: int

    def __post_init__(self) -> None:
        if not (np.isfinite([self.x0, self.y0, self.cell_px]).all() and self.cell_px > 0):
            msg = f"{self}: x0 and y0 must be finite, cell_px finite and above 0."
            raise ValueError(msg)
        if min(self.n_rows, self.n_cols) < 1:
            msg = f"{self}: a grid has at least one row and one column."
            raise ValueError(msg)


def area_fractions(footprints: Footprints, grid: Grid) -> sparse.csr_matrix:
    """Share of each footprint's area that lies in each cell.

    Parameters
    ----------
    footprints
        Areas, all of them inside the grid.
    grid
        The cells.

    Returns
    -------
    (n, n_rows * n_cols), cells row by row; rows sum to 1. float64, because rows of a float32 matrix would sum to 1
    only to 1e-7, and products of such matrices to less: cast once, where it meets the tokens.
    """
    if footprints.turn:
        footprints = footprints.as_polygons()
    first, count = _cells_around(footprints, grid)
    n_cells = int(grid.n_rows) * int(grid.n_cols)
    itype = sparse.get_index_dtype(maxval=max(n_cells, int(count.prod(axis=1).sum())))
    data, indices, lengths = [], [], []
    for rows in _parts(footprints, count):
        part, pairs = footprints.take(rows), _Pairs.lay(first[rows], count[rows], grid)
        share = _SHARES[part.kind](part, pairs)
        _resolved(np.bincount(pairs.own, share, len(part)), start=rows.start)
        kept = share > _ROUNDING
        own, cell, share = pairs.own[kept], pairs.cell[kept], share[kept]
        data.append(share / np.bincount(own, share, len(part))[own])
        indices.append((cell[:, 1] * grid.n_cols + cell[:, 0]).astype(itype))
        lengths.append(np.bincount(own, minlength=len(part)))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(itype)
    shape = (len(footprints), n_cells)
    return sparse.csr_matrix((np.concatenate(data), np.concatenate(indices), indptr), shape=shape)


def spot_by_bin(spots: Footprints, bins_xy_px: Floats, *, bin_px: float, row: Ints, col: Ints) -> sparse.csr_matrix:
    """Share of each spot's area in each bin of a regular grid, of which some bins (off the tissue) are missing.

    Parameters
    ----------
    spots
        Footprints of the spots.
    bins_xy_px
        (n_bins, 2) centres of the bins.
    bin_px
        Edge of a bin.
    row, col
        (n_bins,) position of each in the grid.

    Returns
    -------
    (n_spots, n_bins) float64. Rows sum to 1 over the bins given; a spot without any has an empty row.
    """
    shape = (len(spots), len(bins_xy_px))
    if 0 in shape:
        return sparse.csr_matrix(shape, dtype=np.float64)
    index = np.column_stack([col, row]).astype(np.int64)  # (n_bins, 2)
    origin = _origin_of_bins(np.asarray(bins_xy_px, float), index, bin_px=bin_px)
    box = spots.bounds()
    low = np.floor((box[:, :2].min(axis=0) - origin) / bin_px).astype(np.int64)
    high = np.ceil((box[:, 2:].max(axis=0) - origin) / bin_px).astype(np.int64)
    n_cols, n_rows = (int(n) for n in high - low)
    x0, y0 = (float(v) for v in origin + low * bin_px)
    shares = area_fractions(spots, Grid(x0, y0, bin_px, n_rows, n_cols)).tocoo()

    near = np.flatnonzero(((index >= low) & (index < high)).all(axis=1))  # (m,) bins that a spot can reach
    key = (index[near, 1] - low[1]) * n_cols + index[near, 0] - low[0]
    order = np.argsort(key)
    near, key = near[order], key[order]
    nth = np.searchsorted(key, shares.col)
    there = nth < len(key)
    there[there] = key[nth[there]] == shares.col[there]
    spot, share = shares.row[there], shares.data[there]
    share = share / np.bincount(spot, share, len(spots))[spot]
    return sparse.csr_matrix((share, (spot, near[nth[there]])), shape=shape)


def divide(footprints: Footprints, *, edge_px: float) -> tuple[Floats, Ints, Floats]:
    """Cut footprints into the squares of one grid.

    Parameters
    ----------
    footprints
        n areas.
    edge_px
        Edge of the squares.

    Returns
    -------
    xy_px
        (p, 2) centres of the squares that some footprint reaches.
    index
        (n, k) rows of the squares under each footprint, padded with 0.
    weight
        (n, k) share of the footprint in each; rows sum to 1, padding has 0.
    """
    box = footprints.bounds()
    low = np.floor(box[:, :2].min(axis=0) / edge_px - EDGE)
    n_cols, n_rows = (int(n) for n in np.ceil(box[:, 2:].max(axis=0) / edge_px + EDGE) - low)
    x0, y0 = (float(v) for v in low * edge_px)
    share = area_fractions(footprints, Grid(x0, y0, edge_px, n_rows, n_cols))
    cells, column = np.unique(share.indices, return_inverse=True)
    row, col = np.divmod(cells, n_cols)
    xy_px = np.column_stack([x0 + (col + 0.5) * edge_px, y0 + (row + 0.5) * edge_px])
    return xy_px, *padded(sparse.csr_matrix((share.data, column, share.indptr), shape=(len(footprints), len(cells))))


def cut_bins(xy_px: Floats, *, basis: Floats, n_side: int) -> tuple[Floats, Ints, Floats]:
    """Cut each bin of a lattice into ``n_side`` x ``n_side`` equal squares: centres, rows and shares as :func:`divide`."""
    at = (np.arange(n_side) + 0.5) / n_side - 0.5
    steps = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2) @ basis  # (k, 2)
    n, k = len(xy_px), n_side**2
    return (xy_px[:, None] + steps).reshape(-1, 2), np.arange(n * k).reshape(n, k), np.full((n, k), 1 / k)


def padded(share: sparse.csr_matrix) -> tuple[Ints, Floats]:
    """Columns and values of each row of a sparse matrix, (n, k) each, padded with 0."""
    each = np.diff(share.indptr)
    filled = np.arange(each.max(initial=0)) < each[:, None]  # (n, k)
    index, weight = np.zeros(filled.shape, np.int64), np.zeros(filled.shape)
    index[filled], weight[filled] = share.indices, share.data
    return index, weight


def _cells_around(footprints: Footprints, grid: Grid) -> tuple[Ints, Ints]:
    """First column and row of the cells under each footprint's box, (n, 2), and how many there are, (n, 2)."""
    box = (footprints.bounds().reshape(-1, 2, 2) - [grid.x0, grid.y0]) / grid.cell_px  # (n, low or high, x or y)
    slack = EDGE * np.minimum(1.0, box[:, 1] - box[:, 0])
    first = np.floor(box[:, 0] + slack)
    last = np.maximum(np.ceil(box[:, 1] - slack), first + 1)
    outside = ((first < 0) | (last > [grid.n_cols, grid.n_rows])).any(axis=1)
    if outside.any():
        low = np.minimum(first.min(axis=0), 0)
        n_cols, n_rows = np.maximum(last.max(axis=0), [grid.n_cols, grid.n_rows]) - low
        x0, y0 = np.array([grid.x0, grid.y0]) + low * grid.cell_px
        msg = (
            f"{count_bad(outside)} reach outside the grid ({grid}): lay a larger one; x0={x0:.10g}, y0={y0:.10g}, "
            f"n_rows={n_rows:.0f}, n_cols={n_cols:.0f} would hold them all."
        )
        raise ValueError(msg)
    return first.astype(np.int64), (last - first).astype(np.int64)


@dataclass(frozen=True)
class _Pairs:
    """Every footprint with every cell around it, footprint by footprint and there row by row."""

    first: Ints
    """(n, 2) first column and row of each footprint's cells."""
    count: Ints
    """(n, 2) how many columns and rows there are."""
    own: Ints
    """(p,) which footprint."""
    cell: Ints
    """(p, 2) which column and row."""
    grid: Grid

    @classmethod
    def lay(cls, first: Ints, count: Ints, grid: Grid) -> _Pairs:
        own, nth = _ragged(count.prod(axis=1))
        n_cols = count[own, 0]
        return cls(first, count, own, first[own] + np.column_stack([nth % n_cols, nth // n_cols]), grid)

    def edges(self) -> Floats:
        """Lower and higher edge of the cells, (2, p, 2) of which the last is x and y."""
        return np.array([self.grid.x0, self.grid.y0]) + np.stack([self.cell, self.cell + 1]) * self.grid.cell_px


def _disc_shares(discs: Footprints, pairs: _Pairs) -> Floats:
    """Share of each pair's disc that lies in its cell, (p,)."""
    centre, radius = discs.xy_px[pairs.own], discs.size_px[pairs.own, None] / 2
    edge = np.clip((pairs.edges() - centre) / radius, -1, 1)  # (low or high, p, x or y), on the unit disc
    # twice the area under the unit circle from its centre to the edge
    arc = np.abs(edge * np.sqrt(1 - edge**2) + np.arcsin(edge))
    x, y = edge[:, None, :, 0], edge[None, :, :, 1]  # (2, 1, p) and (1, 2, p)
    x_arc, y_arc = arc[:, None, :, 0], arc[None, :, :, 1]
    # area of the unit disc between its axes and the corner (x, y); negative in the second and fourth quadrant
    corner = np.where(x**2 + y**2 <= 1, np.abs(x * y), (x_arc + y_arc - np.pi / 2) / 2)  # (2, 2, p)
    corner *= np.sign(x) * np.sign(y)
    return (corner[1, 1] - corner[1, 0] - corner[0, 1] + corner[0, 0]) / np.pi


def _square_shares(squares: Footprints, pairs: _Pairs) -> Floats:
    """Share of each pair's square that lies in its cell, (p,)."""
    centre, edge = squares.xy_px[pairs.own], squares.size_px[pairs.own, None]
    low, high = np.clip(pairs.edges(), centre - edge / 2, centre + edge / 2)
    return ((high - low) / edge).prod(axis=1)


def _polygon_shares(footprints: Footprints, pairs: _Pairs) -> Floats:
    """Share of each pair's polygon that lies in its cell, (p,).

    By Green's theorem, the integral of x over dy along the outline, cut where it goes from cell to cell. It is as exact
    as clipping each polygon with each cell in GEOS, and many times faster.
    """
    grid, count = pairs.grid, pairs.count
    polygons, of_polygon = shapely.get_parts(footprints.polygons, return_index=True)
    rings, of_ring = shapely.get_rings(polygons, return_index=True)
    outer = np.diff(of_ring, prepend=-1) > 0  # the first ring of a polygon; the others are holes
    xy, of_vertex = shapely.get_coordinates(rings, return_index=True)
    own = of_polygon[of_ring[of_vertex]]
    # in cells from the footprint's first one: small numbers, so that little is lost to rounding
    xy = (xy - [grid.x0, grid.y0]) / grid.cell_px - pairs.first[own]
    start = np.flatnonzero(np.diff(of_vertex) == 0)  # a ring's last vertex repeats its first and starts no edge
    edge, begin, end = _cut_at_lines(xy[start], xy[start + 1])
    vertex = start[edge]
    own = own[vertex]

    middle = (begin + end) / 2  # (pieces, 2)
    cell = np.clip(np.floor(middle).astype(np.int64), 0, count[own] - 1)
    rise = (end - begin)[:, 1] * np.where(shapely.is_ccw(rings) == outer, 1, -1)[of_vertex[vertex]]
    n_pairs = count.prod(axis=1)
    pair = (np.cumsum(n_pairs) - n_pairs)[own] + cell[:, 1] * count[own, 0] + cell[:, 0]
    area = np.bincount(pair, (middle - cell)[:, 0] * rise, len(pairs.own))
    rises = np.bincount(pair, rise, len(pairs.own))
    # what rises to the right of a cell passes over the whole of it; in a row of cells, all rises sum to 0
    upto = np.cumsum(rises)
    row_start = np.arange(len(upto)) - (pairs.cell - pairs.first[pairs.own])[:, 0]
    area -= upto - (upto - rises)[row_start]
    return area * grid.cell_px**2 / shapely.area(footprints.polygons)[pairs.own]


def _cut_at_lines(begin: Floats, end: Floats) -> tuple[Ints, Floats, Floats]:
    """Cut edges at whole numbers of x and of y; return which edge each piece is of, and its ends (pieces, 2)."""
    first = np.floor(np.minimum(begin, end)) + 1
    n_lines = np.maximum(np.ceil(np.maximum(begin, end)) - first, 0).astype(np.int64)  # (edges, 2) strictly between
    edges, cuts = [np.arange(len(begin))], [np.zeros(len(begin))]
    for axis in (0, 1):
        edge, nth = _ragged(n_lines[:, axis])
        a, b = begin[edge, axis], end[edge, axis]
        edges.append(edge)
        cuts.append((first[edge, axis] + nth - a) / (b - a))
    edge, cut = np.concatenate(edges), np.concatenate(cuts)
    order = np.lexsort((cut, edge))
    edge, cut = edge[order], cut[order]
    until = np.append(cut[1:], 1.0)
    until[np.flatnonzero(np.diff(edge))] = 1.0
    step = (end - begin)[edge]
    return edge, begin[edge] + cut[:, None] * step, begin[edge] + until[:, None] * step


def _ragged(n: Ints) -> tuple[Ints, Ints]:
    """Number ``n[i]`` things of each ``i``: which ``i`` each is of, and which of its things it is."""
    own = np.repeat(np.arange(len(n)), n)
    return own, np.arange(len(own)) - np.repeat(np.cumsum(n) - n, n)


def _parts(footprints: Footprints, count: Ints) -> Iterator[slice]:
    """Cut footprints into runs of about `_PAIRS` pairs or vertices, at least one footprint each."""
    work = count.prod(axis=1)
    if footprints.polygons is not None:
        work = work + shapely.get_num_coordinates(footprints.polygons)
    cuts = np.flatnonzero(np.diff((np.cumsum(work) - 1) // _PAIRS)) + 1
    yield from (slice(a, b) for a, b in pairwise([0, *cuts.tolist(), len(work)]))


_SHARES = {"disc": _disc_shares, "square": _square_shares, "polygon": _polygon_shares}


def _resolved(total: NDArray[Any], *, start: int) -> None:
    """Raise where shares do not sum to 1: such small footprints are beyond float64."""
    bad = np.abs(total - 1) > _UNRESOLVED
    if bad.any():
        nth = int(np.flatnonzero(bad)[0])
        msg = (
            f"shares of footprint {start + nth} sum to {total[nth]:.6g} instead of 1: it is too small for its distance "
            "from the origin. Move the origin nearer, or leave it out."
        )
        raise ValueError(msg)


def _origin_of_bins(xy_px: Floats, index: Ints, *, bin_px: float) -> Floats:
    """Corner (x, y) of the bin of row 0 and column 0, from the first bin; the others must agree."""
    if not (np.isfinite(bin_px) and bin_px > 0):
        msg = f"bin_px={bin_px!r}: give a finite number of pixels above 0."
        raise ValueError(msg)
    origin = xy_px[0] - (index[0] + 0.5) * bin_px
    off = np.abs(xy_px - origin - (index + 0.5) * bin_px).max(axis=1) / bin_px
    bad = ~(off <= _OFF_GRID)
    if bad.any():
        msg = (
            f"bins_xy_px, row and col do not agree: with bin_px={bin_px:.6g} and the first bin as given, "
            f"{count_bad(bad, 'bins')} lie up to {off.max():.3g} bins from their row and column. "
            "Give centres of bins along the image's axes, rows down y and columns along x."
        )
        raise ValueError(msg)
    in_order = index[np.lexsort(index.T)]
    n_twice = int((np.diff(in_order, axis=0) == 0).all(axis=1).sum())
    if n_twice:
        msg = f"row and col: {n_twice} bins have the row and column of another: give each bin of the grid once."
        raise ValueError(msg)
    return origin
