"""Lattice, pitch, physical scale, places to predict: all of it numpy and scipy, in image pixels and µm.

Positions are (x, y) in pixels of the image's finest scale, where pixel ``i`` covers ``[i, i + 1)``.
Vectors of a lattice are rows: a place is ``origin + index @ basis``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge._geometry._areas import _EDGE
from histosge._geometry._footprints import _count
from histosge._geometry._lattice import _STEPS, Lattice

Floats = NDArray[np.float64]

Ints = NDArray[np.int64]
UPSAMPLE = (2, 4, 8, 16)
"""Allowed numbers of places per measured spot."""


# circumradius of a spot's Voronoi cell over pitch
_REACH = {"hexagonal": 1 / np.sqrt(3), "square": 1 / np.sqrt(2)}


@dataclass(frozen=True)
class Places:
    """Places to predict at."""

    xy_px: Floats
    """(n, 2)"""
    array_row: Ints
    array_col: Ints
    size_px: float
    """Distance of neighbouring places: diameter to draw a circle with, or edge of a square bin."""
    spot_index: Ints
    """(n,) row of the measured spot that stands at this place, -1 where there is none."""

    def __len__(self) -> int:
        return len(self.xy_px)

    def keep(self, rows: NDArray[np.bool_] | Ints) -> Places:
        """Return some of the places: where a mask is true, or by number."""
        return Places(self.xy_px[rows], self.array_row[rows], self.array_col[rows], self.size_px, self.spot_index[rows])


def check_upsample(upsample: int) -> None:
    """Refuse a number of places for which there is no lattice."""
    if upsample not in UPSAMPLE:
        msg = f"upsample={upsample!r}: choose one of {UPSAMPLE} (places per measured spot; the paper's is 4)."
        raise ValueError(msg)


def refine(lattice: Lattice, xy_px: Floats, *, upsample: int) -> Places:
    """Lay ``upsample`` places for every spot on a finer lattice that contains the spots' own places.

    4 and 16 halve the step in both directions once and twice; 2 and 8 add one more family of places: the
    centres of the squares, or on a hexagonal lattice the middles of the steps along a row, which makes the
    lattice rectangular. Each place is anchored to the spots next to it, so that a deformed array stays
    deformed, and has a whole-number row and column, so that none is laid twice. Single missing spots with
    measured ones around them are filled in.

    Parameters
    ----------
    lattice
        Lattice of the spots.
    xy_px
        (n_spots, 2), the spots themselves.
    upsample
        2, 4, 8 or 16.
    """
    check_upsample(upsample)
    halvings, odd = divmod(int(np.log2(upsample)), 2)
    # rows: the coarse basis in steps of the fine one
    if not odd:
        whole = np.eye(2, dtype=np.int64)
    elif lattice.kind == "square":
        whole = np.array([[1, -1], [1, 1]])
    else:
        whole = np.array([[2, 0], [1, 1]])
    whole = whole * 2**halvings
    fine_basis = np.linalg.solve(whole.astype(float), lattice.basis)

    index, parents = _fill_single_holes(lattice, xy_px)
    reach = _REACH[lattice.kind] * lattice.pitch_px * (1 + 1e-6)
    width = int(np.ceil(reach / np.hypot(fine_basis[:, 0], fine_basis[:, 1]).min())) + 1
    grid = np.stack(np.meshgrid(*[np.arange(-2 * width, 2 * width + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    offset_px = grid @ fine_basis
    near = np.hypot(offset_px[:, 0], offset_px[:, 1]) <= reach
    grid, offset_px = grid[near], offset_px[near]

    fine = (index @ whole)[:, None] + grid[None]  # (n_parents, n_offsets, 2)
    guess = parents[:, None] + offset_px[None]
    unique, inverse = np.unique(fine.reshape(-1, 2), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    count = np.bincount(inverse)
    xy = np.column_stack([np.bincount(inverse, guess[..., i].reshape(-1)) / count for i in (0, 1)])
    spot = np.full(len(unique), -1, dtype=np.int64)
    own = inverse.reshape(len(parents), len(grid))[: len(xy_px), np.flatnonzero((grid == 0).all(1))[0]]
    spot[own] = np.arange(len(xy_px))
    unique = unique - unique.min(axis=0)
    size = float(np.hypot(fine_basis[:, 0], fine_basis[:, 1]).min())
    return Places(xy, unique[:, 1], unique[:, 0], size, spot)


def _fill_single_holes(lattice: Lattice, xy_px: Floats) -> tuple[Ints, Floats]:
    """Append lattice places without a spot of which more than half of the neighbours have one."""
    steps = _STEPS[lattice.kind]
    around = (lattice.index[:, None] + steps[None]).reshape(-1, 2)
    guess = (xy_px[:, None] + (steps @ lattice.basis)[None]).reshape(-1, 2)
    unique, inverse, count = np.unique(around, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    place = np.column_stack([np.bincount(inverse, guess[:, i]) / count for i in (0, 1)])
    taken = {tuple(i) for i in lattice.index.tolist()}
    # more than half: the zigzag edge of a hexagonal array has places with exactly half of their neighbours
    hole = np.array([tuple(i) not in taken for i in unique.tolist()], dtype=bool) & (count > len(steps) / 2)
    return np.vstack([lattice.index, unique[hole]]), np.vstack([xy_px, place[hole]])


def square_bins(xy_px: Floats, *, bin_px: float, margin_px: float) -> Places:
    """Lay square bins along the image's axes over all that lies within ``margin_px`` of a spot."""
    low = np.floor((xy_px.min(axis=0) - margin_px) / bin_px).astype(np.int64)
    high = np.ceil((xy_px.max(axis=0) + margin_px) / bin_px).astype(np.int64)
    col, row = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]))
    centre = (np.column_stack([col.ravel(), row.ravel()]) + 0.5) * bin_px
    far, _ = cKDTree(xy_px).query(centre, distance_upper_bound=margin_px)
    near = np.isfinite(far)
    row, col = row.ravel()[near], col.ravel()[near]
    return Places(
        centre[near],
        (row - low[1]).astype(np.int64),
        (col - low[0]).astype(np.int64),
        float(bin_px),
        np.full(int(near.sum()), -1, dtype=np.int64),
    )


def lay_over(width_px: float, height_px: float, *, step_px: float, hexagonal: bool) -> Places:
    """Lay places over a whole image: square bins side by side, or a hexagonal lattice, its columns in half steps."""
    row_px = step_px * (np.sqrt(0.75) if hexagonal else 1.0)
    row, col = (a.ravel() for a in np.indices((int(height_px // row_px), int(width_px // step_px))))
    shift = 0.5 * (row % 2) if hexagonal else 0.0
    centre = np.column_stack([(col + 0.5 + shift) * step_px, (row + 0.5) * row_px])
    col = 2 * col + row % 2 if hexagonal else col
    nothing = np.full(len(row), -1, dtype=np.int64)
    return Places(centre, row.astype(np.int64), col.astype(np.int64), float(step_px), nothing)


def lay_around(xy_px: Floats, *, pitch_px: float, upsample: int) -> Places:
    """Lay a hexagonal lattice around spots that lie on none, with about ``upsample`` places for a spot.

    ``pitch_px`` is the usual distance of neighbouring spots; places farther than it from any spot are left out.
    """
    check_upsample(upsample)
    step_px = pitch_px / np.sqrt(upsample)
    basis = step_px * np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]])
    origin = xy_px.min(axis=0)
    width = int(np.ceil(pitch_px / step_px / np.sqrt(0.75))) + 1
    around = np.stack(np.meshgrid(*[np.arange(-width, width + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    of_spot = np.rint((xy_px - origin) @ np.linalg.inv(basis)).astype(np.int64)
    index = np.unique((of_spot[:, None] + around[None]).reshape(-1, 2), axis=0)
    place = origin + index @ basis
    near = np.isfinite(cKDTree(xy_px).query(place, distance_upper_bound=pitch_px)[0])
    index = index[near] - index[near].min(axis=0)
    nothing = np.full(len(index), -1, dtype=np.int64)
    return Places(place[near], index[:, 1], index[:, 0], float(step_px), nothing)


def block_order(xy_px: Floats, *, block_px: float, origin_px: tuple[float, float] | None = None) -> Ints:
    """Order places such that those of one square block come together, next to those of a neighbouring block.

    Blocks go to the right in one row of blocks and back in the next; inside a block, places go by y, then by x.
    Runs of the order are then compact, so that what a block needs (tokens, neighbours) is loaded once.

    Parameters
    ----------
    xy_px
        (n, 2)
    block_px
        Edge of a block.
    origin_px
        Corner (x, y) of one block. ``None`` takes the least x and y of the places.

    Returns
    -------
    (n,) rows of ``xy_px``; equal places keep their order.
    """
    xy = np.asarray(xy_px, float).reshape(-1, 2)
    if not (np.isfinite(block_px) and block_px > 0):
        msg = f"block_px={block_px!r}: give a finite number of pixels above 0."
        raise ValueError(msg)
    bad = ~np.isfinite(xy).all(axis=1)
    if bad.any():
        msg = f"xy_px: {_count(bad, 'places')} are not finite: leave them out."
        raise ValueError(msg)
    if len(xy) == 0:
        return np.zeros(0, np.int64)
    # a row of bins on a block's edge must not be torn apart by the last digit
    origin = xy.min(axis=0) if origin_px is None else np.asarray(origin_px, float)
    block = np.floor((xy - origin) / block_px + _EDGE)  # (n, 2) column and row
    along = np.where(block[:, 1] % 2 == 0, block[:, 0], -block[:, 0])
    return np.lexsort((xy[:, 0], xy[:, 1], along, block[:, 1])).astype(np.int64)
