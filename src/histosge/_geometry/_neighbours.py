"""Nearest measured spots, searched inside a section."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]

Ints = NDArray[np.int64]


def nearest_spots(
    xy: Floats,
    spots_xy: Floats,
    *,
    k: int,
    exclude: Ints | None = None,
    groups: Ints | None = None,
    spot_groups: Ints | None = None,
) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Find the ``k`` nearest spots of each location.

    Parameters
    ----------
    xy
        (n, 2) locations.
    spots_xy
        (n_spots, 2)
    k
        How many to find.
    exclude
        (n,) row of a spot that each location leaves out; -1 for none.
    groups, spot_groups
        (n,) and (n_spots,) numbers of the groups of locations and of spots: sections. Only spots of the location's
        group are found. Without them there is one group.

    Returns
    -------
    index
        (n, k) rows of ``spots_xy``, nearest first; 0 where there are fewer than ``k``.
    distance
        (n, k) in the unit of the positions; 0 where there is none.
    present
        (n, k) whether there is such a spot.
    """
    if groups is not None and spot_groups is not None and not _one_group(groups, spot_groups):
        return _nearest_in_groups(xy, spots_xy, k=k, exclude=exclude, groups=groups, spot_groups=spot_groups)
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


def _one_group(groups: Ints, spot_groups: Ints) -> bool:
    if len(groups) == 0 or len(spot_groups) == 0:
        return True
    return bool((groups == groups[0]).all() and (spot_groups == groups[0]).all())


def _nearest_in_groups(
    xy: Floats, spots_xy: Floats, *, k: int, exclude: Ints | None, groups: Ints, spot_groups: Ints
) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    shape = (len(xy), k)
    index, distance, present = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, bool)
    for group in np.unique(groups):
        rows, spots = np.flatnonzero(groups == group), np.flatnonzero(spot_groups == group)
        within = None
        if exclude is not None:
            number = np.full(len(spots_xy) + 1, -1)  # the last entry stands for "none"
            number[spots] = np.arange(len(spots))
            within = number[np.asarray(exclude)[rows]]
        near, distance[rows], present[rows] = nearest_spots(xy[rows], spots_xy[spots], k=k, exclude=within)
        index[rows] = np.where(present[rows], spots[near] if len(spots) else 0, 0)
    return index, distance, present


def upright(xy: Floats) -> Floats:
    """Turn positions (n, 2) by quarters and mirror them, so that sections that differ in this only become the same.

    The wider side lies along x, and the tails of both axes point up. The centre is the origin. A section without such
    sides or tails stays as it is.
    """
    centred = xy - xy.mean(axis=0)
    wide = centred.var(axis=0)
    if wide[1] > wide[0] * (1 + 1e-6):
        centred = centred[:, ::-1]
    third, size = (centred**3).sum(axis=0), (np.abs(centred) ** 3).sum(axis=0)
    return centred * np.where(third < -1e-6 * size, -1, 1)
