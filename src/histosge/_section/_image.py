"""Images of ``SpatialData`` → lazy RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._image import (
    LazyImage,
    background,
    bits,
    computed,
    is_grey,
    is_opacity,
    largest,
    order_by_name,
    sample,
    seems_fluorescent,
    seems_ycbcr,
    spread,
    white_value,
)
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spatialdata import SpatialData

_THUMBNAILS = ("_hires_image", "_lowres_image")

_SAME_GREY = 2.0
"""Largest difference, in grey levels of 255, of a pyramid level from the mean of the finest."""


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


def thumbnail_of(sdata: SpatialData, key: str, system: str) -> Any:
    """Space Ranger's small copy of an image, (h, w, 3), if it is there and covers the image; else ``None``."""
    from spatialdata import get_pyramid_levels
    from spatialdata.transformations import get_transformation
    from xarray import DataTree

    names = [n for n in sdata.images if n.endswith(_THUMBNAILS) and n != key]
    for name in sorted(names, key=lambda n: not n.endswith(_THUMBNAILS[0])):
        small, image = (
            next(iter(get_pyramid_levels(e))) if isinstance(e, DataTree) else e
            for e in (sdata.images[name], sdata.images[key])
        )
        if any(system not in get_transformation(sdata.images[n], get_all=True) for n in (name, key)):
            continue
        to_system = [
            get_transformation(sdata.images[n], to_coordinate_system=system).to_affine_matrix(("x", "y"), ("x", "y"))
            for n in (name, key)
        ]
        matrix = np.linalg.solve(to_system[1], to_system[0])
        wanted = [image.sizes["x"] / small.sizes["x"], image.sizes["y"] / small.sizes["y"]]
        upright = np.allclose(matrix[:2, :2], np.diag(wanted), rtol=0.02, atol=0.02 * max(wanted))
        at_corner = np.abs(matrix[:2, 2]).max() <= 0.02 * max(image.sizes["x"], image.sizes["y"])
        if upright and at_corner and small.sizes["c"] in (3, 4):
            return computed(small.transpose("y", "x", "c").data)
    return None


def lazy_image(element: Any, key: str) -> LazyImage:
    """Open an image with all its scales, lazily, as RGB."""
    from spatialdata import get_pyramid_levels
    from xarray import DataTree

    arrays = list(get_pyramid_levels(element)) if isinstance(element, DataTree) else [element]
    array, *rest = (level.transpose("c", "y", "x") for level in arrays)
    names = [str(c) for c in array.coords["c"].values] if "c" in array.coords else []
    n_channels = array.sizes["c"]
    if n_channels not in (3, 4):
        msg = (
            f"image {key!r} has {n_channels} channels ({names}); an H&E image has 3 (RGB) or 4 (RGBA). "
            "Pass image_key= of a colour image."
        )
        raise ValueError(msg)
    try:
        order = order_by_name(names)
    except ValueError:
        msg = (
            f"image {key!r} has channels {[name.lower() for name in names]}, which are not red, green and blue: it "
            "does not look like H&E. Pass image_key= of a colour image, or rename its channels to r, g, b."
        )
        raise ValueError(msg) from None
    in_order = order is None or order == list(range(n_channels))
    data = [level.data if in_order else level.data[order] for level in (array, *rest)]
    white = _white(data[0], key)
    _check_looks(data[0], white, key, named=order is not None)
    return LazyImage(data[0], white, tuple(_coarser(data, white)))


def _check_looks(data: Any, white: float, key: str, *, named: bool) -> None:
    """Warn of an image that does not look like stained tissue; refuse it if its channels have no names of colours."""
    seen = sample(data, white)
    if len(seen) == 4 and not named and not is_opacity(seen[3], seen[3].max()):
        msg = (
            f"image {key!r} has 4 channels without names, and the fourth is no opacity: it does not look like H&E. "
            "Pass image_key= of a colour image, or rename its channels to r, g, b, a."
        )
        raise ValueError(msg)
    rgb = LazyImage(seen[..., None], white).read(0, 0, 1, seen.shape[1])[..., 0]
    shade = background(rgb)
    if seems_ycbcr(shade):
        msg = (
            f"image {key!r} has a background of {shade}: it is YCbCr that was read as if it were RGB. Read its file "
            "with `sge.io.read`, or convert it to RGB."
        )
        raise ValueError(msg)
    if not seems_fluorescent(rgb):
        if is_grey(rgb):
            logger.warning(
                "image %r has no colour: of H&E without colour, predictions mean little. Pass a colour image.", key
            )
        return
    if not named:
        msg = (
            f"image {key!r} is dark where H&E is bright, as of fluorescence, and nothing says that its channels are "
            "colours. Pass image_key= of a brightfield image; if it is H&E, rename its channels to r, g, b."
        )
        raise ValueError(msg)
    logger.warning(
        "image %r is dark where H&E is bright: is it fluorescence? Encoders know H&E only, and of anything else "
        "predictions mean "
        "nothing. Pass image_key= of a brightfield image.", key,
    )  # fmt: skip


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
    values = spread(data, (0, 1, 2))
    white = white_value(f"image {key!r}", dtype, values)
    taken = f"{bits(white)} bit" if dtype.kind == "u" else f"0 to {white:g}"
    logger.info(
        "image %r: %s taken as %s (white = %g), by its largest values, %.4g", key, dtype, taken, white, largest(values)
    )
    return white


def _coarser(data: list[Any], white: float) -> Iterator[tuple[Any, float]]:
    """Levels of a pyramid that are means of the finest, shrunken by a whole factor."""
    finest = LazyImage(data[0], white)
    height, width = data[0].shape[1:]
    for level in data[1:]:
        factor = round(height / level.shape[1])
        # a level ends with the last whole pixel, or with one more
        fits = all(n // factor <= m <= -(-n // factor) for n, m in zip((height, width), level.shape[1:], strict=True))
        if factor > 1 and fits and level.dtype == data[0].dtype and _agree(finest, LazyImage(level, white), factor):
            yield level, float(factor)


def _agree(fine: LazyImage, coarse: LazyImage, factor: int) -> bool:
    """Whether a level is the mean of the finest, in the middle of the image: files hold levels of any origin."""
    side = max(1, min(128, 1024 // factor, coarse.height_px, coarse.width_px))
    x, y = (coarse.width_px - side) // 2, (coarse.height_px - side) // 2
    there = coarse.read(x, y, x + side, y + side).astype(float)
    whole = fine.read(x * factor, y * factor, (x + side) * factor, (y + side) * factor).astype(float)
    mean = whole.reshape(3, side, factor, side, factor).mean((2, 4))
    return bool(np.abs(there - mean).mean() <= _SAME_GREY)
