"""The lattice of a section's spots: its kind, pitch and orientation, from positions or from the array.

Positions are (x, y) in pixels of the image's finest scale, where pixel ``i`` covers ``[i, i + 1)``.
Vectors of a lattice are rows: a site is ``origin + index @ basis``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, cKDTree

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


MIN_OCCUPIED = 0.05
MIN_NEIGHBOURS = 0.4
"""Shares of lattice sites with a spot: inside the spots' hull, and next to a spot. Below both, a lattice is chance."""

_EVEN = 0.3
"""Least share of spots on one class of sites over the mean, or with a neighbour along one axis over the largest."""
_ENOUGH = 8
"""Spots per class from which that is not chance."""


_FOLD = {"hexagonal": 6, "square": 4}
# area of the unit cell over pitch squared
_CELL = {"hexagonal": np.sqrt(3) / 2, "square": 1.0}
STEPS = {
    "hexagonal": np.array([[1, 0], [0, 1], [-1, 1], [-1, 0], [0, -1], [1, -1]]),
    "square": np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]),
}
"""From a site to its neighbours, in steps of the basis"""


class NotALattice(ValueError):
    """The positions do not lie on a hexagonal or square lattice."""


@dataclass(frozen=True)
class Lattice:
    """The regular arrangement that a section's spots were printed in."""

    kind: Literal["hexagonal", "square"]
    pitch_px: float
    """Centre-to-centre distance of neighbouring spots."""
    basis: Floats
    """(2, 2), rows are the steps to a neighbour along the row and to the next row, (x, y)."""
    origin: Floats
    """(2,), site of index (0, 0)."""
    index: Ints
    """(n_spots, 2), column and row of each spot."""
    residual: float
    """Root mean square distance of the spots from their lattice sites, in pitches."""


@dataclass(frozen=True)
class Technology:
    """What fixes the physical scale of a section."""

    name: str
    pitch_um: float
    spot_um: float
    """Diameter of a round spot, edge of a square bin."""


VISIUM = Technology("visium", 100.0, 55.0)
LEGACY_ST = Technology("st", 200.0, 100.0)


def estimate_lattice(xy_px: Floats) -> Lattice:
    """Find the lattice of positions: hexagonal or square, at any rotation and scale, with empty sites.

    The step length is the median distance to the nearest neighbour; the symmetry is the larger of the
    bond-orientational order parameters |<exp(6 i angle)>| and |<exp(4 i angle)>| (Nelson and Halperin, 1979)
    of the steps of about that length; the basis is then fitted by least squares in a growing disc, so that
    small errors of the first guess never add up to a whole step.
    """
    xy_px = np.asarray(xy_px, float)
    tree = cKDTree(xy_px)
    dist, near = tree.query(xy_px, k=min(9, len(xy_px)))
    pitch = float(np.median(dist[:, 1]))
    if not np.isfinite(pitch) or pitch <= 0:
        msg = "spots share positions: the median distance to the nearest neighbour is 0."
        raise NotALattice(msg)
    step = (dist > 0.75 * pitch) & (dist < 1.25 * pitch)
    source, slot = np.nonzero(step)
    if len(source) == 0:
        msg = "spots have no neighbours at a common distance."
        raise NotALattice(msg)
    delta = xy_px[near[source, slot]] - xy_px[source]  # (n_steps, 2)
    angle = np.arctan2(delta[:, 1], delta[:, 0])
    order = {kind: np.exp(1j * fold * angle).mean() for kind, fold in _FOLD.items()}
    kind: Literal["hexagonal", "square"] = "hexagonal" if abs(order["hexagonal"]) > abs(order["square"]) else "square"
    if abs(order[kind]) < 0.5:
        msg = (
            f"steps between neighbours have no hexagonal or square order "
            f"(order parameters {abs(order['hexagonal']):.2f} and {abs(order['square']):.2f}; 1 is a perfect lattice)."
        )
        raise NotALattice(msg)
    fold = _FOLD[kind]
    # the first basis vector is the one nearest to the image's x axis: a row of the array in most sections
    first = float(np.angle(order[kind])) / fold
    turn = np.pi / 3 if kind == "hexagonal" else np.pi / 2
    pitch = float(np.median(np.hypot(delta[:, 0], delta[:, 1])))
    basis = pitch * np.array([[np.cos(first + i * turn), np.sin(first + i * turn)] for i in (0, 1)])

    middle = np.median(xy_px, axis=0)
    origin = xy_px[np.argmin(((xy_px - middle) ** 2).sum(1))]
    far = np.hypot(*(xy_px - origin).T)
    radius = 4 * pitch
    while True:
        index = np.rint((xy_px - origin) @ np.linalg.inv(basis))
        inside = far <= radius
        if np.ptp(index[inside], axis=0).min() > 0:
            design = np.column_stack([np.ones(inside.sum()), index[inside]])
            fitted, *_ = np.linalg.lstsq(design, xy_px[inside], rcond=None)
            origin, basis = fitted[0], fitted[1:]
            if abs(np.linalg.det(basis)) < 0.05 * pitch**2:
                msg = "steps between neighbours all run along one line."
                raise NotALattice(msg)
        if radius > far.max():
            break
        radius *= 1.5
    index = np.rint((xy_px - origin) @ np.linalg.inv(basis)).astype(np.int64)
    index -= index.min(axis=0)
    origin = (xy_px - index @ basis).mean(axis=0)
    pitch = float(np.sqrt(abs(np.linalg.det(basis)) / _CELL[kind]))
    residual = _residual(xy_px, origin, basis, index, pitch)
    doubled = 1 - len(np.unique(index, axis=0)) / len(index)
    if residual > 0.25 or doubled > 0.01:
        msg = (
            f"the best {kind} lattice (pitch {pitch:.1f} px) misses the spots by {residual:.2f} pitches "
            f"and puts {doubled:.1%} of them on another spot's site."
        )
        raise NotALattice(msg)
    # the longest and shortest pitch in any direction, along the diagonals of the lattice too
    ideal = np.array([[1.0, 0.0], [np.cos(turn), np.sin(turn)]])
    lengths = np.linalg.svd(np.linalg.solve(ideal, basis), compute_uv=False)
    if lengths[0] / lengths[1] > 1.05:
        msg = (
            f"the {kind} lattice of the spots is stretched: neighbours lie {lengths[0]:.1f} px apart in one direction "
            f"and {lengths[1]:.1f} px in the other, so that no single µm per pixel holds."
        )
        raise NotALattice(msg)
    occupied = occupied_share(xy_px, cell_px2=_CELL[kind] * pitch**2)
    along = _neighbours(index, kind)
    # small pieces far apart leave most of the array empty, but spots there have neighbours all around
    sparse = occupied < MIN_OCCUPIED and along.mean() < MIN_NEIGHBOURS
    if sparse or along.min() < _EVEN * along.max() or _empty_class(index):
        msg = (
            f"the best {kind} lattice (pitch {pitch:.1f} px) has spots on only {occupied:.1%} of its sites, or on "
            "every second or third: are these several sections over one another, or a few spots of an array?"
        )
        raise NotALattice(msg)
    return Lattice(kind, pitch, basis, origin, index, residual)


def occupied_share(xy_px: Floats, *, cell_px2: float) -> float:
    """Share of the lattice sites inside the spots' hull that have a spot; there is one site per ``cell_px2``."""
    if len(xy_px) < 3:
        return 1.0
    # joggled input: spots in one row have a hull as well
    hull = ConvexHull(xy_px, qhull_options="QJ")
    # half a cell of each site on the hull itself lies inside
    sites = hull.volume / cell_px2 + hull.area / (2 * np.sqrt(cell_px2)) + 1
    return float(min(len(xy_px) / sites, 1.0))


def _neighbours(index: Ints, kind: str) -> Floats:
    """Share of the spots that have a neighbour along each axis of the lattice, in one direction."""
    width = index[:, 1].max() + 3
    code = (index[:, 0] + 1) * width + index[:, 1] + 1
    axes = STEPS[kind][: len(STEPS[kind]) // 2]
    return np.array([np.isin(code + step[0] * width + step[1], code).mean() for step in axes])


def _empty_class(index: Ints) -> bool:
    """Whether every second or third site has hardly any spot, which is not chance."""
    for period in (2, 3):
        classes = index % period
        count = np.bincount(classes[:, 0] * period + classes[:, 1], minlength=period**2)
        if count.mean() >= _ENOUGH and count.min() < _EVEN * count.mean():
            return True
    return False


def lattice_of_array(xy_px: Floats, row: Ints, col: Ints) -> Lattice:
    """Lattice of spots whose row and column on the array are known, however few of the array they are.

    Columns count in half steps on hexagonal arrays, as Space Ranger counts them, and in whole steps on square ones.

    Raises
    ------
    NotALattice
        Where the spots do not lie where rows and columns say.
    """
    xy_px = np.asarray(xy_px, float)
    array = np.column_stack([col, row]).astype(float)
    array -= array[0]
    design = np.column_stack([np.ones(len(array)), array])
    if np.linalg.matrix_rank(design) < 3:
        msg = "rows and columns of the array are those of a single line of spots."
        raise NotALattice(msg)
    fitted, *_ = np.linalg.lstsq(design, xy_px, rcond=None)
    per_col, per_row = fitted[1:]
    wide, high = np.hypot(*per_col), np.hypot(*per_row)
    if min(wide, high) <= 0 or abs(per_col @ per_row) > 0.05 * wide * high:
        msg = "rows and columns of the array do not cross at right angles in the image."
        raise NotALattice(msg)
    whole = np.column_stack([col, row]).astype(np.int64)
    kind: Literal["hexagonal", "square"]
    if abs(high / (np.sqrt(3) * wide) - 1) < 0.05 and len(np.unique(whole.sum(1) % 2)) == 1:
        kind, basis = "hexagonal", np.array([2 * per_col, per_row + per_col])
        index = np.column_stack([(whole[:, 0] - whole[:, 1]) // 2, whole[:, 1]])
    elif abs(high / wide - 1) < 0.05:
        kind, basis, index = "square", np.array([per_col, per_row]), whole
    else:
        msg = f"rows of the array lie {high:.1f} px apart and columns {wide:.1f} px: neither hexagonal nor square."
        raise NotALattice(msg)
    index = index - index.min(axis=0)
    origin = (xy_px - index @ basis).mean(axis=0)
    pitch = float(np.sqrt(abs(np.linalg.det(basis)) / _CELL[kind]))
    residual = _residual(xy_px, origin, basis, index, pitch)
    if residual > 0.25:
        msg = f"the spots lie {residual:.2f} pitches off the sites that rows and columns of the array give."
        raise NotALattice(msg)
    return Lattice(kind, pitch, basis, origin, index, residual)


def _residual(xy_px: Floats, origin: Floats, basis: Floats, index: Ints, pitch_px: float) -> float:
    """Root mean square distance of spots from their lattice sites, in pitches."""
    return float(np.sqrt(((xy_px - origin - index @ basis) ** 2).sum(1).mean()) / pitch_px)


def similarity_scale(matrix: Floats, *, tolerance: float = 0.01) -> float | None:
    """Scale of a 2 x 2 matrix that only scales, turns and mirrors; ``None`` if it stretches or shears."""
    singular = np.linalg.svd(np.asarray(matrix, float)[:2, :2], compute_uv=False)
    if singular[1] <= 0 or singular[0] / singular[1] > 1 + tolerance:
        return None
    return float(np.sqrt(singular[0] * singular[1]))
