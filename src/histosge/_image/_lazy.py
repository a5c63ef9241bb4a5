"""A lazy RGB image, read by regions; torch and SpatialData are not used here.

An image is anything that can be sliced as ``(channel, y, x)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1: ``[y0, y1) x [x0, x1)``"""

WHITE = 255
_SAME_SCALE = 0.005
"""Relative difference of scales that counts as none: no mpp is known more exactly."""


def snap_scale(scale: float) -> float:
    """Return 1 for a scale within half a percent of 1, so that the image is not resampled; else the scale."""
    return 1.0 if abs(scale - 1) < _SAME_SCALE else scale


def computed(part: Any) -> NDArray[Any]:
    """Read a part of an image in this process: a ``Client`` of dask would send it to its workers, and may wait for itself."""
    return np.asarray(part.compute(scheduler="threads") if hasattr(part, "compute") else part)


@dataclass(frozen=True)
class LazyImage:
    """An RGB image on disk or in memory, read by regions as uint8."""

    data: Any
    """Sliceable, shape (3 or 4, height, width): a dask, zarr or numpy array."""
    white: float = 255.0
    """The value of a white pixel: 255 for uint8, 65535 for uint16, 1 for most floats."""
    coarser: tuple[tuple[Any, float], ...] = ()
    """Coarser levels of a pyramid: data, and the width of their pixels in pixels of the finest level"""

    @property
    def height_px(self) -> int:
        return int(self.data.shape[1])

    @property
    def width_px(self) -> int:
        return int(self.data.shape[2])

    def level(self, scale: float) -> tuple[LazyImage, float]:
        """Choose the coarsest level with pixels at most ``scale`` wide: the level, and the width of its pixels."""
        fitting = [(factor, data) for data, factor in self.coarser if factor <= scale * (1 + _SAME_SCALE)]
        if not fitting:
            return replace(self, coarser=()), 1.0
        factor, data = max(fitting, key=lambda level: level[0])
        return LazyImage(data, self.white), factor

    def read(self, x0: int, y0: int, x1: int, y1: int) -> UInt8:
        """Read ``[y0, y1) x [x0, x1)`` as (3, height, width) uint8; what lies outside the image is white."""
        left, top = max(x0, 0), max(y0, 0)
        right, bottom = min(x1, self.width_px), min(y1, self.height_px)
        if right <= left or bottom <= top:
            return np.full((3, y1 - y0, x1 - x0), WHITE, np.uint8)
        inside = self._to_rgb8(computed(self.data[:, top:bottom, left:right]))
        if inside.shape[1:] == (y1 - y0, x1 - x0):
            return inside
        out = np.full((3, y1 - y0, x1 - x0), WHITE, np.uint8)
        out[:, top - y0 : bottom - y0, left - x0 : right - x0] = inside
        return out

    def _to_rgb8(self, part: NDArray[Any]) -> UInt8:
        if part.dtype == np.uint8 and self.white == 255 and len(part) == 3:
            return part
        value = part.astype(np.float32) * np.float32(255.0 / self.white)  # (3 or 4, h, w)
        if len(value) == 4:  # behind transparent pixels is the white of the slide
            alpha = np.minimum(value[3] / 255.0, 1)  # opacity may have 16 bits where colours have fewer
            value = value[:3] * alpha + WHITE * (1 - alpha)
        return np.clip(np.rint(value), 0, 255).astype(np.uint8)
