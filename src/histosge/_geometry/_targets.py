"""Targets: where expression is predicted. Laid on a lattice, as bins, or read from shapes.

Positions are (x, y) in pixels of the image's finest scale, where pixel ``i`` covers ``[i, i + 1)``.
Vectors of a lattice are rows: a target lies at ``origin + index @ basis``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from histosge._geometry._areas import EDGE
from histosge._geometry._footprints import Footprints, count_bad
from histosge._geometry._lattice import STEPS, Lattice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from histosge._geometry._lattice import Floats, Ints

UPSAMPLE = (2, 4, 8, 16)
"""Allowed numbers of targets per measured spot."""

# circumradius of a spot's Voronoi cell over pitch
_REACH = {"hexagonal": 1 / np.sqrt(3), "square": 1 / np.sqrt(2)}


@dataclass(frozen=True)
class Targets:
    """Where to predict, and which rows of the shapes element these are."""

    footprints: Footprints
    """(n,) areas of the image that the targets stand for"""
    spot_index: Ints
    """(n,) row of the measured spot at the same position, -1 where there is none"""
    instances: NDArray[Any]
    """(n,) names in the shapes element"""
    array_row: Ints | None = None
    array_col: Ints | None = None
    """(n,) row and column in the lattice or grid of bins, if the targets form one"""
    step_px: float | None = None
    """Distance of neighbouring targets that were laid: diameter of the circle to draw, or edge of a square bin"""
    in_tissue: NDArray[np.bool_] | None = None
    """(n,) whether they lie on tissue; ``None`` where all do"""
    key: str = ""
    """Name of the shapes element"""
    tissue: str = ""
    """How tissue was found"""

    def __len__(self) -> int:
        return len(self.spot_index)

    @property
    def xy_px(self) -> Floats:
        """(n, 2) centres."""
        return self.footprints.xy_px

    @property
    def laid(self) -> bool:
        """Whether histosge laid them; else they are shapes of the user."""
        return self.step_px is not None

    @property
    def are_bins(self) -> bool:
        """Whether they are square bins along the axes of the image."""
        return self.footprints.kind == "square"

    def take(self, rows: NDArray[np.bool_] | Ints) -> Targets:
        """Return some of the targets: where a mask is true, or by number."""
        some: dict[str, Any] = {
            name: None if (values := getattr(self, name)) is None else values[rows]
            for name in ("spot_index", "instances", "array_row", "array_col", "in_tissue")
        }
        return replace(self, footprints=self.footprints.take(rows), **some)


def check_upsample(upsample: int) -> None:
    """Refuse a number of targets for which there is no lattice."""
    if upsample not in UPSAMPLE:
        msg = f"upsample={upsample!r}: choose one of {UPSAMPLE} (targets per measured spot; the paper's is 4)."
        raise ValueError(msg)


def refine(lattice: Lattice, xy_px: Floats, *, upsample: int, diameter_px: float | None = None) -> Targets:
    """Lay ``upsample`` targets for every spot on a finer lattice that contains the spots themselves.

    4 and 16 halve the step in both directions once and twice. 2 and 8 add one more family of sites: the centres of the
    squares, or on a hexagonal lattice the middles of the steps along a row, which makes the lattice rectangular. Each
    target is anchored to the spots next to it, so that a deformed array stays deformed. It has a whole-number row and
    column, so that none is laid twice. Single missing spots between measured ones are filled in.

    Parameters
    ----------
    lattice
        Lattice of the spots.
    xy_px
        (n_spots, 2), the spots themselves.
    upsample
        2, 4, 8 or 16.
    diameter_px
        Diameter of the disc that a target stands for. ``None`` takes the step of the lattice.
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
    return _laid(_discs(xy, diameter_px, size), unique[:, 1], unique[:, 0], step_px=size, spot_index=spot)


def _fill_single_holes(lattice: Lattice, xy_px: Floats) -> tuple[Ints, Floats]:
    """Append empty lattice sites of which more than half of the neighbours have a spot."""
    steps = STEPS[lattice.kind]
    around = (lattice.index[:, None] + steps[None]).reshape(-1, 2)
    guess = (xy_px[:, None] + (steps @ lattice.basis)[None]).reshape(-1, 2)
    unique, inverse, count = np.unique(around, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    site = np.column_stack([np.bincount(inverse, guess[:, i]) / count for i in (0, 1)])
    taken = {tuple(i) for i in lattice.index.tolist()}
    # more than half: the zigzag edge of a hexagonal array has sites with exactly half of their neighbours
    hole = np.array([tuple(i) not in taken for i in unique.tolist()], dtype=bool) & (count > len(steps) / 2)
    return np.vstack([lattice.index, unique[hole]]), np.vstack([xy_px, site[hole]])


def square_bins(xy_px: Floats, *, bin_px: float, margin_px: float) -> Targets:
    """Lay square bins along the image's axes over all that lies within ``margin_px`` of a spot."""
    low = np.floor((xy_px.min(axis=0) - margin_px) / bin_px).astype(np.int64)
    high = np.ceil((xy_px.max(axis=0) + margin_px) / bin_px).astype(np.int64)
    col, row = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]))
    centre = (np.column_stack([col.ravel(), row.ravel()]) + 0.5) * bin_px
    far, _ = cKDTree(xy_px).query(centre, distance_upper_bound=margin_px)
    near = np.isfinite(far)
    row, col = row.ravel()[near], col.ravel()[near]
    return _laid(
        Footprints.squares(centre[near], edge_px=bin_px),
        (row - low[1]).astype(np.int64),
        (col - low[0]).astype(np.int64),
        step_px=float(bin_px),
    )


def lay_over(
    width_px: float, height_px: float, *, step_px: float, hexagonal: bool, diameter_px: float | None = None
) -> Targets:
    """Lay targets over a whole image: square bins side by side, or a hexagonal lattice with columns in half steps."""
    row_px = step_px * (np.sqrt(0.75) if hexagonal else 1.0)
    row, col = (a.ravel() for a in np.indices((int(height_px // row_px), int(width_px // step_px))))
    shift = 0.5 * (row % 2) if hexagonal else 0.0
    centre = np.column_stack([(col + 0.5 + shift) * step_px, (row + 0.5) * row_px])
    col = 2 * col + row % 2 if hexagonal else col
    areas = _discs(centre, diameter_px, step_px) if hexagonal else Footprints.squares(centre, edge_px=step_px)
    return _laid(areas, row.astype(np.int64), col.astype(np.int64), step_px=float(step_px))


def lay_around(xy_px: Floats, *, pitch_px: float, upsample: int, diameter_px: float | None = None) -> Targets:
    """Lay a hexagonal lattice around spots that lie on none, with about ``upsample`` targets for each spot.

    ``pitch_px`` is the usual distance of neighbouring spots; targets farther than that from any spot are left out.
    """
    check_upsample(upsample)
    step_px = pitch_px / np.sqrt(upsample)
    basis = step_px * np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]])
    origin = xy_px.min(axis=0)
    width = int(np.ceil(pitch_px / step_px / np.sqrt(0.75))) + 1
    around = np.stack(np.meshgrid(*[np.arange(-width, width + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    of_spot = np.rint((xy_px - origin) @ np.linalg.inv(basis)).astype(np.int64)
    index = np.unique((of_spot[:, None] + around[None]).reshape(-1, 2), axis=0)
    site = origin + index @ basis
    near = np.isfinite(cKDTree(xy_px).query(site, distance_upper_bound=pitch_px)[0])
    index = index[near] - index[near].min(axis=0)
    return _laid(_discs(site[near], diameter_px, step_px), index[:, 1], index[:, 0], step_px=float(step_px))


def _discs(xy_px: Floats, diameter_px: float | None, step_px: float) -> Footprints:
    return Footprints.discs(xy_px, diameter_px=step_px if diameter_px is None else diameter_px)


def _laid(areas: Footprints, row: Ints, col: Ints, *, step_px: float, spot_index: Ints | None = None) -> Targets:
    """Targets of a lattice or of a grid of bins, numbered from 0; by default none is a spot."""
    n = len(areas)
    at_none = np.full(n, -1, dtype=np.int64)
    return Targets(areas, at_none if spot_index is None else spot_index, np.arange(n), row, col, step_px)


def block_order(xy_px: Floats, *, block_px: float, origin_px: tuple[float, float] | None = None) -> Ints:
    """Order positions so that those of one square block come together, next to those of a neighbouring block.

    Blocks go to the right in one row of blocks and back in the next; inside a block, positions go by y, then by x.
    Runs of the order are then compact, so that what a block needs (tokens, neighbours) is loaded once.

    Parameters
    ----------
    xy_px
        (n, 2)
    block_px
        Edge of a block.
    origin_px
        Corner (x, y) of one block. ``None`` takes the least x and y of the positions.

    Returns
    -------
    (n,) rows of ``xy_px``; equal positions keep their order.
    """
    xy = np.asarray(xy_px, float).reshape(-1, 2)
    if not (np.isfinite(block_px) and block_px > 0):
        msg = f"block_px={block_px!r}: give a finite number of pixels above 0."
        raise ValueError(msg)
    bad = ~np.isfinite(xy).all(axis=1)
    if bad.any():
        msg = f"xy_px: {count_bad(bad, 'positions')} are not finite: leave them out."
        raise ValueError(msg)
    if len(xy) == 0:
        return np.zeros(0, np.int64)
    # rounding must not split a row of bins on a block's edge
    origin = xy.min(axis=0) if origin_px is None else np.asarray(origin_px, float)
    block = np.floor((xy - origin) / block_px + EDGE)  # (n, 2) column and row
    along = np.where(block[:, 1] % 2 == 0, block[:, 0], -block[:, 0])
    return np.lexsort((xy[:, 0], xy[:, 1], along, block[:, 1])).astype(np.int64)
