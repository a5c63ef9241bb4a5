"""Footprints: the areas of the image that spots and targets stand for.

Positions are (x, y) in pixels of one plane, where pixel ``i`` covers ``[i, i + 1)``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import shapely

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from histosge._geometry._lattice import Floats, Ints


_POLYGONAL = (3, 6)  # shapely.GeometryType: POLYGON, MULTIPOLYGON


@dataclass(frozen=True, eq=False)
class Footprints:
    """Areas of spots or targets in the image, also for plots; made with `discs`, `squares` or `of_polygons`."""

    xy_px: Floats
    """(n, 2) centres"""
    kind: Literal["disc", "square", "polygon"]
    size_px: Floats
    """(n,) diameter of a disc, edge of a square; of a polygon, diameter of the disc of its area."""
    polygons: NDArray[np.object_] | None = None
    """(n,) shapely polygons or multipolygons, for ``kind="polygon"``."""
    turn: float = 0.0
    """Angle between the edges of squares and the axes, in radians."""

    def __post_init__(self) -> None:
        shapes = {"xy_px": (len(self), 2), "size_px": (len(self),)}
        if self.kind == "polygon":
            shapes["polygons"] = (len(self),)
        for name, wanted in shapes.items():
            found = np.shape(getattr(self, name))
            if found != wanted:
                msg = f"{name} has shape {found}: {len(self)} footprints of kind {self.kind!r} need {wanted}."
                raise ValueError(msg)
        bad = ~np.isfinite(self.xy_px).all(axis=1) | ~np.isfinite(self.size_px)
        if bad.any():
            msg = f"{count_bad(bad)} have a centre or size that is not finite: leave them out."
            raise ValueError(msg)
        bad = self.size_px <= 0
        if bad.any():
            msg = f"{count_bad(bad)} have no area: give every footprint a size above 0, or leave it out."
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.xy_px)

    @classmethod
    def discs(cls, xy_px: ArrayLike, *, diameter_px: ArrayLike) -> Footprints:
        """Lay discs of one diameter, or of one each, around centres (n, 2)."""
        xy = np.asarray(xy_px, float)
        return cls(xy, "disc", _one_each(diameter_px, len(xy)))

    @classmethod
    def squares(cls, xy_px: ArrayLike, *, edge_px: ArrayLike, turn: float = 0.0) -> Footprints:
        """Lay squares of one edge, or of one each, around centres (n, 2), along the axes unless they are turned."""
        xy = np.asarray(xy_px, float)
        return cls(xy, "square", _one_each(edge_px, len(xy)), turn=turn)

    @classmethod
    def of_polygons(cls, polygons: Sequence[Any] | NDArray[np.object_]) -> Footprints:
        """Take shapely polygons or multipolygons as footprints around their centroids."""
        outlines = np.asarray(polygons, dtype=object).reshape(-1)  # (n,)
        other = ~np.isin(shapely.get_type_id(outlines), _POLYGONAL)
        if other.any():
            kinds = sorted({getattr(outline, "geom_type", "None") for outline in outlines[other]})
            msg = f"{count_bad(other)} are no Polygon or MultiPolygon but {', '.join(kinds)}: leave them out."
            raise ValueError(msg)
        area = shapely.area(outlines)
        crossed = ~shapely.is_valid(outlines) & np.isfinite(area) & (area > 0)
        if crossed.any():
            reason = shapely.is_valid_reason(outlines[np.flatnonzero(crossed)[0]])
            msg = (
                f"{count_bad(crossed)} are not valid polygons, so that their area is not defined (the first: "
                f"{reason}): repair them with shapely.make_valid or geopandas' GeoSeries.make_valid."
            )
            raise ValueError(msg)
        xy = shapely.get_coordinates(shapely.centroid(outlines)) if (area > 0).all() else np.zeros((len(area), 2))
        return cls(xy, "polygon", 2 * np.sqrt(area / np.pi), outlines)

    def take(self, rows: Ints | NDArray[np.bool_] | slice) -> Footprints:
        """Return the footprints of ``rows``: numbers, a mask or a slice."""
        outlines = None if self.polygons is None else self.polygons[rows]
        return replace(self, xy_px=self.xy_px[rows], size_px=self.size_px[rows], polygons=outlines)

    def as_polygons(self) -> Footprints:
        """Return squares as polygons of the same areas."""
        if self.kind != "square":
            return self
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ [[cos, sin], [-sin, cos]] / 2  # of edge 1
        rings = self.xy_px[:, None] + corners * self.size_px[:, None, None]  # (n, 4, 2)
        return Footprints(self.xy_px, "polygon", 2 * self.size_px / np.sqrt(np.pi), shapely.polygons(rings))

    def bounds(self) -> Floats:
        """Return x0, y0, x1, y1 of the smallest box around each, (n, 4)."""
        if self.polygons is not None:
            return shapely.bounds(self.polygons)
        half = self.size_px[:, None] / 2
        if self.kind == "square":
            half = half * (abs(np.cos(self.turn)) + abs(np.sin(self.turn)))
        return np.hstack([self.xy_px - half, self.xy_px + half])

    @cached_property
    def extent(self) -> Floats:
        """x0, y0, x1, y1 of the smallest box around all."""
        each = self.bounds()
        return np.concatenate([each[:, :2].min(axis=0), each[:, 2:].max(axis=0)])

    def digest(self) -> bytes:
        """Digest that differs for any other areas."""
        made = hashlib.sha256(f"{self.kind} {self.turn}".encode())
        for array in (self.xy_px, self.size_px):
            made.update(np.ascontiguousarray(array))
        for outline in () if self.polygons is None else shapely.to_wkb(self.polygons):
            made.update(outline)
        return made.digest()

    def scaled(self, factor: float) -> Footprints:
        """Multiply all positions and sizes by ``factor``, as when the image is resampled."""
        if not (np.isfinite(factor) and factor > 0):
            msg = f"factor={factor!r}: give a finite number above 0 (pixels of the new plane per pixel of this one)."
            raise ValueError(msg)
        outlines = None if self.polygons is None else shapely.transform(self.polygons, lambda xy: xy * factor)
        return replace(self, xy_px=self.xy_px * factor, size_px=self.size_px * factor, polygons=outlines)


def _one_each(size: ArrayLike, n: int) -> Floats:
    """Repeat a single size ``n`` times; leave an array as it is."""
    sizes = np.asarray(size, float)
    return np.full(n, float(sizes)) if sizes.ndim == 0 else sizes


def count_bad(bad: NDArray[np.bool_], what: str = "footprints") -> str:
    """Text for messages: how many are bad, and which are the first."""
    rows = np.flatnonzero(bad)
    named = ", ".join(map(str, rows[:5].tolist())) + (", ..." if len(rows) > 5 else "")
    return f"{len(rows)} of {len(bad)} {what} (rows {named})"
