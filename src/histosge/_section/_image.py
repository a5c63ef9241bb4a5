"""Images of ``SpatialData`` → lazy RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._image import LazyImage
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spatialdata import SpatialData

_THUMBNAILS = ("_hires_image", "_lowres_image")
_RGB_NAMES = {"r": 0, "g": 1, "b": 2, "a": 3, "red": 0, "green": 1, "blue": 2, "alpha": 3}

_SAME_GREY = 2.0
"""Grey levels, of 255, that a level of a pyramid may differ from the mean of the finest."""


def find_image(sdata: SpatialData, key: str | None) -> str:
    names = list(sdata.images)
    if key is not None:
        if key not in names:
            msg = f"image_key={key!r} is not among the images of this SpatialData: {names}."
            raise KeyError(msg)
        return key
    if not names:
        msg = (
            "this SpatialData has no image. Read the section with its H&E image, "
            "for example `sge.io.read(path, image=...)`."
        )
        raise ValueError(msg)
    full = [n for n in names if not n.endswith(_THUMBNAILS)] or names  # Space Ranger's thumbnails give way
    if len(full) > 1:
        msg = f"this SpatialData has {len(full)} images; say which one is the H&E image: image_key= one of {full}."
        raise ValueError(msg)
    return full[0]


def lazy_image(element: Any, key: str) -> LazyImage:
    """Take an image with all its scales, lazily, as RGB."""
    from spatialdata import get_pyramid_levels
    from xarray import DataTree

    arrays = list(get_pyramid_levels(element)) if isinstance(element, DataTree) else [element]
    array, *rest = (level.transpose("c", "y", "x") for level in arrays)
    names = [str(c).lower() for c in array.coords["c"].values] if "c" in array.coords else []
    if array.sizes["c"] not in (3, 4):
        msg = (
            f"image {key!r} has {array.sizes['c']} channels ({names}); an H&E image has 3 (RGB) or 4 (RGBA). "
            "Pass image_key= of a colour image."
        )
        raise ValueError(msg)
    order = np.arange(array.sizes["c"])
    if names and not all(n.isdigit() for n in names):
        if sorted(_RGB_NAMES.get(n, -1) for n in names) != list(range(len(names))):
            msg = (
                f"image {key!r} has channels {names}, which are not red, green and blue: it does not look like H&E. "
                "Pass image_key= of a colour image, or rename its channels to r, g, b."
            )
            raise ValueError(msg)
        order = np.argsort([_RGB_NAMES[n] for n in names])
    in_order = (order == np.arange(len(order))).all()
    data = [level.data if in_order else level.data[order] for level in (array, *rest)]
    white = _white(data[0], key)
    return LazyImage(data[0], white, tuple(_coarser(data, white)))


def _white(data: Any, key: str) -> float:
    """The value of a white pixel."""
    dtype = np.dtype(data.dtype)
    if dtype == np.uint8:
        return 255.0
    if dtype != np.uint16 and dtype.kind != "f":
        msg = (
            f"image {key!r} has dtype {dtype}; pass an RGB image of dtype uint8, uint16 or float (0 to 1, or 0 to 255)."
        )
        raise ValueError(msg)
    step = max(1, max(data.shape[1:]) // 1000)
    sample = np.asarray(data[:, ::step, ::step])
    low, high = float(np.nanmin(sample)), float(np.nanmax(sample))
    if dtype.kind == "f" and (low < 0 or high > 255 or not np.isfinite(sample).all()):
        msg = f"image {key!r} has values from {low:.4g} to {high:.4g}; a float image goes from 0 to 1 or from 0 to 255: rescale it."
        raise ValueError(msg)
    white = 1.0 if dtype.kind == "f" and high <= 1 else 255.0 if high <= 255 else 65535.0
    logger.info("converting image %r from %s (white = %g) to uint8", key, dtype, white)
    return white


def _coarser(data: list[Any], white: float) -> Iterator[tuple[Any, float]]:
    """Levels of a pyramid that show what the finest shows: shrunken by a whole factor, by means and not by leaving out."""
    finest = LazyImage(data[0], white)
    height, width = data[0].shape[1:]
    for level in data[1:]:
        factor = round(height / level.shape[1])
        # a level ends with the last whole pixel, or with one more
        fits = all(n // factor <= m <= -(-n // factor) for n, m in zip((height, width), level.shape[1:], strict=True))
        if factor > 1 and fits and level.dtype == data[0].dtype and _agree(finest, LazyImage(level, white), factor):
            yield level, float(factor)


def _agree(fine: LazyImage, coarse: LazyImage, factor: int) -> bool:
    """Whether a level is the mean of the finest, in the middle of the image: levels of any origin come along."""
    side = max(1, min(128, 1024 // factor, coarse.height_px, coarse.width_px))
    x, y = (coarse.width_px - side) // 2, (coarse.height_px - side) // 2
    there = coarse.read(x, y, x + side, y + side).astype(float)
    whole = fine.read(x * factor, y * factor, (x + side) * factor, (y + side) * factor).astype(float)
    mean = whole.reshape(3, side, factor, side, factor).mean((2, 4))
    return bool(np.abs(there - mean).mean() <= _SAME_GREY)
