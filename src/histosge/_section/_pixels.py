"""Files of images → lazy RGB arrays (c, y, x), and images of a ``SpatialData``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import dask.array as da
    from xarray import DataArray, DataTree

_TIFFS = (".tif", ".tiff", ".btf", ".svs", ".ndpi", ".qptiff")
_PICTURES = (".jpg", ".jpeg", ".png")
_CHUNK_PX = 1024
_SMALLEST_CHUNK_PX = 256
_SMALLEST_LEVEL_PX = 1000
_LARGEST_PIECE = 2**28
"""Bytes. TIFFs compressed in larger pieces are read as a whole, once."""


def is_image(path: Path) -> bool:
    return path.suffix.lower() in (*_TIFFS, *_PICTURES) and path.is_file() and not path.name.startswith(".")


class _ImageError(ValueError):
    """Its message names the image already."""


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file it is that a library cannot read, whatever the library raises."""
    try:
        yield
    except (_ImageError, MemoryError):
        raise
    except Exception as err:
        if isinstance(err, OSError) and err.errno is not None:  # of the system, which names the file
            raise
        raise _unreadable(path, str(err)) from err


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    with _named(path):
        if path.suffix.lower() in _TIFFS:
            import tifffile

            with tifffile.TiffFile(path) as file:
                series = file.series[0]
                return tuple(series.shape[series.axes.index(axis)] for axis in "XY")  # type: ignore[return-value]
        with _picture(path) as picture:
            return picture.size


def open_pixels(path: Path) -> da.Array:
    """Open an RGB image, (c, y, x): a TIFF is read in pieces when they are asked for, others at once."""
    with _named(path):
        return _open_tiff(path) if path.suffix.lower() in _TIFFS else _open_picture(path)


def parse_image(path: Path, name: str) -> DataArray | DataTree:
    """Read an image in pieces, with a pyramid of means that is computed when it is asked for."""
    import dask.array as da
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity

    pixels = open_pixels(path)
    n_halved = 0
    while max(pixels.shape[1:]) >> n_halved > _SMALLEST_LEVEL_PX:
        n_halved += 1
    image = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b", "a"][: len(pixels)],
        scale_factors=[2] * n_halved or None,
        chunks=pixels.chunksize,
        transformations={name: Identity()},
    )
    # levels of spatialdata's are resized chunk by chunk, and shifted where chunks have odd sizes
    size, dtype = pixels.chunksize, pixels.dtype
    for i in range(1, n_halved + 1):
        size = (-1, *(max(edge // 2, _SMALLEST_CHUNK_PX) for edge in size[1:]))
        means = da.coarsen(np.mean, pixels, {1: 2, 2: 2}, trim_excess=True)
        pixels = (means if dtype.kind == "f" else means.round()).astype(dtype).rechunk(size)
        image[f"scale{i}"]["image"].data = pixels
    return image


def _open_picture(path: Path) -> da.Array:
    import dask.array as da

    with _picture(path) as picture:
        if picture.mode == "P":
            picture = picture.convert("RGB")
        if picture.mode not in ("RGB", "RGBA"):
            raise _not_rgb(path, f"is of mode {picture.mode!r}")
        whole = np.empty((len(picture.mode), picture.height, picture.width), np.uint8)
        for y in range(0, picture.height, _CHUNK_PX):  # strip by strip: a second copy of it all would not fit
            bottom = min(y + _CHUNK_PX, picture.height)
            whole[:, y:bottom] = np.moveaxis(np.asarray(picture.crop((0, y, picture.width, bottom))), -1, 0)
    return da.from_array(whole, chunks=(-1, _CHUNK_PX, _CHUNK_PX), name=False)


@contextlib.contextmanager
def _picture(path: Path) -> Iterator[Any]:
    """Open with pillow, of whatever size: slides are what its limit guards against."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            yield picture
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@dataclass(frozen=True)
class _Tiff:
    """The first image of a TIFF as an array (c, y, x), opened for each piece: it can be pickled and leaves no file open."""

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    order: tuple[int, int, int]
    """Which axes of the file are c, y and x"""
    mapped: bool
    """Whether pixels lie in the file as they do in memory"""
    ndim = 3

    def __getitem__(self, key: tuple[slice, slice, slice]) -> Any:
        import tifffile
        import zarr

        there: Any = tuple(key[self.order.index(axis)] for axis in range(3))
        if self.mapped:
            return np.array(tifffile.memmap(self.path, mode="r")[there].transpose(self.order))
        with tifffile.TiffFile(self.path) as file:
            array: Any = zarr.open_array(file.series[0].aszarr(level=0), mode="r")
            return np.asarray(array[there]).transpose(self.order)


def _open_tiff(path: Path) -> da.Array:
    import dask.array as da
    import tifffile
    import zarr
    from tifffile import PHOTOMETRIC

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        page, axes, shape = series.keyframe, series.axes, series.shape
        channel = next((axis for axis in "SC" if axis in axes), "")
        if sorted(axes) != sorted(f"{channel}YX") or not channel or shape[axes.index(channel)] not in (3, 4):
            raise _not_rgb(path, f"has axes {axes} of {shape}")
        ends = [
            o + n
            for part in series.pages
            if part is not None
            for o, n in zip(part.dataoffsets, part.databytecounts, strict=True)
        ]
        if max(ends, default=0) > path.stat().st_size:  # else pieces would turn out to be missing at any time later
            raise _unreadable(path, f"it has {path.stat().st_size} bytes, and pixels up to byte {max(ends)}")
        order: Any = tuple(axes.index(axis) for axis in f"{channel}YX")
        n_channels = shape[order[0]]
        plain = {PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR} | ({PHOTOMETRIC.MINISBLACK} if n_channels == 3 else set())
        if page.photometric not in plain or series.dtype.name not in ("uint8", "uint16", "float32"):
            raise _not_rgb(path, f"has {n_channels} channels of {PHOTOMETRIC(page.photometric).name}, {series.dtype}")
        mapped = page.is_memmappable and series.dataoffset is not None
        stored: Any = zarr.open_array(series.aszarr(level=0), mode="r").chunks
        pieces = [stored[axis] for axis in order[1:]]  # tiles, or strips
        if not mapped and np.prod(pieces) * n_channels * series.dtype.itemsize > _LARGEST_PIECE:
            whole = series.asarray(level=0).transpose(order)
            return da.from_array(whole, chunks=(-1, _CHUNK_PX, _CHUNK_PX), name=False)
    array = _Tiff(path.resolve(), tuple(shape[axis] for axis in order), series.dtype, order, mapped)  # type: ignore[arg-type]
    high, wide = (_CHUNK_PX, _CHUNK_PX) if mapped else pieces
    wide *= max(1, _CHUNK_PX // wide)
    high *= max(1, _CHUNK_PX**2 // (high * wide))
    stat = path.stat()
    chunks = (n_channels, min(high, array.shape[1]), min(wide, array.shape[2]))
    token = f"tiff-{da.core.tokenize(str(array.path), stat.st_mtime_ns, stat.st_size)}"
    return da.from_array(array, chunks=chunks, name=token, meta=np.empty((0, 0, 0), array.dtype))


def _unreadable(path: Path, why: str) -> _ImageError:
    msg = f"{str(path)!r} cannot be read as an image ({why}). Is the file whole? Copy or export it again."
    return _ImageError(msg)


def _not_rgb(path: Path, what: str) -> _ImageError:
    msg = f"{str(path)!r} {what}; an H&E image has red, green and blue, of uint8 or uint16. Convert it to RGB."
    return _ImageError(msg)
