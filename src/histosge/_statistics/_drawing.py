"""Draw some of many spots, evenly over sections and over the tissue. No function here gets measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from histosge._geometry import upright

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_BLOCKS = 16
"""Blocks that are drawn of a section, at least."""
_BLOCK_SPOTS = (19, 400)
"""Spots in a block, roughly: at least a spot and the context of the default head, so that neighbours stay together."""


def shares_of(sizes: Sequence[int], *, most: int) -> Ints:
    """Numbers of spots to draw of each section: all of a small section, equal numbers of the others."""
    left = np.asarray(sizes, np.int64)
    if left.sum() <= most:
        return left
    found = np.zeros_like(left)
    remaining = most
    for i, section in enumerate(np.argsort(left, kind="stable")):  # smallest first
        found[section] = min(left[section], remaining // (len(left) - i))
        remaining -= found[section]
    return found


def draw_evenly(xy_um: Floats, n: int, *, pitch_um: float, rng: np.random.Generator) -> Ints:
    """Draw ``n`` spots as blocks of neighbours: the middles of the squares of a grid over the section.

    Neighbours stay together, so that distances, folds and scores are those of the whole section. Scattered spots are
    about as good to learn from (docs/benchmarks.md).

    Parameters
    ----------
    xy_um
        (n_spots, 2) positions, of one section.
    n
        How many to draw; with ``n_spots`` or more, all are.
    pitch_um
        Distance of neighbouring spots.
    rng
        Shifts the grid.

    Returns
    -------
    (n,) sorted rows.
    """
    if n >= len(xy_um):
        return np.arange(len(xy_um))
    in_block = np.clip(n / _BLOCKS, *_BLOCK_SPOTS)
    edge_um = pitch_um * np.sqrt(in_block * len(xy_um) / n)
    place = upright(np.asarray(xy_um, np.float64)) / edge_um + rng.random(2)
    # rounded: a rounding error decides between no two spots at the same distance, the first of them is drawn
    from_middle = np.abs(place % 1 - 0.5).max(axis=1).round(9)
    return np.sort(np.argsort(from_middle, kind="stable")[:n])
