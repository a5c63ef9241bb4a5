"""Lattice, pitch, physical scale, places to predict: all of it numpy and scipy, in image pixels and µm.

Positions are (x, y) in pixels of the image's finest scale, where pixel ``i`` covers ``[i, i + 1)``.
Vectors of a lattice are rows: a place is ``origin + index @ basis``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]

Ints = NDArray[np.int64]


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
