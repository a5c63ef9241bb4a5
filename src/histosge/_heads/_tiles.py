"""Cut sections into tiles with about equally many spots, blended around their borders. Small sections share a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Tiles:
    """The plane of each section, cut into tiles with about equally many spots.

    A tile is a part of a section, or consists of whole sections.
    """

    xy: NDArray[np.float64]
    """(n, 2) spots"""
    section: NDArray[np.int64]
    """(n,)"""
    roots: dict[int, int]
    """First cut of each section, or ~ its tile"""
    cuts: list[tuple[int, float, int, int]]
    """Axis, position, and the two sides, up to there and beyond: a cut, or ~ a tile"""
    spots: list[NDArray[np.intp]]
    """Rows of the spots in each tile"""
    n_near: int
    """Spots that a tile conditions on exactly"""
    blended: float = 2.0
    """Pitches on either side of a cut where the two sides are blended: without it maps would have seams"""

    @classmethod
    def of(cls, xy: NDArray[np.float64], section: NDArray[np.int64], *, n_tile: int, n_near: int) -> Tiles:
        """Cut the longer side, again and again, at a share of the spots that makes all tiles about equal."""
        cuts: list[tuple[int, float, int, int]] = []
        tiles: list[NDArray[np.intp]] = []

        def cut(rows: NDArray[np.intp]) -> int:
            n_tiles = max(1, round(len(rows) / n_tile))
            axis = int(np.argmax(np.ptp(xy[rows], axis=0)))
            values = np.sort(xy[rows, axis])
            steps = np.flatnonzero(np.diff(values) > 0) + 1  # no cut between spots at the same position
            if n_tiles == 1 or len(steps) == 0:
                tiles.append(rows)
                return ~(len(tiles) - 1)
            n_below = len(rows) * (n_tiles // 2) / n_tiles
            step = steps[np.argmin(np.abs(steps - n_below))]
            at = float(values[step - 1] + values[step]) / 2
            below = xy[rows, axis] <= at
            here = len(cuts)
            cuts.append((axis, at, 0, 0))
            cuts[here] = (axis, at, cut(rows[below]), cut(rows[~below]))
            return here

        roots: dict[int, int] = {}
        small: list[int] = []  # sections that are collected for one tile
        numbers, sizes = np.unique(section, return_counts=True)
        collected = 0
        for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            if size > 1.5 * n_tile:
                roots[number] = cut(np.flatnonzero(section == number))
                continue
            if small and collected + size > 1.5 * n_tile:
                _close(small, roots, tiles, section)
                collected = 0
            small.append(number)
            collected += size
        if small:
            _close(small, roots, tiles, section)
        return cls(xy, section, roots, cuts, tiles, n_near)

    def shares(
        self, xy: NDArray[np.float64], section: NDArray[np.int64]
    ) -> list[tuple[int, NDArray[np.intp], NDArray[np.float64]]]:
        """Return tiles, the rows of the targets (m, 2) in each, and its share there: from 1 to 0 around a cut.

        Targets of a section without spots belong to the first tile: they are near no spot.
        """
        found: list[tuple[int, NDArray[np.intp], NDArray[np.float64]]] = []
        waiting = []
        for number in np.unique(section):
            rows = np.flatnonzero(section == number)
            waiting.append((self.roots.get(int(number), ~0), rows, np.ones(len(rows))))
        while waiting:
            here, rows, share = waiting.pop()
            if len(rows) == 0:
                continue
            if here < 0:
                found.append((~here, rows, share))
                continue
            axis, at, below, beyond = self.cuts[here]
            upper = np.clip((xy[rows, axis] - at) / (2 * self.blended) + 0.5, 0, 1)
            for there, part in ((beyond, upper), (below, 1 - upper)):
                kept = part > 0
                waiting.append((there, rows[kept], share[kept] * part[kept]))
        return found

    def near(self, tile: int) -> NDArray[np.intp]:
        """Return sorted rows: the spots of a tile, then those of its sections nearest to their bounding box.

        Where its sections have fewer than ``n_near``, spots of other sections are added, for what the image tells.
        """
        inside = self.spots[tile]
        distance = np.full(len(self.xy), np.inf)
        for number in np.unique(self.section[inside]):
            rows, mine = np.flatnonzero(self.section == number), inside[self.section[inside] == number]
            xy, low, high = self.xy[rows], self.xy[mine].min(0), self.xy[mine].max(0)
            beyond = np.maximum(np.maximum(low - xy, xy - high), 0)
            distance[rows] = np.hypot(*beyond.T).round(3)
        distance[inside] = -1
        n = min(max(self.n_near, len(inside)), len(self.xy))
        others = np.flatnonzero(np.isinf(distance))
        n_more = n - (len(self.xy) - len(others))
        if n_more > 0:  # evenly from all other sections
            distance[others[np.linspace(0, len(others) - 1, n_more).astype(np.intp)]] = np.finfo(float).max
        limit = np.partition(distance, n - 1)[n - 1]
        # of the spots that are equally far away, as many are on a lattice, the first: the same ones on every device
        closer, tied = np.flatnonzero(distance < limit), np.flatnonzero(distance == limit)
        return np.sort(np.concatenate([closer, tied[: n - len(closer)]]))


def _close(small: list[int], roots: dict[int, int], tiles: list[NDArray[np.intp]], section: NDArray[np.int64]) -> None:
    """Make one tile of the sections collected in ``small``, and empty it."""
    tiles.append(np.flatnonzero(np.isin(section, small)))
    roots.update(dict.fromkeys(small, ~(len(tiles) - 1)))
    small.clear()
