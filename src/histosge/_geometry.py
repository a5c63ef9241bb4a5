"""Lattice, pitch, physical scale, places to predict: all of it numpy and scipy, in image pixels and µm.

Positions are (x, y) in pixels of the image's finest scale, where pixel ``i`` covers ``[i, i + 1)``.
Vectors of a lattice are rows: a place is ``origin + index @ basis``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, cKDTree

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

UPSAMPLE = (2, 4, 8, 16)
"""Allowed numbers of places per measured spot."""

MIN_OCCUPIED = 0.05
MIN_NEIGHBOURS = 0.4
"""Shares of the lattice places among the spots, and next to a spot, that hold one. Below both, the lattice is a matter of chance."""

_EVEN = 0.3
"""Least share of spots on one class of places, or with a neighbour along one axis, over the mean and the largest."""
_ENOUGH = 8
"""Spots a class from which that is no chance."""

_CUT_OUT = 8
"""A pixel darker than this in every colour was blacked out, not stained."""

_FOLD = {"hexagonal": 6, "square": 4}
# area of the unit cell over pitch squared
_CELL = {"hexagonal": np.sqrt(3) / 2, "square": 1.0}
# circumradius of a spot's Voronoi cell over pitch
_REACH = {"hexagonal": 1 / np.sqrt(3), "square": 1 / np.sqrt(2)}
_STEPS = {
    "hexagonal": np.array([[1, 0], [0, 1], [-1, 1], [-1, 0], [0, -1], [1, -1]]),
    "square": np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]),
}


class NotALattice(ValueError):
    """The places do not lie on a hexagonal or square lattice."""


@dataclass(frozen=True)
class Lattice:
    """The regular arrangement that a section's spots were printed in."""

    kind: Literal["hexagonal", "square"]
    pitch_px: float
    """Centre-to-centre distance of neighbouring spots."""
    basis: Floats
    """(2, 2), rows are the steps to a neighbour along the row and to the next row, (x, y)."""
    origin: Floats
    """(2,), place of index (0, 0)."""
    index: Ints
    """(n_spots, 2), column and row of each spot."""
    residual: float
    """Root mean square distance of the spots from their lattice places, in pitches."""


@dataclass(frozen=True)
class Technology:
    """What fixes the physical scale of a section."""

    name: str
    pitch_um: float
    spot_um: float
    """Diameter of a round spot, edge of a square bin."""


VISIUM = Technology("visium", 100.0, 55.0)
LEGACY_ST = Technology("st", 200.0, 100.0)


@dataclass(frozen=True)
class Places:
    """Places to predict at."""

    xy_px: Floats
    """(n, 2)"""
    array_row: Ints
    array_col: Ints
    size_px: float
    """Distance of neighbouring places: diameter to draw a circle with, or edge of a square bin."""
    spot: Ints
    """(n,) row of the measured spot that stands at this place, -1 where there is none."""

    def __len__(self) -> int:
        return len(self.xy_px)

    def keep(self, rows: NDArray[np.bool_] | Ints) -> Places:
        """Return some of the places: where a mask is true, or by number."""
        return Places(self.xy_px[rows], self.array_row[rows], self.array_col[rows], self.size_px, self.spot[rows])


def estimate_lattice(xy_px: Floats) -> Lattice:
    """Find the lattice that places lie on: hexagonal or square, any rotation and scale, places missing.

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
        msg = "spots share places: the median distance to the nearest neighbour is 0."
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
            f"and puts {doubled:.1%} of them on another spot's place."
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
            f"the best {kind} lattice (pitch {pitch:.1f} px) has spots on {occupied:.1%} of its places only, or on every second "
            "or third: are these several sections over one another, or a few spots of an array?"
        )
        raise NotALattice(msg)
    return Lattice(kind, pitch, basis, origin, index, residual)


def occupied_share(xy_px: Floats, *, cell_px2: float) -> float:
    """Share of the places of a lattice, with one in every ``cell_px2``, inside the spots' hull that hold a spot."""
    if len(xy_px) < 3:
        return 1.0
    # joggled input: spots in one row have a hull, too
    hull = ConvexHull(xy_px, qhull_options="QJ")
    # places on the hull itself belong to it by half a cell
    places = hull.volume / cell_px2 + hull.area / (2 * np.sqrt(cell_px2)) + 1
    return float(min(len(xy_px) / places, 1.0))


def _neighbours(index: Ints, kind: str) -> Floats:
    """Share of the spots that have a neighbour along each axis of the lattice, in one sense of it."""
    width = index[:, 1].max() + 3
    code = (index[:, 0] + 1) * width + index[:, 1] + 1
    axes = _STEPS[kind][: len(_STEPS[kind]) // 2]
    return np.array([np.isin(code + step[0] * width + step[1], code).mean() for step in axes])


def _empty_class(index: Ints) -> bool:
    """Whether every second or third place holds next to none of the spots, which chance does not do."""
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
        msg = f"the spots lie {residual:.2f} pitches off the places that rows and columns of the array give."
        raise NotALattice(msg)
    return Lattice(kind, pitch, basis, origin, index, residual)


def _residual(xy_px: Floats, origin: Floats, basis: Floats, index: Ints, pitch_px: float) -> float:
    """Root mean square distance of spots from their lattice places, in pitches."""
    return float(np.sqrt(((xy_px - origin - index @ basis) ** 2).sum(1).mean()) / pitch_px)


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


def nearest_spots(
    xy: Floats, spots_xy: Floats, *, k: int, exclude: Ints | None = None
) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Find the ``k`` nearest spots of each place, leaving out the spot ``exclude`` names for it.

    Returns
    -------
    index
        (n, k) rows of ``spots_xy``, nearest first; 0 where there are fewer than ``k``.
    distance
        (n, k) in the unit of the positions; 0 where there is none.
    present
        (n, k) whether there is such a spot.
    """
    n_near = min(k + (exclude is not None), len(spots_xy))
    if n_near == 0:
        shape = (len(xy), k)
        return np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, bool)
    dist, index = cKDTree(spots_xy).query(xy, k=list(range(1, n_near + 1)))
    present = np.ones(index.shape, dtype=bool)
    if exclude is not None:
        present = index != np.asarray(exclude)[:, None]
        order = np.argsort(~present, axis=1, kind="stable")  # the excluded one goes last
        dist, index, present = (np.take_along_axis(a, order, 1) for a in (dist, index, present))
    dist, index, present = dist[:, :k], index[:, :k], present[:, :k]
    if index.shape[1] < k:
        pad = ((0, 0), (0, k - index.shape[1]))
        dist, index, present = np.pad(dist, pad), np.pad(index, pad), np.pad(present, pad)
    return np.where(present, index, 0).astype(np.int64), np.where(present, dist, 0.0), present


def in_mask(xy_px: Floats, mask: NDArray[np.bool_], *, px_per_cell: tuple[float, float]) -> NDArray[np.bool_]:
    """Look places up in a coarse mask whose cells are ``px_per_cell`` (x, y) image pixels wide; outside is false."""
    col = np.floor(xy_px[:, 0] / px_per_cell[0]).astype(np.int64)
    row = np.floor(xy_px[:, 1] / px_per_cell[1]).astype(np.int64)
    inside = (row >= 0) & (col >= 0) & (row < mask.shape[0]) & (col < mask.shape[1])
    found = np.zeros(len(xy_px), dtype=bool)
    found[inside] = mask[row[inside], col[inside]]
    return found


def similarity_scale(matrix: Floats, *, tolerance: float = 0.01) -> float | None:
    """Scale of a 2 x 2 matrix that only scales, turns and mirrors; ``None`` if it stretches or shears."""
    singular = np.linalg.svd(np.asarray(matrix, float)[:2, :2], compute_uv=False)
    if singular[1] <= 0 or singular[0] / singular[1] > 1 + tolerance:
        return None
    return float(np.sqrt(singular[0] * singular[1]))


def optical_density(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density of each colour, (h, w, 3); 0 where the background was cut out, since no stain is that black."""
    density = -np.log10((thumbnail.astype(np.float32) + 1) / 256)
    density[thumbnail.max(axis=-1) < _CUT_OUT] = 0
    return density


def tissue_mask(
    thumbnail: NDArray[np.uint8], spots_cell: Floats, *, blur_cells: float
) -> tuple[NDArray[np.bool_], float]:
    """Find tissue on a thumbnail by its optical density, told by the spots what tissue looks like here.

    The threshold is Otsu's (1979), lowered until 95 % of the measured spots are tissue: pale sections, fat and
    images cropped to the tissue, on which thresholds from the image alone turn over, keep theirs. Without spots it is
    Otsu's.

    Parameters
    ----------
    thumbnail
        (h, w, 3) RGB.
    spots_cell
        (n, 2) measured spots (x, y) in pixels of the thumbnail.
    blur_cells
        Sigma of the smoothing, in pixels of the thumbnail.

    Returns
    -------
    mask
        (h, w)
    share
        Share of the spots that Otsu's threshold alone would have kept; NaN without spots.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.filters import threshold_otsu

    density = gaussian_filter(optical_density(thumbnail).mean(axis=-1), blur_cells)
    col = np.clip(np.floor(spots_cell[:, 0]).astype(int), 0, density.shape[1] - 1)
    row = np.clip(np.floor(spots_cell[:, 1]).astype(int), 0, density.shape[0] - 1)
    at_spots = density[row, col]
    otsu = float(threshold_otsu(density)) if np.ptp(density) > 0 else -1.0
    if len(at_spots) == 0:
        return density >= otsu, float("nan")
    threshold = min(otsu, float(np.quantile(at_spots, 0.05)))
    return density >= threshold, float((at_spots >= otsu).mean())
